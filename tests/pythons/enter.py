"""Execute a command in a tree of another Debian, this checkout in it at its own path.

    python -m tests.pythons.enter TREE COMMAND [ARGUMENT…]

TREE is a name of `tests.support.enginetrees`, or a directory.  Everything happens in a mount
namespace of its own: neither the tree nor the checkout is written, and the checkout's ``.venv``
holds nothing but a link to the tree's interpreter.
"""

import os
import sys

from sandboxfs.kernel import abi, fscontext, syscalls
from tests.support import enginetrees
from tests.support.host import CHECKOUT, attach, mount_tmpfs
from tests.support.namespace import set_propagation

# Of the caller's environment nothing but these is kept.
KEPT = ("CI",)
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/usr/sbin", "HOME": "/root", "LANG": "C.UTF-8",
    # What the set-up promises isn't promised there (tests/support/skips.py).
    "SANDBOXFS_TESTS_IN_TREE": "1",
}


def enter(tree: str) -> None:
    """Make `tree` the root of this process, whose mounts nobody else sees from then on."""
    syscalls.unshare(abi.CLONE_NEWNS)
    flags = abi.OPEN_TREE_CLONE | abi.AT_RECURSIVE
    checkout = syscalls.open_tree(abi.AT_FDCWD, os.fsencode(CHECKOUT), flags)
    enginetrees.enter(tree)
    # Nothing that is mounted from here on is for the peers of what was cloned, /var/tmp's for one.
    set_propagation(abi.MS_PRIVATE)
    CHECKOUT.mkdir(parents=True, exist_ok=True)
    attach(checkout, CHECKOUT)
    set_propagation(abi.MS_PRIVATE)
    _write_to_memory()
    venv = CHECKOUT / ".venv"
    mount_tmpfs(venv)
    (venv / "bin").mkdir()
    (venv / "bin" / "python").symlink_to("/usr/bin/python3")
    # What an editable installation comes to.
    with open("/usr/lib/python3/dist-packages/checkout.pth", "w", encoding="utf-8") as file:
        file.write(f"{CHECKOUT}\n")
    os.chdir(CHECKOUT)


def _write_to_memory() -> None:
    """Lay an overlay over the checkout."""
    mount_tmpfs("/mnt")
    layers = [os.open(CHECKOUT, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)]
    for name in ("upper", "work"):
        os.mkdir(f"/mnt/{name}")
        layers.append(os.open(f"/mnt/{name}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    # By descriptor: a path may hold what separates options.
    settings = [
        fscontext.string(key, b"/proc/self/fd/%d" % layer)
        for key, layer in zip((b"lowerdir", b"upperdir", b"workdir"), layers, strict=True)
    ]
    attach(fscontext.create(b"overlay", settings, 0), CHECKOUT)
    for layer in layers:
        os.close(layer)
    syscalls.umount2(b"/mnt", abi.MNT_DETACH)


def main() -> None:
    """Do what the command line says."""
    tree, *command = sys.argv[1:]
    enter(tree)
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    os.execvpe(command[0], command, {**ENVIRONMENT, **environment})


if __name__ == "__main__":
    main()
