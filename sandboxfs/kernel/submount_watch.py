"""Whether still nothing is mounted below a directory, without looking at all mounts again.

poll(2) on mountinfo tells that the mount table or a mount's flags have changed
(proc_pid_mounts(5)).  What it doesn't tell is that a directory was renamed with something mounted
inside.  That can concern only mounts on the mount that the directory lies in, and of those only
the ones deeper than in its root, since nobody renames a mountpoint (rename(2), EBUSY): the
directories above them are watched by inotify(7).  Where that is too many, all directories of the
file system are, by fanotify(7), as far as we are allowed to.
"""

import select
import sys

from sandboxfs.kernel import mounttable, submounts, syscalls
from sandboxfs.kernel import system as os
from sandboxfs.kernel.foreign import c_uint64
from sandboxfs.kernel.syscalls import function

# With more mounts than these, looking costs less than knowing.
_MOST_KNOWN, _MOST_WATCHED, _MOST_LISTED = 64, 64, 256
_IN_MOVE_SELF, _IN_DELETE_SELF, _IN_ONLYDIR = 0x800, 0x400, 0x1000000
_inotify_add_watch, _inotify_init1 = function("inotify_add_watch"), function("inotify_init1")
_fanotify_mark, _fanotify_init = function("fanotify_mark"), function("fanotify_init")
# FAN_CLOEXEC, FAN_NONBLOCK, FAN_REPORT_DFID_NAME: events name directories, and open nothing.
_FAN_FLAGS = 0x1 | 0x2 | 0xC00
_FAN_MARK_ADD, _FAN_MARK_FILESYSTEM = 0x1, 0x100
# Linux 5.17.  Renamed files are told of as well.
_FAN_RENAME, _FAN_ONDIR, _FAN_Q_OVERFLOW = 0x10000000, 0x40000000, 0x4000
_FAN_MASK = c_uint64(_FAN_RENAME | _FAN_ONDIR)
# Of inotify and fanotify groups together, in one process; what is known without is looked at again.
_MOST_GROUPS = 8
_groups: set[int] = set()
# Events beyond that are taken for a change: to begin anew costs less than to read them.
_EVENTS = 1 << 14


class Watch:
    """What is known of the directories that were asked about; owns up to three descriptors.

    known: a set of what its user takes for a directory's identity, that of its mount included.
    begun: how often it has begun anew; while `knows` says yes and this stays, nothing that is
    mounted in this mount namespace has changed.
    """

    __slots__ = ("begun", "known", "moves", "pid", "poll", "renames", "table")

    def __init__(self):
        self.table = self.renames = self.moves = -1
        self.pid = self.begun = 0
        self.poll = None
        self.known = set()

    def __del__(self):
        self.close()

    def close(self):
        """Close the descriptors.

        A process forked since has copies of them, or has closed these and given their numbers to
        files of its own.
        """
        for fd in self.descriptors():
            if self.pid == os.getpid():
                os.close(fd)
            _groups.discard(fd)
        self.table = self.renames = self.moves = -1

    def may_have_a_group(self):
        """Whether one more may be made: a user has few for all processes (inotify(7), 128)."""
        return len(_groups) < _MOST_GROUPS

    def descriptors(self):
        """Return the set of descriptors that are open."""
        return {fd for fd in (self.table, self.renames, self.moves) if fd >= 0}

    def take_over(self):
        """Go on in this process, which shares memory and descriptors with the one that began."""
        if self.table >= 0:
            self.pid = os.getpid()

    def knows(self, identity):
        """Whether a directory was found to be bare and nothing has changed since."""
        if self.pid == os.getpid() and identity in self.known:
            news = self.poll.poll(0)
            if not news or (news[0][0] == self.moves and not news[1:] and self.is_of_files()):
                return True
        # Perhaps in another mount namespace, where each mount has another number.
        self.open()
        return False

    def open(self):
        """Begin anew: after a change, and in another process, which shares its parent's events.

        And for a directory not known yet: the table is the one of this mount namespace then.
        """
        self.close()
        self.known.clear()
        self.begun += 1
        self.pid = os.getpid()
        self.table = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        self.poll = select.poll()
        self.poll.register(self.table, select.POLLPRI)
        self.poll.poll(0)  # a fresh descriptor tells of a change first

    def is_bare(self, descriptor, identity):
        """Look whether no mount lies below a directory, and remember it if so.  OSError."""
        watched = self.watch_above(syscalls.mount_id(descriptor)[0]) or (
            self.watch_filesystem(descriptor))
        # Looked at after that: what changes later is told.
        if submounts.below(descriptor):
            return False
        if watched and len(self.known) < _MOST_KNOWN:
            self.known.add(identity)
        return True

    def watch_above(self, number):
        """Watch the directories above what is mounted on a mount; whether that can be done."""
        try:
            if len(syscalls.listmount(number, limit=_MOST_LISTED)) == _MOST_LISTED:
                return False
            first, *records = mounttable.by_listmount(number)
        except OSError:
            return False
        top = first.mountpoint.rstrip(b"/")
        paths = set()
        for record in records:
            path = os.path.dirname(record.mountpoint)
            while record.parent_id == number and len(path) > len(top) and path != b"/":
                paths.add(path)
                path = os.path.dirname(path)
        if len(paths) > _MOST_WATCHED:
            return False
        if paths and self.renames < 0:
            if not self.may_have_a_group():
                return False
            self.renames = _inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
            if self.renames < 0:
                return False
            _groups.add(self.renames)
            self.poll.register(self.renames, select.POLLIN)
        how = _IN_MOVE_SELF | _IN_DELETE_SELF | _IN_ONLYDIR
        # One that was renamed since isn't found, or changed the table's paths.
        return all(_inotify_add_watch(self.renames, path, how) >= 0 for path in paths) and (
            [each.mountpoint for each in records]
            == [each.mountpoint for each in mounttable.by_listmount(number)[1:]]
        )

    def watch_filesystem(self, descriptor):
        """Watch all directories of the file system that one lies in; whether that can be done."""
        if self.moves < 0:
            if (_fanotify_init is None or _fanotify_mark is None
                    or not self.may_have_a_group()):
                return False
            self.moves = _fanotify_init(_FAN_FLAGS, os.O_RDONLY)
            if self.moves < 0:
                return False
            _groups.add(self.moves)
            self.poll.register(self.moves, select.POLLIN)
        how = _FAN_MARK_ADD | _FAN_MARK_FILESYSTEM
        return _fanotify_mark(self.moves, how, _FAN_MASK, descriptor, b".") == 0

    def is_of_files(self):
        """Whether the events that are there are of files alone, and all of them; reads them."""
        try:
            events = os.read(self.moves, _EVENTS)
        except OSError:
            return False
        at = 0
        while at < len(events):
            # struct fanotify_event_metadata: its length, in 4 bytes, and at 8 the mask, in 8.
            mask = int.from_bytes(events[at + 8:at + 16], sys.byteorder)
            if mask & (_FAN_ONDIR | _FAN_Q_OVERFLOW):
                return False
            at += int.from_bytes(events[at:at + 4], sys.byteorder)
        return not self.poll.poll(0)


class Look:
    """The same without a memory."""

    begun = 0

    def knows(self, _identity):
        """Nothing is known."""
        return False

    def is_bare(self, descriptor, _identity):
        """Return whether no mount lies below a directory.  OSError."""
        return not submounts.below(descriptor)
