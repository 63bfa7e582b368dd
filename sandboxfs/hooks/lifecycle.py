"""What each hook does: createRuntime on the host's side, createContainer in the container's.

Source: runtime.md, "Lifecycle", and config.md, "POSIX-platform Hooks".
"""

from sandboxfs.errors import HookError, SpecError
from sandboxfs.kernel import abi
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import read_file
from sandboxfs.plan import survey
from sandboxfs.spec import load

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sandboxfs.hooks.state import State
    from sandboxfs.spec.annotations import Hint
    from sandboxfs.spec.model import Spec

_NOTHING = "nothing to do: overlay=none, and no volume, overlay or /tmp is asked for"


def spec_of(state, policy):
    """Return the `Spec` of the state's bundle with the operator's policy applied."""
    spec = load.load(state.bundle, brief=True)
    policy.apply(spec)
    return spec


def pod_hints(spec):
    """Return the hints whose volume is one of a pod, in a container that is in one."""
    hints = [hint for hint in spec.hints if hint.type == "tmpfs" and hint.share == "pod"]
    if hints:
        from sandboxfs.plan import volumes

        if volumes.pod(spec.annotations):
            return hints
    return []


def create_runtime(state, policy, log):
    """Make what needs the host's privileges: a pod's volumes.  Nothing for other containers."""
    spec = spec_of(state, policy)
    _warn(spec.warnings, log)
    hints = pod_hints(spec)
    if asks_for_a_root(spec, hints):
        _check_pivot(state, spec)
    # What was recorded for its pod counts for a container without hints of its own, too.
    if hints or (spec.annotations and in_pod(spec.annotations)):
        from sandboxfs.hooks import pods

        for line in pods.enter(spec, state, policy, hints):
            log("info", line)


def asks_for_a_root(spec: "Spec", hints: "list[Hint]") -> bool:
    """Return whether a container gets a root of ours, or mounts that lie on one.

    hints: those of its pod, whose volumes createRuntime mounts.
    """
    asked = spec.overrides
    return bool(asked.overlay != "none" or asked.tmp == "tmpfs" or asked.overlay_binds
                or asked.lowers) or any(
        hint.type == "tmpfs" and hint.share != "shared" and hint not in hints
        for hint in spec.hints
    )


def _check_pivot(state: "State", spec: "Spec") -> None:
    """Refuse a container whose runtime goes past whatever a hook lays over the rootfs."""
    # crun, too, holds a descriptor of the rootfs all the time, but goes by its path.
    try:
        with_runc = read_file(b"/proc/%d/comm" % state.pid).startswith(b"runc:[")
    except FileNotFoundError:
        raise HookError("state/pid", "", str(state.pid), "is no running process: who is to enter "
                        "the root?") from None
    if with_runc:
        from sandboxfs.hooks import pinned

        pinned.check(state.pid, spec)


def create_container(state, policy, log):
    """Build the new root of what the runtime has prepared, and attach it over the rootfs."""
    try:
        _lay_over(state, policy, log)
    except BaseException:
        # crun runs no poststop now.  With a user namespace the store is closed to this hook: the
        # next one of the pod finds the container's process gone.
        try:
            leave_pod(state, policy, log)
        except Exception as error:  # noqa: BLE001 - the first error is the one to tell
            log("debug", f"the pod keeps a container that is gone: {error}")
        raise


def _lay_over(state, policy, log):
    spec = spec_of(state, policy)
    hints = pod_hints(spec)
    if not hints and not asks_for_a_root(spec, hints):
        _warn(spec.warnings, log)
        log("info", _NOTHING)
        return
    facts = survey.facts()
    if not facts.privileged:
        raise HookError("createContainer", "", "CAP_SYS_ADMIN", "is missing: this process may "
                        "mount nothing", hint="runtimes start this hook with the rights of the "
                        "container's root, in its mount namespace")
    from sandboxfs.plan import carry, live

    found = live.read(spec, carry.wanted_places(spec))
    if found.is_made_by_runtime():
        log("info", "nothing to do: the root is one of sandboxfs-runtime's already")
        return
    plan = carry.plan(spec, found, facts, state.id)
    _warn(plan.warnings, log)
    if policy.log_level == "debug":
        for note in plan.notes:
            log("debug", f"{note.origin}: {note.text}")
    if not carry.changes_anything(plan):
        log("info", _NOTHING)
        return
    _check_registration(spec)
    from sandboxfs.build import carry as build

    with build.build(plan) as root:
        if not build.is_changed(root):
            log("info", _NOTHING)
            build.leave_alone(root)
            return
        try:
            _check_place(root)
        except BaseException:
            build.leave_alone(root)
            raise
        build.lay_over(root)


def _check_registration(spec: "Spec") -> None:
    """Refuse to work alone: only createRuntime sees whether the runtime enters what is made here.

    Other words of a registration may be an operator's own.
    """
    hooks = spec.document.get("hooks")
    entries = hooks.get("createRuntime") if type(hooks) is dict else None
    for entry in entries if type(entries) is list else ():
        words = entry.get("args") if type(entry) is dict else None
        if type(words) is list and ["hook", "createRuntime"] in [
                words[at:at + 2] for at in range(len(words))]:
            return
    raise HookError("createContainer", "", "hooks.createRuntime", "has no sandboxfs: nothing has "
                    "seen whether this runtime enters the root that is made here",
                    hint="register all three stages (sandboxfs hooks install), or use "
                    "sandboxfs-runtime in front of the runtime (sandboxfs install --for ENGINE)")


def _check_place(root):
    if is_bottom():
        from sandboxfs.hooks import initramfs

        initramfs.check(root)


def is_bottom():
    """Return whether our root lies at the bottom of the mount namespace, as an initramfs does."""
    from sandboxfs.kernel import mounttable

    slash = os.open("/", abi.O_PATH | os.O_CLOEXEC)
    try:
        record = mounttable.record(mounttable.mount_id(slash)[0])
    except FileNotFoundError:
        return False  # a chroot
    finally:
        os.close(slash)
    return record.id == record.parent_id


def poststop(state, policy, log):
    """Take away what outlives a container: its directory of ``overlay=dir=``, its place in a pod.

    The bundle may be gone by now; an id that nobody knows is no fault.
    """
    try:
        spec = spec_of(state, policy)
    except Exception as error:  # noqa: BLE001 - what can be released without it still has to be
        log("info", f"poststop: {error}")
        spec = None
    try:
        if spec is not None and spec.overrides.overlay == "dir" and not spec.overrides.overlay_keep:
            from sandboxfs.build import upper

            upper.remove_after(spec.overrides.overlay_path, state.id)
    finally:
        leave_pod(state, policy, log)


def in_pod(annotations):
    """Return whether the store may know a container: most it doesn't, and load nothing for it.

    annotations: the container's; without any nobody can tell which pod it would be in.
    """
    from sandboxfs.spec.annotations import pod
    from sandboxfs.state.directory import place

    store = f"{place()}/pods"
    if not annotations:
        return os.path.exists(store)
    try:
        found = pod(annotations)
    except SpecError:
        return True  # for `pods` to refuse, or to look through all
    return found is not None and os.path.exists(f"{store}/{found.key}")


def leave_pod(state, policy, log):
    """Count a container no longer in its pod, if it is counted in one."""
    if in_pod(state.annotations):
        from sandboxfs.hooks import pods

        for line in pods.leave(state, policy):
            log("info", line)


def _warn(warnings, log):
    for text in warnings:
        log("warning", text)


HOOKS = {
    "createRuntime": create_runtime, "createContainer": create_container, "poststop": poststop,
}
