"""Masters: the tmpfs of a pod's hint, mounted once in the store.

A master is mounted privately in the mount namespace of the hook that makes it, on a directory
of the store.  Removing that directory takes it away from every other mount namespace that got
a copy, too (rmdir(2) of what is a mountpoint elsewhere only): no memory is left behind.
"""

import sys
from _signal import alarm
from errno import EBUSY

from sandboxfs.build.failure import hint_for
from sandboxfs.errors import MountError
from sandboxfs.hooks import pod_record
from sandboxfs.kernel import abi, fscontext, mountinfo, syscalls
from sandboxfs.kernel import system as os
from sandboxfs.spec import options as option_words
from sandboxfs.spec.annotations import REPLICA_SOURCE

_ALWAYS = abi.MOUNT_ATTR_NOSUID | abi.MOUNT_ATTR_NODEV
_DIRECTORY = abi.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CLONE = abi.OPEN_TREE_CLONE | abi.AT_EMPTY_PATH
_NO_LINKS = syscalls.OpenHow(
    abi.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, 0,
    abi.RESOLVE_IN_ROOT | abi.RESOLVE_NO_SYMLINKS,
)
_LEAST_INODES = 1024
# To look into other mount namespaces, where a file system may not answer.
_DEADLINE = 5  # seconds
_IDENTITY = ((0, 0, 0xFFFFFFFF),)
_MOST_STACKED = 64


def make(directory, master, ids, label):
    """Make a master, mount it, and set its `device` and `namespace`.

    directory: the pod's `state.directory.Directory`.  ids: (uids, gids) of the container's user
    namespace as lists of (inside, ours, count).  label: an SELinux label, or None.  MountError.
    """
    words = option_words.parse(master.options)
    origin = f"hint {master.name}"
    settings = [fscontext.string(b"source", (REPLICA_SOURCE + master.name).encode())]
    settings += _settings(words.data, ids, origin)
    if label:
        settings.append(fscontext.string(b"context", label.encode()))
    attributes = words.attributes | _ALWAYS
    where = directory.where(master.directory)
    try:
        mount = fscontext.create(b"tmpfs", settings, attributes)
    except OSError as error:
        raise _worded(error, origin, where) from error
    try:
        os.mkdir(master.directory, 0o700, dir_fd=directory.fd)
        _attach(mount, directory, master)
        master.device = os.fstat(mount).st_dev
        master.namespace = pod_record.namespace(b"self", b"mnt")
    except OSError as error:
        raise _worded(error, origin, where) from error
    finally:
        os.close(mount)


def _worded(error, origin, target):
    call = getattr(error, "call", "") or "mkdir"
    number = error.errno or 0
    log = getattr(error, "log", "")
    text = f"{os.strerror(number)}: the kernel says: {log}" if log else ""
    return MountError(origin, call, target, text, number, hint_for(call, number))


def _attach(mount, directory, master):
    point = os.open(master.directory, _DIRECTORY, dir_fd=directory.fd)
    try:
        syscalls.move_mount(mount, point)
    finally:
        os.close(point)
    # On a shared mount (/run, with systemd) it became shared itself, and what is mounted in one
    # replica would appear in all of them.
    syscalls.mount_setattr(mount, propagation=abi.MS_PRIVATE)


def _settings(data, ids, origin):
    """Return the settings of fsconfig(2) of a hint's own options."""
    settings = []
    said = dict(data)
    for key, mapping in zip(("uid", "gid"), ids, strict=True):
        inside = said.get(key)
        number = outside(int(inside or 0), mapping)
        if number is None and inside is not None:
            raise MountError(origin, "", f"{key}={inside}",
                             "the id isn't mapped in the container's user namespace")
        if number:
            settings.append(fscontext.string(key.encode(), b"%d" % number))
    if "mode" in said:
        settings.append(fscontext.string(b"mode", said["mode"].encode()))
    settings.append(fscontext.string(b"size", said["size"].encode()))
    # Inodes are memory that size= doesn't count: as many as a tmpfs of that size gets at most
    # pages, which is the kernel's own ratio.
    inodes = max(_pages(said["size"]), _LEAST_INODES)
    settings.append(fscontext.string(b"nr_inodes", b"%d" % inodes))
    return settings


def _pages(size):
    if size.endswith("%"):
        return os.sysconf("SC_PHYS_PAGES") * int(size[:-1]) // 100
    return int(size) // os.sysconf("SC_PAGE_SIZE")


def outside(number, mapping):
    """Return the id that a user namespace's `number` is for us, or None.

    mapping: list of (inside, ours, count).
    """
    for inside, ours, count in mapping:
        if inside <= number < inside + count:
            return ours + number - inside
    return None


def mappings_of(pid):
    """Return (uids, gids) of a process's user namespace, each as (inside, ours, count).

    The kernel writes them in terms of the user namespace of who opens the files, and of the
    one around it for our own (user_namespaces(7)).
    """
    if pod_record.namespace(b"%d" % pid, b"user") == pod_record.namespace(b"self", b"user"):
        return _IDENTITY, _IDENTITY
    return tuple(
        [tuple(map(int, line.split())) for line in
         syscalls.read_file(b"/proc/%d/%s" % (pid, name)).splitlines()]
        for name in (b"uid_map", b"gid_map")
    )


# -- finding it again --------------------------------------------------------------------


def mounted(directory, master):
    """Return a descriptor (O_PATH) of a master's root where it is mounted here, or None."""
    try:
        fd = os.open(master.directory, _DIRECTORY, dir_fd=directory.fd)
    except FileNotFoundError:
        return None
    if os.fstat(fd).st_dev == master.device and syscalls.mount_id(fd)[1]:
        return fd
    os.close(fd)
    return None


