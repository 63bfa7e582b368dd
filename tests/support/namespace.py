"""Running test code where mounting harms nobody: private mount namespaces in forked children."""

import gc
import os
import pickle
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import prctl
import pytest

from sandboxfs.kernel import abi, syscalls

# Ids that no Debian system gives to a user, without an entry in /etc/passwd.  65534 won't do:
# it is what unmapped ids look like, so a test couldn't tell it from a mistake.
UNPRIVILEGED = 61234
# The one to which the fixture `subordinate_ids` gives a name and ranges.
RANGED = 61235

Mapping = tuple[int, int, int]


class ChildFailed(AssertionError):
    """The child ended without telling how: killed, timed out, or it exited by itself."""


def in_namespace(
    function: Callable[..., Any],
    *arguments: Any,
    uid: int | None = None,
    mappings: Iterable[Mapping] | None = None,
    namespaces: int = 0,
    timeout: float = 30,
    check_descriptors: bool = True,
) -> Any:
    """Return ``function(*arguments)``, called in a forked child with mounts of its own.

    The child's mounts are private: nothing it mounts is seen outside, all of it goes when the
    child ends.  What the function returns has to be picklable; what it raises, `pytest.skip`
    included, is raised here, with the child's traceback as a note.

    uid: give up root for this user and group first; the child then makes a user namespace
    in which it is root (its own id is mapped to 0).
    mappings: a user namespace with these (inside, outside, count), for uids and gids, written
    by root from outside.
    namespaces: further CLONE_NEW* flags.  With CLONE_NEWPID the function runs as pid 1.
    timeout: seconds after which the child is killed, and `ChildFailed` raised.
    check_descriptors: fail if the function leaves descriptors open or children unwaited.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    user = None
    if uid is not None:
        user = "self"
    elif mappings is not None:
        user = "mapped"
    ask, answer = _Gate(), _Gate()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            prctl.set_pdeathsig(signal.SIGKILL)
            _enter(user, uid, namespaces, ask, answer)
            _run(function, arguments, writer, check_descriptors)
        except BaseException:  # noqa: BLE001 - nothing may run on in this copy of pytest
            _send(writer, "raised", sys.exc_info()[1])
        finally:
            os._exit(0)
    os.close(writer)
    try:
        if user == "mapped" and ask.wait():
            _write_maps(child, list(mappings or ()))
            answer.open()
        return _unpack(_receive(reader, child, timeout))
    finally:
        os.close(reader)
        ask.close()
        answer.close()
        os.waitpid(child, 0)


class _Gate:
    """A pipe on which one side waits for the other."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def wait(self) -> bool:
        """Return whether the other side opened it; False if it died."""
        # Our own writing end would keep the pipe open.
        os.close(self.writer)
        self.writer = -1
        return bool(os.read(self.reader, 1))

    def open(self) -> None:
        os.write(self.writer, b"\n")

    def close(self) -> None:
        for fd in (self.reader, self.writer):
            if fd >= 0:
                os.close(fd)


def _enter(
    user: str | None, uid: int | None, namespaces: int, ask: _Gate, answer: _Gate
) -> None:
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        # Changing ids took it away, and with it the right to write our own maps.
        prctl.set_dumpable(1)
    if user:
        syscalls.unshare(abi.CLONE_NEWUSER)
    if user == "self":
        assert uid is not None
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"0 {uid} 1")
        _write("/proc/self/gid_map", f"0 {uid} 1")
    elif user == "mapped":
        ask.open()
        answer.wait()
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        os.setgroups([])
        prctl.set_dumpable(1)
    ask.close()
    answer.close()
    syscalls.unshare(abi.CLONE_NEWNS | namespaces)
    set_propagation(abi.MS_PRIVATE)
    if namespaces & abi.CLONE_NEWPID:
        first = os.fork()
        if first:
            os.waitpid(first, 0)
            os._exit(0)
        prctl.set_pdeathsig(signal.SIGKILL)
    # Changing ids and namespaces clears it in some orders; the last word counts.
    prctl.set_pdeathsig(signal.SIGKILL)


