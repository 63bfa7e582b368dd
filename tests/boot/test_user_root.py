"""``switch-root --user-root``: pivot_root works for INIT and all that it starts."""

import json
import os
import subprocess

import pytest

from tests.boot import machine

pytestmark = [pytest.mark.boot, pytest.mark.needs("guest", "runc", "crun")]

INIT = """#!/bin/sh
sandboxfs early-mounts
load-modules
mkdir -p /data /deep/data
mount -t tmpfs data /data; mount -t tmpfs run /run; mkdir /run/inner; mount -t tmpfs i /run/inner
mount -t tmpfs data /deep/data; echo text >/deep/data/file
echo text >/file
mkdir -p /bundle/rootfs/bin /bundle/rootfs/proc /bundle/rootfs/dev
cp /bin/busybox /bundle/rootfs/bin/; ln -s busybox /bundle/rootfs/bin/sh
echo "== before"
cat /proc/self/mountinfo
stat -c %d:%i / /file
stat -f -c %f /
can-pivot | grep True >/pivots || rm /pivots
echo "== pivot before"
cat >/pivot.py <<'END'
import os, sys
sys.path[:0] = ["/sandboxfs"]
from sandboxfs.kernel import abi, fscontext, syscalls
syscalls.unshare(abi.CLONE_NEWNS)
new = fscontext.create(b"tmpfs", [], 0)
syscalls.move_mount_path(new, abi.AT_FDCWD, b"/data")
os.fchdir(new)
try:
    syscalls.pivot_root(b".", b".")
    syscalls.umount2(b".", abi.MNT_DETACH)
    print("pivoted to", os.listdir("/"))
except OSError as error:
    print("failed:", error.strerror)
END
python3 -ISB /pivot.py
echo "== runc before"
runc run --bundle /bundle one; echo "status $?"
echo "== switching"
mv /inner /data/inner
exec sandboxfs switch-root --user-root /data/inner one two
"""

INNER = """#!/bin/sh
echo "== process"
echo "$$ $* $SANDBOXFS_SWITCHED $PWD"
echo "== after"
cat /proc/self/mountinfo
stat -c %d:%i / /file
stat -f -c %f /
cat /deep/data/file
echo "== pivot after"
python3 -ISB /pivot.py
echo "== runc"
runc run --bundle /bundle two; echo "status $?"
echo "== crun"
crun --cgroup-manager=disabled run --bundle /bundle three; echo "status $?"
echo "== sandboxfs"
sandboxfs run --bundle /bundle --strict --verify -- sh -c 'echo inside'; echo "status $?"
echo "== again"
sandboxfs switch-root --user-root /bin/echo witness
echo "== again without the witness"
unset SANDBOXFS_SWITCHED
sandboxfs switch-root --user-root --force /bin/echo init
mkdir /newroot; mount -t tmpfs newroot /newroot; mkdir /newroot/bin; cp /bin/busybox /newroot/bin
if ! [ -e /pivots ]; then
    echo "== deleting"
    sandboxfs switch-root --force /newroot /bin/busybox; echo "status $?"
fi
echo "== leaving"
cat >/newroot/init <<'END'
#!/bin/busybox sh
echo "== left"
busybox mount -t proc proc /proc
busybox cat /proc/self/mountinfo
busybox poweroff -f
END
busybox chmod +x /newroot/init; mkdir /newroot/proc
exec sandboxfs switch-root --keep /newroot /init
"""

CONFIG = {
    "ociVersion": "1.0.2",
    "process": {
        "args": ["/bin/busybox", "echo", "from the container"], "cwd": "/",
        "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0},
    },
    "root": {"path": "rootfs", "readonly": True},
    "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
    "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]},
}


def program(name):
    """Return the files of a program of this machine, with the libraries it is linked with."""
    listing = subprocess.run(["ldd", name], capture_output=True, text=True, check=False).stdout
    libraries = {word: word for word in listing.split() if word.startswith("/")}
    return {f"/bin/{os.path.basename(name)}": name, **libraries}


@pytest.fixture(scope="module")
def user_root():
    """Boot into a user root, and use it."""
    paths = {**program("/usr/sbin/runc"), **program("/usr/bin/crun")}
    files = {"/inner": INNER, "/bundle/config.json": json.dumps(CONFIG)}
    return machine.boot(INIT, files, copies=paths).sections


def mounts(text):
    """Return {mountpoint: line} of a mount table, and the lines after it."""
    lines = text.splitlines()
    table = [line for line in lines if " - " in line]
    return {line.split()[4]: line for line in table}, lines[len(table):]


def pivots(user_root):
    """Return whether pivot_root leaves the initramfs itself there: then there is nothing to do."""
    return user_root["pivot before"] == "pivoted to []\n"


def test_pivot_root_fails_before_unless_the_kernel_can_do_it(user_root):
    if pivots(user_root):
        assert user_root["runc before"] == "from the container\nstatus 0\n"
        assert "pivot_root works without --user-root" in user_root["switching"]
        return
    assert user_root["pivot before"] == "failed: Invalid argument\n"
    assert "pivot_root" in user_root["runc before"]
    assert user_root["runc before"].endswith("status 1\n")


def test_init_gets_its_arguments(user_root):
    """From a mount of its own, which has to move before it can be found."""
    assert user_root["process"] == "1 one two 1 /\n"


def test_nothing_is_copied_and_every_mount_comes_along(user_root):
    before, (*files_before, space_before) = mounts(user_root["before"])
    after, (*files_after, space_after, text) = mounts(user_root["after"])
    assert files_after == files_before  # the same device, the same inodes
    assert text == "text"
    assert abs(int(space_before) - int(space_after)) < 16  # free blocks
    assert set(after) == set(before) == {
        "/", "/dev", "/dev/pts", "/sys", "/sys/fs/cgroup", "/proc", "/data", "/deep/data",
        "/run", "/run/inner",
    }
    for point in set(after) - {"/"}:
        assert after[point].split()[0] == before[point].split()[0]
    # The initramfs again, with a parent now.
    number, parent, *_, type, _source, _options = after["/"].split()
    assert type == "rootfs"
    if pivots(user_root):
        assert after["/"] == before["/"]
    else:
        assert parent == before["/"].split()[0] != number


def test_pivot_root_works_afterwards(user_root):
    assert user_root["pivot after"] == "pivoted to []\n"


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_the_distributions_runtimes_work_unchanged(runtime, user_root):
    assert user_root[runtime] == "from the container\nstatus 0\n"


def test_run_pivots_there_and_has_nothing_to_refuse(user_root):
    assert user_root["sandboxfs"] == "inside\nstatus 0\n"


def test_a_second_time_there_is_nothing_to_do(user_root):
    assert user_root["again"].endswith("now /bin/echo\nwitness\n")
    assert "pivot_root works without --user-root" in user_root["again without the witness"]
    assert user_root["again without the witness"].endswith("init\n")


def test_its_content_is_not_deleted_any_more(user_root):
    """It is no longer the bottom: what is below couldn't be told from a machine's root."""
    if pivots(user_root):  # it is the initramfs itself still, which would go
        assert "deleting" not in user_root
        return
    assert "the root is no initramfs but rootfs" in user_root["deleting"]
    assert "status 125" in user_root["deleting"]


def test_it_can_be_left_like_any_root(user_root):
    left, _rest = mounts(user_root["left"])
    assert set(left) == {"/", "/proc"}
    assert " tmpfs newroot " in left["/"]
