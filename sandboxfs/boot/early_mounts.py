"""The basic mounts of an init: sysfs, proc, devtmpfs, devpts and cgroups.

What is mounted already stays as it is, a directory that is there is used, and one failure
doesn't keep the others from being tried.

Sources: Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/cgroups.rst,
Documentation/filesystems/devpts.rst.
"""

import os

from sandboxfs.errors import BootError
from sandboxfs.kernel import abi, fscontext
from sandboxfs.kernel.syscalls import mount_id, move_mount

CGROUP_MODES = ("v2", "v1", "none")
_CGROUPS = "/sys/fs/cgroup"
_NOSUID, _NODEV, _NOEXEC = abi.MOUNT_ATTR_NOSUID, abi.MOUNT_ATTR_NODEV, abi.MOUNT_ATTR_NOEXEC
_NOTHING = _NOSUID | _NODEV | _NOEXEC
_BASIC = (
    ("sysfs", "/sys", _NOTHING, ()),
    ("proc", "/proc", _NOTHING, ()),
    ("devtmpfs", "/dev", _NOSUID | _NOEXEC, ()),
    # Whoever opens /dev/pts/ptmx gets a terminal, as with /dev/ptmx; terminals are their owner's.
    ("devpts", "/dev/pts", _NOSUID | _NOEXEC, (("mode", "620"), ("ptmxmode", "666"))),
)


def make_early_mounts(cgroup="v2"):
    """Mount /sys, /proc, /dev, /dev/pts and cgroups; returns the failures (`BootError`s).

    cgroup: ``v2`` (one hierarchy), ``v1`` (one for each controller that /proc/cgroups shows as
    enabled), or ``none``.  ValueError for another word.
    """
    if cgroup not in CGROUP_MODES:
        raise ValueError(f"cgroup: {cgroup!r} is none of {', '.join(CGROUP_MODES)}")
    failures = []
    for type, path, attributes, settings in _BASIC:
        _try(failures, type, path, attributes, settings)
    if cgroup == "v2":
        _try(failures, "cgroup2", _CGROUPS, _NOTHING, ())
    elif cgroup == "v1":
        _mount_controllers(failures)
    return failures


def _mount_controllers(failures):
    if not _try(failures, "tmpfs", _CGROUPS, _NOTHING, (("mode", "755"),)):
        return
    try:
        controllers = _enabled_controllers()
    except OSError as error:
        failures.append(BootError("early-mounts", "read", "/proc/cgroups", "", error.errno or 0))
        return
    for name in controllers:
        path = f"{_CGROUPS}/{name}"
        if _try(failures, "cgroup", path, _NOTHING, ((name, None),)) and name == "memory":
            _use_hierarchy(failures, f"{path}/memory.use_hierarchy")


def _enabled_controllers():
    with open("/proc/cgroups", encoding="ascii") as table:
        rows = [line.split() for line in table if not line.startswith("#")]
    return [row[0] for row in rows if len(row) == 4 and row[3] == "1"]


def _use_hierarchy(failures, path):
    """Have a group's limit hold for those below it; newer kernels know nothing else."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    except OSError as error:
        failures.append(BootError("early-mounts", "open", path, "", error.errno or 0))
        return
    try:
        os.write(fd, b"1")
    except OSError as error:
        failures.append(BootError("early-mounts", "write", path, "", error.errno or 0))
    finally:
        os.close(fd)


def _try(failures, type, path, attributes, settings):
    """Mount one file system; returns whether something is mounted there now."""
    try:
        _mount(type, path, attributes, settings)
    except OSError as error:
        log = getattr(error, "log", "")
        text = f"{os.strerror(error.errno or 0)}: the kernel says: {log}" if log else ""
        call = getattr(error, "call", None) or "mkdir"
        failures.append(BootError(
            "early-mounts", call, path, text, error.errno or 0, _HINTS.get(error.errno or 0)
        ))
        return False
    return True


_HINTS = {
    19: "this kernel has no such file system, or its module isn't loaded",  # ENODEV
    16: "its controllers are in use by the other version of cgroups",  # EBUSY
}


def _mount(type, path, attributes, settings):
    try:
        os.mkdir(path, 0o755)
    except FileExistsError:
        pass
    try:
        where = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        error.call = "open"
        raise
    try:
        if mount_id(where)[1]:
            return  # whatever it is, somebody wanted it there
        words = [
            fscontext.flag(key.encode()) if value is None
            else fscontext.string(key.encode(), value.encode())
            for key, value in settings
        ]
        # Named in the mount table by its type, as mount(8) users do.
        words.append(fscontext.string(b"source", type.encode()))
        mount = fscontext.create(type.encode(), words, attributes)
        try:
            move_mount(mount, where)
        finally:
            os.close(mount)
    finally:
        os.close(where)
