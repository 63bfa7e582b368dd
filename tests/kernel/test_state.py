"""The state directory, its files, its lock and the log, as they are meant to be used."""

import os
import signal
import stat
import time
from pathlib import Path

import pytest

from sandboxfs.errors import StateError
from sandboxfs.state import directory, lock, log
from tests.support import UNPRIVILEGED, in_namespace, mount_tmpfs

pytestmark = pytest.mark.needs("root")
STATE = Path("/run/sandboxfs")


def fresh(function, *arguments, **how):
    """Call a function in a namespace whose /run is an empty tmpfs."""

    def inside():
        mount_tmpfs("/run")
        return function(*arguments)

    return in_namespace(inside, **how)


def test_it_is_made_only_when_asked_and_closed_to_others():
    def body():
        assert directory.open_state(create=False) is None
        os.umask(0o277)
        with directory.open_state(create=True, memory=True) as state:
            assert state.path == str(STATE)
            assert state.names() == []
        status = STATE.stat()
        assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (0, 0o700)
        with directory.open_state(create=False) as state:
            assert os.get_inheritable(state.fd) is False

    fresh(body)


def test_a_file_is_replaced_all_at_once():
    def body():
        with directory.open_state(create=True) as state:
            assert state.read("record") is None
            state.write("record", b"one")
            before = os.open(STATE / "record", os.O_RDONLY)
            state.write("record", b"two")
            assert os.read(before, 9) == b"one"
            os.close(before)
            assert state.read("record") == b"two"
            assert stat.S_IMODE((STATE / "record").stat().st_mode) == 0o600
            assert state.names() == ["record"]

    fresh(body)


def test_a_full_memory_leaves_the_old_file():
    def body():
        from sandboxfs.kernel import abi, fscontext, syscalls

        full = fscontext.create(
            b"tmpfs", [fscontext.string(b"size", b"16k"), fscontext.string(b"mode", b"0700")], 0
        )
        STATE.mkdir()
        syscalls.move_mount_path(full, abi.AT_FDCWD, os.fsencode(STATE))
        os.close(full)
        with directory.open_state(create=True) as state:
            state.write("record", b"one")
            with pytest.raises(StateError) as refused:
                state.write("record", bytes(1 << 20))
            assert state.read("record") == b"one"
            assert state.names() == ["record"]
        return str(refused.value)

    assert fresh(body) == "write /run/sandboxfs/record: ENOSPC: No space left on device"


def test_a_user_has_a_directory_of_the_session():
    def body():
        os.makedirs(f"/run/user/{UNPRIVILEGED}", mode=0o755)
        os.chmod(f"/run/user/{UNPRIVILEGED}", 0o700)
        os.chown(f"/run/user/{UNPRIVILEGED}", UNPRIVILEGED, UNPRIVILEGED)
        os.setresgid(UNPRIVILEGED, UNPRIVILEGED, UNPRIVILEGED)
        os.setresuid(UNPRIVILEGED, UNPRIVILEGED, UNPRIVILEGED)
        with directory.open_state(create=True, memory=True) as state:
            state.write("record", b"mine")
            return state.path

    assert fresh(body) == f"/run/user/{UNPRIVILEGED}/sandboxfs"


def test_root_of_a_user_namespace_has_that_users_directory():
    """A rootless runtime's hook is root inside: the store is the user's outside."""

    def body():
        mount_tmpfs("/run")
        with pytest.raises(StateError) as missing:
            directory.open_state(create=True)
        os.makedirs(f"/run/user/{UNPRIVILEGED}", mode=0o755)
        os.chmod(f"/run/user/{UNPRIVILEGED}", 0o700)
        with directory.open_state(create=True, memory=True) as state:
            return str(missing.value), state.path

    missing, path = in_namespace(body, uid=UNPRIVILEGED)
    assert path == f"/run/user/{UNPRIVILEGED}/sandboxfs"
    assert missing.startswith("open /run/user: ENOENT: isn't there")


def test_without_a_session_the_hint_says_how_to_get_one():
    def body():
        os.makedirs("/run/user", mode=0o755)
        os.setresuid(UNPRIVILEGED, UNPRIVILEGED, UNPRIVILEGED)
        assert directory.open_state(create=False) is None
        with pytest.raises(StateError) as missing:
            directory.open_state(create=True)
        return missing.value

    error = fresh(body)
    assert error.line() == f"open /run/user/{UNPRIVILEGED}: ENOENT: isn't there"
    assert "enable-linger" in error.hint


