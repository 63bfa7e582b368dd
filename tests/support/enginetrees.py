"""Debian trees with today's engines and runtimes, made once in .cache/trees by the set-up.

Every tree is made beside its place and renamed, so a half-made one is never found.  A tree that
can't be fetched leaves the reason there instead: its tests are skipped by name, and the last
lines of the tests' log say so.  Nothing is pinned: a tree has what its suite has today.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sandboxfs.kernel import abi, fscontext, syscalls
from tests.support.host import CHECKOUT, attach
from tests.support.namespace import in_namespace, set_propagation

CACHE = CHECKOUT / ".cache" / "trees"
# What of the machine is seen in a tree.
SEEN = ("/proc", "/sys", "/dev", "/run", "/tmp", "/var/tmp")
ATTEMPTS = 2
ENGINES = ("runc", "crun", "containerd", "podman", "dockerd")
_APT = (
    # What the mirrors of a test machine keep of sid may be some days old.
    'Acquire::Check-Valid-Until "false"', 'Acquire::Retries "4"', 'Acquire::http::Timeout "20"',
    'APT::Install-Recommends "false"',
)
_PACKAGES = (
    "runc", "crun", "containerd", "podman", "docker.io", "docker-cli", "conmon", "iptables",
    "ca-certificates", "uidmap", "busybox-static", "strace", "python3", "python3-prctl",
    "python3-pyroute2", "python3-jsonschema", "python3-pytest", "python3-hypothesis",
    "python3-pytest-xdist", "acl", "attr", "erofs-utils", "squashfs-tools",
)
# What nobody reads in a tree, a third of its files.
_LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")


class Recipe:
    """How a tree is made.

    suites: those that packages are taken from; the first one gives the base.  preferred: packages
    that the last one gives.  below: the tree that it lies on.
    """

    def __init__(
        self, suites: Sequence[str], packages: Sequence[str], variant: str,
        below: str = "", preferred: Sequence[str] = (),
    ) -> None:
        self.suites = suites
        self.packages = packages
        self.variant = variant
        self.below = below
        self.preferred = preferred

    def digest(self) -> str:
        """Return what changes whenever the tree would be another one."""
        below = RECIPES[self.below].digest() if self.below else ""
        words = (self.suites, self.packages, self.variant, self.preferred, below, _APT, _LEFT_OUT)
        return hashlib.sha256(repr(words).encode()).hexdigest()


RECIPES = {
    "trixie": Recipe(["trixie"], _PACKAGES, "minbase"),
    "sid": Recipe(["sid"], _PACKAGES, "minbase"),
    # Only unpacked, to lie over sid: what these need of it is the same there.
    "experimental": Recipe(
        ["sid", "experimental"], ["runc", "podman"], "extract", "sid",
        ["runc", "podman", "containers-common", "golang-github-containers-common",
         "golang-github-containers-image", "conmon", "netavark", "passt"]),
}


def is_made(name: str) -> bool:
    """Return whether a tree is there, by its present recipe."""
    stamp = CACHE / name / "recipe"
    return stamp.exists() and stamp.read_text("ascii") == RECIPES[name].digest()


def absence(name: str) -> str | None:
    """Return why a tree isn't there, or None."""
    lacking = next((each for each in _names(name) if not is_made(each)), None)
    if lacking is None:
        return None
    return failure(lacking) or f"the set-up has not made {CACHE / lacking}"


def failure(name: str) -> str | None:
    """Return why a tree, or the one below it, could not be fetched, or None."""
    for each in _names(name):
        if not is_made(each) and (reason := CACHE / f"{each}.failed").exists():
            return reason.read_text("utf-8")
    return None


def layers(name: str) -> list[Path]:
    """Return the directories that a tree consists of, the uppermost first."""
    return [CACHE / each / "root" for each in _names(name)]


def enter(name: str) -> None:
    """Make a tree the root of this process's mount namespace, a private one.

    Writes go to memory.  /proc, /dev, /sys, /run, /tmp and /var/tmp are those of before: clones,
    so peers where they were shared.  The new root is shared, like a host's.
    """
    visible = {
        path: syscalls.open_tree(
            abi.AT_FDCWD, path.encode(), abi.OPEN_TREE_CLONE | abi.AT_RECURSIVE)
        for path in SEEN
    }
    set_propagation(abi.MS_PRIVATE)
    memory = fscontext.create(b"tmpfs", [fscontext.string(b"mode", b"0755")], 0)
    # The path hides nothing that anybody looks for from here on.
    stage = "/tmp"
    attach(memory, stage)
    for each in ("upper", "work", "root"):
        os.mkdir(f"{stage}/{each}", 0o755)
    lowers = [os.open(path, os.O_PATH | os.O_CLOEXEC) for path in layers(name)]
    try:
        lower = ":".join(f"/proc/self/fd/{fd}" for fd in lowers)
        words = {"lowerdir": lower, "upperdir": f"{stage}/upper", "workdir": f"{stage}/work"}
        settings = [fscontext.string(key.encode(), each.encode()) for key, each in words.items()]
        root = fscontext.create(b"overlay", settings, 0)
    finally:
        for fd in lowers:
            os.close(fd)
    attach(root, f"{stage}/root")
    for path, mount in visible.items():
        os.makedirs(f"{stage}/root{path}", exist_ok=True)
        attach(mount, f"{stage}/root{path}")
    os.chdir(f"{stage}/root")
    syscalls.pivot_root(b".", b".")
    syscalls.umount2(b".", abi.MNT_DETACH)
    os.chdir("/")
    fd = os.open("/", os.O_PATH | os.O_CLOEXEC)
    syscalls.mount_setattr(fd, propagation=abi.MS_SHARED)
    os.close(fd)


