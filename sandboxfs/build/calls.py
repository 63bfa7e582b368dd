"""The system calls of the usual case, prepared once for all builds of a plan.

Mostly every rule of a plan comes out the same way: the mountpoint is there, the file system is
granted, /tmp is empty.  For that case the calls of an operation are known ahead, with all their
arguments, and a build only has to make them.  A call that fails ends its operation's list, and the
operation is done again by the function of its kind (`assemble`, `mounts`, `devices`, `masks`),
which knows every other case and words the errors.  So nothing is decided here, and whatever
these lists do, those functions would have done.
"""

import _stat as stat
from errno import ENODATA, ENOENT, ENOTDIR, EOPNOTSUPP

from sandboxfs.build.compiled import cleaned
from sandboxfs.kernel import abi, resolve
from sandboxfs.kernel import system as os
from sandboxfs.kernel.foreign import QuickFunction, c_int, c_uint64, get_errno, string_buffer
from sandboxfs.kernel.syscalls import HAS_OPEN_TREE_ATTR, function, libc, packed, syscall
from sandboxfs.plan import operations as kinds

# Prepared calls are made where no other thread waits for the interpreter's lock, and the long way
# finds out why one failed.
quick = libc.function("syscall", QuickFunction)
# What is masked or made read-only may be missing: the call that finds it is this one.
finding = function("syscall")
_mkdirat, _openat, _mknodat, _symlinkat = [
    libc.function(name, QuickFunction) for name in ("mkdirat", "openat", "mknodat", "symlinkat")
]
_faccessat = function("faccessat")
_CREATE = (abi.FSCONFIG_CMD_CREATE, None, None, 0)
_DIRECTORY = abi.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ATTACH = abi.MOVE_MOUNT_F_EMPTY_PATH | abi.MOVE_MOUNT_T_EMPTY_PATH
_ATTACH_BY_NAME = abi.MOVE_MOUNT_F_EMPTY_PATH
_CLONE = abi.OPEN_TREE_CLONE | abi.OPEN_TREE_CLOEXEC | abi.AT_EMPTY_PATH
_CLONE_TREE = _CLONE | abi.AT_RECURSIVE
_CLONE_NAMED = (abi.OPEN_TREE_CLONE | abi.OPEN_TREE_CLOEXEC | abi.AT_RECURSIVE
                | abi.AT_SYMLINK_NOFOLLOW)
_ANY, _ANY_NO_LINKS = resolve.ANY, resolve.ANY_NO_LINKS
_DIRECTORY_MODE, _FILE = resolve.DIRECTORY_MODE, stat.S_IFREG | resolve.FILE_MODE
# Names of this module are found faster than those of another.
_OPENAT2, _MOVE_MOUNT, _OPEN_TREE = abi.SYS_openat2, abi.SYS_move_mount, abi.SYS_open_tree
_SETATTR = abi.SYS_mount_setattr
_NO_ESCAPE = abi.MOUNT_ATTR_NOSUID | abi.MOUNT_ATTR_NODEV
_READ_ONLY = packed(abi.MOUNT_ATTR_RDONLY, 0, 0, 0)  # struct mount_attr
_NO_VALUE = packed(0, 0)  # struct xattr_args: whether there is one is all that is asked
_NO_VALUE_SIZE = c_uint64(16)  # a seventh argument lies on the stack, where an int leaves half
_HIDING = (
    (abi.FSCONFIG_SET_STRING, b"nr_inodes", b"1", 0),
    (abi.FSCONFIG_SET_STRING, b"nr_blocks", b"1", 0),
    (abi.FSCONFIG_SET_FLAG, b"ro", None, 0),
)
_TMP = ((abi.FSCONFIG_SET_STRING, b"source", b"tmpfs", 0),
        (abi.FSCONFIG_SET_STRING, b"mode", b"1777", 0))
