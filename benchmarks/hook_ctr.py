"""The hooks in a whole `ctr run`: containerd, its shim, runc, /bin/true, and back.

The containerd is one of the bench's own, without CRI, in a mount namespace with a /run of its own;
nothing of the machine's is asked or disturbed.
"""

import copy
import os
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

from benchmarks import bundle, measure
from benchmarks.hook import ENVIRONMENT, STAGES
from benchmarks.process import launcher, name_of
from sandboxfs.kernel import abi, fscontext, syscalls

ROUNDS = 30
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
SECONDS_TO_START = 20
PLAIN, TRUE, ONE, ALL = (
    "ctr run", "ctr run, /bin/true as hook", "ctr run, createContainer", "ctr run, all three hooks",
)
CONFIGURATION = """
version = 2
root = "{home}/root"
state = "{home}/state"
disabled_plugins = [
    "io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt",
    "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
]
[grpc]
  address = "{home}/socket"
"""


def run(directory, rounds=ROUNDS):
    """Measure; returns a `Report`."""
    report = measure.Report("hook_ctr", "The hooks in `ctr run` of /bin/true")
    programs = {name: shutil.which(name, path=PATH) for name in ("containerd", "ctr", "runc")}
    missing = [name for name, path in programs.items() if path is None]
    if missing:
        report.notes.append(f"not installed: {', '.join(missing)}")
        return report
    directory = Path(directory)
    hook = [str(launcher(directory)), "hook"]
    create = {"createContainer": [*hook, "createContainer"]}
    with a_run_of_its_own(), Containerd(directory / "containerd", programs) as containerd:
        contestants = {
            PLAIN: containerd.contestant("plain", {}),
            TRUE: containerd.contestant("true", {"createContainer": ["/bin/true"]}),
            ONE: containerd.contestant("one", create),
            ALL: containerd.contestant("all", {stage: [*hook, stage] for stage in STAGES}),
        }
        report.add(measure.interleaved(contestants, rounds))
    plain = report.rows[PLAIN]["median"]
    for name in (TRUE, ONE, ALL):
        more = report.rows[name]["median"] - plain
        share = more / report.rows[name]["median"]
        report.notes.append(f"{name}: {more / 1e6:.1f} ms more, {share:.0%} of the whole")
    return report


class Containerd:
    """A private containerd that runs while the block does."""

    def __init__(self, home, programs):
        self.home = home
        self.programs = programs
        home.mkdir()
        (home / "config.toml").write_text(CONFIGURATION.format(home=home), encoding="utf-8")

    def __enter__(self):
        with open(self.home / "log", "wb") as log:
            self.process = subprocess.Popen(
                [self.programs["containerd"], "--config", self.home / "config.toml"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={"PATH": PATH},
            )
        deadline = time.monotonic() + SECONDS_TO_START
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise measure.Failed(f"containerd: {(self.home / 'log').read_text()[-1000:]}")
            time.sleep(0.01)
        return self

    def __exit__(self, *exception):
        self.process.terminate()
        self.process.wait()

    def answers(self):
        """Return whether it listens by now."""
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(str(self.home / "socket")) == 0

    def contestant(self, name, hooks):
        """Return what runs a container with these hooks ({stage: command}), measured whole."""
        made = bundle.make(self.home / name)
        content = copy.deepcopy(bundle.document())
        content["root"]["path"] = str(made / "rootfs")
        content["linux"]["cgroupsPath"] = f"/{name_of(made)}"
        content["hooks"] = {
            stage: [{"path": command[0], "args": command, "env": ENVIRONMENT}]
            for stage, command in hooks.items()
        }
        bundle.write(made, content)
        return measure.Spawned([
            self.programs["ctr"], "--address", self.home / "socket", "run", "--rm", "--config",
            made / "config.json", name_of(made),
        ])


@contextmanager
def a_run_of_its_own():
    """Stay where /run is a tmpfs: sockets, pipes and the hooks' log go there."""
    before = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        measure.enter_private(abi.CLONE_NEWNS)
        mount = fscontext.create(b"tmpfs", [fscontext.string(b"mode", b"0755")], 0)
        syscalls.move_mount_path(mount, abi.AT_FDCWD, b"/run")
        os.close(mount)
        yield
    finally:
        syscalls.setns(before, abi.CLONE_NEWNS)
        os.close(before)
