"""``switch-root --image``: a machine whose root is an EROFS or squashfs image."""

import re

import pytest

from tests.boot import machine
from tests.boot.images import make_image

pytestmark = [
    pytest.mark.boot, pytest.mark.needs("guest"), pytest.mark.needs("mkfs.erofs", "mksquashfs"),
]

# Some 10 where nothing else runs.
SECONDS = 120

LOOK = """#!/bin/sh
mount -t proc proc /proc 2>/dev/null
echo "== arguments"
for word in "$0" "$@"; do echo "[$word]"; done
echo "== process"
echo "$$ $PWD $SANDBOXFS_SWITCHED"
echo "== mounts"
cat /proc/self/mountinfo
echo "== modes"
stat -c '%n %a' /tmp /run /ephemeral /data 2>/dev/null
echo "== written"
(echo new >/new) 2>&1 && cat /new
echo "== old root"
(cd /proc/self/fd/9 && find . -xdev)
echo "== executed"
cp /bin/busybox /tmp/program; /tmp/program true 2>&1
cp /bin/busybox /run/program; /run/program true 2>&1
echo "== run"
cat /run/from-before
for name in hosts machine-id resolv.conf app.conf other; do
    echo "== $name before"
    cat /etc/$name
    stat -c '%a %u:%g %Y' /etc/$name
    echo "== $name after"
    (echo written >/etc/$name) 2>&1
    cat /etc/$name
done
echo "== ephemeral"
cd /ephemeral 2>/dev/null || cd /data && find . -type f | sort
echo "== end"
poweroff -f
"""

FIRST = """#!/bin/sh
exec 2>&1
sandboxfs early-mounts
. /bin/load-modules
mount -t tmpfs -o nosuid,size=9m run /run; echo kept >/run/from-before
echo "not an image, but long enough to look for a magic number in it" >/text
head -c 4096 /system.erofs >/cut.erofs
state() {
    cat /proc/self/mountinfo; ls -la --full-time / /run; cat /sys/block/loop*/loop/backing_file
}
before=$(state 2>&1)
refused() {
    echo "== refused: $1"
    shift
    sandboxfs switch-root --force "$@"
    echo "status $?"
}
refused "no image" --image /text
refused "half an image" --image /cut.erofs
refused "no init" --image /system.erofs /sbin/nothing
refused "no program" --image /system.erofs /etc/hosts
refused "no file" --image /system.erofs --ephemeral-file /etc/nothing
refused "no way" --image /system.erofs --ephemeral-file /etc/lost
refused "other mode" --user-root --overlay tmpfs
echo "== refused: not process 1"
(sandboxfs switch-root --image /system.erofs; echo "status $?")
echo "== unchanged"
after=$(state 2>&1)
[ "$before" = "$after" ] && echo same || echo "$before" "$after"
echo "== switching"
exec 9</
exec sandboxfs switch-root --image /system.erofs --ephemeral-file /etc/app.conf \\
    /sbin/init --overlay x
"""

FILES = {"etc/hosts": "of the image\n", "etc/app.conf": "application\n", "etc/other": "other\n"}
LINKS = {
    "etc/machine-id": "../ephemeral/machine-id",
    "etc/resolv.conf": "/ephemeral/net/deep/resolv.conf",
    "etc/lost": "/usr/nowhere/x",
}


def booted(first, files, **how):
    outcome = machine.boot(first, files, timeout=SECONDS, **how)
    assert "end" in outcome.sections, outcome.output[-6000:]
    return outcome.sections


def table(sections):
    """Return {mountpoint: (options, type, source)} of the topmost mounts."""
    found = {}
    for line in sections["mounts"].splitlines():
        words = line.split()
        type, source, _options = words[words.index("-") + 1:]
        found[words[4]] = (set(words[5].split(",")) - {"relatime"}, type, source)
    return found


@pytest.fixture(scope="module")
def immutable(tmp_path_factory):
    """An EROFS image in the initramfs, nothing over it, /run mounted before."""
    work = tmp_path_factory.mktemp("image")
    image = make_image(work, "erofs", LOOK, files=FILES, links=LINKS)
    return booted(FIRST, {"/system.erofs": image.read_bytes()})