def clone(directory, master, living):
    """Return a detached clone of a master, from wherever it is mounted, or None: it is gone.

    Where the runtime's mount namespace isn't the one that the master was made in (both private
    to the host), a process that has it mounted is looked for: in that namespace, or of the
    pod's containers, `living`.
    """
    try:
        fd = mounted(directory, master)
        if fd is not None:
            try:
                return syscalls.open_tree(fd, b"", _CLONE)
            finally:
                os.close(fd)
        return _brought_here(directory, master, _fetched(master, living))
    except OSError as error:
        if isinstance(error, MountError):
            raise
        raise _worded(error, f"hint {master.name}", directory.where(master.directory)) from error


def _brought_here(directory, master, mount):
    """Mount a clone that was made elsewhere, so that it lasts as long as we do; clone it."""
    if mount is None:
        return None
    try:
        remove(directory, master.directory)  # whatever else lies there
        os.mkdir(master.directory, 0o700, dir_fd=directory.fd)
        _attach(mount, directory, master)
        return syscalls.open_tree(mount, b"", _CLONE)
    finally:
        os.close(mount)


def _fetched(master, living):
    """Return a clone that a child made in another mount namespace, or None."""
    import _socket
    from _socket import AF_UNIX, SCM_RIGHTS, SOCK_SEQPACKET, SOL_SOCKET, socketpair

    here, there = socketpair(AF_UNIX, SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        try:
            here.close()
            alarm(_DEADLINE)
            mount = _found_elsewhere(master, living)
            if mount is not None:
                number = mount.to_bytes(4, sys.byteorder)
                there.sendmsg([b"."], [(SOL_SOCKET, SCM_RIGHTS, number)])
        finally:
            os._exit(0)
    there.close()
    try:
        _data, ancillary, _flags, _address = here.recvmsg(
            1, _socket.CMSG_SPACE(4), _socket.MSG_CMSG_CLOEXEC
        )
    finally:
        here.close()
        os.waitpid(child, 0)
    return int.from_bytes(ancillary[0][2][:4], sys.byteorder) if ancillary else None


def _found_elsewhere(master, living):
    # Read before any setns: afterwards /proc is another one.
    proc = os.open(b"/proc", os.O_RDONLY | os.O_DIRECTORY)
    seen = {pod_record.namespace(b"self", b"mnt")}
    for process in _candidates(master, living, proc):
        try:
            name = b"%d/ns/mnt" % process
            number = os.stat(name, dir_fd=proc).st_ino
            if number in seen:
                continue
            seen.add(number)
            syscalls.setns(os.open(name, os.O_RDONLY, dir_fd=proc), abi.CLONE_NEWNS)
            table = syscalls.read_all(os.open(b"self/mountinfo", os.O_RDONLY, dir_fd=proc))
            mount = _clone_of(master, mountinfo.parse(table))
        except OSError:
            continue  # gone meanwhile, or closed to us: the next one may do
        if mount is not None:
            return mount
    return None


def _candidates(master, living, proc):
    """Yield pids: of the namespace that the masters were made in, then of the containers."""
    for name in os.listdir(proc):
        if name.isdigit():
            try:
                number = os.stat(f"{name}/ns/mnt", dir_fd=proc).st_ino
            except OSError:
                continue
            if number == master.namespace:
                yield int(name)
                break
    for container in living:
        yield container.pid


def _clone_of(master, records):
    """Return a clone of the mount of a master's file system in this mount namespace, or None."""
    device = (os.major(master.device), os.minor(master.device))
    for each in records:
        if each.device != device or each.root != b"/" or each.type != b"tmpfs":
            continue
        try:
            fd = syscalls.openat2(abi.AT_FDCWD, each.mountpoint, _NO_LINKS)
        except OSError:
            continue
        try:
            # A hidden mount's path leads to what hides it.
            if os.fstat(fd).st_dev != master.device:
                continue
            mount = syscalls.open_tree(fd, b"", _CLONE)
        finally:
            os.close(fd)
        _like_a_master(mount, master)
        return mount
    return None


def _like_a_master(mount, master):
    """Give the clone of some replica, which may be stricter, the flags of the master."""
    attributes = option_words.parse(master.options).attributes | _ALWAYS
    flags = abi.MOUNT_ATTR_RDONLY | abi.MOUNT_ATTR_NOEXEC | abi.MOUNT_ATTR_NODIRATIME
    flags |= abi.MOUNT_ATTR_NOSYMFOLLOW
    syscalls.mount_setattr(mount, attributes, flags & ~attributes | abi.MOUNT_ATTR__ATIME,
                           abi.MS_PRIVATE)


# -- the end -----------------------------------------------------------------------------


def remove(directory, name):
    """Unmount a master here and in every mount namespace that got a copy of it.

    directory: the pod's.  name: the mountpoint's, there or not.  MountError.
    """
    where = directory.where(name)
    try:
        for _attempt in range(_MOST_STACKED):
            if _removed(name, directory.fd):
                return
            # Mounted in our own mount namespace; every component above is ours alone.
            syscalls.umount2(os.fsencode(where), abi.MNT_DETACH | abi.UMOUNT_NOFOLLOW)
        os.rmdir(name, dir_fd=directory.fd)
    except OSError as error:
        raise MountError("", getattr(error, "call", "rmdir"), where, "",
                         error.errno or 0) from error


def _removed(name, parent):
    """Remove a directory, there or not; False: something is mounted on it here."""
    try:
        os.rmdir(name, dir_fd=parent)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno != EBUSY:
            raise
        return False
    return True
