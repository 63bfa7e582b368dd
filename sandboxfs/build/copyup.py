"""Copies of files and trees onto a tmpfs: `tmpcopyup`, and file binds with an overlay."""

import errno
import os
import stat

from sandboxfs.build.failure import worded
from sandboxfs.kernel import abi
from sandboxfs.kernel.syscalls import mount_setattr, open_tree

_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_DIRECTORY = _READ | os.O_DIRECTORY
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_CHUNK = 1 << 30
# What chown answers to an id that isn't mapped in this user namespace.
_NOT_MAPPED = (errno.EPERM, errno.EINVAL)


def copy_up(assembly, target, mount, operation):
    """`tmpcopyup`: copy what is at the destination into the tmpfs that will cover it."""
    try:
        source = os.open(b".", _READ_DIRECTORY, dir_fd=target)
        destination = os.open(b".", _READ_DIRECTORY, dir_fd=mount)
        try:
            copy_tree(source, destination)
        finally:
            os.close(source)
            os.close(destination)
    except OSError as error:
        raise worded(error, operation, operation.destination, "tmpcopyup") from error
    if operation.attributes & abi.MOUNT_ATTR_RDONLY:
        mount_setattr(mount, abi.MOUNT_ATTR_RDONLY)


def copy_tree(source, destination):
    """Copy the content of one directory into another, both by readable descriptors.

    Modes, owners, times, xattrs, hard links, symlinks and device nodes are kept; what is
    mounted below the source is not entered.
    """
    links = {}
    device = os.fstat(source).st_dev
    # The destination itself keeps the attributes it was made with.
    pending: list[tuple[int, int, os.stat_result | None]] = [
        (os.dup(source), os.dup(destination), None)
    ]
    try:
        while pending:
            here, there, status = pending.pop()
            try:
                directories = _copy_entries(here, there, links, device)
                pending.extend(directories)
                if status is not None:
                    _copy_attributes(here, there, status)
            finally:
                os.close(here)
                os.close(there)
    finally:
        for here, there, _status in pending:
            os.close(here)
            os.close(there)
        for directory, _name in links.values():
            os.close(directory)


def _copy_entries(here, there, links, device):
    directories = []
    for name in os.listdir(here):
        status = os.stat(name, dir_fd=here, follow_symlinks=False)
        identity = (status.st_dev, status.st_ino)
        if stat.S_ISDIR(status.st_mode):
            os.mkdir(name, 0o700, dir_fd=there)
            child = os.open(name, _READ_DIRECTORY, dir_fd=there)
            if status.st_dev != device:
                _copy_attributes(None, child, status)
                os.close(child)
                continue
            directories.append((os.open(name, _READ_DIRECTORY, dir_fd=here), child, status))
        elif status.st_nlink > 1 and identity in links:
            directory, first = links[identity]
            os.link(first, name, src_dir_fd=directory, dst_dir_fd=there, follow_symlinks=False)
        else:
            _copy_one(here, there, name, status)
            if status.st_nlink > 1:
                links[identity] = (os.dup(there), name)
    return directories


def _copy_one(here, there, name, status):
    mode = status.st_mode
    if stat.S_ISLNK(mode):
        os.symlink(os.readlink(name, dir_fd=here), name, dir_fd=there)
        _give(there, name, status)
    elif stat.S_ISREG(mode):
        source = os.open(name, _READ, dir_fd=here)
        try:
            copy = os.open(name, _WRITE, 0o600, dir_fd=there)
            try:
                copy_content(source, copy)
                _copy_attributes(source, copy, status)
            finally:
                os.close(copy)
        finally:
            os.close(source)
    else:
        os.mknod(name, mode, status.st_rdev, dir_fd=there)
        _give(there, name, status)
        os.chmod(name, stat.S_IMODE(mode), dir_fd=there)


def copy_content(source, copy):
    """Copy the bytes of one open file to another."""
    while os.sendfile(copy, source, None, _CHUNK):
        pass


def _give(there, name, status):
    try:
        os.chown(name, status.st_uid, status.st_gid, dir_fd=there, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NOT_MAPPED:
            raise


def _copy_attributes(source, copy, status):
    try:
        os.fchown(copy, status.st_uid, status.st_gid)
    except OSError as error:
        if error.errno not in _NOT_MAPPED:
            raise
    for name in os.listxattr(source) if source is not None else ():
        if not name.startswith("trusted.overlay."):
            os.setxattr(copy, name, os.getxattr(source, name))
    os.fchmod(copy, stat.S_IMODE(status.st_mode))
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))


def file_on(engine, source, status, own):
    """Return a mount of a copy of one file (`source`: its O_PATH descriptor) on the tmpfs."""
    tmpfs = engine.tmpfs()
    name = b"file%d" % engine.uppers
    engine.uppers += 1
    original = os.open(b"/proc/self/fd/%d" % source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        copy = os.open(name, _WRITE, 0o600, dir_fd=tmpfs)
        try:
            if stat.S_ISREG(status.st_mode):
                copy_content(original, copy)
            _copy_attributes(original, copy, status)
        finally:
            os.close(copy)
    finally:
        os.close(original)
    path = own(os.open(name, abi.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=tmpfs))
    fd = own(open_tree(path, b"", abi.OPEN_TREE_CLONE | abi.AT_EMPTY_PATH))
    mount_setattr(fd, 0, 0, abi.MS_PRIVATE)
    return fd
