"""The rules that all other tests lean on: leaks are found, skips are judged, children report."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sandboxfs.build import images
from sandboxfs.kernel import abi, fscontext, syscalls
from tests.support import (
    CHECKOUT,
    UNPRIVILEGED,
    ChildFailed,
    attach,
    capabilities,
    differences,
    in_namespace,
    leaks,
    mount_at,
    mount_tmpfs,
    needs,
    reap_orphans,
    run,
    snapshot,
    table,
    untouched,
)

root = pytest.mark.needs("root")


# -- skips ---------------------------------------------------------------------------------

SKIPPING = """
import pytest
from tests.support import capabilities
from tests.support.skips import needs

capabilities.MACHINE["moon"] = lambda: "no moon over this machine"
capabilities.MACHINE["sun"] = lambda: None
capabilities.PROVIDED["shovel"] = lambda: "shovel is not installed"
capabilities.FETCHED["tree-oak"] = lambda: "no oak grows here"
capabilities.FETCHED["tree-elm"] = lambda: "nobody planted one"
capabilities.unfetched = {"tree-oak": "no oak grows here"}.get

@pytest.mark.needs("moon")
def test_absent_by_mark(): raise AssertionError

def test_absent_in_the_body():
    needs("sun", "moon")
    raise AssertionError

@pytest.mark.needs("shovel")
def test_set_up_lacks(): raise AssertionError

def test_bare():
    pytest.skip("don't feel like it")

def test_pretended():
    pytest.skip("needs sun: it is dark")

def test_guest():
    pytest.skip("in the guest: needs sun: it is night there")

def test_invented():
    pytest.skip("needs unicorns: none here")

@pytest.mark.needs("tree-oak")
def test_could_not_be_fetched(): raise AssertionError

@pytest.mark.needs("tree-elm")
def test_was_not_fetched(): raise AssertionError

@pytest.mark.xfail
def test_expected_failure(): raise AssertionError

