"""Mountpoints that are made where they are missing, inside one root.

Loaded where something has to be made or a symlink is on the way; what is there already is found by
`resolve` at once.
"""

import _stat as stat
import errno

from sandboxfs.kernel import abi
from sandboxfs.kernel import system as os
from sandboxfs.kernel.resolve import (
    ANY,
    ANY_NO_FOLLOW,
    ANY_NO_LINKS,
    DIRECTORY,
    DIRECTORY_MODE,
    FILE_MODE,
    LONGEST_LINK_CHAIN,
    REAL_DIRECTORY,
    OpenHow,
    open_in_root,
)
from sandboxfs.kernel.syscalls import fchmodat2, fchownat, get_errno, syscall

_SYS_openat2 = abi.SYS_openat2
_PATH = abi.O_PATH | os.O_CLOEXEC
# BENEATH: a link that leads out, as absolute ones do, is EXDEV before anything is looked up.
_NO_MAGIC = OpenHow(_PATH, 0, abi.RESOLVE_BENEATH | abi.RESOLVE_NO_MAGICLINKS)
_FOR_A_WALK = (errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.ELOOP, errno.ENOENT)


class Maker:
    """Makes missing mountpoints inside one root.

    root: its descriptor, borrowed.  owner: (uid, gid) of what is made, or None for the
    caller's own.  writable: called with the descriptor of a directory in which nothing can
    be made (EROFS); returns a descriptor of the same directory through a writable mount, or
    None when the tree was changed so that the path has to be walked again; or raises.
    linked: set where a symlink was followed; whoever looks at it clears it.
    """

    __slots__ = ("linked", "made", "owner", "root", "writable")

    def __init__(self, root, owner=None, writable=None):
        self.root = root
        self.owner = owner
        self.writable = writable
        self.made = 0
        self.linked = False

    def directory(self, path):
        """Return the descriptor of a directory at `path`, made (0755, parents too) if missing."""
        fd = syscall(_SYS_openat2, self.root, path, REAL_DIRECTORY, 24)
        if fd >= 0:
            return fd
        if get_errno() == errno.ENOENT:
            fd = self._make_last(path)
            return self._walk(path, True, True) if fd is None else fd
        self.linked = get_errno() == errno.ELOOP
        try:
            return open_in_root(self.root, path, DIRECTORY)
        except FileNotFoundError:
            return self._walk(path, True, True)

    def real_directory(self, path):
        """Return a directory's descriptor; a symlink anywhere on the path is ELOOP."""
        try:
            return open_in_root(self.root, path, REAL_DIRECTORY)
        except FileNotFoundError:
            return self._walk(path, True, False)

    def file(self, path):
        """Return the descriptor of a non-directory at `path`, made (0644, empty) if missing."""
        fd = syscall(_SYS_openat2, self.root, path, ANY_NO_LINKS, 24)
        if fd < 0:
            self.linked = get_errno() == errno.ELOOP
            try:
                fd = open_in_root(self.root, path, ANY)
            except FileNotFoundError:
                return self._walk(path, False, True)
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            os.close(fd)
            raise _kind_error(errno.EISDIR)
        return fd

    def link_itself(self, path, directory):
        """Return the descriptor of `path` with a last symlink not followed; made if missing."""
        # A slash at the end would have the link followed.
        path = path.rstrip(b"/")
        try:
            return open_in_root(self.root, path, ANY_NO_FOLLOW)
        except FileNotFoundError:
            return self._walk(path, directory, True)

    def parent(self, path):
        """Return (descriptor of the parent directory, made if missing, and the last name)."""
        head, _, name = path.rstrip(b"/").rpartition(b"/")
        return self.directory(head or b"/"), name

    def _make_last(self, path):
        """Make the one directory that is usually missing; None: it takes a walk."""
        head, _, name = path.rstrip(b"/").rpartition(b"/")
        if name in (b"", b".", b".."):
            return None
        try:
            parent = open_in_root(self.root, head or b"/", DIRECTORY)
        except OSError:
            return None  # the walk finds out what is wrong with it
        try:
            fd = _make_one(parent, name, True, self.owner)
        except OSError as error:
            # Read-only, a link without a target, or changed meanwhile: the walk knows.
            if error.errno not in _FOR_A_WALK:
                raise
            return None
        finally:
            os.close(parent)
        self.made += 1
        return fd

    def _walk(self, path, directory, follow):
        """Walk component by component, making what is missing."""
        while True:
            walk = _Walk(self, path, directory, follow)
            try:
                fd = walk.to_the_end()
            finally:
                walk.close()
            if fd is not None:
                return fd