def set_propagation(propagation: int) -> None:
    """Give every mount of this namespace a propagation (``MS_PRIVATE``, ``MS_SHARED`` …)."""
    root = syscalls.open_tree(abi.AT_FDCWD, b"/", 0)
    try:
        syscalls.mount_setattr(root, propagation=propagation, recursive=True)
    finally:
        os.close(root)


def _write_maps(child: int, mappings: list[Mapping]) -> None:
    text = "".join(f"{inside} {outside} {count}\n" for inside, outside, count in mappings)
    for name in ("uid_map", "gid_map"):
        _write(f"/proc/{child}/{name}", text)


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _run(
    function: Callable[..., Any], arguments: Iterable[Any], writer: int, check: bool
) -> None:
    # Opened now: after a pivot /proc may be another one, or none.
    table = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    before = _open_descriptors(table)
    try:
        value = function(*arguments)
        if check:
            gc.collect()
            _check_left(before, _open_descriptors(table))
    except pytest.skip.Exception as skip:  # it can't be pickled
        _send(writer, "skipped", str(skip))
    except BaseException as error:  # noqa: BLE001 - told to the parent, which raises it
        _send(writer, "raised", error)
    else:
        _send(writer, "returned", value)


def _open_descriptors(table: int) -> dict[str, str]:
    found = {}
    for name in os.listdir(table):
        try:
            found[name] = os.readlink(name, dir_fd=table)
        except FileNotFoundError:  # the one that listdir itself used
            continue
    return found


def _check_left(before: dict[str, str], after: dict[str, str]) -> None:
    left = {fd: target for fd, target in after.items() if before.get(fd) != target}
    assert not left, f"descriptors left open: {left}"
    try:
        pid, _ = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return
    raise AssertionError(f"a child was left: {pid or 'running'}")


def _send(writer: int, kind: str, value: Any) -> None:
    text = "".join(traceback.format_exception(value)) if kind == "raised" else ""
    try:
        content = pickle.dumps((kind, value, text))
        pickle.loads(content)
    except Exception as error:  # noqa: BLE001 - exceptions with arguments of their own
        content = pickle.dumps(("unpicklable", f"{value!r} ({error!r})", text))
    with os.fdopen(writer, "wb") as pipe:
        pipe.write(content)


def _receive(reader: int, child: int, timeout: float) -> bytes:
    chunks: list[bytes] = []
    deadline = time.monotonic() + timeout
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([reader], [], [], left)[0]:
            os.kill(child, signal.SIGKILL)
            raise ChildFailed(f"the child was still running after {timeout} s")
        chunk = os.read(reader, 1 << 16)
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)


def _unpack(content: bytes) -> Any:
    if not content:
        raise ChildFailed("the child ended without an answer (killed, or it called exec or exit)")
    kind, value, text = pickle.loads(content)
    if kind == "returned":
        return value
    if kind == "unpicklable":
        raise ChildFailed(f"{value}\n{text}")
    if kind == "skipped":
        pytest.skip(value)
    value.add_note("in the child:\n" + text)
    raise value


# Children that live as long as the test process, such as a daemon that many tests use.
KEPT: set[int] = set()


def children() -> set[int]:
    """Return the pids of our children, adopted ones and zombies among them."""
    found: set[int] = set()
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/children", encoding="ascii") as file:
                found.update(map(int, file.read().split()))
        except (FileNotFoundError, ProcessLookupError):  # a thread that ended meanwhile
            continue
    return found


def reap_orphans(timeout: float = 5) -> int:
    """Wait for descendants whose parents are gone; returns how many there were.

    For tests that kill a parent.  The test process adopts orphans (it is a subreaper), so what
    a killed sandboxfs leaves behind is found here; what still runs after `timeout` seconds
    is a leak.
    """
    count = 0
    deadline = time.monotonic() + timeout
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return count
        if pid:
            count += 1
        elif children() <= KEPT:
            return count
        elif time.monotonic() > deadline:
            raise AssertionError(f"orphans still run after {timeout} s")
        else:
            time.sleep(0.01)
