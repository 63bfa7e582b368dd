"""The one choke point: every system call that Python's `os` lacks, by its own name.

Paths are bytes, descriptors ints.  A wrapper returns what the call returns and raises
`OSError` with `call` set to the call's name.  All descriptors are made close-on-exec.
Sources: the manual pages of the same names (section 2), Documentation/filesystems/.
"""

import errno
import sys

from sandboxfs.kernel import abi
from sandboxfs.kernel import system as os
from sandboxfs.kernel.foreign import (
    Libc,
    LockedFunction,
    byref,
    c_uint64,
    get_errno,
    string_buffer,
)

libc = Libc()


def function(name):
    """Return libc's function `name`, or None where this libc lacks it.

    Argument types aren't declared, which would double what a call costs: ints are passed as
    C ints (of 32 bits), bytes and buffers as pointers, None as a null pointer.
    """
    try:
        return libc.function(name)
    except AttributeError:
        return None


def fail(call):
    """Raise the `OSError` of the call that just failed."""
    number = get_errno()
    error = OSError(number, os.strerror(number))
    error.call = call
    raise error


def packed(*numbers):
    """Return unsigned 64-bit numbers as the kernel reads them from a structure.

    Structures that are only read are bytes: a ctypes class costs more to make than the calls.
    """
    return b"".join([number.to_bytes(8, sys.byteorder) for number in numbers])


# struct open_how of openat2(2): flags, mode, resolve.
OpenHow = packed


MACHINE = os.uname().machine
# One function for all calls that libc has no name for, the call's number first.
syscall = function("syscall")
# open_tree_attr(2), Linux 6.15: clones a mount and sets its attributes in one.
HAS_OPEN_TREE_ATTR = syscall(abi.SYS_open_tree_attr, -1, b".", 0, None, 0) < 0 and (
    get_errno() == errno.EBADF
)
_umount2 = function("umount2")
_unshare = function("unshare")
_prlimit = function("prlimit")
# What the payload's process calls is looked up before there is one.
_capset, _socket = function("capset"), function("socket")
_sethostname, _ioctl = function("sethostname"), function("ioctl")


def read_all(fd):
    """Return what a descriptor has to its end: a table of procfs, or a pipe."""
    chunks = []
    # Tables of procfs come a page at a time, and a large buffer is mapped and unmapped each time.
    while chunk := os.read(fd, 1 << 14):
        chunks.append(chunk)
    return b"".join(chunks)


def read_file(path):
    """Return the bytes of a file of procfs."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return read_all(fd)
    finally:
        os.close(fd)


def open_tree(dirfd, path, flags):
    """Open or (`OPEN_TREE_CLONE`) clone a mount; returns its descriptor."""
    fd = syscall(abi.SYS_open_tree, dirfd, path, flags | abi.OPEN_TREE_CLOEXEC)
    if fd < 0:
        fail("open_tree")
    return fd


def move_mount(from_fd, to_fd):
    """Attach the mount `from_fd` on what `to_fd` refers to."""
    if syscall(abi.SYS_move_mount, from_fd, b"", to_fd, b"", 0x44) < 0:
        fail("move_mount")


def move_mount_path(from_fd, to_fd, path):
    """Attach the mount `from_fd` on `path`, relative to `to_fd`; a last symlink is not followed."""
    if syscall(abi.SYS_move_mount, from_fd, b"", to_fd, path, 0x4) < 0:
        fail("move_mount")


def set_group(from_fd, to_fd):
    """Make the private mount `to_fd` a peer of the mount `from_fd` (move_mount(2), Linux 5.15)."""
    flags = 0x44 | abi.MOVE_MOUNT_SET_GROUP
    if syscall(abi.SYS_move_mount, from_fd, b"", to_fd, b"", flags) < 0:
        fail("move_mount")


def fsopen(type):
    """Open a file-system context for the file system `type` (bytes)."""
    fd = syscall(abi.SYS_fsopen, type, abi.FSOPEN_CLOEXEC)
    if fd < 0:
        fail("fsopen")
    return fd


def fsconfig(fd, command, key=None, value=None, aux=0):
    """One step of configuring a file-system context."""
    if syscall(abi.SYS_fsconfig, fd, command, key, value, aux) < 0:
        fail("fsconfig")


def fsmount(fd, attributes):
    """Make a detached mount of a created context; returns its descriptor."""
    mount = syscall(abi.SYS_fsmount, fd, abi.FSMOUNT_CLOEXEC, attributes)
    if mount < 0:
        fail("fsmount")
    return mount


def mount_setattr(fd, attr_set=0, attr_clr=0, propagation=0, recursive=False, userns_fd=0):
    """Change the mount `fd` (and with `recursive` the tree under it)."""
    attr = packed(attr_set, attr_clr, propagation, userns_fd)  # struct mount_attr
    flags = 0x9000 if recursive else 0x1000  # AT_EMPTY_PATH | AT_RECURSIVE
    if syscall(abi.SYS_mount_setattr, fd, b"", flags, attr, 32) < 0:
        fail("mount_setattr")


def openat2(dirfd, path, how):
    """Open `path` as the prepared `OpenHow` says.  EAGAIN is the caller's to retry."""
    fd = syscall(abi.SYS_openat2, dirfd, path, how, 24)
    if fd < 0:
        fail("openat2")
    return fd


