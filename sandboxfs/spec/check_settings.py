"""The checks of what few documents have: sysctl, timeOffsets, netDevices of `linux`."""

from sandboxfs.errors import SpecError
from sandboxfs.spec.check_linux import has_namespace
from sandboxfs.spec.values import (
    ABSENT,
    escaped,
    fault,
    integer,
    object_of,
    require_object,
    string_map,
    text,
)

# ipc_kern_table and mq_sysctl_table of the kernel: what an ipc namespace has of its own.
_IPC_SYSCTLS = frozenset(
    "kernel/" + name
    for name in (
        "auto_msgmni", "msg_next_id", "msgmax", "msgmnb", "msgmni", "sem", "sem_next_id",
        "shm_next_id", "shm_rmid_forced", "shmall", "shmmax", "shmmni",
    )
)


def read(linux, found):
    """Read the three into the `Spec` `found`, from the object `linux`."""
    values = object_of(linux, "sysctl", None, "/linux")
    if values is not None:
        found.sysctl = string_map(values, "/linux/sysctl")
    offsets = object_of(linux, "timeOffsets", None, "/linux")
    if offsets is not None:
        found.time_offsets = {
            clock: _time_offset(clock, entry) for clock, entry in offsets.items()
        }
    devices = object_of(linux, "netDevices", None, "/linux")
    if devices is not None:
        found.net_devices = {
            device: _net_device(device, entry) for device, entry in devices.items()
        }


def _time_offset(clock, entry):
    pointer = f"/linux/timeOffsets/{escaped(clock)}"
    if clock not in ("monotonic", "boottime"):
        fault(pointer, ABSENT, "allowed: monotonic, boottime")
    require_object(entry, "timeOffset", pointer)
    return (
        integer(entry, "secs", pointer, -(2**63), 2**63 - 1, 0),
        integer(entry, "nanosecs", pointer, 0, 10**9 - 1, 0),
    )


def _net_device(device, entry):
    pointer = f"/linux/netDevices/{escaped(device)}"
    wrong = wrong_interface(device)
    if wrong:
        fault(pointer, ABSENT, wrong)
    require_object(entry, "netDevice", pointer)
    name = text(entry, "name", pointer)
    wrong = wrong_interface(name) if name else None
    if wrong:
        fault(f"{pointer}/name", name, wrong)
    return name or None


def wrong_interface(value):
    """Say what keeps a string from being a network interface's name, or return None.

    dev_valid_name() of the kernel; `%` would make it a pattern there.
    """
    if not 0 < len(value.encode("utf-8", "surrogateescape")) <= 15:
        return "a name of 1 to 15 bytes is allowed"
    if value in (".", "..") or any(c in "/:%" or c.isspace() for c in value):
        return "is no name of a network interface"
    return None


def sysctl_path(key):
    """Return the path below /proc/sys of a sysctl's name, or None if it is no name.

    As sysctl(8) has it: the first of `.` and `/` in it is the separator, the other one
    belongs to the names (``net/ipv4/conf/eth0.1/forwarding``).
    """
    dot, slash = key.find("."), key.find("/")
    if dot >= 0 and (slash < 0 or dot < slash):
        key = key.translate({ord("."): "/", ord("/"): "."})
    parts = key.split("/")
    if len(parts) < 2 or any(part in ("", ".", "..") for part in parts):
        return None
    return key


def rules(found):
    """Yield a `SpecError` for every rule between values that a `Spec` breaks."""
    yield from _sysctl_rules(found)
    yield from _net_device_rules(found)


def _sysctl_rules(found):
    """Only what belongs to a namespace of the container's own can be set."""
    for key in found.sysctl:
        path = sysctl_path(key)
        wrong = _wrong_sysctl(found, path) if path else "is no name of a sysctl"
        if wrong:
            yield SpecError(f"/linux/sysctl/{escaped(key)}", text=wrong)


def _wrong_sysctl(found, path):
    if path in _IPC_SYSCTLS or path.startswith("fs/mqueue/"):
        kind = "ipc"
    elif path.startswith("net/"):
        kind = "network"
    elif path.startswith("user/"):
        kind = "user"
    elif path in ("kernel/hostname", "kernel/domainname"):
        kind = "uts"
        if getattr(found, path[len("kernel/"):]) is not None:
            return f"is set by /{path[len('kernel/'):]} already"
    else:
        return "belongs to no namespace: it would change the host"
    return None if has_namespace(found, kind) else f"needs a namespace of type {kind}"


def _net_device_rules(found):
    seen = set()
    for device, name in found.net_devices.items():
        if (name or device) in seen:
            yield SpecError(
                f"/linux/netDevices/{escaped(device)}", "", f'"{name or device}"',
                "is the name of another device in the container already",
            )
        seen.add(name or device)
