"""The state directory made beforehand by somebody else, or a link: containerd CVE-2021-41103."""

import os
from pathlib import Path

import pytest

from sandboxfs.errors import StateError
from sandboxfs.state import directory, log
from tests.support import UNPRIVILEGED, in_namespace, mount_tmpfs

pytestmark = pytest.mark.needs("root")
STATE = Path("/run/sandboxfs")


def opened(prepare, memory=False):
    """Return the error of opening the state directory after `prepare`, or None."""

    def inside():
        mount_tmpfs("/run")
        prepare()
        try:
            with directory.open_state(create=True, memory=memory):
                return None
        except StateError as error:
            return str(error)

    return in_namespace(inside)


def owned_by_another():
    STATE.mkdir(mode=0o700)
    os.chown(STATE, UNPRIVILEGED, UNPRIVILEGED)


def open_to_others(mode):
    def prepare():
        STATE.mkdir()
        STATE.chmod(mode)

    return prepare


def a_link():
    Path("/run/elsewhere").mkdir(mode=0o700)
    STATE.symlink_to("/run/elsewhere")


def run_of(uid, mode):
    def prepare():
        os.chmod("/run", mode)
        os.chown("/run", uid, uid)

    return prepare


def test_the_control_is_taken():
    """What the other tests spoil one at a time."""
    assert opened(lambda: STATE.mkdir(mode=0o700), memory=True) is None
    assert opened(lambda: os.chmod("/run", 0o1777)) is None


@pytest.mark.parametrize("made", ["by another user", "a link"])
def test_the_naive_way_takes_it(made):
    """The control: what makes sure that a directory is there, and writes into it by its path."""

    def inside():
        mount_tmpfs("/run")
        (owned_by_another if made == "by another user" else a_link)()
        os.makedirs(STATE, mode=0o700, exist_ok=True)
        (STATE / "record").write_text("believed later")
        return STATE.stat().st_uid, os.path.realpath(STATE / "record")

    owner, record = in_namespace(inside)
    assert (owner, record) in (
        (UNPRIVILEGED, "/run/sandboxfs/record"), (0, "/run/elsewhere/record"),
    )


def test_made_by_another_user():
    assert opened(owned_by_another) == (
        f"open /run/sandboxfs: belongs to user {UNPRIVILEGED}, not to us: made by somebody else\n"
        "  hint: remove it, after a look at what is in it"
    )


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, 0o1777, 0o500])
def test_another_mode(mode):
    assert f"open /run/sandboxfs: has mode {mode:04o}, 0700 is wanted" in (
        opened(open_to_others(mode)) or ""
    )


def test_a_link_in_its_place_is_not_followed():
    assert opened(a_link) == "open /run/sandboxfs: ENOTDIR: is no directory, or a symlink"


def test_a_file_in_its_place():
    assert "ENOTDIR" in (opened(STATE.touch) or "")


@pytest.mark.parametrize(("uid", "mode", "why"), [
    (UNPRIVILEGED, 0o755, f"open /run: belongs to user {UNPRIVILEGED}"),
    (0, 0o777, "open /run: has mode 0777"),
    (0, 0o775, "open /run: has mode 0775"),
])
def test_who_could_exchange_it(uid, mode, why):
    assert (opened(run_of(uid, mode)) or "").startswith(why)


def test_a_link_above_is_not_followed():
    def inside():
        # A root of its own, so that the machine's /run isn't touched.
        mount_tmpfs("/mnt")
        os.mkdir("/mnt/real")
        os.symlink("/real", "/mnt/run")
        os.mkdir("/mnt/proc")
        from tests.support import bind

        bind("/proc", "/mnt/proc")
        os.chroot("/mnt")
        try:
            directory.open_state(create=True)
        except StateError as error:
            return str(error), os.listdir("/real")
        return None

    assert in_namespace(inside, check_descriptors=False) == (
        "open /run: ENOTDIR: is no directory, or a symlink", []
    )


def test_a_disk_is_no_place_for_records_of_mounts(public_path):
    """Mounts are gone after a reboot; records on a disk would tell of them."""

    def inside():
        from tests.support import bind

        bind(public_path, "/run")
        with directory.open_state(create=True):
            pass
        try:
            directory.open_state(create=True, memory=True)
        except StateError as error:
            return str(error)
        finally:
            STATE.rmdir()
        return None

    assert (in_namespace(inside) or "").startswith(
        "open /run/sandboxfs: doesn't lie on a tmpfs: records would outlive the mounts"
    )


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_a_record_that_is_no_file_of_ours_is_not_read(kind):
    """Not even inside of the checked directory: a mistake there must not hang a hook."""

    def inside():
        mount_tmpfs("/run")
        Path("/run/secret").write_text("secret")
        with directory.open_state(create=True) as state:
            record = STATE / "record"
            {"link": lambda: record.symlink_to("/run/secret"),
             "fifo": lambda: os.mkfifo(record), "directory": record.mkdir}[kind]()
            with pytest.raises(StateError):
                state.read("record")
            if kind == "link":
                state.write("record", b"ours")
                assert state.read("record") == b"ours"
                assert Path("/run/secret").read_text() == "secret"

    in_namespace(inside)


def test_a_hard_link_in_place_of_the_log_is_not_written(capfd):
    """An operator's log path in a directory of another user: a name for something of root's."""

    def inside():
        mount_tmpfs("/run")
        Path("/run/precious").write_text("precious")
        os.mkdir("/run/logs")
        os.link("/run/precious", "/run/logs/hook.log")
        log.Log("/run/logs/hook.log", "info").write("error", "the line")
        assert Path("/run/precious").read_text() == "precious"
        os.unlink("/run/precious")
        log.Log("/run/logs/hook.log", "info").write("error", "the line")
        return Path("/run/logs/hook.log").read_text()

    text = in_namespace(inside)
    assert text.startswith("precious")
    assert text.endswith("the line\n")
    assert "isn't a log of ours" in capfd.readouterr().err
