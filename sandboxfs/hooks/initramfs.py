"""The hook inside an initramfs, where a runtime can't pivot: will it enter what we mount?

Told not to pivot, a runtime moves the rootfs onto `/` and changes its root to its working
directory.  crun goes to the rootfs by its path for that, as late as it can, and finds what a hook
has mounted there.  runc has stood in it since before the hooks, below anything that is mounted
there now: its container would write to the rootfs itself, and nobody would notice.

Sources: runc's msMoveRoot, crun's do_move_root (observed: runc 1.1.5, crun 1.8.1).
"""

import errno

from sandboxfs.errors import HookError
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import read_file


def check(root):
    """Raise HookError if the runtime would enter the rootfs past the finished root (a `Root`).

    To be called where the root of this process is an initramfs.
    """
    here = os.fstat(root.place.fd)
    there = _directory_of_parent()
    if there is None or (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino):
        return
    raise HookError(
        "createContainer", "pivot_root", root.plan.live.path, "in an initramfs the runtime can't "
        "pivot, and will enter the rootfs past what is mounted on it", errno.EINVAL,
        hint="crun --no-pivot works; so does every runtime after sandboxfs switch-root --user-root",
    )


def _directory_of_parent():
    """Return the status of our parent's working directory, or None where it isn't told.

    By the number that this procfs, which may be of another pid namespace, has for it.
    """
    try:
        # The program's name, in parentheses, may hold anything.
        fields = read_file(b"/proc/self/stat").rpartition(b")")[2].split()
        return os.stat(b"/proc/" + fields[1] + b"/cwd")
    except OSError:
        return None
