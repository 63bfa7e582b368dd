"""The system calls of the usual case, as a build makes them.

Mostly every rule of a plan comes out the same way: the mountpoint is there, the file system is
granted, /tmp is empty.  For that case the calls of an operation are known ahead, with all their
arguments (`build.preparation`), and a build only has to make them.  A call that fails ends its
operation's list, and the operation is done again by the function of its kind (`assemble`, `mounts`,
`devices`, `masks`), which knows every other case and words the errors.  So nothing is decided
here, and whatever these lists do, those functions would have done.
"""

import _stat as stat
from errno import ENODATA, ENOENT, ENOTDIR, EOPNOTSUPP

from sandboxfs.build.siblings import Siblings
from sandboxfs.kernel import abi, resolve
from sandboxfs.kernel import system as os
from sandboxfs.kernel.foreign import (
    LockedFunction,
    QuickFunction,
    c_int,
    c_uint64,
    get_errno,
)
from sandboxfs.kernel.syscalls import HAS_OPEN_TREE_ATTR, libc, packed, syscall
from sandboxfs.plan import operations as kinds

# Prepared calls are made where no other thread waits for the interpreter's lock, and the long way
# finds out why one failed.
quick = libc.function("syscall", QuickFunction)
# What is masked or made read-only may be missing: the call that finds it is this one, and says why.
finding = libc.function("syscall", LockedFunction)
mkdirat, openat, mknodat, symlinkat, faccessat = [
    libc.function(name, QuickFunction)
    for name in ("mkdirat", "openat", "mknodat", "symlinkat", "faccessat")
]
DIRECTORY = abi.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
ATTACH = abi.MOVE_MOUNT_F_EMPTY_PATH | abi.MOVE_MOUNT_T_EMPTY_PATH
ATTACH_BY_NAME = abi.MOVE_MOUNT_F_EMPTY_PATH
READ_ONLY = packed(abi.MOUNT_ATTR_RDONLY, 0, 0, 0)  # struct mount_attr
_OPEN_TREE, _SETATTR = abi.SYS_open_tree, abi.SYS_mount_setattr
# Names of this module are found faster than those of another.
_OPENAT2, _MOVE_MOUNT, _ANY_NO_LINKS = abi.SYS_openat2, abi.SYS_move_mount, resolve.ANY_NO_LINKS
_DIRECTORY_MODE, _FILE = resolve.DIRECTORY_MODE, stat.S_IFREG | resolve.FILE_MODE
_NO_VALUE = packed(0, 0)  # struct xattr_args: whether there is one is all that is asked
_NO_VALUE_SIZE = c_uint64(16)  # a seventh argument lies on the stack, where an int leaves half
# A directory without entries: "." and "..", 24 bytes each in struct linux_dirent64, whose name
# begins at the 19th.
_NOTHING_LISTED = 48


def never(*_arguments):
    """Stand for the calls of an operation that has no usual case."""
    return -1


THE_LONG_WAY = ((None, never, ()),)


class Place:
    """A directory of the root in which mountpoints are made, opened once for all of them.

    above: the `Place` that has it under `name`, None for the root itself.  of_the_root: whether it
    lies in the root's own mount, by its path.  binds: (operation, name) of those that go there.
    fd: a slot, -1 unless open.  lacks: whether one was missing, so that the next is made before it
    is looked for.
    """

    __slots__ = ("above", "binds", "fd", "lacks", "name", "of_the_root", "path")

    def __init__(self, above, path, name, of_the_root):
        self.above = above
        self.path = path
        self.name = name
        self.of_the_root = of_the_root
        self.binds = []
        self.fd = c_int(-1)
        self.lacks = False


