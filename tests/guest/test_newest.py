"""The newest kernel that Debian has: a sample for every run, and the whole tables in the matrix."""

import faulthandler
import os
import subprocess
import sys

import pytest

from tests.boot import machine
from tests.guest import guest
from tests.kernel import behaviours
from tests.support import CHECKOUT
from tests.support.commands import ENVIRONMENT

pytestmark = [pytest.mark.guest, pytest.mark.needs("guest", "kernel-newest")]

CASES = [str(case) for case in behaviours.cases()]
# Of so many behaviours in all their ways one: each way and each subject is met.
SAMPLED = 24

RUNS = r"""
import os, subprocess

print("release", os.uname().release, flush=True)
START = "import sys; sys.path[:0] = ['/guest/checkout']; import sandboxfs.__main__ as m; m.main()"
COMMAND = ["/usr/bin/python3", "-ISB", "-c", START, "run", "--verify", "--"]
SCRIPT = "touch /etc/x && mkdir /etc/y && rmdir /etc/y && echo $(id -u) $(ls -d /etc/[xy])"
for uid in (0, 1000):
    done = subprocess.run([*COMMAND, "/bin/sh", "-c", SCRIPT], user=uid, group=uid,
                          extra_groups=[], capture_output=True, text=True)
    print(uid, done.returncode, done.stdout, done.stderr, flush=True)
subprocess.run(["ls", "/etc/x"])
from sandboxfs.kernel.features import Features
features = Features()
for name in ("detached_trees", "overlay_by_descriptor", "statmount", "proc_pidns", "erofs_file",
             "open_tree_namespace", "pivot_root"):
    finding = getattr(features, name)
    print("feature", name, finding.found, finding.detail, flush=True)
"""

INITRAMFS = """#!/bin/sh
sandboxfs early-mounts
load-modules
echo secret >/host-marker
mkdir -p /bundle/rootfs/bin /bundle/rootfs/proc; cp /bin/busybox /bundle/rootfs/bin/sh
echo "== pivot"
can-pivot
echo "== run"
sandboxfs run --rootfs /bundle/rootfs --strict --verify -- /bin/sh -c 'echo inside; echo /*'
echo "status $?"
mkdir /newroot && mount -t tmpfs newroot /newroot && cd /newroot
mkdir bin dev proc sys; cp /bin/busybox bin/; ln -s busybox bin/sh; cp /inner init; cd /
exec sandboxfs switch-root /newroot /init
"""

INNER = """#!/bin/sh
busybox() { /bin/busybox "$@"; }
echo "== switched"
echo "$$ $SANDBOXFS_SWITCHED"
echo /*
busybox cut -d' ' -f5 /proc/self/mountinfo
echo "== end"
busybox poweroff -f
"""


