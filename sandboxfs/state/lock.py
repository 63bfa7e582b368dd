"""A lock that dies with its holder: flock(2) on a file of the state directory, with a deadline."""

from fcntl import LOCK_EX, LOCK_NB, flock
from time import monotonic, sleep

from sandboxfs.errors import StateError
from sandboxfs.kernel import system as os

NAME = "lock"
# A holder does some milliseconds of work; runtimes give a hook seconds.
DEADLINE = 10.0
_FIRST_PAUSE = 0.0002
_LONGEST_PAUSE = 0.01


def acquire(fd, seconds):
    """Take an exclusive flock on a descriptor; returns False if that takes longer."""
    deadline = monotonic() + seconds
    pause = _FIRST_PAUSE
    while True:
        try:
            flock(fd, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            left = deadline - monotonic()
            if left <= 0:
                return False
        else:
            return True
        sleep(min(pause, left))
        pause = min(pause * 2, _LONGEST_PAUSE)


class Lock:
    """The lock of a `Directory`, held inside of ``with``; it is gone when its holder is killed.

    seconds: how long to wait; StateError, with the holder's pid, if that isn't enough.  A
    child that is forked inside holds it as well, as long as it keeps the descriptor.
    """

    __slots__ = ("directory", "fd", "seconds")

    def __init__(self, directory, seconds=DEADLINE):
        self.directory = directory
        self.seconds = seconds
        self.fd = -1

    def __enter__(self):
        where = self.directory.where(NAME)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            self.fd = os.open(NAME, flags, 0o600, dir_fd=self.directory.fd)
        except OSError as error:
            raise StateError("", "open", where, "", error.errno) from None
        try:
            if not acquire(self.fd, self.seconds):
                holder = os.pread(self.fd, 16, 0).decode("ascii", "replace").strip() or "unknown"
                raise StateError("", "lock", where, f"held for more than {self.seconds:g} s by "
                                 f"process {holder}")
            os.ftruncate(self.fd, 0)
            os.pwrite(self.fd, str(os.getpid()).encode() + b"\n", 0)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exception):
        os.close(self.fd)
        self.fd = -1
