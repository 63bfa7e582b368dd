"""A bare initramfs: what Python needs before /dev is there, and `early-mounts`."""

import pytest

from tests.boot import machine

pytestmark = [pytest.mark.boot, pytest.mark.needs("guest")]

# Python itself is process 1: nothing is mounted, and /dev holds a console and a random source.
PYTHON_IS_INIT = """#!/usr/bin/python3 -ISB
import os, sys
sys.path[:0] = ["/sandboxfs"]
from sandboxfs.boot import is_initramfs, make_early_mounts
from sandboxfs.cli import switch_root
print("== by Python", flush=True)
print(os.getpid(), sorted(os.listdir("/dev")), os.listdir("/proc"), is_initramfs(), flush=True)
print(make_early_mounts("none"), flush=True)
print(os.listdir("/sys/fs/cgroup"), flush=True)
from sandboxfs.boot import switch_root
print("== no witness", flush=True)
os.execv("/second", ["/second"])
"""

SECOND = """#!/bin/sh
exec 2>&1
echo "== tables"
cut -d' ' -f4- /proc/self/mountinfo
echo "== again"
sandboxfs early-mounts --cgroup none; echo "status $?"
echo "== version 1"
sandboxfs early-mounts --cgroup v1; echo "status $?"
cut -d' ' -f5- /proc/self/mountinfo | grep cgroup
cat /sys/fs/cgroup/memory/memory.use_hierarchy
grep -v '^#' /proc/cgroups | grep '1$' | cut -f1
echo "== version 1 again"
sandboxfs early-mounts --cgroup v1; echo "status $?"
echo "== one fails"
for name in $(ls /sys/fs/cgroup); do umount /sys/fs/cgroup/$name; done
umount /sys/fs/cgroup; umount /dev/pts; umount /proc
mv /proc /elsewhere; echo text >/proc
sandboxfs early-mounts; echo "status $?"
rm /proc; mv /elsewhere /proc
sandboxfs early-mounts; echo "status $?"
cut -d' ' -f5- /proc/self/mountinfo
echo "== busy"
umount /sys/fs/cgroup
mkdir /two; mount -t cgroup2 two /two; mkdir /two/group; echo +pids >/two/cgroup.subtree_control
sandboxfs early-mounts --cgroup v1; echo "status $?"
ls /sys/fs/cgroup
echo "== as JSON"
umount /sys/fs/cgroup/*; umount /sys/fs/cgroup
sandboxfs early-mounts --cgroup v1 --log-format json; echo "status $?"
echo "== without a random source"
umount /dev/pts; umount -l /dev; rm -f /dev/urandom
for options in -ISB -SB; do
    python3 $options -c 'print("started")' 2>&1 | head -1
done
PYTHONHASHSEED=0 python3 -ISB -c 'print("isolated")' 2>&1 | head -1
PYTHONHASHSEED=0 python3 -SB -c 'print("with a seed")' 2>&1 | head -1
mknod /dev/urandom c 1 9
python3 -ISB -c 'print("with a node")' 2>&1 | head -1
echo "== end"
poweroff -f
"""


@pytest.fixture(scope="module")
def bare():
    """Boot with Python as process 1."""
    return machine.boot(PYTHON_IS_INIT, {"/second": SECOND}, command_line="random.trust_cpu=0")


def test_python_is_process_1_with_nothing_mounted(bare):
    first, second, third = bare.sections["by Python"].splitlines()
    assert first == "1 ['console', 'urandom'] [] True"
    assert second == "[]"
    assert third == "[]"


def test_the_basic_mounts_have_their_flags(bare):
    assert [line.split(" - ")[0] + " " + line.split(" - ")[1].split()[0]
            for line in bare.sections["tables"].splitlines()] == [
        "/ / rw rootfs",
        "/ /sys rw,nosuid,nodev,noexec,relatime sysfs",
        "/ /proc rw,nosuid,nodev,noexec,relatime proc",
        "/ /dev rw,nosuid,noexec,relatime devtmpfs",
        "/ /dev/pts rw,nosuid,noexec,relatime devpts",
    ]


@pytest.mark.parametrize("section", ["again", "version 1 again"])
def test_what_is_there_is_left_alone(section, bare):
    assert bare.sections[section] == "status 0\n"


def test_one_hierarchy_for_each_enabled_controller(bare):
    first, *lines = bare.sections["version 1"].splitlines()
    assert first == "status 0"
    mounts = [line for line in lines if " - " in line]
    hierarchy, *enabled = lines[len(mounts):]
    assert hierarchy == "1"
    assert len(enabled) > 3
    tmpfs, *others = mounts
    assert tmpfs.startswith("/sys/fs/cgroup rw,nosuid,nodev,noexec,relatime - tmpfs ")
    assert [line.split()[0] for line in others] == [f"/sys/fs/cgroup/{name}" for name in enabled]
    for line in others:
        assert " rw,nosuid,nodev,noexec,relatime - cgroup " in line


def test_one_failure_is_named_and_the_others_are_mounted(bare):
    text = bare.sections["one fails"]
    assert text.startswith(
        "sandboxfs: early-mounts: open /proc: ENOTDIR: Not a directory\nstatus 1\nstatus 0\n"
    )
    for point in ("/proc", "/dev/pts", "/sys/fs/cgroup"):
        assert f"\n{point} rw," in text


def test_controllers_that_version_2_uses_are_named(bare):
    text = bare.sections["busy"]
    assert "sandboxfs: early-mounts: fsconfig FSCONFIG_CMD_CREATE /sys/fs/cgroup/pids: EBUSY" in text
    assert "hint: its controllers are in use by the other version of cgroups" in text
    assert "status 1\n" in text
    assert "memory" in text.splitlines()[-1] or "memory" in text
    assert '"errno": "EBUSY"' in bare.sections["as JSON"]


def test_what_python_needs_to_start(bare):
    """What docs/boot.md says of a random source."""
    lines = bare.sections["without a random source"].splitlines()
    assert lines[-2:] == ["with a seed", "with a node"]
