"""`Sandbox` and `Pool`: commands in throw-away roots, called like `subprocess.run`."""

import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

from sandboxfs.errors import ProcessError, UsageError
from sandboxfs.harness import client, wire

PIPE, STDOUT, DEVNULL = subprocess.PIPE, subprocess.STDOUT, subprocess.DEVNULL
# Children that wait for a sandbox's next command.
_AHEAD = 2
_CHUNK = 1 << 16
Word = str | bytes | os.PathLike[str] | os.PathLike[bytes]


class _Lane:
    """A plan, open in a warm process for as long as somebody may run commands in it."""

    def __init__(self, plan: Any, size: int, ahead: bool) -> None:
        self.plan = plan
        self._packed = wire.pack(plan, without=("compiled",))
        self._size = size
        self._ahead = ahead
        self._lock = threading.Lock()
        self._lock_owner = os.getpid()
        self._process: client.WarmProcess | None = None
        self._number = 0
        self._closed = False

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End what runs in it and what waits; when this returns nothing of it is left."""
        self._closed = True
        process, self._process = self._process, None
        if process is None or not process.usable():
            return
        try:
            with process.request(("close", self._number)) as channel:
                channel.answer()
        except client.Gone:
            pass  # and everything with it

    def _opened(self) -> client.WarmProcess:
        """Return the warm process that has the plan open: after a fork or a loss, a new one."""
        if self._lock_owner != os.getpid():
            self._lock, self._lock_owner = threading.Lock(), os.getpid()
        with self._lock:
            if self._closed:
                raise ProcessError("", "run", "", "the sandbox is closed")
            process = client.current()
            if process is not self._process:
                self._number = process.new_lane()
                request = ("open", self._number, self._packed, self._size, self._ahead)
                try:
                    with process.request(request) as channel:
                        _wait(channel, None)
                except client.Gone as error:
                    raise ProcessError("", "open", "", str(error)) from None
                self._process = process
            return process

    def run(
        self,
        args: Sequence[Word],
        *,
        input: str | bytes | None = None,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        capture_output: bool = False,
        check: bool = False,
        timeout: float | None = None,
        cwd: Word | None = None,
        env: Mapping[Any, Any] | None = None,
        text: bool | None = None,
        encoding: str | None = None,
        errors: str | None = None,
    ) -> "subprocess.CompletedProcess[Any]":
        """Execute a command in a root of its own, and wait for it.

        The arguments, the result, CalledProcessError and TimeoutExpired are those of
        `subprocess.run`.  args: a sequence; there is no shell.  cwd, env: by default the
        document's.  A descriptor that isn't redirected is the caller's own.

        Raises SandboxError where the root can't be built or the command not be executed
        (`exit_status` 126, 127), and ProcessError where the warm process was lost on the way.
        """
        command = _command(args, env, cwd)
        streams = _Streams(input, stdin, stdout, stderr, capture_output)
        decode = (encoding, errors) if text or encoding or errors else None
        try:
            streams.open(decode)
            try:
                channel = self._start(command, streams)
                with channel:
                    streams.started()
                    status = self._finish(channel, streams, args, timeout)
            except client.Gone as error:
                raise ProcessError("", "run", os.fsdecode(command[0][0]), str(error),
                                   hint="whether it has run is unknown; the next run starts a "
                                   "new warm process") from None
            out, err = streams.results(decode)
        finally:
            streams.close()
        if check and status:
            raise subprocess.CalledProcessError(status, args, out, err)
        return subprocess.CompletedProcess(args, status, out, err)

    def _start(self, command: tuple[Any, ...], streams: "_Streams") -> client.Channel:
        for last in (False, True):
            process = self._opened()
            try:
                return process.request(("run", self._number, *command), streams.theirs)
            except client.Gone:
                # It never got the request: a new one may have it.
                if last:
                    raise
        raise AssertionError

    def _finish(
        self, channel: client.Channel, streams: "_Streams", args: Any, timeout: float | None
    ) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            return _wait(channel, deadline, streams)
        except TimeoutError:
            channel.kill()
            _wait(channel, None, streams)
            out, err = (bytes(part) if part is not None else None for part in streams.collected)
            raise subprocess.TimeoutExpired(args, timeout or 0, out, err) from None
        except BaseException:
            channel.kill()
            raise

    def status(self) -> dict[str, int]:
        """Return how many children wait, how many build, how many run (dict of int)."""
        process = self._opened()
        try:
            with process.request(("tell", self._number)) as channel:
                counts = channel.answer()[1:]
        except client.Gone as error:
            raise ProcessError("", "status", "", str(error)) from None
        return dict(zip(("waiting", "building", "running"), counts, strict=True))


class Sandbox(_Lane):
    """Throw-away roots of one document; each `run` gets a new one.

    bundle, config: as `sandboxfs.load` takes them.  Without either: the default document over
    `rootfs`, a directory or an image, by default this machine's own `/`.  overlay, overlay_size,
    overlay_binds, lower, tmp: as on the command line.  A context manager.

    Raises SpecError, MountError, UsageError for what is wrong with these.  `warnings`: lines
    of what a document asks for and isn't done.
    """

    def __init__(
        self,
        bundle: Word | None = None,
        *,
        config: Word | None = None,
        rootfs: Word | None = None,
        overlay: str | None = None,
        overlay_size: str | None = None,
        overlay_binds: bool = False,
        lower: Iterable[Word] = (),
        tmp: str | None = None,
    ) -> None:
        from sandboxfs.cli.run import Options, load
        from sandboxfs.plan.from_spec import plan as make_plan

        options = Options()
        for name, value in (("bundle", bundle), ("config", config), ("rootfs", rootfs)):
            if value is not None:
                options.values[name] = os.fsdecode(value)
        words = [("overlay", overlay), ("overlay.size", overlay_size), ("tmp", tmp)]
        words += [("lower", os.fsdecode(each)) for each in lower]
        words += [("overlay.binds", "true")] if overlay_binds else []
        options.overrides = [(key, word, key) for key, word in words if word is not None]
        options.command = ["true"] if bundle is None and config is None else []
        spec = load(options)
        if spec.process is None:
            from sandboxfs.spec.model import Process

            spec.process = Process()
        # Like subprocess: the descriptors are the caller's.
        spec.process.terminal = False
        spec.process.args = spec.process.args or ["true"]
        plan = make_plan(spec)
        self.warnings = [*plan.warnings]
        if spec.not_applied:
            self.warnings.append(f"not applied, a runtime's work: {', '.join(spec.not_applied)}")
        super().__init__(plan, _AHEAD, False)
        self._opened()


class Pool(_Lane):
    """Ready roots: `size` of them are built ahead, each in a child that waits for its command.

    `run` takes one, which costs a message, and the next one is built behind.  Plans with binds that
    are slaves of host mounts are not built ahead, since what is mounted on the host meanwhile
    wouldn't reach them; `ahead` says whether they are.  A context manager.

    Raises UsageError for a size below 1 or above what the limits allow, and at once what keeps the
    first root from being built (MountError, ProcessError).
    """

    def __init__(self, plan: Any, size: int = 4) -> None:
        _check_size(size)
        super().__init__(plan, size, True)
        self._opened()


def _check_size(size: int) -> None:
    if not isinstance(size, int) or isinstance(size, bool):
        raise UsageError("size", "Pool", repr(size), "is no number")
    most, limit = most_roots()
    if size < 1:
        raise UsageError("size", "Pool", str(size), "a pool keeps one root at least")
    if size > most:
        raise UsageError("size", "Pool", str(size), f"{limit} allows {most}")


def most_roots() -> tuple[int, str]:
    """Return how many roots a pool may keep, and the limit that says so."""
    import resource

    limits = []
    # A child that waits is a pidfd, a socket and a pipe in the warm process.
    for name, each in (("RLIMIT_NOFILE", 4), ("RLIMIT_NPROC", 1)):
        hard = resource.getrlimit(getattr(resource, name))[1]
        if hard != resource.RLIM_INFINITY:
            limits.append((max(0, hard - 64) // each, name))
    for path in ("user/max_mnt_namespaces", "user/max_pid_namespaces", "kernel/pid_max"):
        try:
            with open(f"/proc/sys/{path}", encoding="ascii") as file:
                limits.append((int(file.read()) // 2, f"/proc/sys/{path}"))
        except OSError:
            continue  # no procfs, or a kernel without it: the kernel refuses in its own words
    return min(limits, default=(sys.maxsize, ""))


def _command(
    args: Sequence[Word], env: Mapping[Any, Any] | None, cwd: Word | None
) -> tuple[list[bytes], list[bytes] | None, bytes | None]:
    """Return (arguments, environment, directory) as bytes."""
    if isinstance(args, (str, bytes)) or hasattr(type(args), "__fspath__"):
        raise TypeError("args is a sequence of words; there is no shell to split a string")
    words = [os.fsencode(word) for word in args]
    if not words or not words[0]:
        raise ValueError("args is empty: there is nothing to execute")
    entries = None
    if env is not None:
        entries = [os.fsencode(key) + b"=" + os.fsencode(value) for key, value in env.items()]
    directory = None if cwd is None else os.fsencode(cwd)
    for word in (*words, *(entries or ()), directory or b""):
        if b"\0" in word:
            raise ValueError("embedded null byte")
    return words, entries, directory


def _wait(
    channel: client.Channel, deadline: float | None, streams: "_Streams | None" = None
) -> int:
    """Wait for the end of what runs, moving its data; returns its status.

    Raises TimeoutError when the deadline (of `time.monotonic`) has come, Gone, SandboxError.
    """
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    moved = streams.registered(poll) if streams is not None else {}
    status = None
    while status is None or moved:
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            raise TimeoutError
        until = min(filter(None, (deadline, channel.next_look if status is None else None)),
                    default=None)
        for fd, _events in poll.poll(None if until is None else max(0.0, until - now) * 1000 + 1):
            if fd == channel.fileno() and fd not in moved:
                kind, *values = channel.received()
                if kind != "pong":
                    status = values[0] if kind == "ended" else 0
                    poll.unregister(fd)
            elif fd in moved and not moved[fd]():
                poll.unregister(fd)
                del moved[fd]
        if status is None and time.monotonic() >= channel.next_look:
            channel.look()
    return status


class _Streams:
    """What a command reads and writes: `theirs`, its three descriptors, and our ends of pipes."""

    def __init__(self, input: str | bytes | None, stdin: Any, stdout: Any, stderr: Any,
                 capture_output: bool) -> None:
        if input is not None and stdin is not None:
            raise ValueError("stdin and input can't be given together")
        if capture_output and (stdout is not None or stderr is not None):
            raise ValueError("stdout and stderr can't be given with capture_output")
        self.given = [PIPE if input is not None else stdin,
                      PIPE if capture_output else stdout, PIPE if capture_output else stderr]
        self.input = input
        self.theirs: tuple[int, ...] = ()
        self.owned: list[int] = []
        self.ours: list[int | None] = [None, None, None]
        self.collected: list[bytearray | None] = [None, None]
        self.left = memoryview(b"")

    def open(self, decode: tuple[str | None, str | None] | None) -> None:
        """Open pipes and files."""
        if self.input is not None:
            data = self.input
            if isinstance(data, str):
                encoding, errors = decode or (None, None)
                data = data.encode(encoding or "utf-8", errors or "strict")
            self.left = memoryview(data)
        for number, given in enumerate(self.given):
            self.theirs += (self._one(number, given),)

    def _one(self, number: int, given: Any) -> int:
        if given is None:
            try:
                os.get_inheritable(number)
            except OSError:
                given = DEVNULL  # it is closed here
            else:
                return number
        if given == DEVNULL:
            return self._own(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
        if given == STDOUT and number == 2:
            return self.theirs[1]
        if given == PIPE:
            reader, writer = os.pipe2(os.O_CLOEXEC)
            ours, theirs = (writer, reader) if number == 0 else (reader, writer)
            self.ours[number] = ours
            os.set_blocking(ours, False)
            if number:
                self.collected[number - 1] = bytearray()
            return self._own(theirs)
        if isinstance(given, int):
            return given
        return int(given.fileno())

    def _own(self, fd: int) -> int:
        self.owned.append(fd)
        return fd

    def started(self) -> None:
        """Close what the command has its own copies of by now."""
        while self.owned:
            os.close(self.owned.pop())

    def registered(self, poll: Any) -> dict[int, Any]:
        """Register our ends; returns {descriptor: function that moves data, False at the end}."""
        moved: dict[int, Any] = {}
        writer, *readers = self.ours
        if writer is not None:
            poll.register(writer, select.POLLOUT)
            moved[writer] = self._write
        for number, reader in enumerate(readers):
            if reader is not None:
                poll.register(reader, select.POLLIN)
                moved[reader] = lambda number=number: self._read(number)
        return moved

    def _write(self) -> bool:
        writer = self.ours[0]
        assert writer is not None
        try:
            if self.left:
                self.left = self.left[os.write(writer, self.left[:_CHUNK]):]
            if self.left:
                return True
        except BlockingIOError:
            return True
        except BrokenPipeError:
            pass  # it doesn't read to the end, as subprocess has it
        self._drop(0)
        return False

    def _read(self, number: int) -> bool:
        reader, collected = self.ours[number + 1], self.collected[number]
        assert reader is not None
        assert collected is not None
        try:
            chunk = os.read(reader, _CHUNK)
        except BlockingIOError:
            return True
        if chunk:
            collected += chunk
            return True
        self._drop(number + 1)
        return False

    def _drop(self, number: int) -> None:
        fd, self.ours[number] = self.ours[number], None
        if fd is not None:
            os.close(fd)

    def results(self, decode: tuple[str | None, str | None] | None) -> list[Any]:
        """Return (stdout, stderr): bytes, or str where text was asked for, or None."""
        results: list[Any] = []
        for part in self.collected:
            if part is None or decode is None:
                results.append(None if part is None else bytes(part))
                continue
            encoding, errors = decode
            text = bytes(part).decode(encoding or "utf-8", errors or "strict")
            results.append(text.replace("\r\n", "\n").replace("\r", "\n"))
        return results

    def close(self) -> None:
        """Close whatever is still ours."""
        self.started()
        for number in range(3):
            self._drop(number)
