"""``switch-root NEWROOT``: what a machine is like after it has left its initramfs."""

import re

import pytest

from tests.boot import machine

pytestmark = [pytest.mark.boot, pytest.mark.needs("guest")]

# A new root on a tmpfs: busybox and places for what the initramfs has mounted.
NEW_ROOT = """#!/bin/sh
mkdir /newroot && mount -t tmpfs newroot /newroot
cd /newroot
mkdir bin sbin dev proc sys run tmp
cp /bin/busybox bin/
for name in sh ls cat mount umount poweroff stat sed find echo head readlink; do
    ln -s busybox bin/$name
done
cp /inner-init sbin/init
cd /
"""

# Descriptor 9 is the old root, handed on through every exec, 7 and 8 are mounts that stay there.
LEAVE = """#!/bin/sh
exec 9</
sandboxfs early-mounts
. /bin/new-root
mkdir -p /data /deep/data /kept/directory /outside
mount -t tmpfs data /data; echo stays >/data/file
mount -t tmpfs data /deep/data; echo stays >/deep/data/file
exec 8</data 7</deep/data
echo mine >/kept/file; echo other >/kept/directory/other; ln -s kept/file /link
ln -s /newroot/bin /into-the-new-root
ln -s /data /into-data
mount -t tmpfs run /run; mkdir /run/inner; mount -t tmpfs inner /run/inner; echo r >/run/inner/file
load-modules
mkdir /lower /overlay; echo lower >/lower/file
mkdir /newroot/overlay; mount -t overlay -o lowerdir=/lower:/kept o /overlay
mkdir -p /outside/a/b/c/d/e/f/g/h/i/j/k/l/m/n/o/p/q/r/s/t/u/v/w/x/y/z
echo "== before"
cat /proc/self/mountinfo
echo "== memory before"
sed -n '/MemFree\\|Shmem:/p' /proc/meminfo
echo "== pivot"
can-pivot
echo "== kernel threads before"
stat -c %d:%i /proc/2/root/
stat -c %d:%i /
echo "== files before"
find / -xdev | wc -l
echo "== kept"
unshare -m sandboxfs switch-root --keep --force /newroot /bin/sh -c \
    'ls -d /newroot /sys/kernel'
echo "== files after"
find / -xdev | wc -l
echo "== switching"
exec sandboxfs switch-root --preserve /link --preserve /kept/directory /newroot /sbin/init \\
    one --keep '' 'two words'
"""

INNER = """#!/bin/sh
echo "== arguments"
for word in "$@"; do echo "[$word]"; done
echo "== process"
echo "$$ $PWD $SANDBOXFS_SWITCHED"
echo "== root"
ls -a /
echo "== new root's programs"
ls /bin
echo "== mounts"
cat /proc/self/mountinfo
echo "== moved file"
cat /run/inner/file
echo "== overlay"
cat /overlay/file; ls /overlay
echo "== left"
cd /proc/self/fd/9
find . -xdev
echo "== preserved"
cat kept/file kept/directory/other; readlink link
echo "== in place"
cat data/file deep/data/file
cd /
echo "== stayed"
cat /proc/self/fd/8/file /proc/self/fd/7/file
exec 8<&- 7<&-
echo "== kernel threads"
stat -c %d:%i /proc/2/root/
stat -c %d:%i /
exec 9<&-
echo "== memory after"
sed -n '/MemFree\\|Shmem:/p' /proc/meminfo
echo "== end"
poweroff -f
"""


@pytest.fixture(scope="module")
def left():
    """Boot, leave the initramfs for a tmpfs, and look around."""
    return machine.boot(LEAVE, {"/bin/new-root": NEW_ROOT, "/inner-init": INNER}).sections


def test_init_gets_its_arguments_as_they_are(left):
    assert left["arguments"] == "[one]\n[--keep]\n[]\n[two words]\n"


def test_init_is_process_1_in_the_new_root_with_the_witness(left):
    assert left["process"] == "1 / 1\n"
    assert sorted(left["root"].split()) == [
        ".", "..", "bin", "dev", "overlay", "proc", "run", "sbin", "sys", "tmp",
    ]


def test_mounts_move_along_with_what_is_mounted_in_them(left):
    lines = left["mounts"].splitlines()
    mounts = {line.split()[4]: line for line in lines}
    assert sorted(mounts) == [
        "/", "/dev", "/dev/pts", "/overlay", "/proc", "/run", "/run/inner", "/sys",
        "/sys/fs/cgroup",
    ]
    assert len(lines) == len(mounts)
    # The same mounts: not one new number.
    before = {line.split()[0] for line in left["before"].splitlines()}
    assert {line.split()[0] for line in lines} <= before
    assert " tmpfs newroot " in mounts["/"]
    assert left["moved file"] == "r\n"


def test_what_has_no_place_stays_with_a_warning_and_its_files(left):
    for path in ("/data", "/deep/data"):
        assert f"sandboxfs: warning: {path} stays behind: the new root has no place for it\n" in (
            left["switching"]
        )
    assert left["stayed"] == "stays\nstays\n"
    # After a pivot the old root is unmounted, with what stayed; whoever uses that keeps it.
    gone = left["pivot"] == "True\n"
    assert left["in place"].count("No such file" if gone else "stays\n") == 2


def test_the_initramfs_is_empty_but_for_what_is_mounted_or_preserved(left):
    assert sorted(left["left"].split()) == sorted([
        ".", "./data", "./deep", "./deep/data", "./kept", "./kept/directory",
        "./kept/directory/other", "./kept/file", "./link", "./lower", "./lower/file",
    ])
    # By a symlink the link and what it leads to are kept.
    assert left["preserved"] == "mine\nother\nkept/file\n"


def test_the_layers_of_an_overlay_are_left_to_it(left):
    assert left["overlay"].split() == ["lower", "directory", "file"]


def test_no_symlink_was_followed_out_of_it(left):
    """Links led into the new root and into a mount that stayed: both are as they were."""
    assert "busybox" in left["new root's programs"].split()
    assert left["stayed"] == "stays\nstays\n"


def test_the_kernels_own_threads_follow(left):
    before, old = left["kernel threads before"].split()
    after, new = left["kernel threads"].split()
    # Where they have a root of their own, they keep it.
    assert after == (new if before == old else before)


def test_with_keep_nothing_is_deleted(left):
    """In a mount namespace of its own, so that the same machine could go on."""
    text = left["kept"]
    assert "ls: /newroot: No such file or directory\n" in text
    assert "/sys/kernel\n" in text
    assert int(left["files before"]) == int(left["files after"]) > 500


def test_its_memory_is_free(left):
    def kilobytes(section, name):
        return int(re.search(rf"{name}: +(\d+) kB", left[section])[1])

    # The initramfs held 35 MB; what remains in shared memory is the new root's busybox.
    assert kilobytes("memory before", "Shmem") > 30_000
    assert kilobytes("memory after", "Shmem") < 6_000
    gained = kilobytes("memory after", "MemFree") - kilobytes("memory before", "MemFree")
    assert gained > 28_000
