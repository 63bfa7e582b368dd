"""The base namespace of the command line: pinned below the state directory, checked at every use.

/run/sandboxfs/base-namespace is a private tmpfs with two files: `namespace`, on which the
namespace's own file is mounted, and `id`, the kernel's unique number of it.  Unmounting that one
tmpfs ends it all; mount namespaces that are copied from ours get the tmpfs without the namespace.

Sources: mount_namespaces(7), ioctl_ns(2); unshare(1) for why the place has to be private.
"""

import errno

from sandboxfs.errors import SandboxError, StateError
from sandboxfs.kernel import abi, fscontext, syscalls
from sandboxfs.kernel import system as os
from sandboxfs.process import base
from sandboxfs.state.directory import open_state
from sandboxfs.state.lock import Lock

NAME = "base-namespace"
_FILE, _ID = b"namespace", b"id"
_DIRECTORY = abi.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_HINT = f"sandboxfs {NAME} create makes it anew, {NAME} remove takes it away"


def usable(warn=None):
    """Return a descriptor of the pinned base namespace, or -1 where there is none to use.

    warn: called with one line where there is one that can't be used.
    """
    try:
        fd, why = _find()
    except SandboxError as error:
        fd, why = -1, error.line()
    if why is not None and warn is not None:
        warn(f"the base namespace is left alone: {why} ({_HINT})")
    return fd


def status():
    """Return (descriptor or -1, why it can't be used or None); both say nothing: there is none."""
    return _find()


def create():
    """Pin a base namespace where there is no usable one; returns whether one was made.

    A stale one is taken away first.  Raises SandboxError.
    """
    with open_state(True) as state, Lock(state):
        fd, why = _find()
        if fd >= 0:
            os.close(fd)
            return False
        if why is not None:
            _take_away(state)
        namespace = later_than_ours()
        try:
            _pin(state, namespace)
        except OSError as error:
            _take_away(state)
            raise StateError("", getattr(error, "call", "pin"), state.where(NAME), "",
                             error.errno or 0) from error
        finally:
            os.close(namespace)
    return True


def remove():
    """Take the pinned base namespace away, usable or not; returns whether there was one.

    Containers that run keep their own copies.
    """
    state = open_state(False)
    if state is None:
        return False
    with state, Lock(state):
        return _take_away(state)


def _find():
    state = open_state(False)
    if state is None:
        return -1, None
    with state:
        try:
            place = os.open(NAME, _DIRECTORY, dir_fd=state.fd)
        except FileNotFoundError:
            return -1, None
        except OSError as error:
            return -1, f"{state.where(NAME)}: {os.strerror(error.errno or 0)}"
        try:
            return _checked(place, state.where(NAME))
        finally:
            os.close(place)


def _checked(place, path):
    """Return (descriptor, None) of what is pinned in a directory, or (-1, why not)."""
    if not _is_ours(place):
        return -1, f"{path}: nothing of ours is mounted there"
    try:
        fd = os.open(_FILE, _READ, dir_fd=place)
    except OSError as error:
        return -1, f"{path}/namespace: {os.strerror(error.errno or 0)}"
    why = base.fault(fd)
    if why is None and _recorded(place) != base.identity(fd)[1]:
        why = "is another namespace than the one that was pinned"
    if why is None:
        return fd, None
    os.close(fd)
    return -1, f"{path}/namespace: {why}"


def _is_ours(place):
    """Whether a directory is the root of a tmpfs that only we can have put things into."""
    status = os.fstat(place)
    return (
        syscalls.mount_id(place)[1] and status.st_uid == os.geteuid()
        and status.st_mode & 0o777 == 0o700
        and syscalls.filesystem_type(place) == abi.TMPFS_MAGIC
    )


def _recorded(place):
    try:
        fd = os.open(_ID, _READ, dir_fd=place)
    except OSError:
        return None
    try:
        return int(os.read(fd, 32))
    except (OSError, ValueError):
        return None
    finally:
        os.close(fd)


def later_than_ours():
    """Return a new base namespace whose file may be mounted in our mount namespace.

    It may if its id is above ours: so the kernel rules out that two namespaces keep each other
    alive.  But each processor draws its ids from a batch of its own (Linux 6.18), so that a later
    one can be the lower one; where ours was made, a new one is above it.
    """
    own = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        number = base.identity(own)[1]
    finally:
        os.close(own)
    allowed = os.sched_getaffinity(0)
    try:
        for processors in (allowed, *({each} for each in sorted(allowed))):
            os.sched_setaffinity(0, processors)
            namespace = base.create()
            if base.identity(namespace)[1] > number:
                return namespace
            os.close(namespace)
    finally:
        os.sched_setaffinity(0, allowed)
    raise StateError("", "move_mount", NAME, "the kernel takes every namespace that "
                     "is made here for one older than ours", errno.ELOOP,
                     hint="allow this process all processors")


def _pin(state, namespace):
    """Mount the tmpfs with everything in it: one call makes it visible."""
    tmpfs = fscontext.create(
        b"tmpfs", [fscontext.string(b"source", b"sandboxfs"), fscontext.string(b"mode", b"0700"),
                   fscontext.string(b"nr_inodes", b"8")],
        abi.MOUNT_ATTR_NOSUID | abi.MOUNT_ATTR_NODEV | abi.MOUNT_ATTR_NOEXEC)
    clone = -1
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        os.close(os.open(_FILE, flags, 0o600, dir_fd=tmpfs))
        record = os.open(_ID, flags, 0o600, dir_fd=tmpfs)
        try:
            os.write(record, b"%d\n" % base.identity(namespace)[1])
        finally:
            os.close(record)
        clone = syscalls.open_tree(namespace, b"", abi.OPEN_TREE_CLONE | abi.AT_EMPTY_PATH)
        syscalls.move_mount_path(clone, tmpfs, _FILE)
        try:
            os.mkdir(NAME, 0o700, dir_fd=state.fd)
        except FileExistsError:
            pass  # an empty directory that is left of an older one
        syscalls.move_mount_path(tmpfs, state.fd, NAME.encode())
        # Below a shared mount it has become shared as well.
        syscalls.mount_setattr(tmpfs, 0, 0, abi.MS_PRIVATE, True)
    finally:
        for fd in (clone, tmpfs):
            if fd >= 0:
                os.close(fd)


def _take_away(state):
    """Unmount and remove the place; whether there was anything.  Raises StateError."""
    path = b"/proc/self/fd/%d/%s" % (state.fd, NAME.encode())
    there = False
    while True:
        try:
            place = os.open(NAME, _DIRECTORY, dir_fd=state.fd)
        except FileNotFoundError:
            return there
        except OSError as error:
            raise _refused(state, "open", error) from None
        try:
            mounted, ours = syscalls.mount_id(place)[1], _is_ours(place)
        finally:
            os.close(place)
        there = True
        try:
            if mounted and not ours:
                raise StateError("", "umount2", state.where(NAME), "what is mounted there isn't "
                                 "ours", errno.EBUSY, hint="look at it, and unmount it by hand")
            if mounted:
                syscalls.umount2(path, abi.MNT_DETACH | abi.UMOUNT_NOFOLLOW)
            else:
                os.rmdir(NAME, dir_fd=state.fd)
        except OSError as error:
            raise _refused(state, getattr(error, "call", "rmdir"), error) from None


def _refused(state, call, error):
    return StateError("", call, state.where(NAME), "", error.errno or 0)
