"""Moving a tree from one file system to another, emptying the first as the second grows.

For an initramfs, whose files are memory: a plain copy would need the tree's size twice.  Each
file is unlinked as soon as its copy is complete.

All or nothing: a move that fails is moved back.  Nothing is imported meanwhile, since what would
be imported may be under way itself.
"""

import errno
import os
import stat
import time

from sandboxfs.boot.content import (
    CHUNK,
    PAGE,
    Content,
    Torn,
    give_back,
    open_exclusively,
    read_attributes,
    write_attributes,
)

_READ_WRITE = os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Up to this length tmpfs keeps a symlink's target in its inode, beyond in a page of its own.
_SHORT_SYMLINK = 128


class Need:
    """What a tree takes.

    size: bytes of all file content, in whole pages, without holes.  names: how many files,
    directories and further links there are.  busy: bytes of the long files that are open or
    mapped: unlinked, they stay in memory until whoever has them ends or executes something else.
    """

    __slots__ = ("busy", "names", "size")

    def __init__(self):
        self.size = 0
        self.names = 1
        self.busy = 0


def measure(root, skipped=()):
    """Return the `Need` of the directory `root` (a readable descriptor); nothing is changed.

    It has to be one of a mount without others on it (a clone): what it shows is counted.
    skipped: names in the root that aren't.
    """
    need = Need()
    met = set()
    walk = _Trail(root)
    try:
        pending = [[name for name in os.listdir(walk.fd) if name not in skipped]]
        while pending:
            if not pending[-1]:
                pending.pop()
                if pending:
                    walk.up()
                continue
            name = pending[-1].pop()
            try:
                status = os.stat(name, dir_fd=walk.fd, follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    walk.down(name)
                    pending.append(os.listdir(walk.fd))
                elif status.st_nlink == 1 or status.st_ino not in met:
                    _count(need, walk.fd, name, status)
            except FileNotFoundError:
                continue  # it went meanwhile
            need.names += 1
            if status.st_nlink > 1:
                met.add(status.st_ino)
    finally:
        walk.close()
    # A tmpfs counts extended attributes as inodes, a kibibyte each.
    system = os.fstatvfs(root)
    need.names = max(need.names, system.f_files - system.f_ffree)
    return need


def _count(need, directory, name, status):
    if stat.S_ISLNK(status.st_mode):
        need.size += PAGE if status.st_size >= _SHORT_SYMLINK else 0
    elif stat.S_ISREG(status.st_mode):
        size = min(-(-status.st_size // PAGE) * PAGE, status.st_blocks * 512)
        need.size += size
        if size > CHUNK:
            file, exclusive = open_exclusively(directory, name)
            os.close(file)
            need.busy += 0 if exclusive else size


class _Trail:
    """The way to the directory a walk is in: one descriptor, however deep it is."""

    __slots__ = ("fd", "parents")

    def __init__(self, root):
        self.fd = os.open(".", _DIRECTORY, dir_fd=root)
        self.parents = []

    def down(self, name):
        child = os.open(name, _DIRECTORY, dir_fd=self.fd)
        status = os.fstat(self.fd)
        self.parents.append((status.st_dev, status.st_ino))
        os.close(self.fd)
        self.fd = child

    def up(self):
        parent = os.open("..", _DIRECTORY, dir_fd=self.fd)
        os.close(self.fd)
        self.fd = parent
        status = os.fstat(parent)
        if self.parents.pop() != (status.st_dev, status.st_ino):
            raise OSError(errno.ESTALE, "a directory was moved elsewhere while its content was")

    def close(self):
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def move_tree(source, destination, skipped=(), moved=lambda size: None):
    """Move what is in one directory into another one, empty and on another file system.

    source, destination: readable descriptors, borrowed; the source one of a mount without
    others on it.  Modes, owners, times, extended attributes, holes, hard links, symlinks, device
    nodes, FIFOs and sockets are kept, those of `source` itself are given to `destination`.
    What is a mountpoint elsewhere in this namespace is copied but can't be removed: it stays.
    skipped: names in the source's root that are left alone.  moved: called with the number of
    bytes just moved.

    The process's working directory is another one meanwhile.  OSError (ENOSPC, ENOMEM …): it
    is raised after everything has been moved back; `Torn` if that failed, too.
    """
    came_from = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    links = f".sandboxfs-links-{os.getpid()}-{time.monotonic_ns()}"
    try:
        status = os.fstat(source)
        _make_both(links, source, destination)
        forth = _Move(source, destination, links, skipped, moved)
        forth.levels[0].status = status
        try:
            forth.run()
        except Torn:
            forth.close()
            raise
        except BaseException as error:
            try:
                unfinished = forth.stop()
                back = _Move(destination, source, links, (), lambda size: None, unfinished)
                back.run_back()
            except OSError as second:
                raise Torn(error, second) from error
            raise
    finally:
        os.fchdir(came_from)
        os.close(came_from)


def _make_both(name, source, destination):
    os.mkdir(name, 0o700, dir_fd=destination)
    try:
        os.mkdir(name, 0o700, dir_fd=source)
    except OSError:
        os.rmdir(name, dir_fd=destination)
        raise


class _Level:
    """A directory whose content is being moved.

    names: what is still to be moved.  kept: what couldn't be removed, being a mountpoint.
    """

    __slots__ = ("kept", "name", "names", "status")

    def __init__(self, name, status):
        self.name = name
        self.status = status
        self.names = []
        self.kept = set()


class _Move:
    """One direction of a move.

    Files with several names: `links` is the name of a directory in both roots, in which such a
    file has one name more, its inode number, on both sides while it is moved.  The first name
    that is met takes the content along, the others become links to it; the name that is left on
    this side leads to the file again if all has to be moved back.
    """

    def __init__(self, source, destination, links, skipped, moved, unfinished=None):
        self.links = links
        # On the way back: the inode numbers of directories that still are on the other side.
        self.unfinished = unfinished or set()
        self.mark = "forth" if unfinished is None else "back"
        self.skipped = {links, *skipped}
        self.moved = moved
        # The inode number on this side → the file's name in both directories.
        self.linked = {}
        self.levels = [_Level("", os.fstat(source))]
        self.opened = []
        try:
            self.here = self._trail(source)
            self.there = self._trail(destination)
            self.links_here = self._trail(source)
            self.links_there = self._trail(destination)
        except BaseException:
            self.close()
            raise

    def _trail(self, root):
        trail = _Trail(root)
        self.opened.append(trail)
        return trail

    def close(self):
        for trail in self.opened:
            trail.close()

    def run(self):
        """Move everything.  After an error, call `stop`."""
        for trail in (self.links_here, self.links_there):
            trail.down(self.links)
        self._restore_linked()
        self._list()
        while self.levels[-1].names or self._leave():
            level = self.levels[-1]
            self._entry(level, level.names.pop())
        root = self.levels[0]
        self._finish(root)
        for trail in (self.links_here, self.links_there):
            for name in os.listdir(trail.fd):
                os.unlink(name, dir_fd=trail.fd)
            trail.up()
            os.rmdir(self.links, dir_fd=trail.fd)
        os.utime(self.there.fd, ns=(root.status.st_atime_ns, root.status.st_mtime_ns))
        self.close()

    def run_back(self):
        """Move everything back; in any case, nothing is left open."""
        try:
            self.run()
        finally:
            self.close()

    # -- directories ---------------------------------------------------------------------------

    def _list(self):
        """Look for names that have not been moved; returns whether there are any."""
        level = self.levels[-1]
        left = level.kept if len(self.levels) > 1 else level.kept | self.skipped
        level.names = [name for name in os.listdir(self.here.fd) if name not in left]
        return bool(level.names)

    def _entry(self, level, name):
        try:
            status = os.stat(name, dir_fd=self.here.fd, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                self._enter(name, status)
            elif status.st_nlink > 1:
                self._move_linked(level, name, status)
            else:
                self._move_single(level, name, status)
        except FileNotFoundError:
            if self._is_here(name):
                raise  # so it is something else that is missing

    def _is_here(self, name):
        try:
            os.stat(name, dir_fd=self.here.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False  # somebody removed it
        return True

    def _enter(self, name, status):
        # It can be there already: there was more in it after the last look, or we go back.
        self._make_directory(self.there.fd, name)
        self.there.down(name)
        try:
            self.here.down(name)
        except BaseException:
            self.there.up()
            raise
        self.levels.append(_Level(name, status))
        self._list()

    @staticmethod
    def _make_directory(directory, name):
        try:
            os.mkdir(name, 0o700, dir_fd=directory)
        except FileExistsError:
            pass

    def _leave(self):
        """Finish directories until one has more to be moved; False: everything has been."""
        # Others may have made files since the last look.
        while not self._list():
            if len(self.levels) == 1:
                return False
            level = self.levels[-1]
            self._finish(level)
            self.levels.pop()
            self.here.up()
            self.there.up()
            self._remove_directory(level)
        return True

    def _remove_directory(self, level):
        try:
            os.rmdir(level.name, dir_fd=self.here.fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            # ENOTEMPTY without a mountpoint in it: it is found again on the next list.
            if error.errno == errno.EBUSY or (error.errno == errno.ENOTEMPTY and level.kept):
                self.levels[-1].kept.add(level.name)
            elif error.errno != errno.ENOTEMPTY:
                raise

    def _finish(self, level):
        if os.fstat(self.here.fd).st_ino in self.unfinished:
            times = (level.status.st_atime_ns, level.status.st_mtime_ns)
            os.utime(self.there.fd, ns=times)
        else:
            write_attributes(self.there.fd, level.status, read_attributes(self.here.fd))

    def stop(self):
        """Close everything; returns the inode numbers of directories that aren't finished.

        These have nothing of their originals but their times.
        """
        unfinished = set()
        try:
            while self.levels:
                status = self.levels.pop().status
                os.utime(self.there.fd, ns=(status.st_atime_ns, status.st_mtime_ns))
                unfinished.add(os.fstat(self.there.fd).st_ino)
                if self.levels:
                    self.here.up()
                    self.there.up()
        finally:
            self.close()
        return unfinished

    # -- files with one name -------------------------------------------------------------------

    def _move_single(self, level, name, status):
        free = self._make_way(name)
        if stat.S_ISREG(status.st_mode):
            with Content(self.here.fd, name, status, self.moved) as content:
                if free:
                    content.move_to(self.there.fd, name)
                    self._remove_or(content.move_back, level, name)
                else:
                    self._put_back(content, name)
                    os.unlink(name, dir_fd=self.here.fd)
            return
        if free:
            self._make_special(self.there.fd, name, name, status)
        self._remove_or(lambda error: self._unlink_there(name), level, name)

    def _make_way(self, name):
        """Remove an older file of the name from the destination.

        False: it can't be removed, being a mountpoint; so it was kept, and we are going back.
        """
        try:
            os.unlink(name, dir_fd=self.there.fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        return True

    def _put_back(self, content, name):
        file = os.open(name, _READ_WRITE, dir_fd=self.there.fd)
        try:
            content.put_into(file)
        finally:
            os.close(file)

    def _unlink_there(self, name):
        os.unlink(name, dir_fd=self.there.fd)

    def _remove_or(self, undo, level, name):
        """Remove what has been copied; if that fails, call `undo` with the error."""
        try:
            os.unlink(name, dir_fd=self.here.fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno != errno.EBUSY:
                undo(error)
                raise
            level.kept.add(name)  # something is mounted on it

    def _make_special(self, directory, new, name, status):
        """Make a symlink, device node, FIFO or socket like the one called `name`."""
        if stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(name, dir_fd=self.here.fd), new, dir_fd=directory)
        else:
            os.mknod(new, status.st_mode, status.st_rdev, dir_fd=directory)
        try:
            os.chown(new, status.st_uid, status.st_gid, dir_fd=directory, follow_symlinks=False)
            # No descriptor gives the attributes of these, and there may be no procfs yet.
            os.fchdir(self.here.fd)
            attributes = read_attributes(name, follow=False)
            os.fchdir(directory)
            for key, value in attributes:
                os.setxattr(new, key, value, follow_symlinks=False)
            if not stat.S_ISLNK(status.st_mode):
                os.chmod(new, stat.S_IMODE(status.st_mode), dir_fd=directory)
            times = (status.st_atime_ns, status.st_mtime_ns)
            os.utime(new, ns=times, dir_fd=directory, follow_symlinks=False)
        except BaseException:
            os.unlink(new, dir_fd=directory)
            raise

    # -- files with several names --------------------------------------------------------------

    def _move_linked(self, level, name, status):
        if status.st_ino not in self.linked:
            self._take_along(level, name, status)
            return
        linked = self.linked[status.st_ino]
        if self._make_way(name):
            self._link(self.links_there.fd, linked, self.there.fd, name)
        self._remove_or(lambda error: self._unlink_there(name), level, name)
        left = os.stat(linked, dir_fd=self.links_here.fd, follow_symlinks=False)
        if left.st_nlink == 1:
            os.unlink(linked, dir_fd=self.links_here.fd)
            os.unlink(linked, dir_fd=self.links_there.fd)
            del self.linked[status.st_ino]

    def _take_along(self, level, name, status):
        """Move the content; what names are left on this side are those of an empty file then."""
        linked = f"{self.mark}-{status.st_ino}"
        there = self.links_there.fd
        if stat.S_ISREG(status.st_mode):
            with Content(self.here.fd, name, status, self.moved) as content:
                content.move_to(there, linked)
                self._put_aside(content.move_back, level, name, linked)
        else:
            self._make_special(there, linked, name, status)
            self._put_aside(lambda error: os.unlink(linked, dir_fd=there), level, name, linked)
        self.linked[status.st_ino] = linked

    def _put_aside(self, undo, level, name, linked):
        """Make the name over there, and take it away here; on an error, call `undo` with it."""
        made = False
        try:
            if self._make_way(name):
                self._link(self.links_there.fd, linked, self.there.fd, name)
                made = True
            try:
                # Where there is no room for one name more.
                os.rename(name, linked, src_dir_fd=self.here.fd, dst_dir_fd=self.links_here.fd)
            except OSError as error:
                if error.errno != errno.EBUSY:  # something is mounted on it
                    raise
                self._link(self.here.fd, name, self.links_here.fd, linked)
                level.kept.add(name)
        except BaseException as error:
            if made:
                self._unlink_there(name)
            undo(error)
            raise

    @staticmethod
    def _link(directory, name, new_directory, new):
        os.link(name, new, src_dir_fd=directory, dst_dir_fd=new_directory, follow_symlinks=False)

    def _restore_linked(self):
        """On the way back: give files that still have names on the other side their content."""
        here, there = self.links_here.fd, self.links_there.fd
        for name in os.listdir(here):
            status = os.stat(name, dir_fd=here, follow_symlinks=False)
            left = os.stat(name, dir_fd=there, follow_symlinks=False)
            if left.st_size != status.st_size:
                copy = os.open(name, _READ_WRITE, dir_fd=here)
                try:
                    file = os.open(name, _READ_WRITE, dir_fd=there)
                    try:
                        give_back(copy, file, status, read_attributes(copy))
                    finally:
                        os.close(file)
                finally:
                    os.close(copy)
            self.linked[status.st_ino] = name