def test_a_lock_keeps_others_out_and_names_its_holder():
    def body():
        with directory.open_state(create=True) as state:
            ready, done = os.pipe(), os.pipe()
            holder = os.fork()
            if holder == 0:
                with lock.Lock(state):
                    os.write(ready[1], b".")
                    os.read(done[0], 1)
                os._exit(0)
            os.read(ready[0], 1)
            start = time.monotonic()
            with pytest.raises(StateError) as refused, lock.Lock(state, seconds=0.2):
                pass
            waited = time.monotonic() - start
            os.write(done[1], b".")
            os.waitpid(holder, 0)
            with lock.Lock(state, seconds=0.2):
                pass
            for fd in ready + done:
                os.close(fd)
            return str(refused.value), holder, waited

    text, holder, waited = fresh(body)
    assert text == ("lock /run/sandboxfs/lock: held for more than 0.2 s by "
                    f"process {holder}")
    assert 0.2 <= waited < 5


def test_a_killed_holder_leaves_no_lock():
    def body():
        with directory.open_state(create=True) as state:
            ready = os.pipe()
            holder = os.fork()
            if holder == 0:
                with lock.Lock(state):
                    os.write(ready[1], b".")
                    time.sleep(60)
                os._exit(0)
            os.read(ready[0], 1)
            os.kill(holder, signal.SIGKILL)
            os.waitpid(holder, 0)
            with lock.Lock(state, seconds=1):
                taken = True
            for fd in ready:
                os.close(fd)
            return taken

    assert fresh(body)


def test_counting_under_the_lock_loses_nothing():
    def count(state, rounds):
        for _ in range(rounds):
            with lock.Lock(state):
                state.write("count", b"%d" % (int(state.read("count") or 0) + 1))

    def body():
        with directory.open_state(create=True) as state:
            children = []
            for _ in range(8):
                child = os.fork()
                if child == 0:
                    count(state, 25)
                    os._exit(0)
                children.append(child)
            ends = [os.waitpid(child, 0)[1] for child in children]
            return ends, state.read("count")

    assert fresh(body) == ([0] * 8, b"200")


def test_the_log_has_time_level_and_pid_and_is_closed_to_others():
    def body():
        log.Log(level="warning").write("error", "no such\nthing \x1b[31m")
        log.Log(level="warning").write("info", "not kept")
        path = STATE / "hook.log"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        return path.read_text()

    text = fresh(body)
    assert text.count("\n") == 1
    assert text[20:].startswith(" error [")
    assert text.endswith("] no such\\nthing \\x1b[31m\n")
    time.strptime(text[:20], "%Y-%m-%dT%H:%M:%SZ")


def test_the_log_is_limited_in_size_and_keeps_one_older_file():
    """Eight writers at once: no line is torn, and two files are all there is."""

    def body(monkeypatch):
        monkeypatch.setattr(log, "LARGEST_LOG", 20_000)
        children = []
        for _ in range(8):
            child = os.fork()
            if child == 0:
                for number in range(100):
                    log.Log("/run/mine.log", "info").write("info", f"line {number:03} " + "x" * 90)
                os._exit(0)
            children.append(child)
        for child in children:
            assert os.waitpid(child, 0)[1] == 0
        files = {each: Path("/run", each).read_text() for each in os.listdir("/run")}
        assert sorted(files) == ["mine.log", "mine.log.1"]
        for text in files.values():
            assert 0 < len(text) <= 20_000
            assert all(line.endswith("x" * 90) for line in text.splitlines())

    with pytest.MonkeyPatch.context() as monkeypatch:
        fresh(body, monkeypatch)


@pytest.mark.parametrize("bad", ["missing", "fifo", "link", "directory", "closed"])
def test_what_cant_be_logged_goes_to_standard_error(bad, capfd):
    def body():
        path = Path("/run/there.log")
        if bad == "missing":
            path = Path("/run/not/there.log")
        elif bad == "fifo":
            os.mkfifo(path)
        elif bad == "link":
            Path("/run/target").write_text("")
            path.symlink_to("/run/target")
        elif bad == "directory":
            path.mkdir()
        elif bad == "closed":
            path.write_text("")
            os.chown(path, UNPRIVILEGED, UNPRIVILEGED)
        log.Log(str(path), "info").write("error", "the line")
        if bad == "link":
            assert Path("/run/target").read_text() == ""

    fresh(body)
    text = capfd.readouterr().err
    assert "] the line\n" in text
    assert "no line in the log: " in text
