"""What a plan's operations must leave in the mount table: `expected(plan)`.

An operation whose rule allows several outcomes allows several forms here, unless the build
has told which one it took.
"""

import os

from sandboxfs.errors import shown
from sandboxfs.kernel import abi, mounttable
from sandboxfs.plan import operations as kinds

_RDONLY = abi.MOUNT_ATTR_RDONLY
_ATIME = abi.MOUNT_ATTR__ATIME
_NO_ESCAPE = abi.MOUNT_ATTR_NOSUID | abi.MOUNT_ATTR_NODEV
_HIDING = _RDONLY | _NO_ESCAPE | abi.MOUNT_ATTR_NOEXEC
EVERY_FLAG = (
    _HIDING | _ATIME | abi.MOUNT_ATTR_NODIRATIME | abi.MOUNT_ATTR_NOSYMFOLLOW
    | abi.MOUNT_ATTR_IDMAP
)


class Form:
    """One thing that a mount may be.

    types: file system types (bytes), None for any.  attributes: the flags that are wanted
    among those of `mask`; the other flags are the source's.
    """

    __slots__ = ("attributes", "mask", "types")

    def __init__(self, types, attributes, mask=EVERY_FLAG):
        self.types = types
        self.attributes = attributes
        self.mask = mask | _ATIME if mask & _ATIME else mask

    def differences(self, record):
        """Return what of a record is otherwise, as texts."""
        found = []
        if self.types is not None and record.type.partition(b".")[0] not in self.types:
            wanted = " or ".join(map(shown, self.types))
            found.append(f"file system {shown(record.type)} instead of {wanted}")
        wrong = (record.attributes ^ self.attributes) & self.mask
        if wrong:
            wanted = record.attributes ^ wrong
            found.append(f"flags {words(record.attributes)} instead of {words(wanted)}")
        return found


class Expectation:
    """One mount that an operation makes.

    forms: the `Form`s that the operation's rule allows.  propagation: the allowed values of
    `MountRecord.propagation`.  required: False where the rule allows no mount at all,
    None where nothing may be mounted.  follow: whether a last symlink is followed.
    """

    __slots__ = ("destination", "follow", "forms", "operation", "propagation", "required")

    def __init__(self, operation, destination, forms, propagation, required=True, follow=True):
        self.operation = operation
        self.destination = os.fsencode(destination)
        self.forms = forms
        self.propagation = propagation
        self.required = required
        self.follow = follow


def expected(plan, outcomes=()):
    """Return the `Expectation`s of a plan, in its order, the root's first.

    outcomes: what the build says of its rules (`Root.outcomes`), empty if it isn't known;
    then everything that a rule allows is expected.
    """
    decided = {}
    for operation, kind, detail in outcomes or ():
        # With a detail, an overlay's outcomes are those of mounts below its lowers.
        if not detail or type(operation) is not kinds.Overlay:
            decided.setdefault(operation, []).append(kind)
    expectations = []
    for operation in plan.operations:
        make = _EXPECTED.get(type(operation))
        if make is not None:
            expectation = make(plan, operation, decided.get(operation, ()))
            if expectation is not None:
                expectations.append(expectation)
    return expectations


def _sealed(plan):
    return _RDONLY if any(type(each) is kinds.Seal for each in plan.operations) else 0


def _overlay(plan, operation, outcomes):
    types = [b"overlay"]
    if "overlay" not in outcomes and operation.userxattr:
        # Over a lower whose mounts are locked together the root is a skeleton on a tmpfs.
        types.append(b"tmpfs")
    # The rest is the rootfs's own mount's.
    inherited = (abi.MOUNT_ATTR_NOSUID | abi.MOUNT_ATTR_NODEV | abi.MOUNT_ATTR_NOEXEC
                 | abi.MOUNT_ATTR_NOSYMFOLLOW)
    form = Form(types, _sealed(plan), EVERY_FLAG & ~inherited)
    return Expectation(operation, "/", [form], _root_propagation(plan))


def _plain_root(plan, operation, _outcomes):
    sealed = _sealed(plan)
    return Expectation(operation, "/", [Form(None, sealed, sealed)], _root_propagation(plan))


def _filesystem(plan, operation, outcomes):
    forms = []
    if "bind" not in outcomes:
        forms.append(Form([operation.type.encode()], operation.attributes))
    if operation.fallback_bind is not None and operation.type not in outcomes:
        forms.append(Form(None, operation.tree_attributes, operation.tree_attributes))
    return Expectation(operation, operation.destination, forms, _propagation(plan, operation),
                       follow=not operation.no_follow)


