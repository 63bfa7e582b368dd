"""Deleting what an initramfs holds: by descriptor, iteratively, and never anything else.

A path is never used: each directory is opened from its parent by openat2(2), which refuses to
cross a mount or follow a symlink, and what is unlinked is named relative to that descriptor.
One descriptor is open at a time, however deep the tree is.
"""

import errno
import os
import stat

from sandboxfs.kernel import abi
from sandboxfs.kernel.resolve import open_in_root
from sandboxfs.kernel.syscalls import OpenHow

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_BELOW = OpenHow(
    _DIRECTORY, 0,
    abi.RESOLVE_BENEATH | abi.RESOLVE_NO_XDEV | abi.RESOLVE_NO_SYMLINKS
    | abi.RESOLVE_NO_MAGICLINKS,
)
# A mount, or a directory with one in it.
_MOUNTED = (errno.EXDEV, errno.EBUSY)


def identity(status):
    """Return what makes a file the same one: (device, inode)."""
    return status.st_dev, status.st_ino


class _Level:
    """One directory on the way down.  kept: something in it was left on purpose."""

    __slots__ = ("identity", "kept", "name", "names", "path")

    def __init__(self, fd, name, path):
        self.identity = identity(os.fstat(fd))
        self.name = name
        self.path = path
        self.names = os.listdir(fd)
        self.kept = False


def delete_below(root, kept=()):
    """Delete everything in the directory `root` (a descriptor) that lies on its own device.

    What is mounted below it stays, with all that it shows, and so do the files whose identity
    (`identity`) is in `kept`, directories with all they hold.  The directory itself stays.

    Returns a list of (path relative to root, errno) of what could not be deleted, or not be
    looked at.
    """
    return _Walk(root, kept).run()


class _Walk:
    """One deletion.  here: descriptor of the current directory."""

    def __init__(self, root, kept):
        self.root = root
        self.kept = frozenset(kept)
        self.left = []
        self.levels = []
        self.device = 0
        self.here = -1

    def run(self):
        self.device = os.fstat(self.root).st_dev
        self.here = os.open(".", _DIRECTORY, dir_fd=self.root)
        try:
            self.levels.append(_Level(self.here, "", ""))
            while self.levels:
                level = self.levels[-1]
                if level.names:
                    self.entry(level, level.names.pop())
                elif not self.up():
                    break
        finally:
            os.close(self.here)
        return self.left

    def entry(self, level, name):
        """Delete one name of the current directory, or go down into it."""
        path = f"{level.path}{name}"
        try:
            status = os.stat(name, dir_fd=self.here, follow_symlinks=False)
            if status.st_dev != self.device or identity(status) in self.kept:
                level.kept = True
            elif stat.S_ISDIR(status.st_mode):
                self.down(level, name, path, status)
            else:
                os.unlink(name, dir_fd=self.here)
        except FileNotFoundError:
            pass  # somebody else was faster
        except OSError as error:
            level.kept = True
            if error.errno not in _MOUNTED:
                self.left.append((path, error.errno))

    def down(self, level, name, path, status):
        child = open_in_root(self.here, os.fsencode(name), _BELOW)
        if identity(os.fstat(child)) != identity(status):
            os.close(child)
            raise OSError(errno.EAGAIN, "exchanged while it was looked at")
        try:
            self.levels.append(_Level(child, name, path + "/"))
        except OSError:
            os.close(child)
            raise
        os.close(self.here)
        self.here = child

    def up(self):
        """Leave a finished directory and remove it; False: that was the last one."""
        done = self.levels.pop()
        if not self.levels:
            return False
        level = self.levels[-1]
        if len(self.levels) == 1:
            # By `..` it would be the new root, if that is mounted on this very directory.
            parent = os.open(".", _DIRECTORY, dir_fd=self.root)
        else:
            parent = os.open("..", _DIRECTORY, dir_fd=self.here)
        os.close(self.here)
        self.here = parent
        if identity(os.fstat(parent)) != level.identity:
            # Moved away under our hands: what is here is nobody's to delete.
            self.left.append((done.path, errno.EAGAIN))
            return False
        if done.kept:
            level.kept = True
            return True
        try:
            os.rmdir(done.name, dir_fd=parent)
        except FileNotFoundError:
            pass
        except OSError as error:
            level.kept = True
            if error.errno not in _MOUNTED:
                self.left.append((done.path, error.errno))
        return True
