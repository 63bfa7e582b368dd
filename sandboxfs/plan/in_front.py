"""The plan of a root alone: for a runtime that makes the spec's mounts in it by itself.

The rules are `from_spec`'s; what a runtime does after us (mounts, devices, masks, a read-only root)
isn't in it.
"""

from sandboxfs.plan import survey
from sandboxfs.plan.base import RootPlanner
from sandboxfs.plan.operations import MADE_BY_RUNTIME, Attach, Cover, Overlay, Plan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from sandboxfs.spec.model import Spec


def plan(
    spec: "Spec", destinations: "Sequence[str]", path: str, container_id: str,
    facts: "survey.Facts | None" = None,
) -> Plan:
    """Return the `Plan` of a container's root, attached at `path`.

    destinations: where the runtime will mount something, as absolute paths without dots.
    container_id: the name of ``overlay=dir=``'s directory.  facts: by default those of this
    process.  Raises SpecError for what the document asks in contradiction.
    """
    result = Plan(spec)
    result.container_id = container_id
    result.engine = spec.overrides.engine or "auto"
    result.process = None
    work = RootPlanner(result, facts or survey.facts())
    for namespace in spec.namespaces:
        if namespace.type == "user":
            result.user = work.user_namespace(namespace)
    work.by_destination = dict.fromkeys(destinations)
    work.find_above({each[:each.rindex("/")] for each in destinations})
    work.root()
    for operation in result.operations:
        if isinstance(operation, Overlay):
            operation.source = MADE_BY_RUNTIME.decode()
    if work.overrides.overlay_binds:
        result.operations += _covers(spec, result, work.facts)
    _tmp(work, destinations)
    result.operations.append(Attach(spec.root_origin, path, 0))
    return result


def _covers(spec: "Spec", result: Plan, facts: "survey.Facts") -> list[Cover]:
    """Return what keeps writes from the sources of writable binds, each source once."""
    from sandboxfs.plan.from_spec import Planner
    from sandboxfs.spec import options as option_words

    work = Planner(result, facts)
    volumes = {hint.source for hint in spec.hints
               if hint.type == "tmpfs" and hint.share != "shared"}
    found: dict[str, Cover] = {}
    for mount in spec.mounts:
        words = option_words.parse(mount.options, f"/mounts/{mount.index}/options")
        is_bind = (words.bind or mount.type == "bind") and mount.source not in volumes
        if not is_bind or words.remount:
            continue
        bind = work.bind(mount, words, f"mounts[{mount.index}]")
        if bind.overlay:
            known = found.get(bind.source)
            if known is None or not known.recursive:
                found[bind.source] = Cover(bind.origin, bind.destination, bind.source, words)
    return list(found.values())


def _tmp(work: RootPlanner, destinations: "Sequence[str]") -> None:
    if "/tmp" in destinations:
        work.note("/tmp", "left alone, the document mounts it")
    elif work.overrides.overlay != "none":
        work.tmp()