def _bind(plan, operation, outcomes):
    if "symlink" in outcomes:
        return None
    forms = []
    own = operation.attributes
    whole = own | operation.tree_attributes
    if operation.overlay:
        # A directory's overlay, or the copy of a file; what has neither is bound read-only.
        if not outcomes or "overlay" in outcomes:
            forms.append(Form([b"overlay", b"tmpfs"], own))
        if not outcomes or "bind" in outcomes:
            bound = bind_form(operation)
            forms.append(Form(None, bound.attributes | _RDONLY, bound.mask | _RDONLY))
    elif "synthesised" not in outcomes:
        forms.append(bind_form(operation))
    if "synthesised" in outcomes or (not outcomes and operation.nested and whole & _RDONLY):
        forms.append(Form([b"overlay"], whole))
        # Over a read-only superblock, however the bind was asked for.
        forms.append(Form([b"overlay"], whole | _RDONLY))
    allowed = _propagation(plan, operation)
    if operation.overlay or "synthesised" in outcomes:
        allowed = {*allowed, abi.MS_PRIVATE}
    follow = not (operation.no_follow or operation.copy_symlink)
    required = not (operation.copy_symlink and not outcomes)
    return Expectation(operation, operation.destination, forms, allowed, required, follow)


def bind_form(operation):
    """The flags asked for are set, those asked to be cleared are, the rest is the source's."""
    wanted = operation.tree_attributes & ~operation.cleared | operation.attributes
    mask = (operation.tree_attributes | operation.tree_cleared | operation.attributes
            | operation.cleared)
    if operation.idmap is not None:
        wanted |= abi.MOUNT_ATTR_IDMAP
        mask |= abi.MOUNT_ATTR_IDMAP
    return Form(None, wanted, mask)


def _cgroup(plan, operation, _outcomes):
    attributes = operation.attributes
    forms = [Form([b"cgroup2", b"cgroup"], attributes, attributes), Form([b"tmpfs"], attributes)]
    return Expectation(operation, operation.destination, forms, _propagation(plan, operation))


def _tmp(plan, operation, outcomes):
    required = operation.always
    if outcomes:
        required = True if "tmpfs" in outcomes else None
    return Expectation(operation, "/tmp", [Form([b"tmpfs"], _NO_ESCAPE)],
                       _propagation(plan, None), required)


def _mask(plan, operation, outcomes):
    forms = [Form([b"tmpfs"], _HIDING), Form(None, abi.MOUNT_ATTR_NOEXEC, abi.MOUNT_ATTR_NOEXEC)]
    return Expectation(operation, operation.path, forms, _propagation(plan, None),
                       None if "skipped" in outcomes else False)


def _readonly_path(plan, operation, outcomes):
    # What was bound may have had any propagation: a bind keeps it.
    any_propagation = {
        abi.MS_PRIVATE, abi.MS_SHARED, abi.MS_SLAVE, abi.MS_SHARED | abi.MS_SLAVE,
        abi.MS_UNBINDABLE,
    }
    return Expectation(operation, operation.path, [Form(None, _RDONLY, _RDONLY)], any_propagation,
                       None if "skipped" in outcomes else False)


def _node(plan, operation, outcomes):
    if outcomes and "bind" not in outcomes:
        return None
    noexec = abi.MOUNT_ATTR_NOEXEC
    return Expectation(operation, operation.path, [Form(None, noexec, noexec)],
                       _propagation(plan, None), operation.by_bind or "bind" in outcomes)


def _console(plan, operation, _outcomes):
    return Expectation(operation, "/dev/console", [Form([b"devpts"], 0, 0)],
                       _propagation(plan, None))


_EXPECTED = {
    kinds.Overlay: _overlay, kinds.PlainRoot: _plain_root, kinds.Filesystem: _filesystem,
    kinds.Bind: _bind, kinds.Cgroup: _cgroup, kinds.Tmp: _tmp, kinds.Mask: _mask,
    kinds.ReadonlyPath: _readonly_path, kinds.Node: _node, kinds.Console: _console,
}


def _root_propagation(plan):
    number = plan.operations[-1].propagation & ~abi.MS_REC
    return _with_copies(plan, {number or abi.MS_PRIVATE})


def _propagation(plan, operation):
    asked = plan.operations[-1].propagation
    if asked & abi.MS_REC:
        # linux.rootfsPropagation, last of all, over every mount.
        if asked & abi.MS_SHARED:
            return _with_copies(plan, {abi.MS_SHARED, abi.MS_SHARED | abi.MS_SLAVE})
        return {abi.MS_UNBINDABLE}
    number = operation.propagation if operation is not None else 0
    if number == abi.MS_SLAVE:
        # A mount without peers has nobody to be the slave of.
        return {abi.MS_SLAVE, abi.MS_PRIVATE}
    return _with_copies(plan, {number or abi.MS_PRIVATE})


def _with_copies(plan, allowed):
    """A copy of a mount namespace for another user namespace makes shared mounts slaves."""
    if plan.user is not None and any(each & abi.MS_SHARED for each in allowed):
        return {*allowed, abi.MS_SLAVE, abi.MS_SHARED | abi.MS_SLAVE}
    return allowed


def words(attributes):
    """Return `MOUNT_ATTR_*` as one word."""
    return ",".join(mounttable.words_of(attributes))
