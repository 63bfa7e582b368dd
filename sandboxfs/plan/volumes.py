"""What hints make of a spec's mounts: a pod's volume, or a tmpfs of this container alone.

A part of `from_spec` for the few specs that have hints; `work` is its pass over the spec.
"""

from sandboxfs.errors import SpecError
from sandboxfs.plan import from_spec
from sandboxfs.plan.operations import Filesystem, Replica
from sandboxfs.spec import options as option_words


def hinted(work, mount, words, origin, hint):
    """Return a tmpfs in place of a mount: the pod's, or (``share=container``) one of its own."""
    container_pod = pod(work.spec.annotations)
    if hint.share == "pod" and container_pod:
        replica = Replica(origin, mount.destination, mount.source, hint.name, container_pod,
                          list(hint.options))
        replica.attributes, replica.cleared = work.own_attributes(words)
        return replica
    return _own_volume(work, mount, words, origin, hint)


def _own_volume(work, mount, words, origin, hint):
    if hint.share == "pod":
        work.note(origin, f"hint {hint.name}: share=pod, and this container is in no pod: a "
                  "tmpfs of its own")
    operation = Filesystem(origin, mount.destination, "tmpfs", mount.source)
    master = option_words.parse(hint.options, hint.origin)
    attributes = option_words.within(words, master)
    if attributes is None:
        raise SpecError(from_spec.pointer(origin), "", ",".join(mount.options),
                        f"looser than hint {hint.name} allows: "
                        f"{','.join([*hint.options, 'nosuid', 'nodev'])}")
    operation.attributes = attributes
    operation.data = list(master.data)
    operation.mode_from_mountpoint = "mode" not in {key for key, _value in master.data}
    operation.copy_up = words.copy_up
    work.map_owner(operation)
    work.note(origin, f"hint {hint.name}: a tmpfs in place of {mount.type or 'bind'} "
              f"{mount.source}")
    return operation


def check_hints(work):
    """Note which hints come to nothing."""
    sources = {mount.source for mount in work.spec.mounts}
    for hint in work.spec.hints:
        if hint.source not in sources:
            work.note(hint.origin, f"hint {hint.name}: no mount has source {hint.source}")
        elif hint.type == "bind" or hint.share == "shared":
            work.note(hint.origin, f"hint {hint.name}: {hint.type}, share={hint.share}: the "
                      "mount is left as it is")


def volume(result, facts, mount, origin, hint):
    """Return the `Filesystem` that a hint makes of a mount: a tmpfs of this container alone."""
    words = option_words.parse(mount.options, f"/mounts/{mount.index}/options")
    return _own_volume(from_spec.Planner(result, facts), mount, words, origin, hint)


def pod(annotations):
    """Return the id of the pod this container is in, or None."""
    from sandboxfs.spec.annotations import pod as pod_of

    found = pod_of(annotations)
    return None if found is None else found.id
