"""A host for the tests to leave as they found it: a mount namespace that looks like one."""

import os
import stat
from pathlib import Path

import prctl

from sandboxfs.kernel import abi, fscontext, syscalls
from tests.support.namespace import set_propagation

CHECKOUT = Path(__file__).resolve().parents[2]
# Who of a parallel run this is: in the names of what is seen by all, such as loop devices.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")


def isolate() -> None:
    """Move this test process into a mount namespace of its own that behaves like a host's.

    Everything in it is shared, as systemd makes it, so a build that lets a mount propagate is
    caught by the leak check; but its peers are only here, and neither other workers' mounts nor
    this machine's are disturbed.  /run is empty.  A checkout below a closed directory
    (/root) is opened for unprivileged tests.  Orphans become children of this process.
    """
    prctl.set_child_subreaper(1)
    if os.geteuid() != 0:
        return
    syscalls.unshare(abi.CLONE_NEWNS)
    set_propagation(abi.MS_PRIVATE)
    mount_tmpfs("/run")
    _open_up(CHECKOUT)
    set_propagation(abi.MS_SHARED)


def mount_tmpfs(path: str | Path, mode: str = "0755", attributes: int = 0) -> None:
    """Mount a tmpfs on `path`, in whatever namespace the caller is."""
    settings = [fscontext.string(b"mode", mode.encode())]
    mount = fscontext.create(b"tmpfs", settings, attributes)
    attach(mount, path)


def attach(mount: int, path: str | Path) -> None:
    """Attach the detached mount `mount` on `path` and close the descriptor."""
    try:
        syscalls.move_mount_path(mount, abi.AT_FDCWD, os.fsencode(path))
    finally:
        os.close(mount)


def bind(source: str | Path, path: str | Path, recursive: bool = False) -> None:
    """Bind `source` on `path`, in whatever namespace the caller is."""
    flags = abi.OPEN_TREE_CLONE | (abi.AT_RECURSIVE if recursive else 0)
    attach(syscalls.open_tree(abi.AT_FDCWD, os.fsencode(source), flags), path)


def _open_up(path: Path) -> None:
    """Make `path` reachable for every user: a tmpfs hides the first closed directory above it."""
    closed = next((each for each in reversed(path.parents) if not _open_to_others(each)), None)
    if closed is None:
        return
    flags = abi.OPEN_TREE_CLONE | abi.AT_RECURSIVE
    checkout = syscalls.open_tree(abi.AT_FDCWD, os.fsencode(path), flags)
    mount_tmpfs(closed)
    path.mkdir(parents=True)
    attach(checkout, path)
    os.chdir(os.getcwd())  # the old directory lies below the tmpfs


def _open_to_others(path: Path) -> bool:
    return bool(path.stat().st_mode & stat.S_IXOTH)
