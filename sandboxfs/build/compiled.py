"""What a build encodes of a plan once, for itself and for the builds that follow."""


import _stat as stat

from sandboxfs.build.siblings import MANY, grouped
from sandboxfs.kernel import abi, fscontext
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import packed
from sandboxfs.plan.operations import (
    Bind,
    Console,
    Cover,
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
    operations: the plan's, those that are `build.siblings.Siblings` as one.
    calls: the `build.calls.Calls` that no build is using.  gathering: what `build.gather` has to
    do, None until it was asked.  usual: the `build.usual.Usual` that no build is using, or None
    where the plan isn't one for it; build: `build.usual.build` once it is loaded; watch: its
    `kernel.submount_watch.Watch`.  sealed: whether the root is read-only in the end.
    """

    __slots__ = ("build", "calls", "fields", "gathering", "operations", "sealed", "usual", "watch")

    def __init__(self, plan):
        binds = [step for step in plan.operations if type(step) in (Bind, Cover)]
        self.fields = {step: _compile(step) for step in plan.operations
                       if type(step) not in (Bind, Cover)}
        if binds:
            _compile_binds(self.fields, binds, lower_starts(plan))
        self.operations = grouped(plan.operations, self.fields) if len(binds) >= MANY else [
            *plan.operations]
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


def _compile_binds(fields, binds, images):
    """Add the fields of each `Bind` to a dict.  images: what a source in a lower begins with."""
    targets = os.fsencode("\0".join([step.destination for step in binds]))
    sources = os.fsencode("\0".join([step.source for step in binds]))
    images = tuple([start for start in images if start in sources])
    known: dict = {}  # by what a bind asks for
    for step, target, source in zip(
            binds, targets.split(b"\0"), sources.split(b"\0"), strict=True):
        asked = (
            step.recursive, step.overlay, step.attributes, step.cleared, step.propagation,
            step.propagation_recursive, step.tree_attributes, step.tree_cleared,
            step.copy_symlink, step.source_no_follow,
        )
        flags, settings, plain = known.get(asked) or known.setdefault(asked, _asked_for(*asked))
        fields[step] = (target, source, flags, settings, plain and not (
            step.nested or step.idmap is not None or (images and source.startswith(images))
        ))


def _asked_for(recursive, overlay, *asked):
    """Return open_tree(2)'s flags and the settings of a bind, and whether that may be all."""
    *attributes, copy_symlink, source_no_follow = asked
    flags = abi.OPEN_TREE_CLONE | abi.OPEN_TREE_CLOEXEC | (abi.AT_RECURSIVE if recursive else 0)
    plain = not (copy_symlink or source_no_follow or overlay)
    return flags, bind_settings(recursive, overlay, *attributes), plain


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
    modes = [value for key, value in operation.data if key == "mode"]
    for key, value in operation.data:
        if (operation.type, key) == ("devpts", "newinstance"):
            continue  # each is one since Linux 4.7, and the word a no-op
        if (operation.type, key) == ("tmpfs", "mode") and modes == ["1777"]:
            continue  # each has it, unless told otherwise
        name = os.fsencode(key)
        settings.append(
            fscontext.flag(name) if value is None else fscontext.string(name, os.fsencode(value))
        )
    if operation.label and operation.type != "mqueue":
        settings.append(fscontext.string(b"context", operation.label.encode()))
    return settings