# A directory without entries: "." and "..", 24 bytes each in struct linux_dirent64, whose name
# begins at the 19th.
_NOTHING_LISTED = 48
# A first guess saves a look; a wrong one is found by the kernel and costs another.
_USUALLY_FILES = (
    b"kcore", b"keys", b"latency_stats", b"timer_list", b"timer_stats", b"sched_debug",
    b"sysrq-trigger", b"interrupts",
)
_OFTEN_MISSING = (b"asound", b"latency_stats", b"sched_debug", b"scsi", b"timer_stats")
# Entries of the kernel's own file systems that are no links, whatever the kernel, and mostly there:
# they are named in the mount that was made a moment ago, without a descriptor of each.
_NO_LINKS = {
    b"proc": frozenset((
        b"acpi", b"bus", b"fs", b"interrupts", b"irq", b"kcore", b"keys", b"sys",
        b"sysrq-trigger", b"timer_list", *_OFTEN_MISSING,
    )),
    b"sysfs": frozenset((b"devices", b"firmware", b"fs", b"kernel", b"module")),
}


def never(*_arguments):
    """Stand for the calls of an operation that has no usual case."""
    return -1


THE_LONG_WAY = ((None, never, ()),)


class Place:
    """A directory of the root in which mountpoints are made, opened once for all of them.

    above: the `Place` that has it under `name`, None for the root itself.  fd: -1 unless open.
    """

    __slots__ = ("above", "fd", "name", "path")

    def __init__(self, above, path, name):
        self.above = above
        self.path = path
        self.name = name
        self.fd = -1


