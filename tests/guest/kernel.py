"""Which kernel the guest boots: Debian's cloud kernel, unpacked in the cache, never installed."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
CACHE = CHECKOUT / ".cache" / "guest-kernel"
PACKAGE = "linux-image-cloud-amd64"
MODULES = ("overlay", "erofs", "squashfs", "loop", "dummy")


class GuestError(Exception):
    """The guest couldn't be made or booted, or ended without a word; the text says which."""


class Kernel:
    """A kernel to boot: its image, and a directory below which its modules lie, or None."""

    def __init__(self, image, modules):
        self.image = Path(image)
        self.modules = Path(modules) if modules else None

    def module_files(self, names=MODULES):
        """Return the files of the modules `names` and of what they need, in loading order.

        A name without a file is built into this kernel, or unknown to it, and left out.
        """
        files = {}
        if self.modules:
            files = {path.stem.replace("-", "_"): path for path in self.modules.rglob("*.ko")}
        ordered = []

        def add(name):
            path = files.get(name.replace("-", "_"))
            if path is None or path in ordered:
                return
            for needed in _needs(path.read_bytes()):
                add(needed)
            ordered.append(path)

        for name in names:
            add(name)
        return ordered


def _needs(module):
    """Return the names in the ``depends=`` line of a module's .modinfo section."""
    start = module.find(b"\0depends=")
    if start < 0:
        return []
    value = module[start + len(b"\0depends=") :].split(b"\0", 1)[0].decode()
    return [name for name in value.split(",") if name]


def kernel():
    """Return the `Kernel` to test on, fetched into the cache by the first call.

    ``SANDBOXFS_GUEST_KERNEL`` (an image) and ``SANDBOXFS_GUEST_MODULES`` name another one.
    """
    image = os.environ.get("SANDBOXFS_GUEST_KERNEL")
    if image:
        return Kernel(image, os.environ.get("SANDBOXFS_GUEST_MODULES"))
    found = unpacked()
    if found is None:
        _fetch()
        found = unpacked()
    if found is None:
        raise GuestError(f"{CACHE}: no kernel in what {PACKAGE} depends on")
    return found


def unpacked():
    """Return the cache's `Kernel`, or None."""
    images = sorted(CACHE.glob("boot/vmlinuz-*"))
    if not images:
        return None
    release = images[-1].name.removeprefix("vmlinuz-")
    return Kernel(images[-1], CACHE / "lib" / "modules" / release)


def missing():
    """Return what this machine lacks to boot a guest, one sentence each."""
    programs = ("qemu-system-x86_64", "busybox", "/usr/bin/python3")
    lacking = [f"{program} is not installed" for program in programs if not shutil.which(program)]
    have_kernel = os.environ.get("SANDBOXFS_GUEST_KERNEL") or unpacked() or shutil.which("apt-get")
    if not have_kernel:
        lacking.append(f"no kernel in {CACHE}, and no apt-get to fetch {PACKAGE} with")
    return lacking


def _fetch():
    """Download the kernel that the package depends on and unpack it into the cache."""
    CACHE.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE.parent, prefix="fetch-") as work:
        depends = _output(["apt-cache", "depends", PACKAGE], work)
        package = next(
            (line.split()[-1] for line in depends.splitlines() if "Depends: linux-image" in line),
            None,
        )
        if package is None:
            raise GuestError(f"apt-cache depends {PACKAGE} names no kernel:\n{depends}")
        _output(["apt-get", "download", "-q", package], work)
        archive = next(Path(work).glob("*.deb"))
        _output(["dpkg-deb", "-x", str(archive), "unpacked"], work)
        try:
            os.rename(Path(work) / "unpacked", CACHE)
        except OSError:
            if unpacked() is None:  # not merely fetched by someone else meanwhile
                raise


def _output(command, directory):
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        raise GuestError(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr.strip()}")
    return done.stdout
