"""The child that shares memory: what is its own, what comes back, and its death amidst Python.

Each script is a process of its own: such children belong in processes that are ours alone.
"""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from tests.support import CHECKOUT, reap_orphans

pytestmark = pytest.mark.needs("root")

BEGIN = """
import os, signal, sys
from sandboxfs.kernel import abi, vfork
from sandboxfs.kernel.syscalls import prctl, prlimit, unshare

def waited(child, flags=0):
    return os.waitstatus_to_exitcode(os.waitpid(child.start(flags), 0)[1])
"""


def script(text, check=0):
    done = subprocess.run(
        [sys.executable, "-IB", "-c", f"import sys; sys.path.insert(0, {os.fspath(CHECKOUT)!r})\n"
         + BEGIN + textwrap.dedent(text)],
        capture_output=True, text=True, check=False, timeout=60,
    )
    assert done.returncode == check, done.stderr
    return done.stdout.split("\n")[:-1]


def test_what_it_does_to_objects_stays_and_what_is_a_process_s_is_its_own():
    lines = script("""
        seen = []
        before = os.getcwd(), os.umask(0o22), prlimit(0, 7), os.sched_getaffinity(0)
        reader, writer = os.pipe()

        def live(_errno):
            seen.append((os.getpid(), "x" * 100000))
            os.chdir("/")
            os.umask(0o77)
            prlimit(0, 7, (64, 64))
            os.close(reader)
            os.close(writer)
            os.setgroups([])
            os.setresuid(1000, 1000, 1000)
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
            return 5

        child = vfork.Child(live)
        pid = child.start()
        assert os.waitpid(pid, 0)[1] == 5 << 8
        assert [number for number, _text in seen] == [pid] and pid != os.getpid()
        assert os.getcwd() == before[0] and os.umask(0o22) == 0o22 and prlimit(0, 7) == before[2]
        assert os.getresuid() == (0, 0, 0) and not signal.pthread_sigmask(signal.SIG_BLOCK, [])
        os.write(writer, b"x")
        assert os.read(reader, 1) == b"x"
        print("fine")
    """)
    assert lines == ["fine"]


def test_it_begins_in_new_namespaces():
    lines = script("""
        def live(_errno):
            print(os.getpid(), os.readlink("/proc/thread-self/ns/mnt") != mine, flush=True)
            return 0

        mine = os.readlink("/proc/self/ns/mnt")
        assert waited(vfork.Child(live), abi.CLONE_NEWPID | abi.CLONE_NEWNS) == 0
        print(os.readlink("/proc/self/ns/mnt") == mine)
    """)
    assert lines == ["1 True", "True"]


def test_it_executes_with_these_words_and_no_others():
    lines = script(r"""
        words = [b"sh", b"-c", b'printf "<%s>" "$0" "$@"; echo; env', b"", b"two words", b"x=y"]
        program = vfork.Program(words, {b"A": b"", b"B": b"x=y"})
        assert waited(vfork.Child(lambda _errno: (b"/bin/busybox", program))) == 0
        assert waited(vfork.Child(lambda _errno: (b"/bin/true", vfork.Program([b""], {})))) == 0
    """)
    assert lines[0] == "<><two words><x=y>"
    # The shell adds these itself.
    assert {line for line in lines[1:] if line[:3] not in ("PWD", "SHL", "PAT")} == {"A=", "B=x=y"}


def test_a_program_that_cannot_be_executed_is_followed_by_the_next():
    lines = script("""
        import errno
        numbers = []
        paths = [b"/missing", b"/etc", b"/bin/true/x", b"/bin/true"]

        def live(number):
            numbers.append(number)
            return paths.pop(0), vfork.Program([b"true"], {})

        child = vfork.Child(live)
        for _again in range(3):
            paths[:] = [b"/missing", b"/etc", b"/bin/true/x", b"/bin/true"]
            numbers.clear()
            assert waited(child) == 0
            assert numbers == [0, errno.ENOENT, errno.EACCES, errno.ENOTDIR], numbers
        paths[:] = [b"/missing"]

        def give_up(number):
            return 9 if number else (b"/missing", vfork.Program([b"x"], {}))

        assert waited(vfork.Child(give_up)) == 9
        print("fine")
    """)
    assert lines == ["fine"]


def test_the_signal_mask_of_its_last_moment_is_the_program_s():
    lines = script("""
        def live(_errno):
            signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGUSR2])
            return b"/bin/grep", vfork.Program([b"grep", b"SigBlk", b"/proc/self/status"], {})

        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        assert waited(vfork.Child(live)) == 0
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == {signal.SIGTERM}
    """)
    assert int(lines[0].split()[1], 16) == 1 << signal.SIGUSR2 - 1


def test_a_call_that_is_refused_is_an_error():
    lines = script("""
        child = vfork.Child(lambda _errno: 0)
        prlimit(0, 6, (0, 0))  # RLIMIT_NPROC
        os.setresuid(1000, 1000, 1000)
        try:
            child.start()
        except OSError as error:
            print(error.call, error.errno)
    """)
    assert lines == ["clone 11"]


@pytest.mark.parametrize("death", [
    "os.kill(os.getpid(), signal.SIGKILL)",
    "sum(kill_soon(0.05) for _ in iter(int, 1))",  # while it computes
    "kill_soon(0.05), __import__('time').sleep(60)",  # in a call without the interpreter's lock
    "kill_soon(0.05), os.read(os.pipe()[0], 1)",
    "kill_soon(0), [bytearray(1 << 22) for _ in iter(int, 1)]",
    "signal.raise_signal(signal.SIGSEGV)",
])
def test_its_death_amidst_python_is_ours(death):
    number = signal.SIGSEGV if "SEGV" in death else signal.SIGKILL
    lines = script(f"""
        import time
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        armed = []

        def kill_soon(seconds):
            if not armed:
                armed.append(1)
                pid = os.getpid()
                if os.fork() == 0:
                    time.sleep(seconds)
                    os.kill(pid, signal.SIGKILL)
                    os._exit(0)
            return 0

        def live(_errno):
            {death}
            return 0

        child = vfork.Child(live)
        child.start()
        print("alive")
    """, check=128 + number)
    reap_orphans()
    assert lines == []