@pytest.mark.needs("sun")
def test_present(): pass
"""


def _outcomes(pytester, monkeypatch, ci):
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    if ci:
        monkeypatch.setenv("CI", "true")
    else:
        monkeypatch.delenv("CI", raising=False)
    pytester.makeini("[pytest]\nmarkers = needs(name): …\n")
    result = pytester.runpytest_subprocess("-p", "tests.support.skips", "-rA", timeout=60)
    return result, result.parseoutcomes()


def test_in_ci_only_a_truly_absent_capability_may_skip(pytester, monkeypatch):
    pytester.makepyfile(SKIPPING)
    result, outcomes = _outcomes(pytester, monkeypatch, ci=True)
    assert outcomes == {"passed": 1, "skipped": 4, "failed": 3, "errors": 2, "xfailed": 1}
    result.stdout.fnmatch_lines_random(
        [
            "*skipped for want of shovel, which the set-up provides*",
            "*skipped without needs(*",
            "*skipped for want of sun, but this machine has it*",
            "*skipped for unicorns, of which there is no probe*",
            "*skipped for want of tree-elm, which the set-up has not tried to fetch*",
        ]
    )
    # The last words of all.
    assert "NOT TESTED" in result.outlines[-2]
    assert result.outlines[-1] == "tree-oak: 1 tests did not run: no oak grows here"


def test_elsewhere_skips_are_skips(pytester, monkeypatch):
    pytester.makepyfile(SKIPPING)
    _, outcomes = _outcomes(pytester, monkeypatch, ci=False)
    assert outcomes == {"passed": 1, "skipped": 9, "xfailed": 1}


def test_in_ci_a_module_that_skips_itself_fails(pytester, monkeypatch):
    pytester.makepyfile("import pytest\npytest.skip('not today', allow_module_level=True)\n")
    _, outcomes = _outcomes(pytester, monkeypatch, ci=True)
    assert outcomes == {"errors": 1}


def test_every_capability_has_an_answer():
    for name in {**capabilities.PROVIDED, **capabilities.FETCHED, **capabilities.MACHINE}:
        reason = capabilities.absence(name)
        assert reason is None or reason, name


def test_an_unknown_capability_is_an_error():
    with pytest.raises(KeyError):
        needs("unicorns")


# -- children ------------------------------------------------------------------------------


@root
def test_a_child_returns_a_value_and_its_mounts_go():
    before = table()

    def inside():
        mount_tmpfs("/tmp")
        return mount_at(table(), "/tmp").type

    assert in_namespace(inside) == b"tmpfs"
    assert [each.id for each in table()] == [each.id for each in before]


@root
def test_what_a_child_raises_is_raised_with_its_traceback():
    def inside():
        assert 1 + 1 == 3, "arithmetic"

    with pytest.raises(AssertionError, match="arithmetic") as caught:
        in_namespace(inside)
    assert "in inside" in caught.value.__notes__[0]


@root
def test_a_skip_in_a_child_skips():
    with pytest.raises(pytest.skip.Exception, match="for a reason"):
        in_namespace(lambda: pytest.skip("for a reason"))


@root
def test_a_child_that_hangs_is_killed():
    with pytest.raises(ChildFailed, match="still running"):
        in_namespace(lambda: time.sleep(60), timeout=0.2)


@root
@pytest.mark.parametrize("ending", [lambda: os._exit(0), lambda: os.kill(os.getpid(), 9)])
def test_a_child_that_ends_by_itself_is_a_failure(ending):
    with pytest.raises(ChildFailed, match="without an answer"):
        in_namespace(ending)


@root
def test_a_child_that_leaves_a_descriptor_is_a_failure():
    with pytest.raises(AssertionError, match="/etc/passwd"):
        in_namespace(lambda: os.open("/etc/passwd", os.O_RDONLY) and None)


@pytest.mark.needs("root", "user-namespaces")
def test_a_child_can_be_an_unprivileged_user():
    def inside():
        mount_tmpfs("/tmp")
        return os.getuid(), Path("/proc/self/uid_map").read_text("ascii").split()

    assert in_namespace(inside, uid=UNPRIVILEGED) == (0, ["0", str(UNPRIVILEGED), "1"])


@pytest.mark.needs("root", "user-namespaces")
def test_a_child_can_have_mapped_ids():
    def inside():
        return os.getuid(), Path("/proc/self/gid_map").read_text("ascii").split()

    ids = in_namespace(inside, mappings=[(0, 100000, 65536)])
    assert ids == (0, ["0", "100000", "65536"])


@root
def test_a_child_can_be_pid_1():
    assert in_namespace(os.getpid, namespaces=abi.CLONE_NEWPID) == 1


# -- leaks ---------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch):
    """What is leaked on purpose doesn't go by waiting."""
    monkeypatch.setattr(leaks, "SETTLING_SECONDS", 0.1)


@root
def test_a_leaked_mount_is_found(tmp_path, impatient):
    before = leaks.state()
    mount_tmpfs(tmp_path)
    try:
        assert any(str(tmp_path) in line for line in leaks.differences(before))
    finally:
        syscalls.umount2(os.fsencode(tmp_path), abi.MNT_DETACH)


@root
def test_a_mount_that_propagates_out_of_a_namespace_is_found(tmp_path, impatient):
    """The tests' namespace is shared like a host's, or this leak would go unseen."""
    before = leaks.state()
    child = os.fork()
    if child == 0:
        try:
            syscalls.unshare(abi.CLONE_NEWNS)
            attach(fscontext.create(b"tmpfs", [], 0), tmp_path)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    try:
        assert any(str(tmp_path) in line for line in leaks.differences(before))
    finally:
        syscalls.umount2(os.fsencode(tmp_path), abi.MNT_DETACH)


