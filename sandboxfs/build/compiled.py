"""What a build encodes of a plan once, for itself and for the builds that follow."""


from sandboxfs.kernel import fscontext
from sandboxfs.kernel import system as os
from sandboxfs.plan.operations import Filesystem, Node, Symlink


def compile_once(plan):
    """Return {operation: (path, …)} of a plan, computed at the first call.

    path: bytes, what the operation works on.  A `Filesystem` has its type (bytes) and the
    settings of `kernel.fscontext.create` besides.
    """
    if plan.compiled is None:
        plan.compiled = {step: _compile(step) for step in plan.operations}
    return plan.compiled


def _compile(operation):
    if isinstance(operation, Filesystem):
        return (os.fsencode(operation.destination), operation.type.encode(),
                filesystem_settings(operation))
    if isinstance(operation, (Node, Symlink)):
        return (cleaned(operation),)
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