class _Walk:
    """One walk.  Holds a descriptor of every directory on the way, so that `..` is a pop."""

    __slots__ = ("directory", "follow", "links", "maker", "opened", "pending")

    def __init__(self, maker, path, directory, follow):
        self.maker = maker
        self.directory = directory
        self.follow = follow
        self.links = 0
        self.opened = []
        self.pending = _components(path)

    def close(self):
        while self.opened:
            os.close(self.opened.pop())

    def here(self):
        return self.opened[-1] if self.opened else self.maker.root

    def to_the_end(self):
        """Return the descriptor of the last component, or None: walk again."""
        while self.pending:
            name = self.pending.pop()
            if name == b"..":
                if self.opened:
                    os.close(self.opened.pop())
                continue
            fd = self.step(name)
            if fd is None:
                return None
            self.opened.append(fd)
            mode = os.fstat(fd).st_mode
            if stat.S_ISLNK(mode):
                self.refuse_magic(name)
                self.follow_link(os.readlink(b"", dir_fd=fd))
            elif self.pending and not stat.S_ISDIR(mode):
                raise _kind_error(errno.ENOTDIR)
        return self.last()

    def step(self, name):
        """Open one component, made if missing.  None: the tree changed, walk again."""
        for _attempt in range(LONGEST_LINK_CHAIN):
            try:
                return os.open(name, _PATH | os.O_NOFOLLOW, dir_fd=self.here())
            except FileNotFoundError:
                if not self.make(name):
                    return None
        raise OSError(errno.EAGAIN, "the path keeps changing while it is made")

    def make(self, name):
        """Make one component; False: the tree changed, walk again."""
        here, maker = self.here(), self.maker
        is_directory = self.directory or bool(self.pending)
        try:
            os.close(_make_one(here, name, is_directory, maker.owner))
        except FileExistsError:
            return True  # somebody was faster: open what is there
        except OSError as error:
            if error.errno != errno.EROFS or maker.writable is None:
                raise
            twin = maker.writable(here)
            if twin is None:
                return False
            try:
                os.close(_make_one(twin, name, is_directory, maker.owner))
            except FileExistsError:
                return True
            finally:
                if twin != here:
                    os.close(twin)
        maker.made += 1
        return True

    def refuse_magic(self, name):
        """A link of procfs leads to a descriptor, not where its text says: ELOOP, as openat2's."""
        above = self.opened[-2] if len(self.opened) > 1 else self.maker.root
        try:
            os.close(open_in_root(above, name, _NO_MAGIC))
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise

    def follow_link(self, target):
        self.links += 1
        if self.links > LONGEST_LINK_CHAIN or not self.follow:
            raise OSError(errno.ELOOP, "a symlink is on the path")
        self.maker.linked = True
        os.close(self.opened.pop())
        if target.startswith(b"/"):
            self.close()
        self.pending += _components(target)

    def last(self):
        if not self.opened:
            if not self.directory:
                raise _kind_error(errno.EISDIR)
            return os.open(b".", _PATH | os.O_DIRECTORY, dir_fd=self.maker.root)
        is_directory = stat.S_ISDIR(os.fstat(self.opened[-1]).st_mode)
        if is_directory != self.directory:
            raise _kind_error(errno.EISDIR if is_directory else errno.ENOTDIR)
        return self.opened.pop()


def _components(path):
    return [name for name in reversed(path.split(b"/")) if name not in (b"", b".")]


def _kind_error(number):
    # OSError picks the subclass: NotADirectoryError or IsADirectoryError.
    return OSError(number, os.strerror(number))


def _make_one(parent, name, directory, owner):
    """Make a directory or an empty file, with its mode whatever the umask is.

    Returns its descriptor: O_PATH for a directory, for writing for a file.
    """
    mode = DIRECTORY_MODE if directory else FILE_MODE
    if directory:
        os.mkdir(name, mode, dir_fd=parent)
        made = os.open(name, _PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    else:
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        made = os.open(name, flags, mode, dir_fd=parent)
    try:
        _set_attributes(made, directory, mode, owner)
    except BaseException:
        os.close(made)
        raise
    return made


def _set_attributes(made, directory, mode, owner):
    status = os.fstat(made)
    given = stat.S_IMODE(status.st_mode) & 0o777
    if given == mode and owner is None:
        return
    # mkdir gives no descriptor: whoever else writes to the parent may have put another
    # directory there, which must not be given away or opened up.
    if directory and (status.st_uid != os.geteuid() or status.st_nlink > 2 or given & ~mode):
        return
    if given != mode:
        # The umask took bits away; it is the whole process's, so it is left alone.
        fchmodat2(made, mode | status.st_mode & stat.S_ISGID)
    if owner is not None:
        fchownat(made, *owner)