REFUSALS = {
    "no image": "--image: open /text: no EROFS or squashfs image",
    "half an image": r".*(EUCLEAN|EINVAL|EIO): [^\n]*",
    "no init": "INIT: find /sbin/nothing: ENOENT: No such file or directory",
    "no program": "INIT: find /etc/hosts: EACCES: not executable\n  hint: .*",
    "no file": "--ephemeral-file: find /etc/nothing: not in the image",
    "no way": "--ephemeral-file: redirect /etc/lost: /usr/nowhere/x: Read-only file system",
    "other mode": "--overlay: switch-root: has no meaning with --user-root",
    "not process 1": r"switch-root: not process 1, but \d+: INIT would be no init\n  hint: .*",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_says_why(case, immutable):
    status = 2 if case == "other mode" else 125
    said = re.sub(r"^\[ .*\n", "", immutable[f"refused: {case}"], flags=re.MULTILINE)
    assert re.fullmatch(f"sandboxfs: {REFUSALS[case]}\nstatus {status}\n", said)


def test_a_refusal_changes_nothing(immutable):
    """No mount, no file, no loop device."""
    assert immutable["unchanged"] == "same\n"


def test_the_image_is_the_root_and_nothing_writes_to_it(immutable):
    options, type, source = table(immutable)["/"]
    assert (options, type) == ({"ro"}, "erofs")
    # This kernel mounts no files.
    assert source.startswith("/dev/loop")
    assert "Read-only file system" in immutable["written"]
    assert immutable["process"] == "1 / 1\n"
    assert immutable["arguments"] == "[/sbin/init]\n[--overlay]\n[x]\n"
    assert immutable["switching"] == ""


def test_memory_has_its_flags(immutable):
    mounts = table(immutable)
    assert mounts["/tmp"] == ({"rw", "nodev", "noexec"}, "tmpfs", "tmpfs")
    assert mounts["/ephemeral"] == ({"rw", "nodev"}, "tmpfs", "tmpfs")
    assert "/tmp 1777\n" in immutable["modes"]
    assert "/ephemeral 755\n" in immutable["modes"]
    assert "/tmp/program: Permission denied" in immutable["executed"]


def test_a_run_that_is_a_mount_is_moved_with_what_is_in_it(immutable):
    assert table(immutable)["/run"] == ({"rw", "nosuid"}, "tmpfs", "run")
    assert immutable["run"] == "kept\n"
    assert immutable["mounts"].count(" /run ") == 1


def test_the_initramfs_is_gone(immutable):
    assert immutable["old root"].split() == ["."]


def test_a_plain_file_is_bound_to_a_copy(immutable):
    for name, text in (("hosts", "of the image\n"), ("app.conf", "application\n")):
        options, type, _source = table(immutable)[f"/etc/{name}"]
        assert (options, type) == ({"rw", "nodev"}, "tmpfs")
        content, about = immutable[f"{name} before"].splitlines()
        assert content + "\n" == text
        assert about.startswith("640 7:8 1000000000")
        assert immutable[f"{name} after"] == "written\n"
    assert "Read-only file system" in immutable["other after"]


def test_a_symlink_of_the_image_is_followed_to_memory(immutable):
    for name in ("machine-id", "resolv.conf"):
        assert "No such file" in immutable[f"{name} before"]
        assert immutable[f"{name} after"] == "written\n"
        assert f"/etc/{name}" not in table(immutable)


def test_all_of_it_lies_in_the_ephemeral_directory(immutable):
    assert immutable["ephemeral"].split() == [
        "./etc/app.conf", "./etc/hosts", "./machine-id", "./net/deep/resolv.conf",
    ]


# A ramfs as initramfs, a tmpfs over the image, which lacks directories; INIT by default.
OVERLAY = """#!/bin/sh
exec 2>&1
sandboxfs early-mounts
. /bin/load-modules
echo "== switching"
exec 9</
exec sandboxfs switch-root --image /system.squashfs --overlay tmpfs --ephemeral /data
"""


@pytest.fixture(scope="module")
def overlaid(tmp_path_factory):
    work = tmp_path_factory.mktemp("image")
    image = make_image(
        work, "squashfs", LOOK, ("dev", "proc", "sys"), FILES,
        {"etc/machine-id": "/data/machine-id"},
    )
    files = {"/system.squashfs": image.read_bytes()}
    return booted(OVERLAY, files, command_line="rootfstype=ramfs")


def test_over_a_squashfs_a_tmpfs_takes_what_is_written(overlaid):
    options, type, source = table(overlaid)["/"]
    assert (options, type, source) == ({"rw"}, "overlay", "overlay")
    assert overlaid["written"] == "new\n"
    assert overlaid["other after"] == "written\n"
    assert overlaid["arguments"] == "[/sbin/init]\n"
    assert overlaid["switching"] == ""
    # What it was made of is nowhere to be seen.
    assert sorted(table(overlaid)) == [
        "/", "/data", "/dev", "/dev/pts", "/etc/hosts", "/proc", "/run", "/sys",
        "/sys/fs/cgroup", "/tmp",
    ]


def test_what_the_image_lacks_is_made_in_it(overlaid):
    mounts = table(overlaid)
    assert mounts["/run"] == ({"rw", "nodev", "noexec"}, "tmpfs", "tmpfs")
    assert mounts["/tmp"] == ({"rw", "nodev", "noexec"}, "tmpfs", "tmpfs")
    assert mounts["/data"] == ({"rw", "nodev"}, "tmpfs", "tmpfs")
    assert "/run/program: Permission denied" in overlaid["executed"]
    assert overlaid["ephemeral"].split() == ["./etc/hosts", "./machine-id"]
    assert overlaid["old root"].split() == ["."]


# On a disk, before anything but /dev is mounted.
DISK = """#!/bin/sh
exec 2>&1
mount -t devtmpfs devtmpfs /dev
. /bin/load-modules
while [ ! -b /dev/vda ]; do sleep 0.1; done
echo "== switching"
exec 9</
exec sandboxfs switch-root --image /dev/vda
"""


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    work = tmp_path_factory.mktemp("image")
    image = make_image(work, "erofs", LOOK, ("dev", "proc", "run"), FILES)
    return booted(DISK, {}, disk=image)


def test_a_block_device_can_be_the_image(on_disk):
    assert table(on_disk)["/"] == ({"ro"}, "erofs", "/dev/vda")
    assert on_disk["old root"].split() == ["."]


def test_an_immutable_image_without_a_place_is_told_of(on_disk):
    assert on_disk["switching"] == (
        "sandboxfs: warning: no tmpfs on /tmp: the image has no such directory "
        "(Read-only file system)\n"
    )
    assert sorted(table(on_disk)) == ["/", "/dev", "/proc", "/run"]
    # No ephemeral directory: its files are the image's.
    assert on_disk["hosts after"].endswith("of the image\n")
