"""System images: busybox, a script as /sbin/init, and what is given."""

import os
import shutil
import subprocess
from pathlib import Path

from tests.guest.initramfs import BUSYBOX

APPLETS = (
    "sh", "ls", "cat", "mount", "umount", "poweroff", "stat", "sed", "find", "echo", "head",
    "readlink", "cp", "rm", "touch", "mkdir", "env", "grep", "chmod",
)
DIRECTORIES = ("bin", "sbin", "dev", "proc", "sys", "run", "tmp", "etc", "ephemeral")


def make_image(work, type, init, directories=DIRECTORIES, files=None, links=None):
    """Make an image of a type (``"erofs"``, ``"squashfs"``) below `work`; returns its path.

    init: text of /sbin/init.  files: path → text.  links: path → target.
    """
    tree = Path(work, f"{type}-tree")
    tree.mkdir()
    for name in {"bin", "sbin", "etc", *directories}:
        (tree / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(BUSYBOX, tree / "bin" / "busybox")
    for name in APPLETS:
        os.symlink("busybox", tree / "bin" / name)
    for name, text in {"sbin/init": init, **(files or {})}.items():
        (tree / name).write_text(text, "utf-8")
        os.utime(tree / name, (10**9, 10**9))
        os.chown(tree / name, 7, 8)
        (tree / name).chmod(0o640)
    (tree / "sbin" / "init").chmod(0o755)
    for name, target in (links or {}).items():
        os.symlink(target, tree / name)
    tree.chmod(0o755)
    image = Path(work, f"system.{type}")
    order = [image, tree] if type == "erofs" else [tree, image]
    program = "mkfs.erofs" if type == "erofs" else "mksquashfs"
    subprocess.run([program, *order], capture_output=True, check=True)
    return image