def umount2(path, flags):
    """Unmount `path`."""
    if _umount2(path, flags) < 0:
        fail("umount2")


def unshare(flags):
    """Move this process into new namespaces (CLONE_NEW*)."""
    if _unshare(flags) < 0:
        fail("unshare")


def setns(fd, flags):
    """Join the namespace of an nsfs descriptor, or several of a pidfd's process."""
    if function("setns")(fd, flags) < 0:
        fail("setns")


def pivot_root(new_root, put_old):
    """Exchange the root mount of this mount namespace."""
    number = abi.PIVOT_ROOT_BY_MACHINE[MACHINE]
    if syscall(number, new_root, put_old) < 0:
        fail("pivot_root")


def fchmodat2(fd, mode):
    """Set the mode of what an O_PATH descriptor refers to (6.6; else through /proc/self/fd)."""
    if syscall(abi.SYS_fchmodat2, fd, b"", mode, abi.AT_EMPTY_PATH) < 0:
        number = get_errno()
        if number not in (errno.ENOSYS, errno.EOPNOTSUPP):
            fail("fchmodat2")
        os.chmod(f"/proc/self/fd/{fd}", mode)


def fchownat(fd, uid, gid):
    """Set the owner of what an O_PATH descriptor refers to; -1 leaves one as it is."""
    # os.chown has no AT_EMPTY_PATH.
    owner = uid & 0xFFFFFFFF, gid & 0xFFFFFFFF
    if function("fchownat")(fd, b"", *owner, abi.AT_EMPTY_PATH) < 0:
        fail("fchownat")


_libc_statx = function("statx")


def mount_id(fd, wanted=abi.STATX_MNT_ID | abi.STATX_MNT_ID_UNIQUE):
    """Return (mount id, is mount root) of what `fd` refers to.

    The id is the unique one where the kernel has it (6.8), else the reusable one; with
    `wanted` `STATX_MNT_ID` always the latter, mountinfo's.
    """
    out = statx(fd, wanted)
    attributes = int.from_bytes(out[8:16], sys.byteorder)
    return int.from_bytes(out[144:152], sys.byteorder), bool(
        attributes & abi.STATX_ATTR_MOUNT_ROOT
    )


def statx(fd, wanted):
    """Return what a descriptor refers to, as struct statx (a buffer); wanted: STATX_*."""
    out = string_buffer(256)
    if _libc_statx(fd, b"", abi.AT_EMPTY_PATH | abi.AT_STATX_DONT_SYNC, wanted, out) < 0:
        fail("statx")
    return out


def identity(path):
    """Return what tells a file by a mount from any other: inode, device, mount, as bytes."""
    out = string_buffer(256)  # struct statx
    wanted = abi.STATX_BASIC_STATS | abi.STATX_MNT_ID | abi.STATX_MNT_ID_UNIQUE
    if _libc_statx(abi.AT_FDCWD, path, abi.AT_STATX_DONT_SYNC, wanted, out) < 0:
        fail("statx")
    return out[32:40] + out[136:152]


