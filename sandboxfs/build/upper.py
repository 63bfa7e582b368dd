"""``overlay=dir=PATH``: the upper and work directories on a file system of the host."""

import errno
import os
import stat

from sandboxfs.build.failure import worded
from sandboxfs.kernel import abi, resolve
from sandboxfs.kernel.syscalls import fchmodat2

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_BELOW = abi.RESOLVE_BENEATH | abi.RESOLVE_NO_XDEV | abi.RESOLVE_NO_SYMLINKS
_CHILD = resolve.OpenHow(_DIRECTORY, 0, _BELOW)
# Beside upper and work: the container's own files are in these.
_REMOVED_AFTERWARDS = "removed-after-the-container"
_CHILD_PATH = resolve.OpenHow(abi.O_PATH | _DIRECTORY, 0, _BELOW)


def prepare(plan):
    """Return the `UpperDirectory` that the plan asks for, made, or None."""
    for operation in plan.operations:
        if getattr(operation, "upper", None) is not None:
            return UpperDirectory(operation)
    return None


class UpperDirectory:
    """A fresh directory under the path that the user gave; `fd` is its descriptor."""

    def __init__(self, operation):
        path = operation.upper
        self.keep = operation.keep
        self.name = operation.label or f"sandboxfs-{os.urandom(6).hex()}"
        try:
            self.parent = os.open(path, abi.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise worded(error, operation, path, "open") from error
        try:
            os.mkdir(self.name, 0o700, dir_fd=self.parent)
            self.fd = os.open(self.name, _DIRECTORY, dir_fd=self.parent)
        except OSError as error:
            os.close(self.parent)
            raise worded(error, operation, os.path.join(path, self.name), "mkdir") from error

    def empty(self):
        """Remove what a first try made in the directory."""
        for name in os.listdir(self.fd):
            remove_tree(self.fd, name)

    def remove(self, failed=False):
        """Remove the directory with everything in it, unless it is to be kept.

        failed: nobody ever wrote to it, so it isn't worth keeping.
        """
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        try:
            if failed or not self.keep:
                remove_tree(self.parent, self.name)
        finally:
            os.close(self.parent)


def mark_for_removal(upper):
    """Have `remove_after` take an `UpperDirectory` away: unlike one to be kept it has a mark."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    os.close(os.open(_REMOVED_AFTERWARDS, flags, 0o600, dir_fd=upper.fd))


def remove_after(path, name):
    """Remove the directory `name` under `path` if it was made to be removed after its container.

    One that isn't there, or that has no mark, is left alone: somebody else's, or kept.
    """
    try:
        parent = os.open(path, abi.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        try:
            here = os.open(name, _DIRECTORY, dir_fd=parent)
        except (FileNotFoundError, NotADirectoryError):
            return
        try:
            os.stat(_REMOVED_AFTERWARDS, dir_fd=here, follow_symlinks=False)
        except FileNotFoundError:
            return
        finally:
            os.close(here)
        remove_tree(parent, name)
    finally:
        os.close(parent)


def remove_tree(parent, name):
    """Remove a directory tree by descriptor: no link followed, no mount crossed, any depth.

    Only one directory is open at a time, so neither depth nor RLIMIT_NOFILE is a limit.
    """
    flags = _DIRECTORY
    here = _opened(parent, name)
    path = [name]
    identities = [os.fstat(parent)]
    try:
        while path:
            child = _emptied(here)
            if child is not None:
                identities.append(os.fstat(here))
                following = _opened(here, child)
                os.close(here)
                here = following
                path.append(child)
                continue
            above = os.open("..", flags, dir_fd=here)
            os.close(here)
            here = above
            if not os.path.samestat(os.fstat(here), identities.pop()):
                raise OSError(errno.ESTALE, "the directory was moved while it was removed")
            os.rmdir(path.pop(), dir_fd=here)
    finally:
        os.close(here)


def _opened(parent, name):
    """Open a directory that is no mountpoint: a bind has the device of what it lies on."""
    path = os.fsencode(name)
    try:
        return resolve.open_in_root(parent, path, _CHILD)
    except PermissionError:
        # overlayfs leaves its work directory without any mode bits.
        found = resolve.open_in_root(parent, path, _CHILD_PATH)
        try:
            fchmodat2(found, 0o700)
        finally:
            os.close(found)
        return resolve.open_in_root(parent, path, _CHILD)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        raise OSError(errno.EBUSY, f"{name}: something is mounted there") from error


def _emptied(here):
    """Remove the non-directories of `here`; returns the name of a directory in it, or None."""
    with os.scandir(here) as entries:
        for entry in entries:
            status = os.stat(entry.name, dir_fd=here, follow_symlinks=False)
            if not stat.S_ISDIR(status.st_mode):
                os.unlink(entry.name, dir_fd=here)
            else:
                return entry.name
    return None
