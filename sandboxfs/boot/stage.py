"""Where a new root is attached while it is made ready: a directory of its own in the old one."""

import os
import time
from contextlib import contextmanager

from sandboxfs.boot.content import Torn
from sandboxfs.errors import BootError
from sandboxfs.kernel import abi
from sandboxfs.kernel.syscalls import move_mount_path, umount2


@contextmanager
def staged(mount):
    """Attach a mount (its descriptor); gives the path, and takes all away again on an error.

    Attached, it outlives us: what has been moved to it isn't lost with a process that is killed.
    So it stays in place, too, where an error comes from a `Torn`.  BootError.
    """
    stage, before = _directory()
    try:
        try:
            move_mount_path(mount, abi.AT_FDCWD, os.fsencode(stage))
        except OSError as error:
            raise BootError("", "move_mount", stage, "", error.errno or 0) from error
        _restore_times(before)
        yield stage
    except BaseException as error:
        if not isinstance(error.__cause__, Torn) and os.path.isdir(stage):
            if os.path.ismount(stage):
                umount2(os.fsencode(stage), abi.MNT_DETACH)
            os.rmdir(stage)
            _restore_times(before)
        raise


def _directory():
    """Make a directory; returns its path, and what its parent was before."""
    stage = f"/.sandboxfs-root-{os.getpid()}-{time.monotonic_ns()}"
    before = os.stat("/")
    try:
        os.mkdir(stage, 0o700)
    except OSError as error:
        raise BootError("", "mkdir", stage, "", error.errno or 0) from error
    return stage, before


def _restore_times(before):
    os.utime("/", ns=(before.st_atime_ns, before.st_mtime_ns))
