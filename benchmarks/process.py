"""Whole processes: /bin/true in a busybox bundle, from posix_spawn to the end.

crun refuses hybrid cgroups: it is measured from a small process in a mount namespace in which
a cgroup2 lies over /sys/fs/cgroup.
"""

import json
import os
import shutil
from pathlib import Path

from benchmarks import bundle, measure
from benchmarks.build import CHECKOUT, interpreter
from sandboxfs.kernel import abi, fscontext, syscalls

ROUNDS = 60
BARE = "python3 -I -S -c pass"


def run(directory, rounds=ROUNDS):
    """Measure; returns a `Report`."""
    made = bundle.make(Path(directory) / "bundle")
    report = measure.Report("process", "Whole processes: /bin/true in a busybox bundle")
    with Peers(directory, report) as peers:
        contestants = {
            "sandboxfs run": sandboxfs_run(directory, made),
            BARE: measure.Spawned([interpreter(), "-I", "-S", "-c", "pass"]),
            **peers.contestants(made),
        }
        report.add(measure.interleaved(contestants, rounds))
    if "runc run" in report.rows:
        report.target("sandboxfs run against runc run",
                      report.ratio("sandboxfs run", "runc run"), 0.5)
    for name in ("crun run", "bwrap"):
        if name in report.rows:
            report.notes.append(
                f"sandboxfs run against {name}: {report.ratio('sandboxfs run', name):.2f}")
    report.target(f"sandboxfs run against {BARE}", report.ratio("sandboxfs run", BARE), 2.2)
    return report


def sandboxfs_run(directory, made):
    """Return `sandboxfs run` of a bundle, through a launcher as set-up makes it."""
    return measure.Spawned([launcher(directory), "run", "--bundle", made])


def launcher(directory):
    """Return the path of a launcher in `directory`, which everybody may enter from then on."""
    path = Path(directory) / "sandboxfs"
    if not path.exists():
        from sandboxfs.cli import launcher as writer

        writer.write(str(path))
        path.parent.chmod(path.parent.stat().st_mode | 0o055)
    return path


def spawner(command):
    """Return the command of a server that spawns `command` on each request."""
    script = CHECKOUT / "benchmarks" / "spawner.py"
    return [interpreter(), "-I", "-S", str(script), str(CHECKOUT), *map(os.fspath, command)]


class Peers:
    """The other tools, as far as they are installed; a context manager."""

    def __init__(self, directory, report):
        self.state = Path(directory) / "state"
        self.state.mkdir(exist_ok=True)
        self.runc = shutil.which("runc", path="/usr/sbin:/usr/bin")
        self.crun = shutil.which("crun", path="/usr/sbin:/usr/bin")
        self.bwrap = shutil.which("bwrap", path="/usr/sbin:/usr/bin")
        for name in ("runc", "crun", "bwrap"):
            if getattr(self, name) is None:
                report.notes.append(f"{name} is not installed")
        self.servers = []

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for server in self.servers:
            server.__exit__()

    def contestants(self, made):
        """Return {name: function} for a bundle."""
        result = {}
        if self.runc:
            result["runc run"] = measure.Spawned(
                [self.runc, "--root", self.state / "runc", "run", "--bundle", made, name_of(made)]
            )
        if self.crun:
            result["crun run"] = self.in_unified_cgroups(
                [self.crun, "--root", self.state / "crun", "--cgroup-manager=disabled", "run",
                 "--bundle", made, name_of(made)]
            )
        if self.bwrap:
            result["bwrap"] = measure.Spawned(bwrap_command(self.bwrap, made))
        return result

    def in_unified_cgroups(self, command):
        """Return a contestant that is spawned where only cgroup2 is seen."""
        server = measure.Server(spawner(command), abi.CLONE_NEWNS, unified_cgroups)
        self.servers.append(server)
        return server.contestant(b"r")


def name_of(made):
    """Return a container id that no container of the machine has."""
    return f"sandboxfs-bench-{os.getpid()}-{Path(made).name}"


def bwrap_command(program, made):
    """Return what comes closest to the bundle with bubblewrap: no overlay, no masks."""
    return [
        program, "--bind", made / "rootfs", "/", "--proc", "/proc", "--dev", "/dev",
        "--tmpfs", "/run", "--tmpfs", "/tmp", "--unshare-pid", "--unshare-ipc", "--unshare-uts",
        "--unshare-net", "--die-with-parent", *bwrap_binds(made), "/bin/true",
    ]


def bwrap_binds(made):
    """Return bubblewrap's words for the binds of a bundle."""
    words = []
    for mount in json.loads((Path(made) / "config.json").read_text())["mounts"]:
        if mount["type"] == "bind":
            words += ["--bind", mount["source"], mount["destination"]]
    return words


def unified_cgroups():
    """Mount a cgroup2 over /sys/fs/cgroup of this (private) mount namespace."""
    mount = fscontext.create(b"cgroup2", [], 0)
    syscalls.move_mount_path(mount, abi.AT_FDCWD, b"/sys/fs/cgroup")
    os.close(mount)
