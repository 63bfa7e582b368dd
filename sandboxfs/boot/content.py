"""Moving the content of one file to another file system, page by page if that matters.

What lies in memory is there twice while it is copied.  A long file, or one with several names,
therefore gives its pages back while it is copied, from its end, unless somebody has it open or
mapped: a file that got shorter would be SIGBUS for them.
"""

import errno
import fcntl
import os
import stat

CHUNK = 4 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")

_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_WRITE = os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# Executed right now, immutable, on a read-only mount: it can be read all the same.
_NOT_WRITABLE = (errno.ETXTBSY, errno.EPERM, errno.EROFS)
_NO_ATTRIBUTES = (errno.ENOTSUP, errno.ENOSYS)


class Torn(OSError):
    """A move failed, and so did moving back: what was moved is in both places, nothing is lost.

    first, second: the two errors.
    """

    def __init__(self, first, second):
        super().__init__(second.errno, f"{first}; then, moving back: {second}")
        self.first = first
        self.second = second


def open_exclusively(directory, name):
    """Open a regular file; returns (descriptor, whether nobody else has it open or mapped).

    In that case it is writable, and opening it blocks until the descriptor is closed: a write
    lease is only given to the one user of a file (fcntl(2), F_SETLEASE).
    """
    try:
        file = os.open(name, _READ_WRITE, dir_fd=directory)
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        return os.open(name, _READ, dir_fd=directory), False
    try:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError:  # EAGAIN: it is in use; EINVAL: no leases here
        return file, False
    return file, True


class Content:
    """The content and attributes of a regular file, on the move.

    directory, name, status: where the file is, and what it was.  moved: called with each number
    of bytes that has been moved.
    """

    def __init__(self, directory, name, status, moved):
        self.moved = moved
        self.copy = -1
        self.place = (-1, "")
        self.shrinks = False
        if status.st_size > CHUNK or (status.st_nlink > 1 and status.st_size):
            self.file, self.shrinks = open_exclusively(directory, name)
        else:
            self.file = os.open(name, _READ, dir_fd=directory)
        try:
            # From here on its size is certain, if it is ours alone.
            self.status = os.fstat(self.file)
            # Read now: the kernel takes security.capability from a file that is made shorter.
            self.attributes = read_attributes(self.file)
        except BaseException:
            os.close(self.file)
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        os.close(self.file)
        if self.copy >= 0:
            os.close(self.copy)

    def move_to(self, directory, name):
        """Make the copy; on an error everything is as it was before it is raised, or `Torn`."""
        self.copy = os.open(name, _CREATE, 0o600, dir_fd=directory)
        self.place = (directory, name)
        try:
            os.ftruncate(self.copy, self.status.st_size)
            _transfer(self.file, self.copy, self.status, self.shrinks, self.moved)
            write_attributes(self.copy, self.status, self.attributes)
        except BaseException as error:
            self.move_back(error)
            raise

    def move_back(self, reason):
        """Give the file back what it has lost, and remove the copy; `Torn` if that fails."""
        try:
            if self.shrinks:
                give_back(self.copy, self.file, self.status, self.attributes)
        except OSError as error:
            raise Torn(reason, error) from reason
        directory, name = self.place
        os.unlink(name, dir_fd=directory)

    def put_into(self, file):
        """Write the content into a file that is there already (a descriptor, read and write)."""
        os.ftruncate(file, 0)
        os.ftruncate(file, self.status.st_size)
        _transfer(self.file, file, self.status, False, self.moved)
        write_attributes(file, self.status, self.attributes)


def give_back(copy, file, status, attributes):
    """Move what a file has lost at its end back from the copy, which gets shorter instead."""
    kept = os.fstat(file).st_size
    if kept < status.st_size:
        os.ftruncate(file, status.st_size)
        _transfer(copy, file, os.fstat(copy), True, lambda size: None, kept)
    write_attributes(file, status, attributes)


def _transfer(source, target, status, shrinks, moved, first=0):
    """Copy all data from offset `first` on, the last piece first; holes stay holes."""
    pieces = _pieces(source, first, status.st_size)
    # A ramfs doesn't know its holes: those are found by reading (and cost pages until then).
    holes_unknown = status.st_blocks * 512 < status.st_size and pieces == _split(
        first, status.st_size
    )
    for start, end in reversed(pieces):
        if holes_unknown:
            _copy_without_zeros(source, target, start, end)
        else:
            _copy(source, target, start, end)
        if shrinks:
            os.ftruncate(source, start)
        moved(end - start)
    if shrinks:
        os.ftruncate(source, first)


def _pieces(file, first, size):
    """Return [(start, end)] of the data from `first` on, none longer than CHUNK."""
    pieces = []
    while first < size:
        try:
            start = os.lseek(file, first, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # only a hole is left
                raise
            break
        first = min(os.lseek(file, start, os.SEEK_HOLE), size)
        pieces += _split(start, first)
    return pieces


def _split(start, end):
    return [(at, min(at + CHUNK, end)) for at in range(start, end, CHUNK)]


def _copy(source, target, start, end):
    os.lseek(target, start, os.SEEK_SET)
    while start < end:
        count = os.sendfile(target, source, start, end - start)
        if not count:
            return  # somebody cut the file
        start += count


def _copy_without_zeros(source, target, start, end):
    zeros = bytes(PAGE)
    while start < end:
        data = os.pread(source, min(1 << 18, end - start), start)
        if not data:
            return
        for at in range(0, len(data), PAGE):
            page = data[at:at + PAGE]
            if page != zeros[:len(page)]:
                _write(target, page, start + at)
        start += len(data)


def _write(target, data, offset):
    while data:
        count = os.pwrite(target, data, offset)
        data = data[count:]
        offset += count


def read_attributes(file, follow=True):
    """Return [(name, value)] of the extended attributes of a descriptor, or of a path."""
    options = {} if follow else {"follow_symlinks": False}
    try:
        names = os.listxattr(file, **options)
    except OSError as error:
        if error.errno not in _NO_ATTRIBUTES:
            raise
        return []
    return [(name, os.getxattr(file, name, **options)) for name in names]


def write_attributes(file, status, attributes):
    """Give an open file or directory its owner, extended attributes, mode and times."""
    os.fchown(file, status.st_uid, status.st_gid)
    given = dict(attributes)
    for name, _value in read_attributes(file):
        # What a directory's default ACL has added.
        if name.startswith("system.posix_acl_") and name not in given:
            os.removexattr(file, name)
    for name, value in attributes:
        os.setxattr(file, name, value)
    os.fchmod(file, stat.S_IMODE(status.st_mode))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
