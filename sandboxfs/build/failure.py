"""From an OSError to an error a person can use: origin, call, path, errno, kernel log, hint."""

import errno

from sandboxfs.errors import MountError
from sandboxfs.kernel import system as os

# (call, errno) or errno → what the name doesn't tell.
_HINTS = {
    ("move_mount", errno.ENOSPC): "no disk is full: the mount namespace has as many mounts as "
    "fs.mount-max (sysctl) allows",
    ("openat2", errno.EAGAIN): "somebody keeps renaming directories on the path",
    ("unshare", errno.EPERM): "this user may not make namespaces: see sandboxfs doctor",
    ("mount_setattr", errno.EPERM): "the flag is locked by the owner of the mount's user "
    "namespace and can't be cleared from inside",
    errno.EMFILE: "raise RLIMIT_NOFILE (ulimit -n): a build keeps a descriptor for each mount",
    errno.ENFILE: "the machine's table of open files is full (fs.file-max)",
    errno.ENOSYS: "this kernel lacks the call: sandboxfs needs Linux 5.12 or later",
    errno.ENODEV: "the kernel has no such file system: its module may have to be loaded",
    errno.ELOOP: "a symlink is where none may be, or links lead in a circle",
}


def hint_for(call, number):
    """Return what the name of an errno doesn't tell of a failed call, or None."""
    return _HINTS.get((call.split(" ")[0], number)) or _HINTS.get(number)


def worded(error, operation, target, call=None):
    """Return the MountError of an OSError met while an operation worked on `target`.

    A MountError comes back as it is: it was worded closer to the fault.
    """
    if isinstance(error, MountError):
        return error
    call = getattr(error, "call", None) or call or operation.name
    log = getattr(error, "log", "")
    number = error.errno or 0
    text = os.strerror(number) if number else str(error)
    if log:
        text = f"{text}: the kernel says: {log}"
    elif error.strerror and error.strerror != text:
        text = error.strerror
    hint = getattr(error, "hint", None)
    if hint is None:
        hint = hint_for(call, number)
    return MountError(operation.origin, call, target, text, number, hint)
