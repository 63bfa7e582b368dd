"""A machine with engines whose configuration may be changed: this one's, or a tree's.

All of it is in a mount namespace of the caller's (`in_namespace`): /etc, /opt, /usr/local,
/usr/share and /var/lib are overlays, /run is empty.  An engine of a tree (another Debian) is
started with that tree as its root, where these directories are the machine's, with the tree's
configuration in them: so the command line runs here, and configures the engine there.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sandboxfs.kernel import fscontext
from tests.support.commands import Done, run
from tests.support.host import attach, bind, mount_tmpfs
from tests.support.trees import Entry, snapshot

_WRITABLE = ("/etc", "/opt", "/usr/local", "/usr/share", "/var/lib")
_CONFIGURATION = ("/etc/containerd", "/etc/containers", "/etc/docker")


class Machine:
    """The machine; `root` is where the engines are: ``/``, or a tree of another Debian."""

    def __init__(self, root: str = "/") -> None:
        self.root = "/"
        mount_tmpfs("/mnt")
        for path in _WRITABLE:
            _overlay(path, path, Path("/mnt", path.strip("/").replace("/", "-")))
        mount_tmpfs("/run")
        for name in ("containerd", "containers", "docker"):
            Path("/var/lib", name).mkdir(exist_ok=True)
            mount_tmpfs(Path("/var/lib", name))
        if root != "/":
            self.root = "/mnt/root"
            Path(self.root).mkdir()
            _overlay(root, self.root, Path("/mnt/tree"))
            self._join()

    def _join(self) -> None:
        for path in _CONFIGURATION:
            shutil.rmtree(path, ignore_errors=True)
            if os.path.isdir(self.root + path):
                shutil.copytree(self.root + path, path, symlinks=True)
            os.makedirs(path, exist_ok=True)
            os.makedirs(self.root + path, exist_ok=True)
        for path in (*_CONFIGURATION, "/usr/local", "/run", "/proc", "/sys", "/dev",
                     "/var/lib/containerd", "/var/lib/containers", "/var/lib/docker"):
            os.makedirs(self.root + path, exist_ok=True)
            bind(path, self.root + path, recursive=True)

    def unify(self) -> None:
        """Mount unified cgroups: podman and crun refuse hybrid ones."""
        for path in {"/sys/fs/cgroup", self.root.rstrip("/") + "/sys/fs/cgroup"}:
            attach(fscontext.create(b"cgroup2", [], 0), path)

    def command(self, *words: str) -> list[str]:
        """Return the command that starts a program of the engines' root."""
        return [*words] if self.root == "/" else ["chroot", self.root, *words]

    def run(self, *words: str, check: int | None = 0) -> Done:
        """Run a program of the engines' root."""
        return run(*self.command(*words), check=check, timeout=60)

    def configuration(self) -> dict[bytes, Entry]:
        """Return all of /etc and of where our programs and hooks go, but for times.

        A directory's number of links depends on the layers that it comes from.
        """
        found: dict[bytes, Entry] = {}
        for top in ("/etc", "/usr/local/libexec", "/usr/share/containers"):
            if not os.path.exists(top):
                continue
            for name, entry in snapshot(top).items():
                del entry["mtime"], entry["links"]
                found[os.fsencode(top) + b"/" + name] = entry
        return found

    @contextmanager
    def service(self, socket: str, *words: str) -> Iterator[Path]:
        """Run a daemon until the block ends; it is up when its socket is there.  Yields its log."""
        Path(socket).unlink(missing_ok=True)
        log = Path("/mnt/log")
        with log.open("wb") as output:
            process = subprocess.Popen(self.command(*words), stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + 60
            while not os.path.exists(socket):
                assert process.poll() is None, log.read_text("utf-8")
                assert time.monotonic() < deadline, log.read_text("utf-8")
                time.sleep(0.05)
            yield log
        finally:
            process.terminate()
            process.wait(30)

    def cri(self) -> dict[str, str]:
        """Start containerd; returns the plugins of its CRI, and whether each is loaded (``ok``)."""
        with self.service("/run/containerd/containerd.sock", "containerd"):
            listed = self.run("ctr", "plugins", "ls").stdout
        lines = [line.split() for line in listed.splitlines() if "cri" in line]
        return {f"{type}.{id}": state for type, id, _platform, state in lines}


def _overlay(lower: str, path: str, work: Path) -> None:
    for name in ("upper", "work"):
        (work / name).mkdir(parents=True)
    settings = [fscontext.string(key, os.fsencode(value)) for key, value in (
        (b"lowerdir", lower), (b"upperdir", work / "upper"), (b"workdir", work / "work"))]
    attach(fscontext.create(b"overlay", settings, 0), path)
