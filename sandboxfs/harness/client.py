"""The caller's end of the warm process: started when first needed, watched, replaced when lost.

One warm process belongs to one process and one mount namespace.  A forked child of the caller
starts its own; threads share one, since each request is one datagram and each answer has a channel
of its own.
"""

import atexit
import contextlib
import itertools
import os
import select
import subprocess
import sys
import threading
import time
from typing import Any, Self

from sandboxfs.errors import ProcessError, SandboxError
from sandboxfs.harness import wire
from sandboxfs.process import report

# It answers in microseconds; whoever takes this long hangs, or the machine does.
ANSWER_SECONDS = 10.0
# How soon after a request, and then how often, a caller that waits asks whether it is there.
FIRST_LOOK_SECONDS = 0.5
LOOK_SECONDS = 1.0
_LOCALE = ("LC_ALL", "LC_CTYPE", "LANG")
_HINT = "the next run starts a new one"


class Gone(Exception):
    """The warm process is gone, or doesn't answer any more; the text says which."""


class WarmProcess:
    """A running warm process: `pid`, and `lanes`, the plans it has open by their users."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.namespace = _namespace()
        ours, theirs = wire.pair()
        theirs.setsockopt(1, wire.SO_PASSCRED, 1)  # SOL_SOCKET
        owner = os.pidfd_open(self.owner)
        try:
            # Inside a session of its own: a terminal's signals are for us alone.
            self.process = subprocess.Popen(
                [*_command(), str(theirs.fileno()), str(owner), str(self.owner)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), owner), start_new_session=True, cwd="/",
                env={name: os.environ[name] for name in _LOCALE if name in os.environ},
            )
        except OSError as error:
            ours.close()
            raise ProcessError("warm process", "execve", _interpreter(), "", error.errno or 0) \
                from error
        finally:
            theirs.close()
            os.close(owner)
        self.control = ours
        self.pid = self.process.pid
        self.pidfd = os.pidfd_open(self.pid)
        self.last_lane = itertools.count(1)

    def new_lane(self) -> int:
        """Return a number for a plan that is going to be opened."""
        return next(self.last_lane)

    def usable(self) -> bool:
        """Whether it is this process's, not known to be gone, and sees what this process sees.

        One that has died meanwhile is noticed by who sends it something.
        """
        return (
            self.owner == os.getpid() and self.pidfd >= 0 and self.namespace == _namespace()
        )

    def request(self, message: tuple[Any, ...], descriptors: tuple[int, ...] = ()) -> "Channel":
        """Send a request; returns the channel its answers come by.  Raises Gone."""
        ours, theirs = wire.pair()
        channel = Channel(self, ours)
        try:
            self._send(message, (theirs.fileno(), *descriptors))
        except BaseException:
            channel.close()
            raise
        finally:
            theirs.close()
        return channel

    def _send(self, message: tuple[Any, ...], descriptors: tuple[int, ...]) -> Any:
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            try:
                return wire.send(self.control, message, descriptors)
            except BlockingIOError:
                poll = select.poll()
                poll.register(self.control.fileno(), select.POLLOUT)
                if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    raise self.hangs() from None
            except (BrokenPipeError, ConnectionResetError):
                raise self.died() from None

    def died(self) -> Gone:
        """Return the error of its death, with its last words, and clean up after it."""
        words = ""
        with contextlib.suppress(OSError):
            while (message := wire.receive(self.control, wire.MSG_DONTWAIT)[0]) is not None:
                if message[0] == "died":
                    words = f": {message[1]}"
        # Its channels end a moment before it does.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        self.end(0)
        code = self.process.returncode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else "ended"
        return Gone(f"the warm process {self.pid} {how}{words}")

    def hangs(self) -> Gone:
        """Return the error of its silence; it is killed, and its sandboxes with it."""
        self.end(0)
        return Gone(f"the warm process {self.pid} doesn't answer, and was killed")

    def is_stopped(self) -> bool:
        """Whether a signal has stopped it (proc_pid_stat(5))."""
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as file:
                return file.read().rpartition(b") ")[2][:1] in (b"T", b"t")
        except OSError:
            return False

    def end(self, seconds: float = ANSWER_SECONDS) -> None:
        """End it: by closing its socket, and after so many seconds by SIGKILL."""
        with _lock:
            if self.process.returncode is not None and self.pidfd < 0:
                return
            if seconds:
                self.control.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(seconds)
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self.control.close()
            if self.pidfd >= 0:
                os.close(self.pidfd)
                self.pidfd = -1

    def forget(self) -> None:
        """In a forked child: drop our copies of what is the parent's."""
        self.control.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        self.process.returncode = 0  # not ours to wait for