class Calls:
    """The prepared calls of one plan; used by one build at a time.

    `preparation.prepared` makes and fills it.

    overlay: the entries of the root itself; entries: those of all operations after it; joined: the
    operation of `overlay`, None without one.  An entry is (slot that gets the result or None,
    function, arguments).  A slot is a C int that later entries have among their arguments;
    `lower`, `null` and `sources` (by operation) are filled by the materials, the others are
    descriptors that a build opened.  gathered: what the materials have of sources.
    steps: list of (operation or `Siblings`, end of its entries, its usual outcome or None, slot of
    its mount or None).  skips: by the id of the arguments of a call that finds what may be
    missing, (operation, number of entries after it).  hiding_tmpfs: the slot of what hides
    directories.
    ready: the binds whose mountpoints `build.mountpoints` has made in the upper; there: the paths
    of places in which it needn't look, since an earlier build has found the first one there.
    of_the_machine: operations in whose mounts nothing is made.
    ahead: what `overlay`, `entries` and `steps` were before a part of them was made ahead, by the
    process pid, or None.
    """

    __slots__ = (
        "ahead", "ahead_outcomes", "contexts", "directories", "entries", "gathered", "hides_files",
        "hiding_tmpfs", "is_staged", "joined", "lower", "null", "of_the_machine", "opened",
        "outcomes", "overlay", "owned", "pid", "places", "ready", "root", "scratch", "skips",
        "sources", "steps", "submounts", "there",
    )

    def __init__(self):
        self.entries = []
        self.steps = []
        self.owned = []
        self.contexts = []
        self.opened = []
        self.outcomes = []
        self.lower, self.null, self.root = c_int(-1), c_int(-1), c_int(-1)
        self.sources = {}
        self.gathered: dict = {}
        self.directories: set[object] = set()
        self.places = []
        self.ready: set[object] = set()
        self.there: set[bytes] = set()
        self.of_the_machine: set[object] = set()
        self.hiding_tmpfs = None
        self.hides_files = self.is_staged = False
        self.skips = {}
        self.scratch = None
        self.submounts = False
        self.overlay = self.joined = None
        self.ahead, self.ahead_outcomes = None, []
        self.pid = 0

    def begin(self, materials):
        """Take the descriptors that a build starts from."""
        self.is_ahead()
        self.lower.value = materials.lowers[0].fd if materials.lowers else -1
        self.null.value = materials.null
        self.directories = materials.directories
        self.gathered = materials.sources
        self.submounts = any(
            lower.submounts or lower.skeleton is not None for lower in materials.lowers
        )
        for operation, slot in self.sources.items():
            source = materials.sources.get(operation)
            slot.value = source if type(source) is int else -1

    def go_ahead(self):
        """Make those calls that depend on nothing of the host, before the build is asked for.

        File systems of our own and what is in them, as long as nothing of the host's comes among
        them: nothing else can have changed when the root is joined and they are attached.  The
        build makes the rest, and gets `ahead_outcomes`.  `null` may have been filled before.  The
        umask has to be 0.  False if one fails.
        """
        late = {id(self.root), id(self.lower)}
        if self.null.value < 0:
            late.add(id(self.null))
        overlay, entries, steps, done = [], [], [], 0
        self.ahead = self.overlay, self.entries, self.steps
        self.pid = os.getpid()
        self.outcomes = self.ahead_outcomes = []
        if self.overlay and not self._go_ahead(self.overlay, overlay, late):
            return False
        waits = deep = False
        for operation, end, outcome, mount in self.steps:
            its = self.entries[done:end]
            done = end
            kind = type(operation)
            waits = waits or kind in (kinds.Bind, Siblings) or its[:1] == [*THE_LONG_WAY] or (
                # What is mounted below a path comes before the path is covered or cloned.
                deep and kind in (kinds.Mask, kinds.ReadonlyPath))
            deep = deep or (kind in (kinds.Filesystem, kinds.Cgroup) and any(
                arguments[:1] == (abi.SYS_openat2,) for _slot, _call, arguments in its))
            if waits:
                entries += its
            else:
                before = len(entries)
                if not self._go_ahead(its, entries, late):
                    return False
                if its and len(entries) == before:
                    # Nothing is left of it, but the mount it went into may be dropped.
                    own = [slot for slot, _call, _arguments in its]
                    entries += [(None, is_open, (each,)) for _slot, _call, arguments in its
                                for each in arguments if type(each) is c_int and each not in own]
            steps.append((operation, len(entries), outcome, mount))
        self.overlay, self.entries, self.steps = self.overlay and overlay, entries, steps
        return True

    def is_ahead(self):
        """Whether something is made ahead; what another process made in our memory is forgotten."""
        if self.ahead is not None and self.pid != os.getpid():
            self.take()
        return self.ahead is not None

    def is_done_ahead(self, index):
        """Whether nothing is left to do for a step: it was done, in mounts that are there."""
        start = self.steps[index - 1][1] if index else 0
        entries = self.entries[start:self.steps[index][1]]
        return bool(entries) and all(
            call is is_open and call(*arguments) >= 0 for _slot, call, arguments in entries
        )

    def _go_ahead(self, entries, rest, late):
        """Make calls; what has to wait goes to `rest`.  False if one fails."""
        waiting = [self.waits(entry, late) for entry in entries]
        skipped = 0
        for index, entry in enumerate(entries):
            slot, call, arguments = entry
            if skipped:
                skipped -= 1
                continue
            # What may be missing: the calls after it go with it.
            if call is finding and any(waiting[index:]):
                rest += entries[index:]
                break
            if waiting[index]:
                rest.append(entry)
                continue
            result = call(*arguments)
            if result < 0:
                skipped = self.skipped(call, arguments)
                if skipped is None:
                    return False
            elif slot is not None:
                slot.value = result
        return True

    def waits(self, entry, late):
        """Whether a call depends on what isn't there yet; then what depends on it waits, too."""
        slot, call, arguments = entry
        if getattr(call, "__self__", None) is not self and not any(
            id(argument) in late for argument in arguments
        ):
            return False
        if slot is not None:
            late.add(id(slot))
        if arguments and arguments[0] == abi.SYS_fsconfig:
            late.add(id(arguments[1]))  # what comes after it on this context
        return True

    def take(self):
        """Return the descriptors that were opened, as a list, and forget them."""
        if self.ahead is not None:
            self.overlay, self.entries, self.steps = self.ahead
            self.ahead, self.ahead_outcomes = None, []
        taken = [slot.value for slot in self.owned if slot.value >= 0]
        taken += [fd for fd in self.opened if fd >= 0]
        for slot in self.owned:
            slot.value = -1
        self.opened = []
        self.is_staged = False
        self.leave_places()
        return taken

    def leave_places(self):
        """Find every place by its path again: something else may lie there now."""
        for place in self.places:
            place.fd.value = -1
            place.lacks = False

    def close_contexts(self):
        """Close what only the calls needed: the long way may be short of descriptors."""
        for slot in self.contexts:
            if slot.value >= 0:
                os.close(slot.value)
                slot.value = -1

    def drop_mount(self, step):
        """Forget the mount of a step that failed: what goes into it has to find the other one."""
        operation, _end, _outcome, slot = step
        if slot is not None and operation not in self.sources and slot.value >= 0:
            self.opened.append(slot.value)
            slot.value = -1

    # -- what is more than a list of calls ----------------------------------------------

    def bind(self, operation, source, path, place, name):
        """Attach a bind at `path`, made in its place if missing; below 0: the long way."""
        if place.fd.value < 0 and len(place.binds) > 1:
            self.find(place)
        fd = place.fd.value
        if fd >= 0 and operation in self.ready:
            return quick(_MOVE_MOUNT, source, b"", fd, name, ATTACH_BY_NAME)
        if fd >= 0 and operation in self.directories:
            # A directory is never attached to a link.  Where one was missing the next will be: a
            # wrong guess costs a call.
            if not place.lacks:
                if syscall(_MOVE_MOUNT, source, b"", fd, name, ATTACH_BY_NAME) == 0:
                    return 0
                place.lacks = get_errno() == ENOENT
                self.there.discard(place.path)
            if place.lacks and mkdirat(fd, name, _DIRECTORY_MODE) == 0:
                return quick(_MOVE_MOUNT, source, b"", fd, name, ATTACH_BY_NAME)
        return self.bind_anywhere(operation, source, path, place, name)

    def bind_siblings(self, siblings, place):
        """Attach many binds in one place, as `bind` does each.

        Below 0, the rest takes the long way: -1 where none is attached, -2 where the first is, …
        """
        clones = [self.gathered[operation] for operation in siblings.operations]
        fd, done = place.fd.value, 0
        if fd < 0:
            fd = self.look(place)
        if fd >= 0 and (self.ready.issuperset(siblings.operations)
                        or self.directories.issuperset(siblings.operations)):
            for clone, name in zip(clones, siblings.names, strict=True):
                # A directory is never attached to a link.
                if quick(_MOVE_MOUNT, clone, b"", fd, name, ATTACH_BY_NAME) < 0:
                    break  # the next ones will be missing, too
                done += 1
        if done < len(clones) and fd >= 0 and self.may_make_in(fd):
            place.fd.value = fd
        for index in range(done, len(clones)):
            operation, name = siblings.operations[index], siblings.names[index]
            source = c_int(clones[index])
            if self.bind(operation, source, siblings.below + name, place, name) < 0:
                return -1 - index
        return 0

    def bind_anywhere(self, operation, source, path, place, name):
        """Do the same where nothing is known of what is there."""
        if place.fd.value < 0 or self.make(operation, source.value, place.fd, name) < 0:
            target = syscall(_OPENAT2, self.root, path, _ANY_NO_LINKS, 24)
            if target >= 0:
                self.opened.append(target)
                # A file on a directory, or the other way round, is EINVAL.
                return syscall(_MOVE_MOUNT, source, b"", target, b"", ATTACH)
            if (place.fd.value >= 0 or get_errno() != ENOENT or self.enter(place) < 0
                    or self.make(operation, source.value, place.fd, name) < 0):
                return -1
        return syscall(_MOVE_MOUNT, source, b"", place.fd, name, ATTACH_BY_NAME)

    def source(self, operation):
        """Return the descriptor of a bind's clone."""
        slot = self.sources.get(operation)
        return self.gathered[operation] if slot is None else slot.value

    def make(self, operation, source, directory, name):
        """Make the mountpoint of a bind where there is nothing yet; below 0 where there is.

        source: the descriptor of its clone.
        """
        if operation in self.directories:
            return mkdirat(directory, name, _DIRECTORY_MODE)
        try:
            if stat.S_ISDIR(os.fstat(source).st_mode):
                return mkdirat(directory, name, _DIRECTORY_MODE)
        except OSError:
            return -1
        return mknodat(directory, name, _FILE, 0)

    def enter(self, place):
        """Open a place, made if missing; below 0 where that takes the long way."""
        if self.find(place) == 0:
            return 0
        above = place.above
        if (get_errno() != ENOENT or above is None
                or (above.fd.value < 0 and self.enter(above) < 0)
                or mkdirat(above.fd, place.name, _DIRECTORY_MODE) < 0):
            return -1
        fd = openat(above.fd, place.name, DIRECTORY)
        if fd < 0:
            return -1
        self.opened.append(fd)
        place.fd.value = fd
        return 0

    def find(self, place):
        """Open a place that is there, and in which may be made what is missing; below 0: not so."""
        fd = self.look(place)
        if fd < 0 or not self.may_make_in(fd):
            return -1
        place.fd.value = fd
        return 0

    def look(self, place):
        """Return the descriptor of a place that is there, below 0 where that fails."""
        # What was made in the upper is in no mount that has come to lie over it.
        how = resolve.DIRECTORY_OF_THE_ROOT if place.of_the_root else resolve.REAL_DIRECTORY
        fd = syscall(_OPENAT2, self.root, place.path, how, 24)
        if fd >= 0:
            self.opened.append(fd)
        return fd

    def may_make_in(self, directory):
        """Whether what is made in a directory has the mode it is made with: no ACL takes bits."""
        return (
            syscall(abi.SYS_getxattrat, directory, b".", 0, b"system.posix_acl_default",
                    _NO_VALUE, _NO_VALUE_SIZE) < 0 and get_errno() in (ENODATA, EOPNOTSUPP)
        )

    def link(self, operation, only_if, *arguments):
        """Make a symlink where the host has what it is for."""
        if faccessat(abi.AT_FDCWD, only_if, 0, abi.AT_SYMLINK_NOFOLLOW) == 0:
            return symlinkat(*arguments)
        self.outcomes.append((operation, "skipped", f"no {operation.only_if} here"))
        return 0

    def skipped(self, call, arguments):
        """Return how many entries follow that belong to what is missing; None: it isn't that."""
        if call is not finding or get_errno() not in (ENOENT, ENOTDIR):
            return None
        operation, count = self.skips[id(arguments)]
        self.outcomes.append((operation, "skipped", "missing"))
        return count

    def stage_null(self, directory):
        """Attach the host's /dev/null in a private directory: from there it can be cloned.

        It may have been gathered in another mount namespace, where alone it could be before.
        """
        self.is_staged = (
            self.hides_files and mknodat(directory, b"null", _FILE, 0) == 0
            and quick(_MOVE_MOUNT, self.null, b"", directory, b"null", ATTACH_BY_NAME) == 0
        )

    def has_hierarchies(self, text, names, is_unified):
        """Return 0 if this process has these cgroup hierarchies, and they are used so, else -1."""
        from sandboxfs.build import cgroups

        try:
            return 0 if cgroups.has(text, names, is_unified) else -1
        except OSError:
            return -1

    def note_hierarchies(self, operation, hierarchies):
        """Take note that an operation's hierarchies were mounted; returns 0."""
        from sandboxfs.build import cgroups

        self.outcomes += [cgroups.outcome(operation, names) for names in hierarchies]
        return 0

    def has_no_submounts(self):
        """Return 0 if nothing is mounted in the root by itself, else -1."""
        return -1 if self.submounts else 0


