"""What a build encodes of a plan once, for itself and for the builds that follow."""


import _stat as stat

from sandboxfs.kernel import fscontext
from sandboxfs.kernel import system as os
from sandboxfs.plan.operations import Console, Filesystem, Node, Symlink

_NODE_KINDS = {"c": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO}


class Compiled:
    """What a plan's builds share.

    fields: {operation: (path, …)}; path is bytes, what the operation works on.  A `Filesystem`
    has its type (bytes) and the settings of `kernel.fscontext.create` besides, a `Symlink` and
    a `Console` directory and name, a `Node` these, its mode with the type, and its device
    number.  calls: the `build.calls.Calls` that no build is using.
    """

    __slots__ = ("calls", "fields")

    def __init__(self, plan):
        self.fields = {step: _compile(step) for step in plan.operations}
        self.calls = []


def compile_once(plan):
    """Return the `Compiled` of a plan, made at the first call."""
    if plan.compiled is None:
        plan.compiled = Compiled(plan)
    return plan.compiled


def _compile(operation):
    if isinstance(operation, Filesystem):
        return (os.fsencode(operation.destination), operation.type.encode(),
                filesystem_settings(operation))
    if isinstance(operation, (Node, Symlink, Console)):
        path = cleaned(operation)
        head, _, name = path.rpartition(b"/")
        if not isinstance(operation, Node):
            return path, head, name
        number = os.makedev(operation.major or 0, operation.minor or 0)
        return path, head, name, operation.mode | _NODE_KINDS[operation.type], number
    return (os.fsencode(target_of(operation)),)


def target_of(operation):
    """Return the path an operation works on, as the spec has it, or an empty one."""
    for field in ("destination", "path"):
        value = getattr(operation, field, None)
        if value is not None:
            return value
    return ""


def cleaned(operation):
    """Return what an operation works on as an absolute path without ``.`` and ``..``."""
    return os.path.normpath(b"/" + os.fsencode(target_of(operation)).lstrip(b"/"))


def filesystem_settings(operation):
    """Return the fsconfig steps of a `Filesystem`: source, flag words, one step per key."""
    settings = [fscontext.string(b"source", os.fsencode(operation.source))]
    settings += [fscontext.flag(word.encode()) for word in operation.flags]
    for key, value in operation.data:
        name = os.fsencode(key)
        settings.append(
            fscontext.flag(name) if value is None else fscontext.string(name, os.fsencode(value))
        )
    if operation.label and operation.type != "mqueue":
        settings.append(fscontext.string(b"context", operation.label.encode()))
    return settings
