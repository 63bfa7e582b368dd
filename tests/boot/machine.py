"""A machine that starts from an initramfs made here: qemu without KVM, Debian's cloud kernel.

One initramfs serves the whole tier: busybox with its applets in /bin, the system's python3 with
its standard library, and `sandboxfs` at /bin/sandboxfs (the checkout's package in /sandboxfs,
started as its launcher does).  What a test adds, its /init first of all, is a second
archive behind the first, which the kernel unpacks over it.

    outcome = boot("#!/bin/sh\necho '== hello'; echo world; poweroff -f\n")
    outcome.sections["hello"] == "world\n"

/init is process 1, with a console and nothing mounted.  A line that starts with ``== `` begins a
section of the output.  The machine ends by ``poweroff -f``, or when process 1 ends.
"""

import functools
import re
import subprocess
import tempfile
import time
from pathlib import Path

from tests.guest import guest, initramfs
from tests.guest.kernel import CHECKOUT, Kernel, kernel

# A boot takes 3 to 10 seconds on an idle machine; tests run beside each other.
SECONDS = 120
MODULES = ("overlay", "erofs", "squashfs", "loop", "virtio_pci", "virtio_blk")

LAUNCHER = """#!/usr/bin/python3 -ISB
import sys; sys.path[:0] = ["/sandboxfs"]
from sandboxfs.__main__ import main; sys.exit(main())
"""

# Prints True where pivot_root can leave the root: an initramfs that lies on nullfs (Linux 7.0).
CAN_PIVOT = """#!/usr/bin/python3 -ISB
import os, sys
sys.path[:0] = ["/sandboxfs"]
from sandboxfs.kernel import abi, fscontext, syscalls
syscalls.unshare(abi.CLONE_NEWNS)
new = fscontext.create(b"tmpfs", [], 0)
syscalls.move_mount_path(new, abi.AT_FDCWD, b"/")
os.fchdir(new)
try:
    syscalls.pivot_root(b".", b".")
except OSError as error:
    print(error.errno != 22)
else:
    print(True)
"""


class Outcome:
    """What a boot gave.

    output: the console as str.  sections: dict from a section's name to its text.
    seconds: how long qemu ran.  panicked: process 1 ended, or the kernel gave up otherwise.
    """

    def __init__(self, output, seconds):
        self.output = output
        self.seconds = seconds
        self.panicked = "Kernel panic" in output
        parts = re.split(r"^== (.*)\n", output, flags=re.MULTILINE)
        self.sections = dict(zip(parts[1::2], parts[2::2], strict=True))


def boot(
    init: str, files: dict[str, str | bytes] | None = None, copies: dict[str, str] | None = None,
    disk: str | Path | None = None, timeout: float = SECONDS, memory: int = 512,
    command_line: str = "", booted: Kernel | None = None,
) -> Outcome:
    """Boot with `init` as the text of /init, and wait until the machine ends; an `Outcome`.

    files: more of the initramfs, from path to text or bytes (executable where it begins with
    ``#!``).  copies: more files, from path to path of this machine.  disk: path of an image that
    becomes /dev/vda.  memory: MiB.  booted: the kernel, by default the older one.
    GuestError when `timeout` seconds have passed.
    """
    booted = booted or _older()
    extra = initramfs.Archive()
    for path, content in {"/init": init, **(files or {})}.items():
        data = content.encode() if isinstance(content, str) else content
        extra.file(path, data, 0o755 if data.startswith((b"#!", b"\x7fELF")) else 0o644)
    for path, source in (copies or {}).items():
        extra.copy(source, path)
    with tempfile.TemporaryDirectory(prefix="sandboxfs-guest-") as work:
        archive = Path(work) / "initramfs"
        archive.write_bytes(base(booted) + extra.finish())
        command = [
            guest.QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-m", str(memory), "-smp", "1", "-kernel", str(booted.image),
            "-initrd", str(archive), "-append", f"{guest.COMMAND_LINE} {command_line}",
            "-serial", "stdio",
        ]  # fmt: skip
        if disk is not None:
            command += ["-drive", f"file={disk},if=virtio,format=raw"]
        started = time.monotonic()
        output = guest._watched(command, started + timeout, None)
    return Outcome(output, time.monotonic() - started)


_older = functools.cache(kernel)


@functools.cache
def base(booted: Kernel) -> bytes:
    """Return the part of the initramfs that all boots of a kernel share."""
    archive = initramfs.Archive()
    initramfs.add_system(archive)
    initramfs.add_python(archive)
    applets = subprocess.run(
        [initramfs.BUSYBOX, "--list"], capture_output=True, text=True, check=True
    ).stdout.split()
    for applet in applets:
        if applet not in ("busybox", "sh"):
            archive.symlink(f"/bin/{applet}", "busybox")
    modules = booted.module_files(MODULES)
    for file, content in modules.items():
        archive.file(f"/modules/{file}", content)
    archive.file(
        "/bin/load-modules",
        "".join(["#!/bin/sh\n", *(f"insmod /modules/{file}\n" for file in modules)]).encode(),
        0o755,
    )
    for name in ("sandboxfs", "specs"):
        initramfs.add_tree(archive, CHECKOUT / name, f"/sandboxfs/{name}")
    for name in ("prctl", "_prctl"):
        initramfs.add_package(archive, name, "/sandboxfs")
    # Python wants random numbers before anything could have mounted /dev.
    archive.character_device("/dev/urandom", 1, 9)
    archive.file("/bin/sandboxfs", LAUNCHER.encode(), 0o755)
    archive.file("/bin/can-pivot", CAN_PIVOT.encode(), 0o755)
    return archive.finish()
