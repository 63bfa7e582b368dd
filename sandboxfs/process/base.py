"""The base namespace: a kept mount namespace with next to nothing in it.

A new mount namespace is a copy of the caller's, mount by mount, and before the root is entered
each copied mount becomes a slave: on a host with thousands of them that costs more than all the
rest.  Whoever joins the base namespace first copies two mounts, whatever the host has.

It holds an empty, read-only tmpfs on the kernel's own rootfs; the child attaches its caller's
/proc in its copy, so that procfs means the same with and without.  Everything else of the host was
cloned into descriptors before.  It is kept by a descriptor, or by a bind of its file
(`sandboxfs.process.base_pin`).

Sources: mount_namespaces(7), setns(2), ioctl_ns(2), pivot_root(2); open_tree(2) of Linux 7.0 for
OPEN_TREE_NAMESPACE.
"""

import _stat as stat
import errno
import sys
from fcntl import ioctl

from sandboxfs.build.engine import make_slave
from sandboxfs.errors import MountError
from sandboxfs.kernel import abi, fscontext
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import (
    mount_id,
    mount_setattr,
    move_mount_path,
    open_tree,
    pivot_root,
    setns,
    umount2,
    unshare,
)
from sandboxfs.plan.operations import Bind, Cgroup, Console, Filesystem, PlainRoot

# _IO and _IOR of include/uapi/linux/nsfs.h.
_NS_GET_USERNS = 0xB701
_NS_GET_NSTYPE = 0xB703
_NS_MNT_GET_INFO = 0x8010B70A  # Linux 6.12; struct mnt_ns_info: size, nr_mounts, mnt_ns_id

# Ours, and the kernel's own rootfs below it where that one is counted.
MOST_MOUNTS = 2
_NO_ESCAPE = (
    abi.MOUNT_ATTR_RDONLY | abi.MOUNT_ATTR_NOSUID | abi.MOUNT_ATTR_NODEV | abi.MOUNT_ATTR_NOEXEC
)
_DIRECTORIES = (b"proc", b"sys", b"sys/fs", b"sys/fs/cgroup")
_CGROUPS = b"/sys/fs/cgroup"
_CLONE = abi.OPEN_TREE_CLONE | abi.AT_SYMLINK_NOFOLLOW


class Base:
    """A base namespace as one run uses it: its descriptor, borrowed, and what is taken along.

    clones: list of (clone, path) of the caller's mounts that the child attaches; owned.
    """

    __slots__ = ("clones", "fd")

    def __init__(self, fd):
        self.fd = fd
        self.clones = []

    def enter(self):
        """Move this process into a copy of the base namespace; whether that was possible.

        False where the kernel doesn't let this process join it: nothing has changed then.
        """
        try:
            setns(self.fd, abi.CLONE_NEWNS)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EINVAL):
                raise
            return False
        unshare(abi.CLONE_NEWNS)
        for clone, path in self.clones:
            move_mount_path(clone, abi.AT_FDCWD, path)
        return True

    def close(self):
        """Close the clones."""
        while self.clones:
            os.close(self.clones.pop()[0])


def prepare(plan, fd):
    """Return the `Base` by which the plan's child gets its mount namespace; None: the plain way.

    fd: a base namespace's descriptor; it stays the caller's.  Called by the parent, after which
    the child imports nothing.
    """
    if not _fits(plan):
        return None
    base = Base(fd)
    try:
        _take(base, b"/proc", 0)
        if any(type(step) is Cgroup for step in plan.operations):
            _take(base, _CGROUPS, abi.AT_RECURSIVE)
    except OSError:
        # None of them here, or locked together with others: the plain way finds out about it.
        base.close()
        return None
    _load_late_parts(plan)
    return base


def _fits(plan):
    """Whether nothing but descriptors leads from the plan's build to the host."""
    if plan.engine == "attached" or not plan.new_namespace("mount"):
        return False
    if plan.user is not None and not plan.user.outside:
        return False  # an unprivileged user clones mounts only in a namespace of its own
    # To a clone that is to be the root itself, mounts are attached only where it was cloned.
    return type(plan.operations[0]) is not PlainRoot


def _take(base, path, flags):
    clone = open_tree(abi.AT_FDCWD, path, _CLONE | flags)
    base.clones.append((clone, path))
    if not mount_id(clone)[1]:
        raise OSError(errno.EINVAL, "not the root of a mount")
    mount_setattr(clone, 0, 0, abi.MS_PRIVATE, bool(flags))


def _load_late_parts(plan):
    """Load what a build loads when it comes across it: there are no files in there."""
    from sandboxfs.build import devices, masks, mounts, tmp, writable  # noqa: F401 - any long way

    for step in plan.operations:
        kind = type(step)
        if kind is Cgroup:
            from sandboxfs.kernel import mountinfo  # noqa: F401
        elif kind is Console:
            from sandboxfs.build import console  # noqa: F401
        elif kind is Filesystem and step.copy_up:
            from sandboxfs.build import copyup
        elif kind is Bind and (step.overlay or step.nested):
            from sandboxfs.build import copyup, view  # noqa: F401


