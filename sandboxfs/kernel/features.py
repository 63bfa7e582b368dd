"""What this kernel allows this user: every answer found by doing the thing once.

Version numbers say little: distributions carry changes back, and policies (seccomp, LSMs,
sysctls) forbid what a kernel could do.  What would change this process is tried in a forked
child, and what needs a mount in a mount namespace of that child; nothing stays behind.
"""

import os
from _signal import SIGKILL
from errno import EINVAL, ENOSYS

import prctl

from sandboxfs.kernel import abi, fscontext, resolve, syscalls, usernamespace
from sandboxfs.kernel.probe import (
    Finding,
    apart,
    attach_to_root,
    enter_mount_namespace,
    enter_user_namespace,
    in_child,
    tried,
    worded,
)
from sandboxfs.kernel.smallest_images import erofs_image, image_files, loop_device, squashfs_image

OPEN_TREE_NAMESPACE = 2  # Linux 7.0
NOBODY = 65534

_CLONE = abi.OPEN_TREE_CLONE | abi.AT_EMPTY_PATH
_DIRECTORY = abi.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class Features:
    """The findings of this process, each probed when first asked for and remembered.

    Pass one object around where several places ask.
    """

    def __init__(self):
        self._known = {}

    def _answer(self, probe):
        if probe not in self._known:
            self._known[probe] = probe()
        return self._known[probe]

    mount_namespace = property(lambda self: self._answer(_mount_namespace))
    user_namespaces = property(lambda self: self._answer(_user_namespaces))
    id_ranges = property(lambda self: self._answer(_id_ranges))
    time_namespaces = property(lambda self: self._answer(_time_namespaces))
    detached_trees = property(lambda self: self._answer(_detached_trees))
    mount_setattr = property(lambda self: self._answer(_mount_setattr))
    openat2 = property(lambda self: self._answer(_openat2))
    overlay = property(lambda self: self._answer(_overlay))
    overlay_by_descriptor = property(lambda self: self._answer(_overlay_by_descriptor))
    overlay_in_user_namespace = property(lambda self: self._answer(_overlay_in_user_namespace))
    user_attributes = property(lambda self: self._answer(_user_attributes))
    idmapped_mounts = property(lambda self: self._answer(_idmapped_mounts))
    statmount = property(lambda self: self._answer(_statmount))
    proc_pidns = property(lambda self: self._answer(_proc_pidns))
    erofs_file = property(lambda self: self._answer(_erofs_file))
    squashfs = property(lambda self: self._answer(_squashfs))
    pivot_root = property(lambda self: self._answer(_pivot_root))
    open_tree_namespace = property(lambda self: self._answer(_open_tree_namespace))
    device_nodes = property(lambda self: self._answer(_device_nodes))
    selinux = property(lambda self: self._answer(_selinux))
    pidfd = property(lambda self: self._answer(_pidfd))
    clone3 = property(lambda self: self._answer(_clone3))
    close_range = property(lambda self: self._answer(_close_range))
    cgroups = property(lambda self: self._answer(_cgroups))
    mount_max = property(lambda self: self._answer(_mount_max))


def detached_trees():
    """Return whether mounts can be attached to a tree that isn't attached (Linux 6.15).

    Tried in this process, which has to be one that may mount.  Only EINVAL and ENOSYS mean
    no: any other error says nothing of the kernel, and True is the answer.
    """
    try:
        _nest()
    except OSError as error:
        return error.errno not in (EINVAL, ENOSYS)
    return True


def _nest():
    outer = inner = -1
    try:
        outer = fscontext.create(b"tmpfs", [], 0)
        inner = fscontext.create(b"tmpfs", [], 0)
        os.mkdir(b"inner", dir_fd=outer)
        syscalls.move_mount_path(inner, outer, b"inner")
    finally:
        for descriptor in (inner, outer):
            if descriptor >= 0:
                os.close(descriptor)


# -- namespaces ----------------------------------------------------------------------------


def _mount_namespace():
    return in_child(enter_mount_namespace)


def _user_namespaces():
    """For users without privileges; mounting in one counts, since LSMs may forbid just that."""
    return in_child(_unprivileged_mount)


def _unprivileged_mount():
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        # Changing ids closed /proc/self to us; PR_SET_DUMPABLE opens it again.
        prctl.set_dumpable(1)
    enter_user_namespace()
    syscalls.unshare(abi.CLONE_NEWNS)
    os.close(fscontext.create(b"tmpfs", [], 0))


def _id_ranges():
    """Ranges of ids for a user namespace: root writes any, others go by newuidmap(1)."""
    if os.geteuid() == 0:
        return Finding(True, "root needs no newuidmap")
    try:
        ranges = [_subordinate(path) for path in ("/etc/subuid", "/etc/subgid")]
    except OSError as error:
        return Finding(False, worded(error))
    if not all(ranges):
        return Finding(False, "no range for this user in /etc/subuid and /etc/subgid")
    return in_child(_map_ranges, *ranges)


