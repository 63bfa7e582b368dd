"""What the hot path checks of `mounts`."""

from sandboxfs.errors import SpecError
from sandboxfs.spec.check_linux import id_mappings
from sandboxfs.spec.model import Mount
from sandboxfs.spec.values import (
    ABSENT,
    array,
    checked,
    clean,
    each,
    fault,
    missing,
    require_object,
    shown,
    strings,
    text,
    wrong_inner_path,
    wrong_length,
)

# What lxcfs and checkpointing put there; runc's list (validProcMounts).
_PROC_FILES = frozenset((
    "/proc/cpuinfo", "/proc/diskstats", "/proc/meminfo", "/proc/stat", "/proc/swaps",
    "/proc/uptime", "/proc/loadavg", "/proc/slabinfo", "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/crypto/fips_enabled",
))


def read(document, found, problems):
    """Read `mounts` into the `Spec` `found`."""
    found.mounts = each(array(document, "mounts", ""), "/mounts", _mount, problems)


def _mount(entry, index, pointer):
    require_object(entry, "mount", pointer)
    destination = checked(entry, "destination", pointer, wrong_inner_path)
    if destination is None:
        missing(f"{pointer}/destination")
    # An empty source or type is Go's way of leaving it out.
    source = checked(entry, "source", pointer, wrong_length) or None
    uids = id_mappings(entry, "uidMappings", pointer)
    gids = id_mappings(entry, "gidMappings", pointer)
    if bool(uids) != bool(gids):
        fault(
            f"{pointer}/{'gidMappings' if uids else 'uidMappings'}", ABSENT,
            "is missing: uidMappings and gidMappings come together, or neither",
        )
    return Mount(
        index, destination, text(entry, "type", pointer) or None, source,
        strings(entry, "options", pointer, wrong_option), uids, gids,
    )


def wrong_option(value):
    """Say that an option is empty, or return None."""
    return None if value else "an empty option is not allowed"


def is_bind(mount):
    """Return whether a `Mount` is a bind: by its options, or by its type (runc's habit)."""
    return mount.type == "bind" or "bind" in mount.options or "rbind" in mount.options


def rules(found):
    """Yield a `SpecError` for every rule between values that a `Spec` breaks, and warn."""
    for mount in found.mounts:
        bind = is_bind(mount)
        if bind and mount.source is None and "remount" not in mount.options:
            yield SpecError(f"/mounts/{mount.index}/source", text="is missing: a bind needs one")
        if "proc" in mount.destination:
            yield from _proc_rules(mount, bind)
        if mount.destination[0] != "/":
            found.warnings.append(
                f"mounts[{mount.index}]: destination {shown(mount.destination)} is relative, "
                "taken from / (deprecated by the specification)"
            )


def _proc_rules(mount, bind):
    """Over or inside /proc only procfs itself and the files that lxcfs emulates."""
    destination = clean(mount.destination)
    if destination == "/proc":
        if "remount" in mount.options or (not bind and mount.type == "proc"):
            return
        if bind and mount.source is not None and clean(mount.source) == "/proc":
            return
    elif not destination.startswith("/proc/") or destination in _PROC_FILES:
        return
    yield SpecError(
        f"/mounts/{mount.index}/destination", "", f'"{mount.destination}"',
        "over or inside /proc only proc itself is allowed, and the files "
        + ", ".join(sorted(path[len("/proc/"):] for path in _PROC_FILES)),
    )
