"""Where a runtime runs: as the tests do, with cgroup2 alone, or in a tree with today's engines.

A space of its own is a process that keeps a mount namespace, which commands enter by nsenter.
What the tests mount where containers lie (/var/tmp) is seen in all of them, and the other way.
"""

import os
import shutil
import signal
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import prctl

from sandboxfs.kernel import abi, fscontext, syscalls
from tests.support import CHECKOUT, LAUNCHER, RANGED, attach, enginetrees, run
from tests.support.namespace import KEPT

# `sandboxfs runtime wrap`, once it is there.
HAS_FRONT = find_spec("sandboxfs.runtime") is not None
_INSTALLED = "/usr/lib/python3/dist-packages/sandboxfs"


class Space:
    """This very namespace, with this machine's programs."""

    name = "host"
    # The words that run the product there.
    product: tuple[str, ...] = (str(LAUNCHER),)

    def command(self, *options: str) -> list[str]:
        """Return the words that run a command there; `options` are of nsenter."""
        assert not options
        return []

    def sandboxfs(self, *arguments: str | Path) -> None:
        """Run the product there."""
        run(*self.command(), *self.product, *arguments, timeout=60, check=0)

    def versions(self) -> Mapping[str, str]:
        """Return what its engines and runtimes say of their versions."""
        return enginetrees.versions()

    def close(self) -> None:
        """End what keeps it."""


class Kept(Space):
    """A process that keeps a mount namespace; `enter` makes it."""

    def __init__(self) -> None:
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._keep(writer)
            finally:
                os._exit(1)
        os.close(writer)
        KEPT.add(self.pid)
        try:
            told = os.read(reader, 1000)
            assert told == b"ready", told.decode()
        finally:
            os.close(reader)

    def _keep(self, writer: int) -> None:
        # Not our descriptors: pipes of pytest's would be kept open.
        os.dup2(writer, 3)
        os.closerange(4, 1 << 16)
        prctl.set_pdeathsig(signal.SIGKILL)
        try:
            syscalls.unshare(abi.CLONE_NEWNS)
            self.enter()
        except BaseException as error:  # noqa: BLE001 - told to the parent
            os.write(3, repr(error).encode())
            os._exit(1)
        os.write(3, b"ready")
        os.closerange(0, 1 << 16)
        while True:
            signal.pause()

    def enter(self) -> None:
        raise NotImplementedError

    def command(self, *options: str) -> list[str]:
        return ["nsenter", f"--mount=/proc/{self.pid}/ns/mnt", *options, "--"]

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        KEPT.remove(self.pid)


class Unified(Kept):
    """The same programs, but only cgroup2, which lies over /sys/fs/cgroup.

    All its mounts are peers of the tests', so what propagates from there is seen here; only
    /sys/fs/cgroup is its own.
    """

    def enter(self) -> None:
        own = syscalls.open_tree(abi.AT_FDCWD, b"/sys/fs/cgroup", 0)
        syscalls.mount_setattr(own, propagation=abi.MS_PRIVATE)
        attach(fscontext.create(b"cgroup2", [], 0), "/sys/fs/cgroup")


class Tree(Unified):
    """A tree as root, with the product installed for the tree's own Python.

    unified: with cgroup2 alone, else with this machine's cgroups.
    """

    product = ("/usr/bin/python3", "-I", "-m", "sandboxfs")

    def __init__(self, name: str, unified: bool) -> None:
        self.name = name
        self.unified = unified
        super().__init__()

    def enter(self) -> None:
        # Read before they are out of sight.
        checkout = os.open(CHECKOUT, os.O_PATH)
        enginetrees.enter(self.name)
        if self.unified:
            super().enter()
        for name, text in named("").items():
            with open(f"/etc/{name}", "a", encoding="utf-8") as file:
                file.write(text)
        source = f"/proc/self/fd/{checkout}"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(f"{source}/sandboxfs", _INSTALLED, ignore=ignored)
        shutil.copytree(f"{source}/specs", f"{_INSTALLED}/_specs")
        os.close(checkout)

    def versions(self) -> Mapping[str, str]:
        return enginetrees.versions(self.name)


def named(etc: str) -> dict[str, str]:
    """Return what gives `RANGED` a name and subordinate ids, after what is in `etc`, by file."""
    lines = {
        "passwd": f"ranged:x:{RANGED}:{RANGED}::/:/bin/sh\n", "group": f"ranged:x:{RANGED}:\n",
        "subuid": "ranged:200000:65536\n", "subgid": "ranged:200000:65536\n",
    }
    if not etc:
        return lines
    kept = {name: Path(etc, name).read_text("utf-8") for name in ("passwd", "group")}
    return {name: kept.get(name, "") + line for name, line in lines.items()}