def test_a_leaked_descriptor_is_found(impatient):
    before = leaks.state()
    fd = os.open("/etc/passwd", os.O_RDONLY)
    try:
        assert any("/etc/passwd" in line for line in leaks.differences(before))
    finally:
        os.close(fd)


def test_an_orphan_is_found(impatient):
    """It was never our child: its parent died before it."""
    before = leaks.state()
    script = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'input()'])"
    reader, writer = os.pipe()
    subprocess.run([sys.executable, "-ISc", script], stdin=reader, check=True)
    os.close(reader)
    try:
        assert any(line.startswith("processes: left") for line in leaks.differences(before))
    finally:
        os.close(writer)
    assert reap_orphans() == 1


def test_a_leaked_file_is_found(impatient):
    before = leaks.state()
    path = Path(f"/var/tmp/sandboxfs-{os.getpid()}")
    path.touch()
    try:
        assert leaks.differences(before) == [f"files: left: {path}"]
    finally:
        path.unlink()


def test_the_leak_check_itself_fails_a_test(pytester):
    pytester.makeconftest("from tests.conftest import nothing_left")
    pytester.makepyfile("import os\ndef test_it(): os.open('/etc/passwd', os.O_RDONLY)")
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", timeout=60)
    result.stdout.fnmatch_lines(["*the test left something behind*", "*/etc/passwd*"])
    assert result.parseoutcomes() == {"passed": 1, "errors": 1}


@pytest.mark.needs("root", "squashfs")
def test_a_loop_device_is_found_and_another_workers_is_not(public_path):
    """Devices are the whole machine's; whose they are is told by the file behind them."""
    others = public_path / "popen-gw77"
    others.mkdir()
    before = leaks.state()
    for path, owner in ((public_path / "image", "us"), (others / "image", "them")):
        path.write_bytes(bytes(4096))
        with open(path, "rb") as image:
            loop, _device = images._loop_device(image.fileno())
            try:
                found = leaks.state()["loops"] - before["loops"]
            finally:
                os.close(loop)
        assert [str(path) in line for line in found] == ([True] if owner == "us" else [])


# -- trees ---------------------------------------------------------------------------------


def _chmod(tree):
    (tree / "file").chmod(0o600)


def _touch(tree):
    os.utime(tree / "file", ns=(0, 0))


def _write(tree):
    info = (tree / "file").stat()
    (tree / "file").write_text("other", "utf-8")
    os.utime(tree / "file", ns=(info.st_atime_ns, info.st_mtime_ns))


def _make(tree):
    (tree / "folder" / "new").mkdir()


def _relink(tree):
    (tree / "link").unlink()
    (tree / "link").symlink_to("folder")


def _remove(tree):
    (tree / "file").unlink()


@pytest.mark.parametrize("change", [_chmod, _touch, _write, _make, _relink, _remove])
def test_a_snapshot_sees(tmp_path, change):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("once", "utf-8")
    (tmp_path / "link").symlink_to("file")
    before = snapshot(tmp_path)
    assert not differences(before, snapshot(tmp_path))
    with pytest.raises(AssertionError, match="was changed"), untouched(tmp_path):
        change(tmp_path)


@pytest.mark.needs("root", "setfattr")
def test_a_snapshot_sees_attributes(tmp_path):
    before = snapshot(tmp_path)
    os.setxattr(tmp_path, "trusted.overlay.opaque", b"y")
    assert len(differences(before, snapshot(tmp_path))) == 1


# -- users ---------------------------------------------------------------------------------


@pytest.mark.needs("root", "newuidmap")
def test_subordinate_ids_are_there_and_go(subordinate_ids):
    assert "ranged:200000:65536" in Path("/etc/subuid").read_text("utf-8")


@pytest.mark.needs("root", "launcher")
def test_the_checkout_is_reachable_for_everybody():
    done = run("/bin/sh", "-c", f"test -x {CHECKOUT}/.venv/bin/sandboxfs", uid=UNPRIVILEGED)
    assert done.returncode == 0, done.stderr
