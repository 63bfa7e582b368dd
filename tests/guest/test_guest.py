"""The table of behaviours on the kernel of a guest: one boot, one result a case.

That kernel (6.1) has no mounts onto detached trees, so the attached engine is what runs there.
"""

from pathlib import Path

import pytest

from tests.guest import guest, kernel
from tests.kernel import behaviours
from tests.support import needs

CASES = [str(case) for case in behaviours.cases([behaviours.ATTACHED])]
# Emulated, and every case forks an interpreter twice.
CASES_SECONDS = 400
# One worker of a parallel run boots, the others leave these to it (tests/support/schedule.py).
pytestmark = pytest.mark.guest


@pytest.fixture(scope="module")
def results():
    """Return what each case gave in the guest."""
    needs("guest")
    return guest.run_in_guest(behaviours.__file__, CASES, timeout=CASES_SECONDS)


@pytest.mark.parametrize("case", CASES)
def test_behaviour_in_the_guest(case, results):
    assert case in results, "the guest didn't come to it"
    failure = results[case]
    if failure and failure.startswith(behaviours.SKIPPED):
        pytest.skip(f"in the guest: {failure.removeprefix('skipped: ')}")
    assert failure is None, failure


def test_every_case_ran_once_in_the_guest(results, record_property):
    record_property("cases", len(results))
    print(f"{len(results)} behaviours ran in the guest")
    assert sorted(results) == sorted(CASES)


def test_output_and_status_reach_the_host_and_the_kernel_is_older_than_detached_trees():
    code = "from tests.kernel import behaviours as b; print(b.engines_here()); raise SystemExit(7)"
    outcome = guest.boot({"code": code, "arguments": ["-c"]})
    assert "('attached',)\n" in outcome.output
    assert outcome.status == 7


RUNS = r"""
import subprocess

START = "import sys; sys.path[:0] = ['/guest/checkout']; import sandboxfs.__main__ as m; m.main()"
COMMAND = ["/usr/bin/python3", "-ISB", "-c", START, "run", "--verify", "--"]
SCRIPT = "touch /etc/x && mkdir /etc/y && rmdir /etc/y && echo $(id -u) $(ls -d /etc/[xy])"
for uid in (0, 1000):
    done = subprocess.run([*COMMAND, "/bin/sh", "-c", SCRIPT], user=uid, group=uid,
                          extra_groups=[], capture_output=True, text=True)
    print(uid, done.returncode, done.stdout, done.stderr, flush=True)
subprocess.run(["ls", "/etc/x"])
from sandboxfs.kernel.features import Features
print("attributes:", Features().user_attributes)
"""


@pytest.mark.needs("guest")
def test_run_finds_out_that_the_attached_engine_is_the_one():
    outcome = guest.boot({"code": RUNS, "arguments": ["-c"]})
    assert "0 0 0 /etc/x\n" in outcome.output
    assert "1000 0 0 /etc/x\n" in outcome.output
    assert "/etc/x: No such file" in outcome.output
    # Why nothing there removes a directory of the lower and makes it again.
    assert "attributes: Finding(False, 'setxattr: ENOTSUP: " in outcome.output


def test_a_guest_that_hangs_is_ended():
    with pytest.raises(guest.GuestError, match="didn't power off in time"):
        guest.boot({"code": "import time; time.sleep(600)", "arguments": ["-c"]}, timeout=6)


def test_modules_are_loaded_after_what_they_need():
    files = list(guest.kernel().module_files(["erofs", "overlay", "erofs"]))
    assert files == ["libcrc32c.ko", "erofs.ko", "overlay.ko"]


def test_a_kernel_that_cant_be_fetched_leaves_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel, "CACHE", tmp_path)
    monkeypatch.setitem(kernel.SUITES, "newest", ("no-such-suite",))
    assert kernel.failure("newest") is None
    assert not kernel.try_to_fetch("newest")
    assert "no-such-suite" in kernel.failure("newest")
    assert [path.name for path in tmp_path.iterdir()] == ["guest-kernel-newest.failed"]


def test_the_archive_starts_with_no_file_before_its_directory(tmp_path):
    import subprocess

    from tests.guest.initramfs import Archive

    archive = Archive()
    archive.file("/a/b/c", b"text", 0o640, 7)
    archive.symlink("/a/link", "b/c")
    Path(tmp_path, "archive").write_bytes(archive.finish())
    with open(tmp_path / "archive", "rb") as file:
        listing = subprocess.run(
            ["busybox", "cpio", "-t"], stdin=file, capture_output=True, text=True, check=True
        ).stdout
    assert listing.split() == ["a", "a/b", "a/b/c", "a/link"]
