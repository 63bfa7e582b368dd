"""The mistake that would destroy a machine: `switch-root` deletes nothing of a real root.

One boot goes from its initramfs to a root on tmpfs, which any check by statfs(2) would take for
another initramfs, and from there by --keep to a root on a disk.  On each of them the program is
asked to leave, by process 1 and by others, with and without --force.

/usr and others of the initramfs are bound into each root, so that Python is there: they are the
initramfs's own files and outlive its deletion.
"""

import json
import subprocess
from pathlib import Path

import pytest

from tests.boot import machine

pytestmark = [pytest.mark.boot, pytest.mark.needs("guest")]

INIT = """#!/bin/sh
sandboxfs early-mounts
load-modules
mkdir /newroot
mount -t tmpfs newroot /newroot
cd /newroot
mkdir usr lib lib64 bin sandboxfs dev proc sys tmp disk run precious
echo precious >precious/file
for name in usr lib lib64 bin sandboxfs; do mount -o bind /$name $name; done
cp /attempts.py /attempts /on-tmpfs /to-disk /on-the-disk /end .
mkdir other && mount -t tmpfs other other && cp -r /bin other/ && mkdir other/sbin &&
    cp /bin/busybox other/sbin/init
exec sandboxfs switch-root /newroot /on-tmpfs
"""

WHERE = """
unset SANDBOXFS_SWITCHED
python3 -ISB -c '
import sys; sys.path[:0] = ["/sandboxfs"]
from sandboxfs.boot import is_initramfs, place
root = place.look().root
print(root.type.decode(), root.source.decode(), is_initramfs())'
"""

ON_TMPFS = f"""#!/bin/sh
echo "== on tmpfs"
{WHERE}
mount -t ext4 /dev/vda /disk
exec python3 -ISB /attempts.py on-tmpfs /to-disk
"""

TO_DISK = """#!/bin/sh
echo "== what it holds"
cat /precious/file
find /usr | wc -l
cd /disk
for name in usr lib lib64 bin sandboxfs; do mount -o bind /$name $name; done
cp /attempts.py /attempts /on-the-disk /end .
echo "== to the disk"
exec sandboxfs switch-root --keep /disk /on-the-disk
"""

ON_THE_DISK = f"""#!/bin/sh
echo "== mounts on the disk"
cat /proc/self/mountinfo
echo "== on the disk"
{WHERE}
mkdir /other; mount -t tmpfs other /other && cp -r /bin /other/ && mkdir /other/sbin &&
    cp /bin/busybox /other/sbin/init
exec python3 -ISB /attempts.py on-the-disk /end
"""

END = """#!/bin/sh
echo "== what the disk holds"
cat /precious/file
find /usr | wc -l
poweroff -f
"""

BOUND = ("usr", "lib", "lib64", "bin", "sandboxfs")
WORDS = {
    "plainly": ["/other"],
    "by force": ["--force", "/other"],
    "with something preserved": ["--force", "--preserve", "/precious", "/other"],
    "onto itself": ["--force", "/usr", "/bin/busybox"],
}


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """Return the path of an ext4 image with a file and mountpoints."""
    directory = tmp_path_factory.mktemp("disk")
    tree = directory / "tree"
    for name in (*BOUND, "dev", "proc", "sys", "tmp", "precious"):
        (tree / name).mkdir(parents=True)
    (tree / "precious" / "file").write_text("more precious\n")
    image = directory / "image"
    subprocess.run(
        ["/usr/sbin/mkfs.ext4", "-q", "-d", tree, image, "16M"], check=True, capture_output=True
    )
    return image


@pytest.fixture(scope="module")
def asked(disk):
    """Boot, and ask on both roots."""
    cases = [[name, words, ""] for name, words in WORDS.items()]
    cases += [[f"{name}, as a child", words, "child"] for name, words in WORDS.items()]
    files = {
        "/attempts": json.dumps(cases), "/on-tmpfs": ON_TMPFS, "/to-disk": TO_DISK,
        "/on-the-disk": ON_THE_DISK, "/end": END,
        "/attempts.py": (Path(__file__).parent / "attempts.py").read_bytes(),
    }
    return machine.boot(INIT, files, disk=disk).sections


def test_the_roots_are_what_they_are_meant_to_be(asked):
    assert asked["on tmpfs"].startswith("tmpfs newroot False\n")
    assert asked["on the disk"].startswith("ext4 /dev/vda False\n")


@pytest.mark.parametrize(("root", "what"), [
    ("on-tmpfs", "tmpfs (newroot), mounted over the bottom of the mount namespace"),
    ("on-the-disk", "ext4 (/dev/vda)"),
])
@pytest.mark.parametrize("how", ["", ", as a child"])
@pytest.mark.parametrize("name", WORDS)
def test_nothing_is_deleted_whatever_is_forced(root, what, how, name, asked):
    text = asked[f"{name}{how}, {root}"]
    if how and name == "plainly":
        assert "not process 1" in text
    else:
        assert f"switch-root /: the root is no initramfs but {what}; nothing was deleted" in text
        assert "--keep switches without deleting" in text
    assert "status 125, unchanged\n" in text


@pytest.mark.parametrize("root", ["on-tmpfs", "on-the-disk"])
def test_every_file_is_still_there(root, asked):
    assert asked[f"every file, {root}"].startswith("unchanged\n")


def test_what_they_hold_is_readable_and_binds_outlived_the_initramfs(asked):
    """/usr is the initramfs's own directory, spared since it is mounted."""
    first, files = asked["what it holds"].splitlines()
    second, files_on_the_disk = asked["what the disk holds"].splitlines()[:2]
    assert (first, second) == ("precious", "more precious")
    assert int(files) > 300
    assert files == files_on_the_disk


def test_keep_is_allowed_there_and_pivots(asked):
    """From the tmpfs root to the disk: its mounts moved, and nothing of it is mounted on."""
    lines = asked["mounts on the disk"].splitlines()
    points = [line.split()[4] for line in lines]
    assert sorted(points) == sorted([
        "/", *(f"/{name}" for name in BOUND), "/dev", "/dev/pts", "/proc", "/sys",
        "/sys/fs/cgroup",
    ])
    assert "newroot" not in asked["mounts on the disk"]
    for name in BOUND:
        assert f"/{name} stays behind: the new root has a mount of its own there" in (
            asked["to the disk"]
        )
