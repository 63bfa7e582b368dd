"""A busy host: what a start costs with 0, 1,000 and 5,000 mounts on the machine.

Each number of mounts is a mount namespace of its own, with a small process in it that spawns or
runs what is measured, and, for the command line, a pinned base namespace.
"""

import os
import subprocess
from pathlib import Path

from benchmarks import bundle, measure, process, view
from benchmarks.build import CHECKOUT, interpreter
from sandboxfs.kernel import abi, fscontext, syscalls

ROUNDS = 40
COUNTS = (0, 1000, 5000)
LIBRARY, COMMAND, PLAIN = "Sandbox.run", "sandboxfs run, base namespace", "sandboxfs run"


def run(directory, rounds=ROUNDS, counts=COUNTS):
    """Measure; returns a `Report`."""
    report = measure.Report("busy", "/bin/true in a busybox bundle, by the mounts of the host")
    made = bundle.make(Path(directory) / "bundle")
    launcher = process.launcher(directory)
    peers = process.Peers(directory, report)
    servers, contestants = [], {}
    try:
        for count in counts:
            words = {
                COMMAND: [launcher, "run", "--bundle", made],
                PLAIN: [launcher, "run", "--bundle", made],
            }
            if peers.bwrap:
                words["bwrap"] = process.bwrap_command(peers.bwrap, made)
            if peers.runc:
                words["runc run"] = [
                    peers.runc, "--root", peers.state / f"runc{count}", "run", "--bundle", made,
                    f"{process.name_of(made)}-{count}",
                ]
            for name, command in words.items():
                pin = launcher if name == COMMAND else None
                servers.append(measure.Server(
                    process.spawner(command), abi.CLONE_NEWNS, prepared(count, pin)))
                contestants[f"{name}, {count}"] = servers[-1].contestant(b"r")
            servers.append(measure.Server(library(made), abi.CLONE_NEWNS, prepared(count, None)))
            contestants[f"{LIBRARY}, {count}"] = servers[-1].contestant(b"r")
        report.add(measure.interleaved(contestants, rounds))
    finally:
        for server in servers:
            server.__exit__()
    for name in (LIBRARY, COMMAND):
        for count in counts[1:]:
            report.target(f"{name}, {count} mounts against none",
                          report.ratio(f"{name}, {count}", f"{name}, {counts[0]}"), 1.1)
    return report


def prepared(count, pin):
    """Return what makes a host of so many mounts, and pins a base namespace by the launcher."""
    def prepare():
        # A /run of its own: the pin lies there.
        tmpfs = fscontext.create(b"tmpfs", [fscontext.string(b"mode", b"755")], 0)
        syscalls.move_mount_path(tmpfs, abi.AT_FDCWD, b"/run")
        os.close(tmpfs)
        view.mounts(count)
        if pin is not None:
            subprocess.run([pin, "base-namespace", "create"], check=True,
                           stdout=subprocess.DEVNULL)

    return prepare


def library(made):
    """Return the command of a server that runs /bin/true by a `Sandbox`."""
    script = Path(__file__).with_name("sandbox_rounds.py")
    return [interpreter(), "-I", "-S", str(script), str(CHECKOUT), str(made)]