class Calls:
    """The prepared calls of one plan; used by one build at a time.

    overlay: the entries of the root itself; entries: those of all operations after it; joined: the
    operation of `overlay`, None without one.  An entry is (slot that gets the result or None,
    function, arguments).  A slot is a C int that later entries have among their arguments;
    `lower`, `null` and `sources` (by operation) are filled by the materials, the others are
    descriptors that a build opened.
    steps: list of (operation, end of its entries, its usual outcome or None, slot of its mount
    or None).  skips: by the id of the arguments of a call that finds what may be missing,
    (operation, number of entries after it).  hiding_tmpfs: the slot of what hides directories.
    ahead: what `overlay`, `entries` and `steps` were before a part of them was made ahead, by the
    process pid, or None.
    """

    __slots__ = (
        "ahead", "ahead_outcomes", "contexts", "directories", "entries", "hides_files",
        "hiding_tmpfs", "is_staged", "joined", "lower", "null", "opened", "outcomes", "overlay",
        "owned", "pid", "places", "root", "scratch", "skips", "sources", "steps", "submounts",
    )

    def __init__(self, plan, compiled):
        self.entries = []
        self.steps = []
        self.owned = []
        self.contexts = []
        self.opened = []
        self.outcomes = []
        self.lower, self.null, self.root = c_int(-1), c_int(-1), c_int(-1)
        self.sources = {}
        self.directories: set[object] = set()
        self.places = []
        self.hiding_tmpfs = None
        self.hides_files = self.is_staged = False
        self.skips = {}
        self.scratch = None
        self.submounts = False
        self.overlay = self.joined = None
        self.ahead, self.ahead_outcomes = None, []
        self.pid = 0
        _Preparation(self, plan, compiled).prepare()

    def begin(self, materials):
        """Take the descriptors that a build starts from."""
        self.is_ahead()
        self.lower.value = materials.lowers[0].fd if materials.lowers else -1
        self.null.value = materials.null
        self.directories = materials.directories
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
            waits = waits or type(operation) is kinds.Bind or its[:1] == [*THE_LONG_WAY] or (
                # What is mounted below a path comes before the path is covered or cloned.
                deep and type(operation) in (kinds.Mask, kinds.ReadonlyPath))
            deep = deep or (type(operation) is kinds.Filesystem and any(
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
            place.fd = -1

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
        # Where one was missing the next will be: a wrong guess costs a call.
        fd = place.fd
        if fd >= 0 and operation in self.directories and _mkdirat(fd, name, _DIRECTORY_MODE) == 0:
            return quick(_MOVE_MOUNT, source, b"", fd, name, _ATTACH_BY_NAME)
        if place.fd < 0 or self.make(operation, source, place.fd, name) < 0:
            target = syscall(_OPENAT2, self.root, path, _ANY_NO_LINKS, 24)
            if target >= 0:
                self.opened.append(target)
                # A file on a directory, or the other way round, is EINVAL.
                return syscall(_MOVE_MOUNT, source, b"", target, b"", _ATTACH)
            if (place.fd >= 0 or get_errno() != ENOENT or self.enter(place) < 0
                    or self.make(operation, source, place.fd, name) < 0):
                return -1
        return syscall(_MOVE_MOUNT, source, b"", place.fd, name, _ATTACH_BY_NAME)

    def make(self, operation, source, directory, name):
        """Make the mountpoint of a bind where there is nothing yet; below 0 where there is."""
        if operation in self.directories:
            return _mkdirat(directory, name, _DIRECTORY_MODE)
        try:
            if stat.S_ISDIR(os.fstat(source.value).st_mode):
                return _mkdirat(directory, name, _DIRECTORY_MODE)
        except OSError:
            return -1
        return _mknodat(directory, name, _FILE, 0)

    def enter(self, place):
        """Open a place, made if missing; below 0 where that takes the long way."""
        fd = syscall(_OPENAT2, self.root, place.path, resolve.REAL_DIRECTORY, 24)
        if fd < 0:
            above = place.above
            if (get_errno() != ENOENT or above is None or (above.fd < 0 and self.enter(above) < 0)
                    or _mkdirat(above.fd, place.name, _DIRECTORY_MODE) < 0):
                return -1
            fd = _openat(above.fd, place.name, _DIRECTORY)
            if fd < 0:
                return -1
            self.opened.append(fd)
            place.fd = fd
            return 0
        self.opened.append(fd)
        # An ACL for what is made there would take bits from its mode.
        if (syscall(abi.SYS_getxattrat, fd, b".", 0, b"system.posix_acl_default",
                    _NO_VALUE, _NO_VALUE_SIZE) >= 0 or get_errno() not in (ENODATA, EOPNOTSUPP)):
            return -1
        place.fd = fd
        return 0

    def link(self, operation, only_if, *arguments):
        """Make a symlink where the host has what it is for."""
        if _faccessat(abi.AT_FDCWD, only_if, 0, abi.AT_SYMLINK_NOFOLLOW) == 0:
            return _symlinkat(*arguments)
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
            self.hides_files and _mknodat(directory, b"null", _FILE, 0) == 0
            and quick(_MOVE_MOUNT, self.null, b"", directory, b"null", _ATTACH_BY_NAME) == 0
        )

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


def lists_nothing(number, directory, buffer):
    """The same by getdents64(2): two calls instead of eight.

    A file system needn't list these two, nor everything at once: FUSE may do as it likes.
    """
    return 0 if (
        syscall(number, directory, buffer, 1024) == _NOTHING_LISTED
        and buffer[19:21] == b".\0" and buffer[43:46] == b"..\0"
        and syscall(number, directory, buffer, 1024) == 0
    ) else -1


class _Preparation:
    """One pass over a plan.

    made_in: by path, the slots of the tmpfs mounts that only this build has seen, in which a
    mountpoint is certain to be missing.  kernels: by path, the slots of the kernel's own file
    systems that were mounted, and the names in them that are no links.
    places: by path, the `Place`s; what is attached on one hides it and all below.  bound: the
    destinations of binds, in which no place is: others may rename what they have there.
    """

    def __init__(self, calls, plan, compiled):
        self.calls = calls
        self.plan = plan
        self.compiled = compiled
        self.entries = []
        self.made_in = {}
        self.made = set()
        self.kernels = {}
        self.hides_directories = False
        self.found = 0
        self.places = {}
        self.bound = set()
        user = plan.user
        self.foreign_root = user is not None and user.outside and bool(
            user.root_uid or user.root_gid
        )

    def prepare(self):
        calls = self.calls
        for operation in self.plan.operations:
            kind = type(operation)
            self.entries = []
            if kind is kinds.Overlay:
                calls.overlay = self.overlay(operation)
            elif kind not in (kinds.Lower, kinds.PlainRoot, kinds.Pivot):
                self.step(operation, kind)

    def step(self, operation, kind):
        calls = self.calls
        prepare = _KINDS.get(kind)
        mount = prepare(self, operation) if prepare is not None else None
        slot = mount if isinstance(mount, c_int) else None
        if getattr(operation, "no_follow", False):
            # Links on the way to it are followed and not reported: it may lie anywhere.
            self.made_in, self.kernels, self.places = {}, {}, {}
        elif kind not in _AT_THEIR_DESTINATION:
            self.places = {}
        name = None
        if mount is None:
            self.forget(operation)
            self.entries = [*THE_LONG_WAY]
        elif slot is not None:
            name = "bind" if kind is kinds.Bind else getattr(operation, "type", "tmpfs")
        calls.entries += self.entries
        outcome = name and (operation, name, "")
        calls.steps.append((operation, len(calls.entries), outcome, slot))

    def forget(self, operation):
        """What an operation mounts in its own way, or over others, isn't known any more."""
        if getattr(operation, "destination", None) is not None:
            path = self.compiled[operation][0]
            if not is_canonical(path):
                path = cleaned(operation)
            self.places.pop(path, None)
            if type(operation) is kinds.Bind:
                self.bound.add(path)
            below = path + b"/"
            for known in (self.made_in, self.kernels):
                for place in list(known):
                    if place == path or place.startswith(below) or (
                        # What is bound may be a link itself.
                        known is self.kernels and type(operation) is kinds.Bind
                        and path.startswith(place + b"/")
                    ):
                        del known[place]

    # -- entries -------------------------------------------------------------------------

    def slot(self):
        slot = c_int(-1)
        self.calls.owned.append(slot)
        return slot

    def do(self, *call):
        self.entries.append((None, quick, call))

    def open(self, *call):
        slot = self.slot()
        self.entries.append((slot, quick, call))
        return slot

    def filesystem(self, type, settings, attributes):
        context = self.open(abi.SYS_fsopen, type, abi.FSOPEN_CLOEXEC)
        self.calls.contexts.append(context)
        for setting in (*settings, _CREATE):
            self.do(abi.SYS_fsconfig, context, *setting)
        return self.open(abi.SYS_fsmount, context, abi.FSMOUNT_CLOEXEC, attributes)

    def directory_in(self, parent, name, mode):
        """Make a directory where there is none yet; returns its slot."""
        self.entries.append((None, _mkdirat, (parent, name, mode)))
        slot = self.slot()
        self.entries.append((slot, _openat, (parent, name, _DIRECTORY)))
        return slot

    def mountpoint(self, path, how):
        """Find a mountpoint, or make it where it is certain to be missing.

        Returns (slot, b""), or (slot of its parent, name) in a tmpfs that nobody else has seen.
        """
        head, _, name = path.rpartition(b"/")
        # Directories that `..` takes back are made, too.
        parent = self.made_in.get(head) if is_canonical(path) else None
        if parent is None or path in self.made or self.foreign_root:
            if path.count(b"/") == 1 and len(path) > 1 and is_canonical(path):
                # A directory is never attached to a link, and none is followed at a path's end.
                return self.calls.root, name
            return self.open(abi.SYS_openat2, self.calls.root, path, how, 24), b""
        self.made.add(path)
        self.entries.append((None, _mkdirat, (parent, name, resolve.DIRECTORY_MODE)))
        return parent, name

    def place(self, path):
        """Return the `Place` of a canonical path, or None where mountpoints take the long way."""
        if path in self.bound:
            return None
        head, _, name = path.rpartition(b"/")
        above = self.place(head) if path else None
        if path and above is None:
            return None
        place = self.places.get(path)
        if place is None or place.above is not above:
            place = self.places[path] = Place(above, path or b"/", name)
            self.calls.places.append(place)
        return place

    def attach(self, mount, target, name=b""):
        flags = abi.MOVE_MOUNT_F_EMPTY_PATH if name else _ATTACH
        self.do(abi.SYS_move_mount, mount, b"", target, name, flags)
        return mount

    # -- kinds ---------------------------------------------------------------------------

    def overlay(self, operation):
        """The root: one lower whose directory has the attributes that a new upper has."""
        calls = self.calls
        calls.joined = operation
        scratch = []  # no mode: it is never attached
        if operation.size:
            scratch.append((abi.FSCONFIG_SET_STRING, b"size", operation.size.encode(), 0))
        calls.scratch = self.filesystem(b"tmpfs", scratch, 0)
        upper = self.directory_in(calls.scratch, b"upper0", 0o755)
        work = self.directory_in(calls.scratch, b"work0", 0o700)
        settings = [
            (abi.FSCONFIG_SET_STRING, b"source", b"overlay", 0),
            (abi.FSCONFIG_SET_STRING, b"redirect_dir", b"nofollow", 0),
            (abi.FSCONFIG_SET_STRING, b"metacopy", b"off", 0),
            (abi.FSCONFIG_SET_FD, b"lowerdir+", None, calls.lower),
            (abi.FSCONFIG_SET_FD, b"upperdir", None, upper),
            (abi.FSCONFIG_SET_FD, b"workdir", None, work),
        ]
        if operation.userxattr:
            settings.append((abi.FSCONFIG_SET_FLAG, b"userxattr", None, 0))
        calls.root = self.filesystem(
            b"overlay", settings, abi.MOUNT_ATTR_RDONLY if self.plan.compiled.sealed else 0
        )
        calls.owned.pop()  # the assembly owns it, however it was built
        return self.entries

    def mount(self, operation):
        if (operation.copy_up or operation.no_follow or operation.mode_from_mountpoint
                or operation.propagation or operation.label):
            return None
        path, type, settings = self.compiled[operation]
        target, name = self.mountpoint(path, resolve.REAL_DIRECTORY)
        mount = self.attach(self.filesystem(type, settings, operation.attributes), target, name)
        self.forget(operation)
        if type in _NO_LINKS and is_canonical(path):
            self.kernels[path] = mount, _NO_LINKS[type]
        # What is made in a directory that hands down its group takes more than one call.
        if type == b"tmpfs" and not any(
            key == b"mode" and may_have_group_bit(value) for _command, key, value, _fd in settings
        ):
            self.made_in[cleaned(operation)] = mount
        return mount

    def bind(self, operation):
        if (operation.idmap is not None or operation.overlay or operation.nested
                or operation.copy_symlink or operation.no_follow):
            return None
        path = self.compiled[operation][0]
        place = None
        # A root that isn't ours alone may be changed by others meanwhile.
        if self.calls.overlay is not None and not self.foreign_root and is_canonical(path):
            head, _, name = path.rpartition(b"/")
            place = self.place(head)
        self.forget(operation)
        source = self.calls.sources[operation] = c_int(-1)
        if place is not None:
            self.entries.append((None, self.calls.bind, (operation, source, path, place, name)))
            return source
        target = self.open(abi.SYS_openat2, self.calls.root, path, resolve.ANY_NO_LINKS, 24)
        # A file on a directory, or the other way round, is EINVAL.
        return self.attach(source, target)

    def tmp(self, operation):
        places = [cleaned(step) for step in self.plan.operations if hasattr(step, "destination")]
        if operation.always or self.calls.overlay is None or any(
            (place + b"/").startswith(b"/tmp/") for place in places
        ):
            return None
        self.entries.append((None, self.calls.has_no_submounts, ()))
        how = resolve.OpenHow(
            os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, 0,
            abi.RESOLVE_IN_ROOT | abi.RESOLVE_NO_MAGICLINKS,
        )
        target = self.open(abi.SYS_openat2, self.calls.root, b"/tmp", how, 24)
        number = abi.GETDENTS64_BY_MACHINE.get(os.uname().machine)
        if number is None:
            self.entries.append((None, is_empty, (target,)))
        else:
            self.entries.append((None, lists_nothing, (number, target, string_buffer(1024))))
        return self.attach(self.filesystem(b"tmpfs", _TMP, _NO_ESCAPE), target)

    def directory(self, operation):
        self.open(abi.SYS_openat2, self.calls.root, self.compiled[operation][0],
                  resolve.REAL_DIRECTORY, 24)
        return True

    def node(self, operation):
        _path, head, name, mode, number = self.compiled[operation]
        parent = self.made_in.get(head)
        if (parent is None or operation.by_bind or operation.uid or operation.gid
                or self.foreign_root or number >= 1 << 31):
            return None
        self.made.add(head + b"/" + name)
        self.entries.append((None, _mknodat, (parent, name, mode, number)))
        return True

    def symlink(self, operation):
        _path, head, name = self.compiled[operation]
        parent = self.made_in.get(head)
        if parent is None:
            return None
        self.made.add(head + b"/" + name)
        arguments = (os.fsencode(operation.target), parent, name)
        if operation.only_if is None:
            self.entries.append((None, _symlinkat, arguments))
        else:
            only_if = os.fsencode(operation.only_if)
            self.entries.append((None, self.calls.link, (operation, only_if, *arguments)))
        return True

    def mask(self, operation):
        path = self.compiled[operation][0]
        parent, name = self.named(path)
        is_directory = name not in _USUALLY_FILES
        if is_directory and self.calls.hiding_tmpfs is None:
            self.calls.hiding_tmpfs = self.filesystem(
                b"tmpfs", _HIDING, abi.MOUNT_ATTR_RDONLY | _NO_ESCAPE | abi.MOUNT_ATTR_NOEXEC
            )
        # A file's mount on a directory, or the other way round, is EINVAL.
        if parent is None or name in _OFTEN_MISSING:
            where = (self.calls.root, path) if parent is None else (parent, name)
            target = self.find(self.slot(), abi.SYS_openat2, *where, resolve.ANY, 24)
            self.attach(self.hiding(is_directory), target)
        else:
            mount = self.hiding(is_directory)
            self.find(None, abi.SYS_move_mount, mount, b"", parent, name, _ATTACH_BY_NAME)
        self.end_skip(operation)
        return True

    def hiding(self, is_directory):
        """Return the slot of a mount that hides a directory or a file: a first one, or a clone."""
        first = self.calls.hiding_tmpfs
        if not is_directory:
            self.calls.hides_files = True
            first = self.calls.null
        elif not self.hides_directories:
            self.hides_directories = True
            return first
        return self.open(abi.SYS_open_tree, first, b"", _CLONE)

    def readonly_path(self, operation):
        path = self.compiled[operation][0]
        parent, name = self.named(path)
        if parent is None:
            parent, name = self.find(
                self.slot(), abi.SYS_openat2, self.calls.root, path, resolve.ANY, 24), b""
            (slot, _call, clone), *more = cloned(self.slot(), parent, b"", _CLONE_TREE, _READ_ONLY)
            self.entries.append((slot, quick, clone))
        else:
            (slot, _call, clone), *more = cloned(
                self.slot(), parent, name, _CLONE_NAMED, _READ_ONLY)
            self.find(slot, *clone)
        self.entries += more
        self.attach(slot, parent, name)
        self.end_skip(operation)
        return True

    def find(self, slot, *call):
        """Have a call made that finds what may be missing; returns the slot of its result."""
        self.found = len(self.entries)
        self.entries.append((slot, finding, call))
        return slot

    def end_skip(self, operation):
        """The entries since `find` are left out where it finds nothing."""
        _slot, _call, arguments = self.entries[self.found]
        self.calls.skips[id(arguments)] = operation, len(self.entries) - self.found - 1

    def named(self, path):
        """Return (slot of a mount of ours, name) of what is no link in it, or (None, name)."""
        head, _, name = path.rpartition(b"/")
        slot, names = self.kernels.get(head, (None, ()))
        return (slot if name in names else None), name


_AT_THEIR_DESTINATION = (
    kinds.Filesystem, kinds.Bind, kinds.Node, kinds.Symlink, kinds.Directory,
)
_KINDS = {
    kinds.Filesystem: _Preparation.mount, kinds.Bind: _Preparation.bind,
    kinds.Tmp: _Preparation.tmp, kinds.Directory: _Preparation.directory,
    kinds.Node: _Preparation.node, kinds.Symlink: _Preparation.symlink,
    kinds.Mask: _Preparation.mask, kinds.ReadonlyPath: _Preparation.readonly_path,
}