def _subordinate(path):
    """Return (first, size) of this user's first range, or None (subuid(5))."""
    import pwd

    keys = {str(os.getuid())}
    try:
        keys.add(pwd.getpwuid(os.getuid()).pw_name)
    except KeyError:  # a user without a name has ranges by number only
        pass
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            key, _, rest = line.strip().partition(":")
            first, _, size = rest.partition(":")
            if key in keys and first.isdigit() and size.isdigit():
                return int(first), int(size)
    return None


def _map_ranges(uids, gids):
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            syscalls.unshare(abi.CLONE_NEWUSER)
            os.write(told, b"+")
            import _signal

            _signal.pause()
        finally:
            os._exit(1)
    try:
        os.close(told)
        if not os.read(ready, 1):
            raise OSError(EINVAL, "no user namespace")
        for program, (first, size), own in (
            ("newuidmap", uids, os.getuid()), ("newgidmap", gids, os.getgid()),
        ):
            _spawn(program, child, ["0", str(own), "1", "1", str(first), str(size)])
    finally:
        os.kill(child, SIGKILL)
        os.waitpid(child, 0)
    return f"{uids[1]} user ids, {gids[1]} group ids"


def _spawn(program, child, words):
    null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
    try:
        actions = [(os.POSIX_SPAWN_DUP2, null, 2)]
        helper = os.posix_spawnp(
            program, [program, str(child), *words], os.environ, file_actions=actions
        )
    except OSError as error:
        error.call = program
        raise
    finally:
        os.close(null)
    status = os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1])
    if status:
        raise _refusal(f"{program} refused (exit status {status})")


def _refusal(text):
    error = OSError(text)
    error.errno = 0
    return error


def _time_namespaces():
    return apart(syscalls.unshare, abi.CLONE_NEWTIME)


# -- mounts --------------------------------------------------------------------------------


def _detached_trees():
    return apart(_nest)


def _mount_setattr():
    return apart(_make_read_only)


def _make_read_only():
    mount = fscontext.create(b"tmpfs", [], 0)
    syscalls.mount_setattr(mount, abi.MOUNT_ATTR_RDONLY)
    try:
        os.mkdir(b"directory", dir_fd=mount)
    except OSError:
        return
    raise _refusal("a mount that was made read-only could be written")


def _openat2():
    return tried(_open_in_root)


def _open_in_root():
    # As a build asks: at `..` the kernel answers EAGAIN where anybody renames or mounts meanwhile.
    os.close(resolve.open_in_root(abi.AT_FDCWD, b"/..", resolve.DIRECTORY))


def _layers(attached):
    """Return the descriptors of three directories on a new tmpfs; attached on / if asked."""
    tmpfs = fscontext.create(b"tmpfs", [], 0)
    layers = []
    for name in (b"lower", b"upper", b"work"):
        os.mkdir(name, dir_fd=tmpfs)
        layers.append(os.open(name, _DIRECTORY, dir_fd=tmpfs))
    if attached:
        attach_to_root(tmpfs)
    return layers


def _userxattr():
    """Where we aren't root of the machine, overlayfs keeps its marks in user.* attributes."""
    try:
        with open("/proc/self/uid_map", encoding="ascii") as file:
            whole = file.read().split() == ["0", "0", "4294967295"]
    except OSError:
        whole = True
    return [] if whole else [fscontext.flag(b"userxattr")]


def _overlay():
    return apart(_join_by_path)


def _join_by_path():
    keys = (b"lowerdir", b"upperdir", b"workdir")
    settings = [
        fscontext.string(key, b"/proc/self/fd/%d" % layer)
        for key, layer in zip(keys, _layers(True), strict=True)
    ]
    fscontext.create(b"overlay", settings + _userxattr(), 0)


def _overlay_by_descriptor():
    return apart(_join_by_descriptor)


def _join_by_descriptor():
    keys = (b"lowerdir+", b"upperdir", b"workdir")
    settings = [
        fscontext.descriptor(key, layer) for key, layer in zip(keys, _layers(False), strict=True)
    ]
    fscontext.create(b"overlay", settings + _userxattr(), 0)


def _overlay_in_user_namespace():
    return in_child(_join_in_user_namespace)


def _join_in_user_namespace():
    enter_user_namespace()
    enter_mount_namespace()
    _join_by_path()


def _user_attributes():
    return apart(_set_user_attribute)


def _set_user_attribute():
    tmpfs = fscontext.create(b"tmpfs", [], 0)
    try:
        os.setxattr(b"/proc/self/fd/%d" % tmpfs, "user.overlay.opaque", b"y")
    except OSError as error:
        error.call = "setxattr"
        raise


def _idmapped_mounts():
    return apart(_map_ids)


class _Range:
    """The mapping of one of our ids, as `usernamespace.with_mappings` takes it."""

    __slots__ = ("container_id", "host_id", "size")

    def __init__(self, own):
        self.container_id = 7
        self.host_id = own
        self.size = 1