def wide(kernel: guest.Kernel, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run other tests, which boot the older kernel, on this one."""
    faulthandler.cancel_dump_traceback_later()  # many tests take longer than one may
    named = {"SANDBOXFS_GUEST_KERNEL": str(kernel.image)}
    if kernel.modules:
        named["SANDBOXFS_GUEST_MODULES"] = str(kernel.modules)
    if "CI" in os.environ:
        named["CI"] = os.environ["CI"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments],
        cwd=CHECKOUT, env={**ENVIRONMENT, **named}, capture_output=True, text=True, check=False,
        timeout=800,
    )


def assert_passed(done: "subprocess.CompletedProcess[str]") -> None:
    """Fail with an inner run's own words."""
    print(done.stdout[-2000:])
    if done.returncode:
        pytest.fail(f"{done.stdout[-20000:]}\n{done.stderr[-2000:]}", pytrace=False)


@pytest.fixture(scope="module")
def newest() -> guest.Kernel:
    return guest.kernel("newest")


@pytest.fixture(scope="module")
def runs(newest: guest.Kernel) -> str:
    """Boot, run as root and as somebody, and ask what the kernel can do."""
    outcome = guest.boot({"code": RUNS, "arguments": ["-c"]}, booted=newest)
    assert outcome.status == 0, outcome.output
    return outcome.output


@pytest.fixture(scope="module")
def initramfs(newest: guest.Kernel) -> dict[str, str]:
    """Boot from an initramfs, run in it, and leave it."""
    return machine.boot(INITRAMFS, {"/inner": INNER}, booted=newest).sections


def test_its_modules_are_unpacked(newest: guest.Kernel) -> None:
    files = newest.module_files(["erofs", "overlay"])
    assert {"erofs.ko", "overlay.ko"} <= set(files)
    assert all(content.startswith(b"\x7fELF") for content in files.values())


def test_run_works_for_root_and_for_everybody(runs: str) -> None:
    print(runs.partition("\n")[0])
    assert "\n0 0 0 /etc/x\n" in runs
    assert "\n1000 0 0 /etc/x\n" in runs
    assert "/etc/x: No such file" in runs


@pytest.mark.parametrize("feature", [
    "detached_trees", "overlay_by_descriptor", "statmount", "proc_pidns", "open_tree_namespace",
    "pivot_root",
])
def test_what_this_kernel_can_do_is_found(feature: str, runs: str) -> None:
    assert f"\nfeature {feature} True" in runs


def test_images_in_memory_are_told_to_need_a_loop_device(runs: str) -> None:
    """The guest has no file that isn't on a tmpfs."""
    assert "\nfeature erofs_file False fsconfig FSCONFIG_CMD_CREATE: ENOTBLK" in runs
    assert ": image in /tmp" in runs


def test_in_an_initramfs_run_pivots_as_on_any_root(initramfs: dict[str, str]) -> None:
    assert initramfs["pivot"] == "True\n"
    # Strict: nothing has to be warned of.
    assert initramfs["run"] == "inside\n/bin /dev /proc /sys /tmp\nstatus 0\n"


def test_an_initramfs_is_left_by_pivot_root(initramfs: dict[str, str]) -> None:
    process, root, *mounts = initramfs["switched"].splitlines()
    assert process == "1 1"
    assert root == "/bin /dev /init /proc /sys"
    assert sorted(mounts) == ["/", "/dev", "/dev/pts", "/proc", "/sys", "/sys/fs/cgroup"]
    assert "end" in initramfs


def test_a_sample_of_the_behaviours(newest: guest.Kernel) -> None:
    sample = CASES[::SAMPLED]
    results = guest.run_in_guest(behaviours.__file__, sample, timeout=200, booted=newest)
    assert sorted(results) == sorted(sample)
    assert_held(results)


def assert_held(results: dict[str, str | None]) -> None:
    """Fail with what didn't hold."""
    failed = {
        case: failure for case, failure in results.items()
        if failure and not failure.startswith(behaviours.SKIPPED)
    }
    print(f"{len(results)} behaviours ran in the guest")
    assert not failed, "\n".join(f"{case}: {failure}" for case, failure in failed.items())


@pytest.mark.matrix
@pytest.mark.parametrize("part", range(4))
def test_all_behaviours(part: int, newest: guest.Kernel) -> None:
    results = guest.run_in_guest(behaviours.__file__, CASES[part::4], timeout=600, booted=newest)
    assert sorted(results) == sorted(CASES[part::4])
    assert_held(results)


@pytest.mark.matrix
@pytest.mark.parametrize("files", [
    ("bare", "copy", "image", "leave", "real_roots"),
    ("refusals", "run", "runtimes", "tmpfs", "user_root", "view"),
], ids=["first", "second"])
def test_all_of_the_boot_tests(files: tuple[str, ...], newest: guest.Kernel) -> None:
    assert_passed(wide(newest, *(f"tests/boot/test_{file}.py" for file in files)))


@pytest.mark.matrix
def test_hooks_and_pods(newest: guest.Kernel) -> None:
    assert_passed(wide(newest, "tests/guest/test_guest_hook.py", "tests/guest/test_pods.py"))