def versions(name: str = "") -> dict[str, str]:
    """Return what the engines and runtimes of a tree, or of this machine, say of their versions."""
    if name and not (kept := CACHE / name / "versions.json").exists():
        found = in_namespace(_versions_inside, name, timeout=60, check_descriptors=False)
        kept.write_text(json.dumps(found), "utf-8")
    return json.loads(kept.read_text("utf-8")) if name else ask_versions()


def _versions_inside(name: str) -> dict[str, str]:
    enter(name)
    return ask_versions()


def ask_versions() -> dict[str, str]:
    """Return what the programs on the path say of their versions."""
    found = {}
    for program in (*ENGINES, "python3"):
        try:
            done = subprocess.run(
                [program, "--version"], stdin=subprocess.DEVNULL, capture_output=True,
                text=True, check=False, timeout=60)
        except FileNotFoundError:
            continue
        if done.returncode == 0 and (version := _number(done.stdout)):
            found[program] = version
    return found


def _number(text: str) -> str:
    """Return the first word of a text that begins with a number, as 1.2.3 without a suffix."""
    for word in text.replace(",", " ").split():
        number = word.removeprefix("v").partition("~")[0].partition("+")[0].partition("-")[0]
        if number.replace(".", "").isdecimal() and "." in number:
            return number
    return ""


def _names(name: str) -> list[str]:
    return [name, *([RECIPES[name].below] if RECIPES[name].below else [])]


def make(name: str) -> str | None:
    """Make a tree if it is missing; returns why it could not be made, or None."""
    if is_made(name):
        return None
    CACHE.mkdir(parents=True, exist_ok=True)
    place, part = CACHE / name, CACHE / f"{name}.part"
    record = CACHE / f"{name}.failed"
    for old in (place, part):
        if old.exists():
            shutil.rmtree(old)
    reason: str | None = None
    for _ in range(ATTEMPTS):
        part.mkdir()
        reason = _fetch(RECIPES[name], part / "root")
        if reason is None:
            (part / "recipe").write_text(RECIPES[name].digest(), "ascii")
            record.unlink(missing_ok=True)
            part.rename(place)
            return None
        shutil.rmtree(part)
    record.write_text(reason or "", "utf-8")
    return reason


def _fetch(recipe: Recipe, root: Path) -> str | None:
    """Make a tree at `root`; returns the reason where that fails."""
    if not shutil.which("mmdebstrap"):
        return "mmdebstrap is not installed"
    if os.geteuid() != 0:
        return "only root makes trees"
    mirror = _mirror()
    if not mirror:
        return "this machine's apt has no source of Debian's main archive"
    # Whatever it mounts in the tree goes with its namespace.
    command = [
        "unshare", "--mount", "--propagation=private", "--", "mmdebstrap", "--mode=root",
        "--format=directory", "--quiet", f"--variant={recipe.variant}",
        f"--include={','.join(recipe.packages)}",
        *(f"--aptopt={each}" for each in _APT),
        *(f"--dpkgopt=path-exclude={each}" for each in _LEFT_OUT),
        *(f"--setup-hook={_preferences(recipe)}" for _ in recipe.preferred[:1]),
        recipe.suites[0], str(root), *(f"deb {mirror} {each} main" for each in recipe.suites),
    ]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", env={**os.environ, "LC_ALL": "C.UTF-8"},
    ) as process:
        try:
            output, _ = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.communicate()
            return "mmdebstrap did not end within ten minutes"
    if process.returncode == 0:
        return None
    lines = [line for line in output.splitlines() if line.startswith("E:")] or output.splitlines()
    # The last one only repeats the exit status of apt.
    return f"mmdebstrap: {' '.join(lines[-4:]).replace(mirror, 'the mirror')}"


def _preferences(recipe: Recipe) -> str:
    """Return the shell's words that tell apt which packages the last suite gives."""
    lines = (f"Package: {' '.join(recipe.preferred)}", f"Pin: release a={recipe.suites[-1]}",
             "Pin-Priority: 990")
    words = " ".join(f"'{line}'" for line in lines)
    return f"""printf '%s\\n' {words} >"$1/etc/apt/preferences.d/preferred\""""


def _mirror() -> str:
    """Return where this machine's apt gets Debian's main archive from, or an empty string."""
    try:
        done = subprocess.run(
            ["apt-get", "indextargets", "--format", "$(REPO_URI) $(ORIGIN) $(LABEL) $(COMPONENT)",
             "Created-By: Packages"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    for line in done.stdout.splitlines():
        uri, *words = line.split()
        if words == ["Debian", "Debian", "main"]:
            return uri
    return ""


def main() -> int:
    """Make all trees; returns 1 if one of them is missing."""
    wanted = [name for name in RECIPES if not is_made(name)]
    if wanted:
        print(f"set-up: making {CACHE}: {', '.join(wanted)}", file=sys.stderr, flush=True)
    with ThreadPoolExecutor(2) as pool:
        reasons = dict(zip(wanted, pool.map(make, wanted), strict=True))
    for name, reason in reasons.items():
        if reason is not None:
            print(f"set-up: no tree {name}, its tests are skipped: {reason}", file=sys.stderr)
    return int(any(reasons.values()))
