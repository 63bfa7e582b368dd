"""Mountpoints that many binds need, made in the upper before overlayfs joins it.

To make a directory on an overlay takes three times what it takes on the tmpfs below, which until
then is ours alone.  What is made is what overlayfs would have made when asked for the same paths:
the missing directories, and of those that only the lower has a copy with mode, owner and times.
Whatever needs more than that (extended attributes, ACLs, a group that is handed down, a directory
that may not be changed, a link) is left to overlayfs, as everything is from where a call fails.
"""

import _stat as stat
import sys
from errno import ENOENT

from sandboxfs.build.calls import DIRECTORY, mkdirat, openat
from sandboxfs.kernel import abi, resolve
from sandboxfs.kernel import system as os
from sandboxfs.kernel.foreign import get_errno
from sandboxfs.kernel.syscalls import fchownat, function, statx, syscall

# From so many in one directory on it is worth looking at the lower first.
MANY = 3
_look = function("openat")
_faccessat = function("faccessat")
_UPPER_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MISSING = -1
# What an id looks like that isn't mapped here: overlayfs can't copy it either.
_NOBODY = 65534


class Upper:
    """The upper of one plan's overlay; used by one build at a time.

    lowers: by path, a descriptor in the lower, _MISSING, or None where overlayfs has to do it.
    uppers: by path, a descriptor in the upper, or None likewise.  copies: by the descriptor of
    each copy, the status of what it is a copy of.  changed: those in which something was made.
    """

    def __init__(self, calls):
        self.calls = calls
        self.opened = []
        self.forget()

    def forget(self):
        while self.opened:
            os.close(self.opened.pop())
        self.lowers, self.uppers, self.copies, self.changed = {}, {}, {}, set()

    def make(self, lower, upper, places):
        """Make what is missing of the mountpoints in `places`; returns 0, whatever was made.

        lower, upper: slots of the two directories.  Below 0: the upper can't be used.
        """
        self.calls.ready.clear()
        there = self.calls.there
        places = [place for place in places if place.path not in there]
        if not places:
            return 0
        self.lowers[b"/"], self.uppers[b"/"] = lower.value, upper.value
        try:
            self.make_some(places)
            self.keep_times()
        except OSError:
            return -1
        finally:
            self.forget()
        return 0

    def make_some(self, places):
        """Make mountpoints as long as nothing fails."""
        try:
            for place in places:
                self.make_in(place)
        except OSError:
            pass  # no room, no descriptors: the build makes the rest, or says so

    def make_in(self, place):
        """Make the mountpoints in one place, until one of them is there."""
        lower = self.lower(place)
        if lower is None:
            return
        for operation, name in place.binds:
            if lower != _MISSING and (
                _faccessat(lower, name, 0, abi.AT_SYMLINK_NOFOLLOW) == 0 or get_errno() != ENOENT
            ):
                if operation is place.binds[0][0]:
                    self.calls.there.add(place.path)
                break  # where one is there the next will be
            directory = self.upper(place)
            if directory is None:
                break
            if self.calls.make(operation, self.calls.source(operation), directory, name) == 0:
                self.calls.ready.add(operation)
                self.changed.add(directory)

    def lower(self, place):
        """Return the descriptor of a place in the lower, _MISSING, or None: not for us."""
        if place.path not in self.lowers:
            fd = above = self.lower(place.above)
            if above is not None and above != _MISSING:
                fd = _look(above, place.name, DIRECTORY)
                if fd >= 0:
                    self.opened.append(fd)
                elif get_errno() != ENOENT:
                    fd = None
            self.lowers[place.path] = fd
        return self.lowers[place.path]

    def upper(self, place):
        """Return the descriptor of a place in the upper, made or copied, or None: not for us."""
        if place.path not in self.uppers:
            self.uppers[place.path] = None
            above, lower = self.upper(place.above), self.lowers[place.path]
            if above is not None and lower == _MISSING:
                self.uppers[place.path] = self.made(above, place.name, resolve.DIRECTORY_MODE)
                self.changed.add(above)
            elif above is not None:
                status = copiable(lower)
                if status is not None:
                    self.uppers[place.path] = self.copied(above, place.name, status)
        return self.uppers[place.path]

    def copied(self, above, name, status):
        """Make the copy of a directory, and return its descriptor.  Raises OSError."""
        fd = self.made(above, name, stat.S_IMODE(status.st_mode))
        try:
            # Whoever we are: what we make is ours.
            fchownat(fd, status.st_uid, status.st_gid)
        except OSError:
            os.rmdir(name, dir_fd=above)
            raise
        self.copies[fd] = status
        return fd

    def made(self, above, name, mode):
        """Make a directory of the upper, and return its descriptor.  Raises OSError."""
        if mkdirat(above, name, mode) < 0:
            raise OSError
        fd = openat(above, name, _UPPER_DIRECTORY)
        if fd < 0:
            os.rmdir(name, dir_fd=above)
            raise OSError
        self.opened.append(fd)
        return fd

    def keep_times(self):
        """Give the copies the times they have as copies of overlayfs."""
        for fd, status in self.copies.items():
            modified = os.fstat(fd).st_mtime_ns if fd in self.changed else status.st_mtime_ns
            os.utime(fd, ns=(status.st_atime_ns, modified))


def copiable(directory):
    """Return the status of a directory that has nothing but owner, mode and times, else None."""
    status = os.fstat(directory)
    if (status.st_mode & (stat.S_ISUID | stat.S_ISGID) or _NOBODY in (status.st_uid, status.st_gid)
            or syscall(abi.SYS_listxattrat, directory, b".", 0, None, 0) != 0):
        return None
    attributes = int.from_bytes(statx(directory, 0)[8:16], sys.byteorder)
    return None if attributes & (abi.STATX_ATTR_IMMUTABLE | abi.STATX_ATTR_APPEND) else status
