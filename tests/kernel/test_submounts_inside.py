"""A directory's mounts, asked from inside of it by a child that nobody else hears of."""

import os
import resource
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from sandboxfs.kernel import abi, fscontext, inside, submounts, syscalls
from tests.support import in_namespace, mount_tmpfs

pytestmark = pytest.mark.needs("root", "listmount")


@pytest.fixture
def lower(public_path):
    path = public_path / "lower"
    (path / "deep/er").mkdir(parents=True)
    return path


def asked(path):
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        return inside.is_empty(fd)
    finally:
        os.close(fd)


def test_what_is_mounted_below_or_on_it_is_seen(lower):
    def ask():
        fd = os.open(lower, os.O_PATH | os.O_CLOEXEC)
        found = [inside.is_empty(fd)]
        mount_tmpfs(lower / "deep/er")
        found.append(inside.is_empty(fd))
        os.close(fd)
        fd = os.open(lower.parent, os.O_PATH | os.O_CLOEXEC)
        found.append(inside.is_empty(fd))
        os.close(fd)
        return found

    def ask_of_itself():
        fd = os.open(lower, os.O_PATH | os.O_CLOEXEC)
        mount_tmpfs(lower)
        found = inside.is_empty(fd)
        os.close(fd)
        return found

    assert in_namespace(ask) == [True, False, False]
    assert in_namespace(ask_of_itself) is False


def test_the_caller_keeps_root_directory_and_signals(lower):
    def ask():
        before = os.stat("/"), os.getcwd(), signal.pthread_sigmask(signal.SIG_BLOCK, ())
        assert asked(lower) is True
        assert (os.stat("/"), os.getcwd(), signal.pthread_sigmask(signal.SIG_BLOCK, ())) == before

    in_namespace(ask)


def test_a_program_with_threads_and_children_of_its_own_notices_nothing(lower):
    def ask():
        told = []
        signal.signal(signal.SIGCHLD, lambda *_: told.append("SIGCHLD"))
        reaped, stop = [], threading.Event()

        def reap():
            while not stop.is_set():
                try:
                    reaped.append(os.waitpid(-1, os.WNOHANG))
                except ChildProcessError:
                    time.sleep(0)

        reaper = threading.Thread(target=reap)
        reaper.start()
        found = {asked(lower) for _round in range(300)}
        stop.set()
        reaper.join()
        return found, told, [each for each in reaped if each != (0, 0)]

    assert in_namespace(ask) == ({True}, [], [])


def test_a_signal_waits_until_it_is_over(lower):
    def ask():
        seen = []
        signal.signal(signal.SIGALRM, lambda *_: seen.append(os.getpid()))
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        found = {asked(lower) for _round in range(300)}
        signal.setitimer(signal.ITIMER_REAL, 0)
        return found, set(seen) == {os.getpid()}

    assert in_namespace(ask) == ({True}, True)


class Alarm(Exception):
    """Raised by a handler."""


def test_a_handler_that_raises_leaves_neither_signals_blocked_nor_a_child(lower):
    def ask():
        def ring(*_):
            raise Alarm

        signal.signal(signal.SIGALRM, ring)
        fd = os.open(lower, os.O_PATH | os.O_CLOEXEC)
        raised = 0
        for delay in range(2000):
            try:
                signal.setitimer(signal.ITIMER_REAL, (20 + delay % 120) / 1e6)
                inside.is_empty(fd)
                time.sleep(0.0002)
            except Alarm:
                raised += 1
            assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
        os.close(fd)
        assert raised > 1000
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, 0x40000000)  # __WALL

    in_namespace(ask, timeout=60)


def test_no_signal_reaches_the_child():
    def ask():
        usleep = inside.vfork.locked("usleep")
        reader, writer = os.pipe()
        watcher = os.fork()
        if watcher == 0:
            time.sleep(0.1)
            children = Path(f"/proc/{os.getppid()}/task/{os.getppid()}/children")
            (pid,) = {int(each) for each in children.read_text().split()} - {os.getpid()}
            os.write(writer, Path(f"/proc/{pid}/status").read_bytes())
            os._exit(0)
        assert inside._calls((usleep, 300_000))
        os.waitpid(watcher, 0)
        status = os.read(reader, 1 << 16).decode()
        os.close(reader)
        os.close(writer)
        (line,) = [line for line in status.splitlines() if line.startswith("SigBlk")]
        return int(line.split()[1], 16)

    blocked = in_namespace(ask)
    for number in (signal.SIGINT, signal.SIGTSTP, signal.SIGTERM, signal.SIGALRM):
        assert blocked >> (number - 1) & 1


def test_a_pid_namespace_that_is_to_come_is_not_begun(lower):
    def ask():
        syscalls.unshare(abi.CLONE_NEWPID)
        fd = os.open(lower, os.O_PATH | os.O_CLOEXEC)
        before = inside.is_empty(fd)
        os.close(fd)
        child = os.fork()
        if child == 0:
            os._exit(7 if os.getpid() == 1 else 1)
        return before, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert in_namespace(ask) == (None, 7)


@pytest.mark.parametrize("own_process", [True, False])
def test_what_lies_in_no_namespace_of_ours_is_not_empty(lower, monkeypatch, own_process):
    monkeypatch.setattr(submounts, "own_process", own_process)

    def ask():
        tree = fscontext.create(b"tmpfs", [], 0)
        os.makedirs(f"/proc/self/fd/{tree}/directory/point")
        other = fscontext.create(b"tmpfs", [], 0)
        syscalls.move_mount_path(other, tree, b"directory/point")
        fd = os.open("directory", os.O_PATH | os.O_CLOEXEC, dir_fd=tree)
        with pytest.raises(FileNotFoundError):
            submounts.below(fd)
        assert not submounts.is_surely_bare(fd)
        for each in (fd, other, tree):
            os.close(each)

    in_namespace(ask)


def give_up_chroot():
    os.setresgid(1000, 1000, 1000)
    os.setresuid(1000, 1000, 1000)


def allow_no_child():
    os.setresuid(1000, 1000, 0)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    os.setresuid(1000, 1000, 1000)


@pytest.mark.parametrize("hinder", [give_up_chroot, allow_no_child])
def test_where_no_child_can_ask_paths_tell(lower, hinder):
    def ask():
        mount_tmpfs(lower / "deep")
        hinder()
        fd = os.open(lower, os.O_PATH | os.O_CLOEXEC)
        found = inside.is_empty(fd), [each.mountpoint for each in submounts.below(fd)]
        os.close(fd)
        return found

    assert in_namespace(ask) == (None, [b"deep"])


def test_without_listmount_paths_tell(lower, monkeypatch):
    monkeypatch.setattr(inside, "abi", SimpleNamespace(SYS_listmount=999, LSMT_ROOT=abi.LSMT_ROOT))

    def ask():
        mount_tmpfs(lower / "deep")
        fd = os.open(lower, os.O_PATH | os.O_CLOEXEC)
        found = inside.is_empty(fd), [each.mountpoint for each in submounts.below(fd)]
        os.close(fd)
        return found

    assert in_namespace(ask) == (None, [b"deep"])


def test_a_child_that_is_killed_is_no_answer():
    kill = inside.vfork.locked("raise")

    def ask():
        return inside._calls((kill, int(signal.SIGKILL)))

    assert in_namespace(ask) is False