class Channel:
    """The caller's end of one request; closing it gives the request up."""

    def __init__(self, process: WarmProcess, socket: Any) -> None:
        self.process = process
        self.socket = socket
        self.asked = 0.0
        self.next_look = time.monotonic() + FIRST_LOOK_SECONDS

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it; what still runs for it is killed."""
        self.socket.close()

    def fileno(self) -> int:
        """Return its descriptor, readable when there is an answer."""
        return int(self.socket.fileno())

    def answer(self) -> tuple[Any, ...]:
        """Wait for the answer to a request that takes no time.  Raises Gone, SandboxError."""
        deadline = time.monotonic() + ANSWER_SECONDS
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise self.process.hangs()
            if poll.poll(left * 1000):
                return self.received()

    def received(self) -> tuple[Any, ...]:
        """Return the answer that is there.  Raises Gone, and the SandboxError it may be."""
        message, descriptors, _sender = wire.receive(self.socket)
        for fd in descriptors:
            os.close(fd)
        if message is None:
            raise self.process.died()
        self.asked = 0.0
        if message[0] == "failed":
            error: SandboxError = report.failure(message[1:])
            raise error
        return tuple(message)

    def look(self) -> None:
        """Make sure that the warm process is there, while its answer takes time.  Raises Gone.

        Called when `next_look` has come: asks, and later expects to have been answered.  One that
        was stopped by a signal needn't be asked.
        """
        now = time.monotonic()
        if self.process.is_stopped() or (self.asked and now > self.asked + ANSWER_SECONDS):
            raise self.process.hangs()
        self.next_look = now + LOOK_SECONDS
        if self.asked:
            return
        try:
            wire.send(self.socket, ("ping",))
        except BlockingIOError:
            raise self.process.hangs() from None
        except (BrokenPipeError, ConnectionResetError):
            return  # what it said before is still there to be read, and then its end
        self.asked = now

    def kill(self) -> None:
        """Have what runs for this request killed; its end is still answered."""
        with contextlib.suppress(OSError):
            wire.send(self.socket, ("kill",))


# -- the one of this process ---------------------------------------------------------------

_lock = threading.RLock()
_current: WarmProcess | None = None


def current() -> WarmProcess:
    """Return the warm process of this process, started if need be."""
    global _current
    with _lock:
        if _current is not None and not _current.usable():
            _current.end(0 if _readable(_current.pidfd) else ANSWER_SECONDS)
            _current = None
        if _current is None:
            _current = WarmProcess()
        return _current


def stop() -> None:
    """End the warm process of this process, if there is one; the next run starts another."""
    global _current
    with _lock:
        if _current is not None:
            _current.end()
            _current = None


def _after_fork_in_child() -> None:
    global _current, _lock
    _lock = threading.RLock()  # another thread of the parent may have held it
    if _current is not None:
        _current.forget()
        _current = None


os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(stop)


def _readable(pidfd: int) -> bool:
    if pidfd < 0:
        return True
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _namespace() -> tuple[int, int]:
    status = os.stat("/proc/self/ns/mnt")
    return status.st_dev, status.st_ino


def _interpreter() -> str:
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _command() -> list[str]:
    """Return the command of a warm process: as bare as the launcher, but for its arguments."""
    from sandboxfs.cli import launcher

    code = (
        f"import gc, sys; gc.disable(); sys.path += {launcher.own_path()!a}; "
        "from sandboxfs.harness.server import main; main(*map(int, sys.argv[1:]))"
    )
    return [_interpreter(), "-I", "-S", "-B", "-c", code]
