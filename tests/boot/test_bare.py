"""A bare initramfs: what Python needs before /dev is there, and `early-mounts`."""

import pytest

from tests.boot import machine

pytestmark = [pytest.mark.boot, pytest.mark.needs("guest")]

# Then Python itself is process 1: nothing is mounted, /dev holds a console and a random source.
INIT = """#!/bin/sh
echo "== without a random source"
rm /dev/urandom
python3 -ISB -c 'print("isolated")' 2>&1 | head -1
PYTHONHASHSEED=0 python3 -ISB -c 'print("isolated, with a seed")' 2>&1 | head -1
PYTHONHASHSEED=0 python3 -SB -c 'print("with a seed")' 2>&1 | head -1
mknod /dev/urandom c 1 9
python3 -ISB -c 'print("with a node")' 2>&1 | head -1
exec python3 -ISB /by-python
"""

BY_PYTHON = """
import os, sys
sys.path[:0] = ["/sandboxfs"]
from sandboxfs.__main__ import main
from sandboxfs.boot import is_initramfs, make_early_mounts

def section(name):
    print("==", name, flush=True)

def mount(*words):
    print("status", main(["early-mounts", *words]), flush=True)

def table(start):
    with open("/proc/self/mountinfo") as file:
        for line in file:
            point = line.split(" ", 4)[4]
            if point.startswith(start):
                print(point, end="", flush=True)

def shell(script):
    sys.stdout.flush()
    os.system(script)

sys.stderr = sys.stdout
section("by Python")
print(os.getpid(), sorted(os.listdir("/dev")), os.listdir("/proc"), is_initramfs())
print(make_early_mounts("none"), os.listdir("/sys/fs/cgroup"))
table("/")
section("again")
mount("--cgroup", "none")
section("version 1")
mount("--cgroup", "v1")
table("/sys/fs/cgroup")
shell("cat /sys/fs/cgroup/memory/memory.use_hierarchy")
shell("grep -v '^#' /proc/cgroups | grep '1$' | cut -f1")
section("version 1 again")
mount("--cgroup", "v1")
section("one fails")
shell("umount /sys/fs/cgroup/* /sys/fs/cgroup /dev/pts /proc; mv /proc /elsewhere; echo x >/proc")
mount()
shell("rm /proc; mv /elsewhere /proc")
mount()
table("/")
section("version 2 again")
mount()
section("busy")
shell("umount /sys/fs/cgroup; mkdir /two; mount -t cgroup2 two /two; mkdir /two/group;"
      "echo +pids >/two/cgroup.subtree_control")
mount("--cgroup", "v1")
table("/sys/fs/cgroup/")
section("busy, as JSON")
mount("--cgroup", "v1", "--log-format", "json")
section("unknown")
mount("--cgroup", "v3")
section("end")
shell("poweroff -f")
"""


@pytest.fixture(scope="module")
def bare():
    """Boot with Python as process 1."""
    outcome = machine.boot(INIT, {"/by-python": BY_PYTHON}, command_line="random.trust_cpu=0")
    return outcome.sections


def test_python_starts_with_a_random_source_or_without_randomness(bare):
    """What docs/boot.md says: -I doesn't read PYTHONHASHSEED, so the launcher needs the node."""
    fatal = (
        "Fatal Python error: _Py_HashRandomization_Init: failed to get random numbers to"
        " initialize Python"
    )
    assert bare["without a random source"].splitlines() == [
        fatal, fatal, "with a seed", "with a node",
    ]


def test_python_is_process_1_with_nothing_mounted(bare):
    first, second, *_ = bare["by Python"].splitlines()
    assert first == "1 ['console', 'urandom'] [] True"
    assert second == "[] []"


def test_the_basic_mounts_have_their_flags(bare):
    assert [line.rpartition(" - ")[0] for line in bare["by Python"].splitlines()[2:]] == [
        "/ rw",
        "/sys rw,nosuid,nodev,noexec,relatime",
        "/proc rw,nosuid,nodev,noexec,relatime",
        "/dev rw,nosuid,noexec,relatime",
        "/dev/pts rw,nosuid,noexec,relatime",
    ]


@pytest.mark.parametrize("section", ["again", "version 1 again", "version 2 again"])
def test_what_is_there_is_left_alone(section, bare):
    assert bare[section] == "status 0\n"


def test_one_hierarchy_for_each_enabled_controller(bare):
    first, *lines = bare["version 1"].splitlines()
    assert first == "status 0"
    mounts = [line for line in lines if " - " in line]
    hierarchy, *enabled = lines[len(mounts):]
    # Some kernels have no memory controller of version 1 any more.
    assert hierarchy == "1" if "memory" in enabled else "No such file" in hierarchy
    assert len(enabled) > 3
    tmpfs, *others = mounts
    assert tmpfs.startswith("/sys/fs/cgroup rw,nosuid,nodev,noexec,relatime - tmpfs ")
    assert [line.split()[0] for line in others] == [f"/sys/fs/cgroup/{name}" for name in enabled]
    for line in others:
        assert " rw,nosuid,nodev,noexec,relatime - cgroup " in line


def test_one_failure_is_named_and_the_others_are_mounted(bare):
    text = bare["one fails"]
    assert text.startswith(
        "sandboxfs: early-mounts: open /proc: ENOTDIR: Not a directory\nstatus 1\nstatus 0\n"
    )
    assert "\n/proc rw,nosuid,nodev,noexec,relatime - proc " in text
    assert "\n/dev/pts rw," in text
    assert "\n/sys/fs/cgroup rw,nosuid,nodev,noexec,relatime - cgroup2 " in text


def test_controllers_that_version_2_uses_are_named(bare):
    text = bare["busy"]
    call = "fsconfig FSCONFIG_CMD_CREATE /sys/fs/cgroup/pids: EBUSY"
    assert f"sandboxfs: early-mounts: {call}: Device or resource busy\n" in text
    assert "hint: its controllers are in use by the other version of cgroups\nstatus 1\n" in text
    assert "/sys/fs/cgroup/devices rw" in text
    assert "/sys/fs/cgroup/pids rw" not in text
    assert '"errno": "EBUSY"' in bare["busy, as JSON"]
    assert "status 2" in bare["unknown"]
