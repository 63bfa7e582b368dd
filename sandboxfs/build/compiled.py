"""What a build encodes of a plan once, for itself and for the builds that follow."""


import _stat as stat

from sandboxfs.kernel import abi, fscontext
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import packed
from sandboxfs.plan.operations import (
    Bind,
    Console,
    Filesystem,
    Lower,
    Node,
    PlainRoot,
    Seal,
    Symlink,
)

_NODE_KINDS = {"c": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO}


class Compiled:
    """What a plan's builds share.

    fields: {operation: (path, …)}; path is bytes, what the operation works on.  A `Filesystem`
    has its type (bytes) and the settings of `kernel.fscontext.create` besides, a `Symlink` and
    a `Console` directory and name, a `Node` these, its mode with the type, and its device
    number.  A `Bind` has its source, open_tree(2)'s flags, the settings of `bind_settings`, and
    whether nothing but these calls is to be done.
    calls: the `build.calls.Calls` that no build is using.  gathering: what `build.gather` has to
    do, None until it was asked.  usual: the `build.usual.Usual` that no build is using, or None
    where the plan isn't one for it; build: `build.usual.build` once it is loaded; watch: its
    `kernel.submount_watch.Watch`.  sealed: whether the root is read-only in the end.
    """

    __slots__ = ("build", "calls", "fields", "gathering", "sealed", "usual", "watch")

    def __init__(self, plan):
        images, settings = lower_starts(plan), {}
        self.fields = {
            step: _compile_bind(step, images, settings) if type(step) is Bind else _compile(step)
            for step in plan.operations
        }
        self.calls = []
        self.gathering = None
        self.usual = []
        self.build = None
        self.watch = None
        self.sealed = any(type(step) is Seal for step in plan.operations)


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


def lower_starts(plan):
    """Return what the path of a source in one of the plan's lowers begins with."""
    starts = [
        os.fsencode(each.path).rstrip(b"/") + b"/" for each in plan.operations
        if type(each) in (Lower, PlainRoot)
    ]
    return tuple([start for start in starts if start != b"/"])


def _compile_bind(operation, images, settings):
    """Return the fields of a `Bind`.  settings: those of the binds before, by what they ask for."""
    source = os.fsencode(operation.source)
    flags = abi.OPEN_TREE_CLONE | abi.OPEN_TREE_CLOEXEC
    if operation.recursive:
        flags |= abi.AT_RECURSIVE
    plain = not (
        operation.copy_symlink or operation.source_no_follow or operation.overlay
        or operation.nested or operation.idmap is not None or source.startswith(images)
    )
    asked = (
        operation.recursive, operation.overlay, operation.attributes, operation.cleared,
        operation.propagation, operation.propagation_recursive, operation.tree_attributes,
        operation.tree_cleared,
    )
    if asked not in settings:
        settings[asked] = bind_settings(*asked)
    return (os.fsencode(operation.destination), source, flags, settings[asked], plain)


def bind_settings(recursive, overlay, attributes, cleared, propagation, propagation_recursive,
                  tree_attributes, tree_cleared):
    """Return the (flags, struct mount_attr) of the mount_setattr calls for a bind's clone.

    They are its flags and its propagation, from the fields of a `Bind`; without a word it
    becomes private.
    """
    for_tree = propagation_recursive if propagation else recursive
    propagation = propagation or abi.MS_PRIVATE
    if overlay:
        attributes |= abi.MOUNT_ATTR_RDONLY
        cleared &= ~abi.MOUNT_ATTR_RDONLY
    settings = []
    if tree_attributes or tree_cleared or for_tree:
        tree_cleared = tree_cleared & ~tree_attributes | tree_cleared & abi.MOUNT_ATTR__ATIME
        settings.append((abi.AT_EMPTY_PATH | abi.AT_RECURSIVE, packed(
            tree_attributes, tree_cleared, propagation if for_tree else 0, 0)))
    if attributes or cleared or not for_tree:
        settings.append((abi.AT_EMPTY_PATH, packed(
            attributes, cleared, 0 if for_tree else propagation, 0)))
    return settings


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
        if (operation.type, key) == ("devpts", "newinstance"):
            continue  # each is one since Linux 4.7, and the word a no-op
        name = os.fsencode(key)
        settings.append(
            fscontext.flag(name) if value is None else fscontext.string(name, os.fsencode(value))
        )
    if operation.label and operation.type != "mqueue":
        settings.append(fscontext.string(b"context", operation.label.encode()))
    return settings
