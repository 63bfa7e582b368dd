"""The log of the hooks: a line an event, 0600, of limited size, with one file of older lines.

Runtimes hide what a hook writes to standard error (crun sends it to /dev/null), so the same
line is kept here.
"""

import _stat as stat
import sys
from time import gmtime, monotonic, strftime

from sandboxfs.errors import SandboxError, StateError, printable
from sandboxfs.kernel import abi
from sandboxfs.kernel import system as os
from sandboxfs.state import directory as state_directory

NAME = "hook.log"
DEFAULT = f"/run/{state_directory.NAME}/{NAME}"
LEVELS = ("error", "warning", "info", "debug")
# A file grows up to this, then becomes NAME.1, and what was that goes.
LARGEST_LOG = 1 << 20
LONGEST_LINE = 4096
_SECONDS_FOR_THE_LOCK = 1.0

_DIRECTORY = abi.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
# A FIFO nobody reads is ENXIO with O_NONBLOCK, instead of a hook that hangs.
_APPEND = (
    os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    | os.O_CLOEXEC
)


def one_line(text):
    """Return `text` as one printable line, at most `LONGEST_LINE` characters.

    What is logged quotes annotations and paths, which may hold anything.
    """
    text = printable(text)
    return text if len(text) <= LONGEST_LINE else text[:LONGEST_LINE] + "…"


class Log:
    """Where the hooks' lines go.

    path: absolute, or None (as root's place of it) for ``hook.log`` in the state directory of
    who writes, which is made if missing.
    level: the least important one of `LEVELS` that is kept.
    """

    __slots__ = ("level", "path")

    def __init__(self, path=None, level="info"):
        self.path = None if path == DEFAULT else path
        self.level = level

    def write(self, level, line):
        """Append one line, with time, level and pid; never raises.

        Standard error gets the line where the file can't take it, and why.
        """
        reason = self.keep(level, line)
        if reason is not None:
            text = f"{level} [{os.getpid()}] {one_line(line)}"
            _to_standard_error(f"sandboxfs: {text}\nsandboxfs: no line in the log: {reason}\n")

    def keep(self, level, line):
        """Append one line as `write` does; returns why the file can't take it, or None.

        For a line that standard error has got already.
        """
        if LEVELS.index(level) > LEVELS.index(self.level):
            return None
        text = f"{level} [{os.getpid()}] {one_line(line)}"
        try:
            self._append(f"{strftime('%Y-%m-%dT%H:%M:%SZ', gmtime())} {text}\n")
        except (OSError, SandboxError) as error:
            return error.line() if isinstance(error, SandboxError) else str(error)
        return None

    def _append(self, line):
        content = line.encode("utf-8", "surrogateescape")
        if self.path is None:
            with state_directory.open_state(create=True) as state:
                _append(state.fd, NAME, content)
            return
        parent = os.open(os.path.dirname(self.path), _DIRECTORY)
        try:
            _append(parent, self.path.rpartition("/")[2], content)
        finally:
            os.close(parent)


def _append(parent, name, content):
    """Append a line; the lock is held from the look at the size until it is written."""
    from sandboxfs.state import lock

    deadline = monotonic() + _SECONDS_FOR_THE_LOCK
    while True:
        fd = _open(parent, name)
        try:
            try:
                locked = lock.acquire(fd, max(0.0, deadline - monotonic()))
            except OSError:
                locked = False  # a file system without locks
            # Without it a line is written all the same: one too many is better than one too few.
            if locked and not _is_named(fd, parent, name):
                continue  # somebody has put it aside meanwhile
            size = os.fstat(fd).st_size
            if locked and size and size + len(content) > LARGEST_LOG:
                os.rename(name, name + ".1", src_dir_fd=parent, dst_dir_fd=parent)
                continue
            os.write(fd, content)
            return
        finally:
            os.close(fd)


def _is_named(fd, parent, name):
    """Whether an open file is still the one of that name."""
    try:
        found = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), found)


def _open(parent, name):
    fd = os.open(name, _APPEND, 0o600, dir_fd=parent)
    status = os.fstat(fd)
    # A name in a directory that others write to may be a link to something else of ours.
    if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1 and status.st_uid == os.geteuid():
        return fd
    os.close(fd)
    raise StateError("", "open", name, "isn't a log of ours: a regular file of our own, with "
                     "one name, is wanted")


def _to_standard_error(text):
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):
        pass
