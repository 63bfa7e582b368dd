"""Which kernel a guest boots: Debian's cloud kernels, unpacked in the cache, never installed.

``older`` is the kernel of this machine's own release.  ``newest`` is the newest that its mirror has
in the suites of `SUITES`; their package lists are read by an apt that keeps everything in a
temporary directory, and this machine's own isn't touched.
"""

import lzma
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
CACHE = CHECKOUT / ".cache"
PACKAGE = "linux-image-cloud-amd64"
# From 6.19 on linux-image-* is a stub: the image and the modules are packages that it depends on.
PARTS = re.compile(r"Depends: (linux-(?:image|binary|modules)-\S+)")
MODULES = ("overlay", "erofs", "squashfs", "loop", "dummy")

# Where to look for it; the newest of all wins.  None: in what this machine's own apt knows.
SUITES: dict[str, tuple[str, ...] | None] = {"older": None, "newest": ("trixie-backports", "sid")}
DIRECTORIES = {"older": "guest-kernel", "newest": "guest-kernel-newest"}

# Else what lies in backports would count for less than what doesn't.
PREFERENCES = "Package: *\nPin: release *\nPin-Priority: 500\n"


class GuestError(Exception):
    """The guest couldn't be made or booted, or ended without a word; the text says which."""


class Kernel:
    """A kernel to boot: its image, and a directory below which its modules lie, or None."""

    def __init__(self, image: str | Path, modules: str | Path | None) -> None:
        self.image = Path(image)
        self.modules = Path(modules) if modules else None

    @property
    def release(self) -> str:
        """What this kernel calls itself, as far as its files tell."""
        return self.modules.name if self.modules else self.image.name

    def module_files(self, names: tuple[str, ...] | list[str] = MODULES) -> dict[str, bytes]:
        """Return the modules `names` and those that they need, file name → content, to load so.

        A name without a file is built into this kernel, or unknown to it, and left out.
        """
        files = {}
        if self.modules:
            for path in self.modules.rglob("*.ko*"):
                files[path.name.partition(".")[0].replace("-", "_")] = path
        ordered: dict[str, bytes] = {}

        def add(name: str) -> None:
            path = files.get(name.replace("-", "_"))
            file = f"{name.replace('-', '_')}.ko"
            if path is None or file in ordered:
                return
            content = path.read_bytes()
            if path.suffix == ".xz":
                content = lzma.decompress(content)
            for needed in _needs(content):
                add(needed)
            ordered[file] = content

        for name in names:
            add(name)
        return ordered


def _needs(module: bytes) -> list[str]:
    """Return the names in the ``depends=`` line of a module's .modinfo section."""
    start = module.find(b"\0depends=")
    if start < 0:
        return []
    value = module[start + len(b"\0depends=") :].split(b"\0", 1)[0].decode()
    return [name for name in value.split(",") if name]


def kernel(name: str = "older") -> Kernel:
    """Return the `Kernel` to test on, a key of `SUITES`, fetched into the cache by the first call.

    ``SANDBOXFS_GUEST_KERNEL`` (an image) and ``SANDBOXFS_GUEST_MODULES`` name another one in place
    of the older.  GuestError: it can't be fetched.
    """
    image = os.environ.get("SANDBOXFS_GUEST_KERNEL")
    if image and name == "older":
        return Kernel(image, os.environ.get("SANDBOXFS_GUEST_MODULES"))
    found = unpacked(name)
    if found is None:
        _fetch(name)
        found = unpacked(name)
    if found is None:
        raise GuestError(f"{CACHE / DIRECTORIES[name]}: no kernel in what {PACKAGE} depends on")
    return found


def unpacked(name: str = "older") -> Kernel | None:
    """Return the cache's `Kernel`, or None."""
    cache = CACHE / DIRECTORIES[name]
    images = sorted([*cache.glob("boot/vmlinuz-*"), *cache.glob("usr/lib/modules/*/vmlinuz")])
    if not images:
        return None
    if images[-1].name == "vmlinuz":
        return Kernel(images[-1], images[-1].parent)
    release = images[-1].name.removeprefix("vmlinuz-")
    return Kernel(images[-1], cache / "lib" / "modules" / release)