# -- making one --------------------------------------------------------------------------


def create():
    """Make a base namespace; returns its descriptor, which keeps it.

    The process must be single-threaded and have CAP_SYS_ADMIN.  Raises MountError, also where
    the kernel builds no detached trees: nothing can be carried into the namespace there.
    """
    from sandboxfs.kernel.features import detached_trees

    if not detached_trees():
        raise MountError("base namespace", "move_mount", "", "this kernel can't attach mounts to a "
                         "tree that is attached nowhere", errno.EINVAL,
                         hint="Linux 6.15 can; sandboxfs doctor says more")
    try:
        fd = _by_open_tree()
        if fd < 0:
            fd = _by_child()
    except OSError as error:
        if isinstance(error, MountError):
            raise
        call = getattr(error, "call", "make")
        hint = None
        if call == "pivot_root" and error.errno == errno.EINVAL:
            hint = "the root is an initramfs, which pivot_root can't leave before Linux 7.0"
        raise MountError("base namespace", call, "", "", error.errno or 0, hint) from error
    return fd


def _tree():
    """Return the only mount of it: an empty tmpfs with the directories that are mounted on."""
    tmpfs = fscontext.create(
        b"tmpfs", [fscontext.string(b"source", b"sandboxfs"), fscontext.string(b"mode", b"0755"),
                   fscontext.string(b"nr_inodes", b"16")], _NO_ESCAPE & ~abi.MOUNT_ATTR_RDONLY)
    try:
        for name in _DIRECTORIES:
            os.mkdir(name, 0o755, dir_fd=tmpfs)
        mount_setattr(tmpfs, abi.MOUNT_ATTR_RDONLY, 0, abi.MS_PRIVATE)
    except BaseException:
        os.close(tmpfs)
        raise
    return tmpfs


def _by_open_tree():
    """Return a namespace made around the tree, or -1 where the kernel can't (before 7.0)."""
    tree = _tree()
    try:
        fd = open_tree(tree, b"", abi.OPEN_TREE_NAMESPACE | abi.AT_EMPTY_PATH)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS):
            raise
        return -1
    finally:
        os.close(tree)
    # Anything else than expected is left for the way that is known.
    try:
        if fault(fd) is None:
            return fd
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return -1


def _by_child():
    """Return a namespace that a forked child makes out of a copy of ours."""
    ready_reader, ready_writer = os.pipe2(os.O_CLOEXEC)
    go_reader, go_writer = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        _live_in_it(ready_writer, go_reader, (ready_reader, go_writer))
    try:
        os.close(ready_writer)
        os.close(go_reader)
        said = os.read(ready_reader, 64)
        if said != b"ready":
            call, _, number = said.decode().partition(" ")
            failure = OSError(int(number or 0), os.strerror(int(number or 0)))
            failure.call = call or "fork"
            raise failure
        return os.open(f"/proc/{child}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(ready_reader)
        os.close(go_writer)
        os.waitpid(child, 0)


def _live_in_it(ready, go, others):
    """The child's life: make the namespace, say so, stay until the parent holds it."""
    try:
        for fd in others:
            os.close(fd)
        unshare(abi.CLONE_NEWNS)
        make_slave()
        tree = _tree()
        move_mount_path(tree, abi.AT_FDCWD, b"/")
        os.fchdir(tree)
        pivot_root(b".", b".")
        umount2(b".", abi.MNT_DETACH)
        os.write(ready, b"ready")
        os.read(go, 1)
    except OSError as error:
        os.write(ready, f"{getattr(error, 'call', 'make')} {error.errno}".encode())
    finally:
        os._exit(0)


# -- checking one ------------------------------------------------------------------------


def identity(fd):
    """Return (number of mounts, the kernel's unique id) of a mount namespace's descriptor."""
    info = bytearray((16).to_bytes(4, sys.byteorder) + bytes(12))
    ioctl(fd, _NS_MNT_GET_INFO, info)
    return int.from_bytes(info[4:8], sys.byteorder), int.from_bytes(info[8:16], sys.byteorder)


def fault(fd):
    """Return why the descriptor is no base namespace for us (str), or None."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        return "is no namespace file"
    try:
        if ioctl(fd, _NS_GET_NSTYPE) != abi.CLONE_NEWNS:
            return "is a namespace of another type"
        owner = ioctl(fd, _NS_GET_USERNS)
    except OSError as error:
        if error.errno == errno.EPERM:
            return "belongs to a user namespace outside of ours"
        return "is no namespace file"
    try:
        if not os.path.samestat(os.fstat(owner), os.stat("/proc/self/ns/user")):
            return "belongs to another user namespace"
    finally:
        os.close(owner)
    try:
        mounts, _number = identity(fd)
    except OSError:
        return "can't be asked for its mounts by this kernel"
    if mounts > MOST_MOUNTS:
        return f"holds {mounts} mounts, and should be nearly empty"
    return None
