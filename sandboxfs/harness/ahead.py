"""What a plan allows to be done before somebody asks for it."""

import _stat as stat

from sandboxfs.build.compiled import cleaned
from sandboxfs.kernel import abi
from sandboxfs.kernel import system as os
from sandboxfs.plan.operations import Bind, Lower, PlainRoot


def needs_parent(plan):
    """Whether something has to stay between the warm process and the payload."""
    spec = plan.spec
    return bool(
        plan.user is not None or spec.time_offsets or spec.net_devices
        or not plan.new_namespace("mount") or any(entry.path for entry in plan.namespaces)
        or type(plan.operations[0]) is PlainRoot
        or (spec.overrides is not None and spec.overrides.overlay == "dir")
    )


def may_be_built_ahead(plan):
    """Whether a root that was built some time ago is the same as one that is built now.

    Mounts that are made on the host meanwhile don't reach a slave bind until it is attached.
    """
    if needs_parent(plan):
        return False
    return not any(
        type(step) is Bind and step.propagation & (abi.MS_SLAVE | abi.MS_SHARED)
        for step in plan.operations
    )


def leaves_no_trace(plan):
    """Whether a plan can be built and dropped: nothing propagates, is copied, or takes a device."""
    if plan.engine == "attached" or not may_be_built_ahead(plan):
        return False
    if not has_directories(plan):
        return False
    bound = []
    for step in plan.operations:
        if getattr(step, "copy_up", False) or getattr(step, "overlay", False):
            return False
        if hasattr(step, "destination"):
            path = cleaned(step)
            # A mountpoint that is missing in a bind would be made on the host.
            if path.startswith(tuple(bound)):
                return False
            if type(step) is Bind:
                bound.append(path + b"/")
    return True


def has_directories(plan):
    """Whether all lowers are directories, not images."""
    return all(_is_directory(step.path) for step in plan.operations if type(step) is Lower)


def _is_directory(path):
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except OSError:
        return False