def failure(name: str) -> str | None:
    """Return why a kernel could not be fetched when that was tried last, or None."""
    reason = _record(name)
    return reason.read_text("utf-8") if reason.exists() and not unpacked(name) else None


def try_to_fetch(name: str) -> bool:
    """Fetch a kernel unless it is there; where that fails write down why, and return False."""
    try:
        found = kernel(name)
    except GuestError as error:
        CACHE.mkdir(exist_ok=True)
        # One line: it becomes the reason of skips.  The command is long and tells nothing.
        _record(name).write_text(str(error).splitlines()[-1], "utf-8")
        return False
    _record(name).unlink(missing_ok=True)
    return found is not None


def _record(name: str) -> Path:
    return CACHE / f"{DIRECTORIES[name]}.failed"


def missing() -> list[str]:
    """Return what this machine lacks to boot a guest, one sentence each."""
    programs = ("qemu-system-x86_64", "busybox", "/usr/bin/python3")
    lacking = [f"{program} is not installed" for program in programs if not shutil.which(program)]
    have_kernel = os.environ.get("SANDBOXFS_GUEST_KERNEL") or unpacked() or shutil.which("apt-get")
    if not have_kernel:
        lacking.append(f"no kernel in {CACHE}, and no apt-get to fetch {PACKAGE} with")
    return lacking


def _fetch(name: str) -> None:
    """Download the packages that the kernel is made of and unpack them into the cache."""
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="fetch-") as work:
        suites = SUITES[name]
        options = ["-o", "Acquire::Retries=3", *(_private_apt(work, suites) if suites else [])]
        packages = _parts(PACKAGE, options, work)
        if not packages:
            raise GuestError(f"apt-cache depends {PACKAGE} names no kernel")
        _output(["apt-get", *options, "download", "-q", *packages], work)
        for archive in Path(work).glob("*.deb"):
            _output(["dpkg-deb", "-x", str(archive), "unpacked"], work)
        try:
            os.rename(Path(work) / "unpacked", CACHE / DIRECTORIES[name])
        except OSError:
            if unpacked(name) is None:  # not merely fetched by someone else meanwhile
                raise


def _parts(package: str, options: list[str], work: str) -> list[str]:
    """Return the packages with a kernel's files that `package` depends on, stubs among them."""
    found: list[str] = []
    waiting = [package]
    while waiting:
        text = _output(["apt-cache", *options, "depends", waiting.pop()], work)
        for part in PARTS.findall(text):
            if part not in found:
                found.append(part)
                waiting.append(part)
    return found


def _private_apt(work: str, suites: tuple[str, ...]) -> list[str]:
    """Read the package lists of `suites` from this machine's mirror; return apt's options."""
    listed = _output(
        ["apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(COMPONENT)|$(REPO_URI)",
         "Created-By: Packages"], work,
    )
    main = "Debian|Debian|main|"
    mirrors = [line for line in listed.splitlines() if line.startswith(main)]
    if not mirrors:
        raise GuestError("apt knows no mirror of Debian")
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    source = f"deb [signed-by={keyring}] {mirrors[0].removeprefix(main)}"
    sources = "".join(f"{source} {suite} main\n" for suite in suites)
    files = {"sources": sources, "preferences": PREFERENCES, "status": ""}
    for file, text in files.items():
        Path(work, file).write_text(text, "utf-8")
    for directory in ("lists/partial", "cache/archives/partial"):
        Path(work, directory).mkdir(parents=True)
    settings = {
        "Dir::Etc::sourcelist": f"{work}/sources", "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": f"{work}/preferences", "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::State::lists": f"{work}/lists", "Dir::State::status": f"{work}/status",
        "Dir::Cache": f"{work}/cache", "Acquire::Check-Valid-Until": "false",
        "Acquire::Languages": "none",
        # The directory is closed to apt's own user.
        "APT::Sandbox::User": "root",
    }
    options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
    _output(["apt-get", "-o", "Acquire::Retries=3", *options, "update", "-q"], work)
    return options


def _output(command: list[str], directory: str) -> str:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        raise GuestError(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr.strip()}")
    return done.stdout