def _map_ids():
    owner = usernamespace.with_mappings([_Range(os.geteuid())], [_Range(os.getegid())])
    mount = fscontext.create(b"tmpfs", [], 0)
    syscalls.mount_setattr(mount, abi.MOUNT_ATTR_IDMAP, 0, 0, False, owner)


def _statmount():
    return tried(_list_mounts)


def _list_mounts():
    from sandboxfs.kernel import mounttable

    mounttable.by_listmount()


def _proc_pidns():
    return apart(_mount_proc)


def _mount_proc():
    # A pid namespace of our own: those of others may not be ours to show.
    syscalls.unshare(abi.CLONE_NEWPID)
    first = os.fork()
    if first == 0:
        import _signal

        _signal.pause()
    try:
        pid_namespace = os.open(f"/proc/{first}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        fscontext.create(b"proc", [fscontext.descriptor(b"pidns", pid_namespace)], 0)
    finally:
        os.kill(first, SIGKILL)
        os.waitpid(first, 0)


def _erofs_file():
    return apart(_mount_erofs)


def _mount_erofs() -> str:
    """Where the file of an image lies matters: the kernel takes none on a tmpfs."""
    refused: list[str] = []
    for image, directory in image_files(erofs_image()):
        settings = [fscontext.string(b"source", b"/proc/self/fd/%d" % image)]
        try:
            fscontext.create(b"erofs", settings, abi.MOUNT_ATTR_RDONLY)
        except OSError as error:
            failure = error
            refused.append(directory)
        else:
            return f"not of an image in {', '.join(refused)}" if refused else ""
    where = f"image in {', '.join(refused)}"
    failure.log = ", ".join(part for part in (getattr(failure, "log", ""), where) if part)
    raise failure


def _squashfs():
    return apart(_mount_squashfs)


def _mount_squashfs() -> None:
    for image, _directory in image_files(squashfs_image()):
        device, path = loop_device(image)
        settings = [fscontext.string(b"source", path), fscontext.flag(b"ro")]
        try:
            fscontext.create(b"squashfs", settings, abi.MOUNT_ATTR_RDONLY)
        finally:
            os.close(device)
        return


def _pivot_root():
    return apart(_pivot)


def _pivot():
    tmpfs = fscontext.create(b"tmpfs", [], 0)
    attach_to_root(tmpfs)
    os.fchdir(tmpfs)
    syscalls.pivot_root(b".", b".")


def _open_tree_namespace():
    return apart(_open_namespace)


def _open_namespace():
    syscalls.open_tree(abi.AT_FDCWD, b"/", OPEN_TREE_NAMESPACE | abi.AT_RECURSIVE)


def _device_nodes():
    return apart(_make_node)


def _make_node():
    import stat

    tmpfs = fscontext.create(b"tmpfs", [], 0)
    try:
        os.mknod(b"null", 0o666 | stat.S_IFCHR, os.makedev(1, 3), dir_fd=tmpfs)
        os.close(os.open(b"null", os.O_WRONLY | os.O_CLOEXEC, dir_fd=tmpfs))
    except OSError as error:
        error.call = "mknod"
        error.filename = None
        raise


def _selinux():
    # fsopen(2) finds a file system only where its module is active.
    return apart(lambda: os.close(syscalls.fsopen(b"selinuxfs")))


# -- processes and limits ------------------------------------------------------------------


def _pidfd():
    return tried(lambda: os.close(os.pidfd_open(os.getpid())))


def _clone3():
    return tried(_ask_clone3)


def _ask_clone3():
    # An argument of no size is EINVAL where the call is, and makes no process.
    syscalls.syscall(abi.SYS_clone3, None, 0)
    try:
        syscalls.fail("clone3")
    except OSError as error:
        if error.errno != EINVAL:
            raise


def _close_range():
    return tried(_close_nothing)


def _close_nothing():
    syscalls.close_range(0x7FFFFFFF, 0x7FFFFFFF, 0)


def _cgroups():
    """``v2``, ``hybrid`` or ``v1`` as detail; false where no cgroup file system is mounted."""
    from sandboxfs.kernel import mounttable

    try:
        types = {record.type for record in mounttable.read()}
    except OSError as error:
        return Finding(False, worded(error))
    if b"cgroup" in types:
        return Finding(True, "hybrid" if b"cgroup2" in types else "v1")
    if b"cgroup2" in types:
        return Finding(True, "v2")
    return Finding(False, "no cgroup file system is mounted")


def _mount_max():
    """How many mounts a namespace may have and has, as detail; false from nine tenths on."""
    from sandboxfs.kernel import mounttable

    try:
        with open("/proc/sys/fs/mount-max", encoding="ascii") as file:
            limit = int(file.read())
        used = len(mounttable.read())
    except OSError as error:
        return Finding(False, worded(error))
    return Finding(used < limit * 9 // 10, f"{used} of {limit}")
