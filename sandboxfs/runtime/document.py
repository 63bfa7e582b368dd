"""The container's document: the parts that we use, and the changes that its container needs.

The runtime judges the document; a fault in a part that we don't use is the runtime's to tell.
"""

import errno
import sys

from sandboxfs.errors import HookError, SpecError
from sandboxfs.kernel import system as os
from sandboxfs.spec import check_linux, check_root
from sandboxfs.spec import load as loader
from sandboxfs.spec.model import Spec
from sandboxfs.spec.values import known_keys, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from sandboxfs.plan.operations import Filesystem

    Document = dict[str, Any]

# What is read of a document here: the beginnings of these JSON pointers.
_USED = ("/root", "/annotations", "/linux/namespaces", "/linux/uidMappings", "/linux/gidMappings")
_BUILDAH = "buildah"


def is_a_build(bundle: str, identity: str) -> bool:
    """Return whether buildah runs a step of a build: what it writes has to stay in the image.

    `podman build` and buildah keep the bundle in a temporary directory of their own, and name the
    container after it (buildah, run_linux.go).  Engines name neither of them so.
    """
    name = bundle[bundle.rfind("/") + 1:]
    number = name.removeprefix(_BUILDAH)
    return (name != number and number.isdigit() and identity == f"{_BUILDAH}-{name}")


def load(bundle: str, config: "str | None") -> "Spec":
    """Return the `Spec` of what we use of a bundle's document.

    MountError where it can't be read, SpecError for a fault in a part that is used.
    """
    found: Document = loader.parse(loader.read(bundle, config), config or "config.json")
    problems: list[SpecError] = []
    if type(found) is not dict:
        raise SpecError(config or "config.json", "", shown(found), "an object is allowed")
    spec, document = Spec(), _without_nulls(found)
    spec.bundle, spec.document = bundle, found
    known_keys(document, "", "")
    for part in (check_root.read, check_linux.read, *check_linux.PARTS):
        _read(part, document, spec, problems)
    check_root.read_annotations(document, spec, bundle, problems)
    pointers: tuple[str, ...] = _USED
    if spec.hints or spec.overrides.overlay_binds:
        from sandboxfs.spec import check_mounts

        pointers += ("/mounts",)
        _read(check_mounts.read, document, spec, problems)
    used = [each for each in problems if each.origin.startswith(pointers)]
    if used:
        first = used[0]
        raise SpecError(first.origin, first.operation, first.target, first.text, first.hint, used)
    if spec.root_path is None:
        raise HookError("root.path", "", "", "config.json has no root", errno.EINVAL)
    return spec


def _read(part: "Callable[..., object]", document: "Document", spec: "Spec",
          problems: "list[SpecError]") -> None:
    try:
        part(document, spec, problems)
    except SpecError as error:
        problems.append(error)


def _without_nulls(document: "Any") -> "Any":
    """Return a document without optional keys that are null: to runtimes they are absent."""
    if type(document) is not dict:
        return document
    return {key: _without_nulls(value) if key in ("root", "linux") else value
            for key, value in document.items() if value is not None}


# -- what has to be changed ----------------------------------------------------------------


def changes(spec: "Spec", config: "str | None") -> "Document | None":
    """Return the document with what the container needs besides its root, None without.

    config: the operator's file, for the hooks.  A hint of this container alone makes a mount a
    tmpfs; volumes of a pod, and an upper on disk, need hooks.
    """
    document = dict(spec.document)
    overrides = spec.overrides
    if spec.hints:
        _volumes(document, spec)
    if overrides.overlay == "none" and overrides.tmp == "tmpfs":
        _tmp(document)
    if spec.annotations and _is_in_a_pod_of_ours(spec):
        _hooks(document, ("createRuntime", "poststop"), config)
    elif overrides.overlay == "dir" and not overrides.overlay_keep:
        _hooks(document, ("poststop",), config)
    original = spec.document
    return None if all(document[key] is original.get(key) for key in document) else document


def _is_in_a_pod_of_ours(spec: "Spec") -> bool:
    """Return whether a container shares volumes of a pod, or may have to be counted in one."""
    from sandboxfs.spec import annotations

    if not spec.hints and annotations.pod(spec.annotations) is None:
        return False
    from sandboxfs.hooks import lifecycle

    return bool(lifecycle.pod_hints(spec)) or lifecycle.in_pod(spec.annotations)


def column(document: "Document", key: str) -> list[str]:
    """Return the value of a key (``"destination"``) of each of the document's mounts."""
    return [entry[key] for entry in document.get("mounts") or ()
            if type(entry) is dict and type(entry.get(key)) is str]


def _tmp(document: "Document") -> None:
    from sandboxfs.plan.base import cleaned

    if "/tmp" not in map(cleaned, column(document, "destination")):
        entry = {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs",
                 "options": ["nosuid", "nodev", "mode=1777"]}
        document["mounts"] = [*(document.get("mounts") or ()), entry]


def _volumes(document: "Document", spec: "Spec") -> None:
    """Make a tmpfs of each mount that a hint of this container alone is for."""
    from sandboxfs.plan import survey, volumes
    from sandboxfs.plan.operations import Plan

    hints = {hint.source: hint for hint in spec.hints
             if hint.type == "tmpfs" and hint.share != "shared"}
    in_pod = bool(volumes.pod(spec.annotations))
    changed = list(document.get("mounts") or ())
    for mount in spec.mounts:
        hint = hints.get(mount.source)
        if hint is None or (hint.share == "pod" and in_pod):
            continue
        origin = f"mounts[{mount.index}]"
        operation = volumes.volume(Plan(spec), survey.facts(), mount, origin, hint)
        changed[mount.index] = {"destination": mount.destination, "type": "tmpfs",
                                "source": "tmpfs", "options": _words(operation)}
    if changed != document.get("mounts"):
        document["mounts"] = changed


def _words(operation: "Filesystem") -> list[str]:
    from sandboxfs.kernel import mounttable

    words = [word for word in mounttable.words_of(operation.attributes) if word != "relatime"]
    if operation.copy_up:
        words.append("tmpcopyup")
    return words + [key if value is None else f"{key}={value}" for key, value in operation.data]


def _hooks(document: "Document", stages: tuple[str, ...], config: "str | None") -> None:
    """Add hooks of ours, executed by this interpreter, behind those that the document has."""
    from sandboxfs.hooks import registration

    hooks = dict(document.get("hooks") or {})
    code = (f"import sys; sys.path[:] = {sys.path!a}; "
            "from sandboxfs.__main__ import main; sys.exit(main())")
    program = os.readlink("/proc/self/exe")
    options = ["--config", config] if config else []
    for stage in stages:
        present = hooks.get(stage) or []
        if any(registration.is_ours(entry, stage) for entry in present):
            continue
        hooks[stage] = [*present, {
            "path": program, "args": [program, "-ISBc", code, "hook", stage, *options],
            "env": list(registration.ENVIRONMENT), "timeout": registration.TIMEOUTS[stage],
        }]
    document["hooks"] = hooks
