"""The spec used without a bundle: a throw-away view of a root, this machine's by default.

Mounts, masks and read-only paths are those of containerd's default spec.  What differs
serves the use: the host's network stays, so that things can be fetched, and root keeps its
capabilities, so that packages can be installed.
"""

import os

from sandboxfs.spec import load
from sandboxfs.spec.check_process import CAPABILITIES

MASKED_PATHS = (
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys",
    "/proc/latency_stats", "/proc/scsi", "/proc/sched_debug", "/proc/timer_list",
    "/proc/timer_stats", "/sys/devices/virtual/powercap", "/sys/firmware",
)
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Made anew inside, so that a working directory below means nothing there.
_REPLACED = ("/proc", "/dev", "/sys")


def spec(rootfs="/", args=("sh",), rootless=None):
    """Return the default `Spec`; the arguments are those of `document`."""
    return load.from_document(document(rootfs, args, rootless), name="default")


def document(rootfs="/", args=("sh",), rootless=None):
    """Return the default config.json as a dict.

    rootfs: a directory or an image.  args: the command.  rootless: with a user namespace
    whose root is the caller; by default if the caller isn't root.  Working directory,
    PATH, HOME and TERM are the caller's where the root is this machine's; `terminal` is set
    when stdin and stdout are terminals.
    """
    if rootless is None:
        rootless = os.geteuid() != 0
    rootfs = os.path.abspath(os.fsdecode(rootfs))
    own = rootfs == "/"
    namespaces = ["pid", "mount", "ipc", "uts"] + ["user"] * rootless
    linux = {
        "namespaces": [{"type": kind} for kind in namespaces],
        "maskedPaths": list(MASKED_PATHS),
        "readonlyPaths": list(READONLY_PATHS),
    }
    if rootless:
        linux["uidMappings"] = [{"containerID": 0, "hostID": os.geteuid(), "size": 1}]
        linux["gidMappings"] = [{"containerID": 0, "hostID": os.getegid(), "size": 1}]
    return {
        "ociVersion": "1.1.0",
        "process": {
            "terminal": os.isatty(0) and os.isatty(1),
            "user": {"uid": 0, "gid": 0},
            "args": list(args),
            "env": _environment(own),
            "cwd": _working_directory() if own else "/",
            "capabilities": _capabilities(rootless),
        },
        "root": {"path": rootfs},
        "mounts": _mounts(rootless),
        "linux": linux,
    }


def _mount(destination, type, source, *options):
    return {
        "destination": destination, "type": type, "source": source, "options": list(options),
    }


def _mounts(rootless):
    # Group 5, tty, isn't among the ids of a rootless container.
    owner = () if rootless else ("gid=5",)
    return [
        _mount("/proc", "proc", "proc", "nosuid", "noexec", "nodev"),
        _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount("/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance",
               "ptmxmode=0666", "mode=0620", *owner),
        _mount("/dev/shm", "tmpfs", "shm", "nosuid", "noexec", "nodev", "mode=1777",
               "size=65536k"),
        _mount("/dev/mqueue", "mqueue", "mqueue", "nosuid", "noexec", "nodev"),
        # A new sysfs shows the network namespace of whoever mounts it; the host's is kept,
        # so the host's own is bound, read-only with all that is mounted below it (cgroups).
        _mount("/sys", "none", "/sys", "rbind", "nosuid", "noexec", "nodev", "rro"),
    ]


def _environment(own):
    """Return PATH, HOME and TERM; the caller's PATH and HOME mean nothing in another root."""
    path = os.environ.get("PATH") if own else None
    home = os.environ.get("HOME") if own else None
    entries = [f"PATH={path or DEFAULT_PATH}", f"HOME={home or '/root'}"]
    if os.environ.get("TERM"):
        entries.append(f"TERM={os.environ['TERM']}")
    return [entry if _is_text(entry) else f"{entry.partition('=')[0]}=" for entry in entries]


def _is_text(string):
    """Return whether JSON can hold a string of the system (which may be no UTF-8)."""
    return not any("\udc80" <= character <= "\udcff" for character in string)


def _working_directory():
    """Return the caller's working directory if it means the same inside, else "/"."""
    try:
        path = os.getcwd()
    except OSError:  # it was removed
        return "/"
    # The kernel calls a directory outside our root "(unreachable)/…".
    if path[:1] != "/" or len(path) > 4095 or not _is_text(path):
        return "/"
    return "/" if "/" + path.split("/")[1] in _REPLACED else path


def _capabilities(rootless):
    """Return all five sets: what the caller may hold; everything in a new user namespace.

    Ambient ones aren't set: they would survive in programs that drop root.
    """
    names = list(CAPABILITIES)
    if not rootless:
        allowed = _permitted()
        names = [name for number, name in enumerate(CAPABILITIES) if allowed >> number & 1]
    sets = ("bounding", "effective", "permitted")
    return {key: list(names) for key in sets}


def _permitted():
    """Return the caller's permitted and bounding capabilities as a bit mask (proc(5))."""
    everything = (1 << len(CAPABILITIES)) - 1
    try:
        file = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # no /proc: early in an initramfs, where root has them all
        return everything
    try:
        status = os.read(file, 1 << 16)
    finally:
        os.close(file)
    for line in status.split(b"\n"):
        key, _, value = line.partition(b":\t")
        if key in (b"CapPrm", b"CapBnd"):
            everything &= int(value, 16)
    return everything