def cloned(slot, directory, path, flags, attributes):
    """Return the entries that clone a mount to a slot, with attributes (struct mount_attr)."""
    if HAS_OPEN_TREE_ATTR:
        return [(slot, quick, (abi.SYS_open_tree_attr, directory, path, flags, attributes, 32))]
    how = abi.AT_EMPTY_PATH | flags & abi.AT_RECURSIVE
    return [(slot, quick, (_OPEN_TREE, directory, path, flags)),
            (None, quick, (_SETATTR, slot, b"", how, attributes, 32))]


def is_canonical(path):
    """Whether a path is absolute and has nothing but names."""
    if path[:1] == b"/" and path[-1:] != b"/" and b"//" not in path and b"/." not in path:
        return True
    return path == os.path.normpath(b"/" + path.lstrip(b"/"))


def may_have_group_bit(mode):
    """Whether a tmpfs's ``mode=`` sets the set-group-ID bit, or is nothing we understand."""
    return not mode or bool(mode.strip(b"01234567")) or bool(int(mode, 8) & 0o2000)


def is_open(slot):
    """Return 0 or more if a slot has a descriptor, else below 0."""
    return slot.value


def is_empty(directory):
    """Return 0 if nothing is in a directory (its slot), else -1."""
    return -1 if os.listdir(directory.value) else 0


def lists_nothing(number, directory, buffer, size):
    """The same by getdents64(2): two calls instead of eight.

    A file system needn't list these two, nor everything at once: FUSE may do as it likes.
    """
    if quick(number, directory, buffer, size) != _NOTHING_LISTED:
        return -1
    listed = buffer[:_NOTHING_LISTED]
    return 0 if (
        listed[19:21] == b".\0" and listed[43:46] == b"..\0"
        and quick(number, directory, buffer, size) == 0
    ) else -1
