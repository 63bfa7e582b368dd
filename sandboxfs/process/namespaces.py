"""Namespaces by their OCI names, the copy of this process that lives in new ones, and their `lo`.

Sources: config-linux.md ("Namespaces"), clone(2), namespaces(7), netdevice(7).
"""

import sys
from errno import EAFNOSUPPORT

from sandboxfs.errors import ProcessError
from sandboxfs.kernel import abi
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import clone3, has_threads, ioctl, socket

FLAGS = {
    "mount": abi.CLONE_NEWNS,
    "pid": abi.CLONE_NEWPID,
    "network": abi.CLONE_NEWNET,
    "ipc": abi.CLONE_NEWIPC,
    "uts": abi.CLONE_NEWUTS,
    "cgroup": abi.CLONE_NEWCGROUP,
    "user": abi.CLONE_NEWUSER,
    "time": abi.CLONE_NEWTIME,
}
# Names under /proc/PID/ns.
FILES = {
    "mount": "mnt", "pid": "pid", "network": "net", "ipc": "ipc", "uts": "uts",
    "cgroup": "cgroup", "user": "user", "time": "time",
}

SIGCHLD = 17
_AF_INET, _AF_INET6 = 2, 10
_SIOCSIFFLAGS = 0x8914
_IFF_UP_RUNNING = 0x41
_IFNAMSIZ = 16


def new_flags(plan):
    """Return the `CLONE_NEW*` of the namespaces that the plan makes, the user one left out."""
    flags = 0
    for entry in plan.namespaces:
        if entry.path is None:
            flags |= FLAGS[entry.type]
    return flags


def require_one_thread():
    """Raise `ProcessError` in a process with threads.

    The child of clone3 is a copy of the calling thread alone, and nobody is there to release
    the locks the others held (of the allocator, of the interpreter).
    """
    if has_threads():
        raise ProcessError(
            "", "clone3", "", "this process has threads, and a copy of it would hang",
            hint="run it from a process of its own: start sandboxfs as a command",
        )


def fork_into(flags, exit_signal=SIGCHLD):
    """Copy this process into new namespaces; returns the child's pid, 0 in the child."""
    try:
        return clone3(flags, exit_signal)
    except OSError as error:
        raise refused(error, "clone3", flags) from None


def refused(error, call, flags):
    """Return the error of a call that should have made a process in new namespaces."""
    names = " ".join(name for name, flag in FLAGS.items() if flags & flag)
    hint = None
    if error.errno == 1:  # EPERM
        hint = (
            "new namespaces need root, or a user namespace and a kernel that lets you make one "
            "(kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns)"
        )
    elif error.errno == 28:  # ENOSPC
        hint = "a limit of /proc/sys/user/max_*_namespaces, or namespaces nested too deep"
    elif error.errno == 22:  # EINVAL
        hint = "a kind of namespace that this kernel lacks (time: Linux 5.6)"
    return ProcessError("linux.namespaces", call, names, "", error.errno, hint)


def loopback_up():
    """Bring `lo` up in this process's network namespace: 127.0.0.1 and ::1 come with it."""
    try:
        fd = socket(_AF_INET)
    except OSError as error:
        if error.errno != EAFNOSUPPORT:
            raise
        fd = socket(_AF_INET6)
    try:
        name = b"lo".ljust(_IFNAMSIZ, b"\0")
        flags = _IFF_UP_RUNNING.to_bytes(2, sys.byteorder)
        ioctl(fd, "SIOCSIFFLAGS", _SIOCSIFFLAGS, name + flags + bytes(22))
    finally:
        os.close(fd)