# The size, of 32 bits.  VER1 has the namespace's id, kernels before 6.11 know VER0 only.
_HEAD_VER0 = (24).to_bytes(4, sys.byteorder) + bytes(4)
_HEAD_VER1 = (32).to_bytes(4, sys.byteorder) + bytes(4)


def mount_request(mount_id, parameter=0, namespace_id=0):
    """Return a struct mnt_id_req (bytes), which statmount and listmount take."""
    if namespace_id:
        return _HEAD_VER1 + packed(mount_id, parameter, namespace_id)
    return _HEAD_VER0 + packed(mount_id, parameter)


def listmount(mount_id=abi.LSMT_ROOT, namespace_id=0, limit=None):
    """Return the unique ids of all mounts below the mount `mount_id`, oldest first.

    namespace_id: of another mount namespace (Linux 6.11), 0 for ours.  limit: stop after so
    many ids.  OSError: ENOSYS without the system call, ENOENT for an id that isn't there (a
    detached mount's for one), EPERM for one outside of our root.
    """
    found = []
    room = 32 if limit is None else min(limit, 512)
    last = 0
    while True:
        # Few ids go where statx(2) writes, too: each size of an array is a type of its own.
        ids = string_buffer(256) if room == 32 else (c_uint64 * room)()
        request = mount_request(mount_id, last, namespace_id)
        count = syscall(abi.SYS_listmount, request, ids, room, 0)
        if count < 0:
            fail("listmount")
        if room == 32:
            found += [
                int.from_bytes(ids[at:at + 8], sys.byteorder) for at in range(0, count * 8, 8)
            ]
        else:
            found += ids[:count]
        if limit is not None and len(found) >= limit:
            return found[:limit]
        if count < room:
            return found
        last = found[-1]
        room = 1024


def statmount(mount_id, mask, namespace_id, buffer, size):
    """Read struct statmount and its strings into `buffer`, of `size` bytes (EOVERFLOW)."""
    request = mount_request(mount_id, mask, namespace_id)
    if syscall(abi.SYS_statmount, request, byref(buffer), size, 0) < 0:
        fail("statmount")


# Processes.

_prctl = function("prctl")


def clone3(flags, exit_signal):
    """Fork into new namespaces (clone3(2), no stack: the child goes on where the parent is).

    Returns the child's pid, 0 in the child.  exit_signal must be 0 with `CLONE_PARENT`.
    The caller must be single-threaded.
    """
    # The interpreter's lock stays held over the call: the child has no other thread, so nobody
    # could hand the lock back to it.
    call = libc.function("syscall", LockedFunction)
    pid = call(abi.SYS_clone3, packed(flags, 0, 0, 0, exit_signal, 0, 0, 0), 64)
    if pid < 0:
        fail("clone3")
    return pid


def prctl(option, argument=0, argument2=0):
    """Control this process (prctl(2)), by numbers only; returns what the call returns.

    By libc: python-prctl's C half brings libcap along, a quarter of a millisecond of every start,
    and lacks the ambient set and capabilities newer than itself.  What isn't hot uses python-prctl.
    """
    result = _prctl(option, argument, argument2, 0, 0)
    if result < 0:
        fail("prctl")
    return result


def close_range(first, last, flags):
    """Close a range of descriptors, or (`CLOSE_RANGE_CLOEXEC`) mark them close-on-exec."""
    if syscall(abi.SYS_close_range, first, last, flags) < 0:
        fail("close_range")


def prlimit(pid, resource, limits=None):
    """Set a process's (soft, hard) limit where given, and return the one it had."""
    old = string_buffer(256)  # struct rlimit, and room
    if _prlimit(pid, resource, None if limits is None else packed(*limits), old) < 0:
        fail("prlimit")
    return int.from_bytes(old[:8], sys.byteorder), int.from_bytes(old[8:16], sys.byteorder)


_ST_FLAGS = (
    (os.ST_NOSUID, abi.MOUNT_ATTR_NOSUID), (os.ST_NODEV, abi.MOUNT_ATTR_NODEV),
    (os.ST_NOEXEC, abi.MOUNT_ATTR_NOEXEC), (os.ST_NOATIME, abi.MOUNT_ATTR_NOATIME),
    (os.ST_NODIRATIME, abi.MOUNT_ATTR_NODIRATIME),
    (0x2000, abi.MOUNT_ATTR_NOSYMFOLLOW),  # ST_NOSYMFOLLOW of include/linux/statfs.h
)


