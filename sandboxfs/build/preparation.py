"""One pass over a plan: the system calls of its usual case, for all builds of it."""


from sandboxfs.build import mountpoints
from sandboxfs.build.calls import (
    ATTACH,
    ATTACH_BY_NAME,
    DIRECTORY,
    READ_ONLY,
    THE_LONG_WAY,
    Calls,
    Place,
    cloned,
    faccessat,
    finding,
    is_canonical,
    is_empty,
    lists_nothing,
    may_have_group_bit,
    mkdirat,
    mknodat,
    openat,
    quick,
    symlinkat,
)
from sandboxfs.build.compiled import cleaned, compile_once
from sandboxfs.build.siblings import Siblings
from sandboxfs.kernel import abi, resolve
from sandboxfs.kernel import system as os
from sandboxfs.kernel.foreign import c_int, string_buffer
from sandboxfs.kernel.syscalls import MACHINE
from sandboxfs.plan import operations as kinds

_FSCONFIG = abi.SYS_fsconfig
_CREATE = (abi.FSCONFIG_CMD_CREATE, None, None, 0)
_CLONE = abi.OPEN_TREE_CLONE | abi.OPEN_TREE_CLOEXEC | abi.AT_EMPTY_PATH
_CLONE_TREE = _CLONE | abi.AT_RECURSIVE
_CLONE_NAMED = (abi.OPEN_TREE_CLONE | abi.OPEN_TREE_CLOEXEC | abi.AT_RECURSIVE
                | abi.AT_SYMLINK_NOFOLLOW)
_LOOK = abi.OPEN_TREE_CLOEXEC | abi.AT_SYMLINK_NOFOLLOW
_NO_ESCAPE = abi.MOUNT_ATTR_NOSUID | abi.MOUNT_ATTR_NODEV
_HIDING = (
    (abi.FSCONFIG_SET_STRING, b"nr_inodes", b"1", 0),
    (abi.FSCONFIG_SET_STRING, b"nr_blocks", b"1", 0),
    (abi.FSCONFIG_SET_FLAG, b"ro", None, 0),
)
_TMP = ((abi.FSCONFIG_SET_STRING, b"source", b"tmpfs", 0),)  # a tmpfs has mode 1777
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


def prepared(plan):
    """Return the `Calls` of a plan that `compiled.compile_once` has seen."""
    calls = Calls()
    _Preparation(calls, plan, plan.compiled.fields).prepare()
    return calls


def go_ahead(plan):
    """Make what a build of a plan needs of file systems of its own, for the next build of it.

    Called in the namespaces the build will be done in, by a process that does nothing else.
    Returns whether that was possible: if not, the build makes it all.
    """
    compiled = compile_once(plan)
    if plan.engine == "attached" or plan.live is not None:
        return False
    calls = compiled.calls.pop() if compiled.calls else prepared(plan)
    if calls.is_ahead():
        compiled.calls.append(calls)
        return True
    calls.null.value = -1  # of an earlier build
    umask = os.umask(0)
    done = False
    try:
        done = calls.go_ahead()
    finally:
        os.umask(umask)
        if not done:
            for fd in calls.take():
                os.close(fd)
        compiled.calls.append(calls)
    return done


