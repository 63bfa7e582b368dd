"""An older kernel to test on: Debian's cloud kernel, booted by qemu without KVM.

The guest is an initramfs made here: busybox, the system's python3 with its standard library,
python-prctl, this checkout's `sandboxfs`, `specs` and `tests`, and modules for overlay, EROFS,
squashfs and loop.  Its root is the "user root": the initramfs bound on itself and entered, so
that pivot_root works.

    python3 -m tests.guest.guest SCRIPT [ARGUMENT…]    run a Python script, exit as it does
    python3 -m tests.guest.guest -c CODE               the same with a piece of Python
    python3 -m tests.guest.guest --behaviours [NAME…]  the table of tests/kernel/behaviours.py
    python3 -m tests.guest.guest --shell               a busybox shell (end it with `poweroff -f`)

In the guest `sandboxfs` and `tests` are importable, busybox's applets and python3 are in the
PATH, /tmp, /run and /dev/shm are tmpfs, cgroup2 is mounted, and uid 1000 (`user`) exists with
subordinate ids.  ``--add PATH`` takes a file or directory of this machine along, at its own
path; ``--timeout SECONDS`` (60); ``--verbose`` shows the kernel's messages.
``SANDBOXFS_GUEST_KERNEL=IMAGE SANDBOXFS_GUEST_MODULES=DIR`` boot another kernel.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.guest import initramfs
from tests.guest.kernel import CHECKOUT, GuestError, Kernel, kernel, missing

__all__ = ["GuestError", "Kernel", "Outcome", "boot", "kernel", "missing", "run_in_guest"]

QEMU = "qemu-system-x86_64"
MEMORY_MIB = 768
BOOT_SECONDS = 60

# Without KVM every instruction counts: no mitigations, no relocation, no watchdogs.
COMMAND_LINE = "console=ttyS0 panic=-1 mitigations=off nokaslr nowatchdog audit=0 quiet"

# The shell that the kernel starts.  pivot_root fails with EINVAL on an initramfs's own mount:
# the second mount of it, entered by chroot, has a parent, and there it works.
INIT = """#!/bin/busybox sh
export PATH=/bin:/usr/bin HOME=/root
/bin/busybox --install -s /bin
mount --bind / /userroot
cd /userroot
mount -t devtmpfs devtmpfs dev && mkdir -p dev/pts dev/shm dev/mqueue
mount -t proc -o nosuid,nodev,noexec proc proc
mount -t sysfs -o nosuid,nodev,noexec sysfs sys
mount -t devpts -o nosuid,noexec,mode=620,ptmxmode=666 devpts dev/pts
mount -t tmpfs -o nosuid,nodev shm dev/shm
mount -t mqueue mqueue dev/mqueue
mount -t tmpfs -o nosuid,nodev,mode=755 run run
mount -t tmpfs -o nosuid,nodev tmp tmp
mount -t cgroup2 cgroup2 sys/fs/cgroup
while read -r module; do insmod "guest/modules/$module"; done < guest/modules/order
chown 1000:1000 home/user
ip link set lo up
mount --move . /
exec chroot . /bin/sh /guest/start
"""

START_SCRIPT = """cd /tmp
stty -F /dev/ttyS1 raw -echo
/usr/bin/python3 -I -B /guest/checkout/tests/guest/inside.py </dev/null
poweroff -f
"""

START_SHELL = """cd /tmp
setsid cttyhack sh -l
poweroff -f
"""


class Outcome:
    """What a boot gave.

    status: the exit status of what ran inside, or None when the guest ended without one.
    output: the console as str.  frames: the objects that were reported, in order.
    seconds: how long qemu ran.
    """

    __slots__ = ("frames", "output", "seconds", "status")

    def __init__(self, status, output, frames, seconds):
        self.status = status
        self.output = output
        self.frames = frames
        self.seconds = seconds


def run_in_guest(
    module_path: str, cases: Iterable[str] | None = None, timeout: float = BOOT_SECONDS,
    booted: Kernel | None = None,
) -> dict[str, str | None]:
    """Boot once and run the behaviours of a module there.

    module_path: a file of this checkout that offers `cases`, `engines_here` and `run_case`
    (see tests/kernel/behaviours.py).  cases: identifiers (``"name[engine]"``), or None for all
    that the guest's kernel can run.
    Returns a dict from identifier to None (passed) or a str (what failed, or why it was
    skipped), in running order.
    Raises GuestError if the guest ended before the last case, with what the console showed.
    """
    module = Path(module_path).resolve().relative_to(CHECKOUT)
    outcome = boot({"behaviours": str(module), "cases": cases}, timeout, booted=booted)
    results = {
        frame["case"]: frame["failure"] for frame in outcome.frames if "case" in frame
    }
    if outcome.status is None:
        raise GuestError(
            f"the guest ended after {len(results)} cases, {outcome.seconds:.1f} s:\n"
            f"{outcome.output[-4000:]}"
        )
    return results


def boot(
    request: dict[str, object], timeout: float = BOOT_SECONDS, added: Iterable[str | Path] = (),
    echo: Callable[[bytes], None] | None = None, verbose: bool = False,
    booted: Kernel | None = None,
) -> Outcome:
    """Boot the guest with a request for inside.py, and wait until it powers off.

    booted: the kernel, by default `kernel()`.  added: paths of this machine to take along.
    echo: called with each piece of console output (bytes) as it comes.  Returns an `Outcome`;
    raises GuestError when qemu can't be started or `timeout` seconds have passed (qemu is killed
    then).
    """
    with tempfile.TemporaryDirectory(prefix="sandboxfs-guest-") as work:
        archive = Path(work) / "initramfs"
        archive.write_bytes(_archive(request, START_SCRIPT, added, booted))
        frames = Path(work) / "frames"
        command = _qemu(archive, verbose, booted)
        command += ["-serial", "stdio", "-serial", f"file:{frames}"]
        started = time.monotonic()
        output = _watched(command, started + timeout, echo)
        reported = [json.loads(line) for line in frames.read_text().splitlines()]
    status = next((frame["status"] for frame in reported if "status" in frame), None)
    return Outcome(status, output, reported, time.monotonic() - started)


def _watched(command, deadline, echo):
    """Run qemu, gathering its console until it ends; kill it at the deadline."""
    gathered = b""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        os.set_blocking(process.stdout.fileno(), False)
        try:
            while process.poll() is None:
                gathered += _piece(process.stdout, echo)
                if time.monotonic() > deadline:
                    shown = gathered.decode(errors="replace")[-4000:]
                    raise GuestError(f"the guest didn't power off in time; its console:\n{shown}")
                time.sleep(0.01)
        finally:
            process.kill()
        gathered += _piece(process.stdout, echo)
    if process.returncode not in (0, -9):
        raise GuestError(f"{QEMU}: exit {process.returncode}\n{gathered.decode(errors='replace')}")
    return gathered.decode(errors="replace").replace("\r\n", "\n")


def _piece(stream, echo):
    piece = stream.read() or b""
    if piece and echo:
        echo(piece)
    return piece


def _qemu(archive: Path, verbose: bool, booted: Kernel | None = None) -> list[str]:
    return [
        QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-m", str(MEMORY_MIB), "-smp", "1", "-kernel", str((booted or kernel()).image),
        "-initrd", str(archive),
        "-append", COMMAND_LINE.replace(" quiet", "") if verbose else COMMAND_LINE,
    ]  # fmt: skip


def _archive(
    request: dict[str, object], start: str, added: Iterable[str | Path],
    booted: Kernel | None = None,
) -> bytes:
    archive = initramfs.Archive()
    initramfs.add_system(archive)
    initramfs.add_python(archive)
    archive.file("/init", INIT.encode(), 0o755)
    archive.file("/guest/start", start.encode())
    archive.file("/guest/request", json.dumps(request).encode())
    modules = (booted or kernel()).module_files()
    for file, content in modules.items():
        archive.file(f"/guest/modules/{file}", content)
    archive.file("/guest/modules/order", "".join(f"{file}\n" for file in modules).encode())
    for name in ("sandboxfs", "specs", "tests"):
        initramfs.add_tree(archive, CHECKOUT / name, f"/guest/checkout/{name}")
    for name in ("prctl", "_prctl"):
        initramfs.add_package(archive, name, "/guest/checkout")
    for path in map(Path, added):
        if path.is_dir():
            initramfs.add_tree(archive, path, str(path.resolve()))
        else:
            archive.copy(str(path), str(path.resolve()))
    return archive.finish()


def _shell(added, verbose):
    with tempfile.TemporaryDirectory(prefix="sandboxfs-guest-") as work:
        archive = Path(work) / "initramfs"
        archive.write_bytes(_archive({}, START_SHELL, added))
        return subprocess.call([*_qemu(archive, verbose), "-serial", "mon:stdio"])


def _arguments(words):
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.guest.guest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("-c", dest="code")
    what.add_argument("--shell", action="store_true")
    what.add_argument("--behaviours", action="store_true")
    parser.add_argument("--add", action="append", default=[], metavar="PATH")
    parser.add_argument("--timeout", type=float, default=BOOT_SECONDS)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="SCRIPT ARGUMENT…")
    return parser, parser.parse_args(words)


def _echo(piece):
    sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


def main(words=None):
    """Run what the command line asks for in a guest; return its exit status."""
    parser, options = _arguments(words)
    if options.shell:
        return _shell(options.add, options.verbose)
    if options.behaviours:
        request = {"behaviours": "tests/kernel/behaviours.py", "cases": options.words or None}
    elif options.code is not None:
        request = {"code": options.code, "arguments": ["-c", *options.words]}
    elif options.words:
        source = Path(options.words[0]).read_text()
        request = {"code": source, "arguments": options.words}
    else:
        parser.error("what is to be run? SCRIPT, -c CODE, --behaviours or --shell")
    outcome = boot(request, options.timeout, options.add, _echo, options.verbose)
    for frame in outcome.frames:
        if "case" in frame:
            sys.stdout.write(f"{frame['case']}: {frame['failure'] or 'passed'}\n")
    sys.stderr.write(f"guest: exit {outcome.status} after {outcome.seconds:.1f} s\n")
    return 125 if outcome.status is None else outcome.status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except GuestError as error:
        sys.exit(f"guest: {error}")