def flags_of(fd):
    """Return the `MOUNT_ATTR_*` of the mount a descriptor lies in, but for RDONLY."""
    flags = os.fstatvfs(fd).f_flag
    return sum([attribute for bit, attribute in _ST_FLAGS if flags & bit])


# `f_type` comes first in struct statfs: a long, and on s390x an int.
_F_TYPE = 8 if sys.maxsize >> 32 and MACHINE != "s390x" else 4


def filesystem_type(fd):
    """Return the magic number of the file system that a descriptor lies in (statfs(2))."""
    out = string_buffer(256)
    if function("fstatfs")(fd, out) < 0:
        fail("fstatfs")
    return int.from_bytes(out[:_F_TYPE], sys.byteorder)


RLIMIT_NOFILE = 7
_CLONE_THREAD = 0x10000


def more_descriptors():
    """Raise the soft limit of open descriptors to the hard one: a build holds several a mount.

    Returns the soft limit that was, for `fewer_descriptors`, or None where it was the hard one.
    """
    soft, hard = prlimit(0, RLIMIT_NOFILE)
    if soft == hard:
        return None
    prlimit(0, RLIMIT_NOFILE, (hard, hard))
    return soft


def fewer_descriptors(soft):
    """Set the soft limit of open descriptors to what it was before `more_descriptors`."""
    if soft is not None:
        hard = prlimit(0, RLIMIT_NOFILE)[1]
        prlimit(0, RLIMIT_NOFILE, (min(soft, hard), hard))


def has_threads():
    """Return whether this process has more than one thread."""
    # Unsharing a thread group does nothing, and is EINVAL in a process with threads.
    if _unshare(_CLONE_THREAD) == 0:
        return False
    if get_errno() != errno.EINVAL:
        fail("unshare")
    return True


_CAPABILITY_VERSION_3 = 0x20080522


def capget():
    """Return this process's (effective, permitted, inheritable) capabilities as bit sets."""
    data = string_buffer(256)  # as for statx(2): each size is a type, which takes time to make
    header = _CAPABILITY_VERSION_3.to_bytes(4, sys.byteorder) + bytes(4)
    if function("capget")(header, data) < 0:
        fail("capget")
    words = [int.from_bytes(data[at:at + 4], sys.byteorder) for at in range(0, 24, 4)]
    return tuple(words[at] | words[at + 3] << 32 for at in range(3))


def capset(effective, permitted, inheritable):
    """Set this process's capabilities, given as bit sets."""
    sets = (effective, permitted, inheritable)
    words = [word & 0xFFFFFFFF for word in sets] + [word >> 32 for word in sets]
    data = b"".join([word.to_bytes(4, sys.byteorder) for word in words])
    header = _CAPABILITY_VERSION_3.to_bytes(4, sys.byteorder) + bytes(4)
    if _capset(header, data) < 0:
        fail("capset")


def sethostname(name):
    """Set the host name (bytes) of this UTS namespace."""
    if _sethostname(name, len(name)) < 0:
        fail("sethostname")


def setdomainname(name):
    """Set the NIS domain name (bytes) of this UTS namespace."""
    if function("setdomainname")(name, len(name)) < 0:
        fail("setdomainname")


def signalfd(numbers):
    """Return a descriptor that reads the (blocked) signals of `numbers` as they come."""
    mask = packed(sum(1 << number - 1 for number in numbers)) + bytes(120)
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    fd = function("signalfd")(-1, mask, flags)
    if fd < 0:
        fail("signalfd")
    return fd


def socket(family):
    """Return a datagram socket of an address family, for ioctls of network devices."""
    fd = _socket(family, 2 | os.O_CLOEXEC, 0)
    if fd < 0:
        fail("socket")
    return fd


def ioctl(fd, name, request, argument):
    """Have a device do `request`, of that name, with bytes that are only read.

    The module `fcntl` takes longer to load than a network device to be brought up.
    """
    if _ioctl(fd, request, argument) < 0:
        fail(f"ioctl {name}")