class _Preparation:
    """One pass over a plan.

    made_in: by path, the slots of the tmpfs mounts that only this build has seen, in which a
    mountpoint is certain to be missing.  kernels: by path, the slots of the kernel's own file
    systems that were mounted, and the names in them that are no links.
    places: by path, the `Place`s; what is attached on one hides it and all below.  bound: the
    destinations of binds, in which no place is: others may rename what they have there.
    covered: of the paths of the root, those something lies on.  lost: whether a mount may lie
    anywhere, or have looked anywhere for its mountpoint.  upper: the slot of the upper, and the
    number of entries that make it.
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
        self.covered = set()
        self.lost = False
        self.upper = None, 0
        user = plan.user
        self.foreign_root = user is not None and user.outside and bool(
            user.root_uid or user.root_gid
        )

    def prepare(self):
        calls = self.calls
        for operation in self.plan.compiled.operations:
            kind = type(operation)
            self.entries = []
            if kind is kinds.Overlay:
                calls.overlay = self.overlay(operation)
            elif kind is Siblings:
                self.siblings(operation)
            elif kind not in (kinds.Lower, kinds.PlainRoot, kinds.Pivot):
                self.step(operation, kind)
        if calls.overlay is not None and self.plan.user is None:
            self.ready_mountpoints()

    def ready_mountpoints(self):
        """Have the mountpoints of many binds made before the upper is joined."""
        places = [place for place in self.calls.places
                  if place.of_the_root and len(place.binds) >= mountpoints.MANY]
        if places:
            upper, index = self.upper
            self.calls.overlay.insert(index, (
                None, mountpoints.Upper(self.calls).make, (self.calls.lower, upper, places)))

    def step(self, operation, kind):
        calls = self.calls
        prepare = _KINDS.get(kind)
        mount = prepare(self, operation) if prepare is not None else None
        slot = mount if isinstance(mount, c_int) else None
        if getattr(operation, "no_follow", False):
            # Links on the way to it are followed and not reported: it may lie anywhere.
            self.made_in, self.kernels, self.places = {}, {}, {}
            self.lost = True
        elif kind not in _AT_THEIR_DESTINATION:
            self.places = {}
        name = None  # of the outcome; what cgroup hierarchies there are is noted at the build
        if mount is None:
            if self.may_be_led(operation):
                self.lost, self.places = True, {}
            self.forget(operation)
            self.entries = [*THE_LONG_WAY]
        elif slot is not None and kind is not kinds.Cgroup:
            name = "bind" if kind is kinds.Bind else getattr(operation, "type", "tmpfs")
        calls.entries += self.entries
        outcome = name and (operation, name, "")
        calls.steps.append((operation, len(calls.entries), outcome, slot))

    def may_be_led(self, operation):
        """Whether links may lead an operation that isn't prepared to another place of the root.

        What it finds there must not be of later ones' making.
        """
        if getattr(operation, "destination", None) is None:
            return False
        path = cleaned(operation)
        return not any(path.startswith(known + b"/") for known in (*self.made_in, *self.kernels))

    def forget(self, operation):
        """What an operation mounts in its own way, or over others, isn't known any more."""
        if getattr(operation, "destination", None) is not None:
            path = self.compiled[operation][0]
            if not is_canonical(path):
                path = cleaned(operation)
            self.places.pop(path, None)
            self.covered.add(path)
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
        self.entries += [
            (None, quick, (_FSCONFIG, context, *setting)) for setting in (*settings, _CREATE)
        ]
        return self.open(abi.SYS_fsmount, context, abi.FSMOUNT_CLOEXEC, attributes)

    def directory_in(self, parent, name, mode):
        """Make a directory where there is none yet; returns its slot."""
        self.entries.append((None, mkdirat, (parent, name, mode)))
        slot = self.slot()
        self.entries.append((slot, openat, (parent, name, DIRECTORY)))
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
        self.entries.append((None, mkdirat, (parent, name, resolve.DIRECTORY_MODE)))
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
            of_the_root = not self.lost and path not in self.covered and (
                above is None or above.of_the_root)
            place = self.places[path] = Place(above, path or b"/", name, of_the_root)
            self.calls.places.append(place)
        return place

    def attach(self, mount, target, name=b""):
        flags = abi.MOVE_MOUNT_F_EMPTY_PATH if name else ATTACH
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
        self.upper = upper, len(self.entries)
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
            self.made_in[path if is_canonical(path) else cleaned(operation)] = mount
        return mount

    def cgroup(self, operation):
        from sandboxfs.build import cgroups

        return cgroups.prepare(self, operation)

    def bind(self, operation):
        if is_special(operation):
            return None
        path = self.compiled[operation][0]
        head, _, name = path.rpartition(b"/")
        place = self.place_of_binds(head, path)
        self.forget(operation)
        source = self.calls.sources[operation] = c_int(-1)
        if place is not None:
            place.binds.append((operation, name))
            self.entries.append((None, self.calls.bind, (operation, source, path, place, name)))
            return source
        target = self.open(abi.SYS_openat2, self.calls.root, path, resolve.ANY_NO_LINKS, 24)
        # A file on a directory, or the other way round, is EINVAL.
        return self.attach(source, target)

    def place_of_binds(self, head, path):
        """Return the `Place` for a bind on `path`, whose parent is `head`, or None."""
        # A root that isn't ours alone may be changed by others meanwhile.
        if self.calls.overlay is None or self.foreign_root or not is_canonical(path):
            return None
        return self.place(head)

    def siblings(self, siblings):
        """Prepare many binds in one `Place`; where there is more to be known, each by itself."""
        below = siblings.below
        place = self.place_of_binds(below[:-1], below + siblings.names[0])
        if place is None or any(
            known.startswith(below) for known in (*self.made_in, *self.kernels)
        ) or any(below.startswith(known + b"/") for known in self.kernels):
            for operation in siblings.operations:
                self.entries = []
                self.step(operation, kinds.Bind)
            return
        paths = [below + name for name in siblings.names]
        for path in paths:
            self.places.pop(path, None)
        self.covered.update(paths)
        self.bound.update(paths)
        calls = self.calls
        place.binds += zip(siblings.operations, siblings.names, strict=True)
        calls.entries.append((None, calls.bind_siblings, (siblings, place)))
        calls.steps.append((siblings, len(calls.entries), None, None))

    def tmp(self, operation):
        if operation.always or self.calls.overlay is None or any(
            # Only what has the word in it is worth being cleaned.
            b"tmp" in fields[0] and hasattr(step, "destination")
            and (cleaned(step) + b"/").startswith(b"/tmp/")
            for step, fields in self.compiled.items()
        ):
            return None
        self.entries.append((None, self.calls.has_no_submounts, ()))
        # Nothing of the plan is in it: it is empty if the only lower has an empty one, and that
        # is told sooner than by overlayfs.
        is_only = self.has_one_lower()
        target = self.slot()
        self.entries.append((target, openat, (
            self.calls.lower if is_only else self.calls.root, b"tmp",
            os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)))
        number = abi.GETDENTS64_BY_MACHINE.get(MACHINE)
        if number is None:
            self.entries.append((None, is_empty, (target,)))
        else:
            # As for statx(2): each size is a type, which takes time to make.
            self.entries.append((None, lists_nothing, (number, target, string_buffer(256), 256)))
        mount = self.filesystem(b"tmpfs", _TMP, _NO_ESCAPE)
        if is_only:
            return self.attach(mount, self.calls.root, b"tmp")
        return self.attach(mount, target)

    def has_one_lower(self):
        """Whether the root is what one lower has, but for what the plan says."""
        lowers = [step for step in self.plan.operations if type(step) is kinds.Lower]
        return len(lowers) == 1 and self.calls.joined.upper is None and not self.lost

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
        self.entries.append((None, mknodat, (parent, name, mode, number)))
        return True

    def symlink(self, operation):
        _path, head, name = self.compiled[operation]
        parent = self.made_in.get(head)
        if parent is None:
            return None
        self.made.add(head + b"/" + name)
        arguments = (os.fsencode(operation.target), parent, name)
        if operation.only_if is None:
            self.entries.append((None, symlinkat, arguments))
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
        if parent is None:
            target = self.find(
                self.slot(), abi.SYS_openat2, self.calls.root, path, resolve.ANY, 24)
            self.attach(self.hiding(is_directory), target)
        elif name in _OFTEN_MISSING or (name == b"kcore" and not has_kcore()):
            # It opens no file before it looks, as openat2 does.
            target = self.find(self.slot(), abi.SYS_open_tree, parent, name, _LOOK)
            self.attach(self.hiding(is_directory), target)
        else:
            mount = self.hiding(is_directory)
            self.find(None, abi.SYS_move_mount, mount, b"", parent, name, ATTACH_BY_NAME)
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
            (slot, _call, clone), *more = cloned(self.slot(), parent, b"", _CLONE_TREE, READ_ONLY)
            self.entries.append((slot, quick, clone))
        else:
            (slot, _call, clone), *more = cloned(
                self.slot(), parent, name, _CLONE_NAMED, READ_ONLY)
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


def has_kcore():
    """Whether this kernel shows its memory: it is built with that or without."""
    return faccessat(abi.AT_FDCWD, b"/proc/kcore", 0, abi.AT_SYMLINK_NOFOLLOW) == 0


def is_special(bind):
    """Whether a bind takes more than a clone that is attached."""
    return (bind.idmap is not None or bind.overlay or bind.nested or bind.copy_symlink
            or bind.no_follow)


_AT_THEIR_DESTINATION = (
    kinds.Filesystem, kinds.Bind, kinds.Node, kinds.Symlink, kinds.Directory, kinds.Cgroup,
)
_KINDS = {
    kinds.Filesystem: _Preparation.mount, kinds.Bind: _Preparation.bind,
    kinds.Cgroup: _Preparation.cgroup,
    kinds.Tmp: _Preparation.tmp, kinds.Directory: _Preparation.directory,
    kinds.Node: _Preparation.node, kinds.Symlink: _Preparation.symlink,
    kinds.Mask: _Preparation.mask, kinds.ReadonlyPath: _Preparation.readonly_path,
}
