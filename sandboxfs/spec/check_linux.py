"""What the hot path checks of `linux`, but for what few documents have (`check_settings`)."""

from sandboxfs.errors import SpecError
from sandboxfs.spec.model import Device, IdMapping, Namespace
from sandboxfs.spec.values import (
    ABSENT,
    LARGEST_ID,
    LARGEST_NAME,
    are_clean,
    array,
    checked,
    each,
    enclosed,
    fault,
    integer,
    missing,
    object_of,
    require_object,
    strings,
    text,
    word,
    wrong_absolute_inner_path,
    wrong_absolute_path,
    wrong_inner_path,
)

MOST_MAPPINGS = 340  # user_namespaces(7): since Linux 4.15
NAMESPACES = ("mount", "pid", "network", "uts", "ipc", "user", "cgroup", "time")
PROPAGATIONS = (
    "private", "rprivate", "shared", "rshared", "slave", "rslave", "unbindable", "runbindable",
)


def read(document, found, problems):
    """Read what stands first in `linux`, and whether it is an object."""
    linux = object_of(document, "linux", "linux", "") or {}
    found.namespaces = each(
        array(linux, "namespaces", "/linux"), "/linux/namespaces", _namespace, problems
    )
    found.cgroups_path = text(linux, "cgroupsPath", "/linux") or None
    found.mount_label = text(linux, "mountLabel", "/linux") or None
    if "rootfsPropagation" in linux:
        found.rootfs_propagation = word(linux, "rootfsPropagation", "/linux", PROPAGATIONS)


def _namespace(entry, index, pointer):
    require_object(entry, "namespace", pointer)
    kind = word(entry, "type", pointer, NAMESPACES)
    path = checked(entry, "path", pointer, wrong_namespace_path)
    return Namespace(index, kind, path or None)


def wrong_namespace_path(value):
    """As `wrong_absolute_path`; an empty one stands for a new namespace, as in Go."""
    return wrong_absolute_path(value) if value else None


def _read_mappings(document, found, problems):
    linux = document.get("linux", {})
    found.uid_mappings = id_mappings(linux, "uidMappings", "/linux")
    found.gid_mappings = id_mappings(linux, "gidMappings", "/linux")


def id_mappings(owner, key, pointer):
    """Return the list owner[key] of `IdMapping`, of `linux` or of a mount."""
    entries = array(owner, key, pointer)
    if len(entries) > MOST_MAPPINGS:
        fault(f"{pointer}/{key}", ABSENT, f"at most {MOST_MAPPINGS} entries are allowed")
    return [
        _mapping(entry, f"{pointer}/{key}/{index}") for index, entry in enumerate(entries)
    ]


def _mapping(entry, pointer):
    require_object(entry, "mapping", pointer)
    for key in ("containerID", "hostID", "size"):
        if key not in entry:
            missing(f"{pointer}/{key}")
    return IdMapping(
        integer(entry, "containerID", pointer, 0, LARGEST_ID),
        integer(entry, "hostID", pointer, 0, LARGEST_ID),
        integer(entry, "size", pointer, 1, 2**32 - 1),
    )


def _read_devices(document, found, problems):
    found.devices = each(
        array(document.get("linux", {}), "devices", "/linux"), "/linux/devices", _device,
        problems,
    )


def _device(entry, index, pointer):
    require_object(entry, "device", pointer)
    kind = word(entry, "type", pointer, ("c", "b", "u", "p"))
    path = checked(entry, "path", pointer, wrong_inner_path)
    if path is None:
        missing(f"{pointer}/path")
    # A dev_t of the kernel: 12 bits of major, 20 of minor (linux/kdev_t.h).
    major = integer(entry, "major", pointer, 0, (1 << 12) - 1)
    minor = integer(entry, "minor", pointer, 0, (1 << 20) - 1)
    if kind != "p" and (major is None or minor is None):
        missing(f"{pointer}/" + ("major" if major is None else "minor"))
    # Some engines write st_mode whole, with the bits of the type.
    mode = integer(entry, "fileMode", pointer, 0, 0o177777)
    return Device(
        index, path, kind, major or 0, minor or 0, None if mode is None else mode & 0o7777,
        integer(entry, "uid", pointer, 0, LARGEST_ID),
        integer(entry, "gid", pointer, 0, LARGEST_ID),
    )


def _read_paths(document, found, problems):
    linux = document.get("linux", {})
    for key, field in (("maskedPaths", "masked_paths"), ("readonlyPaths", "readonly_paths")):
        if key in linux:
            setattr(found, field, _inner_paths(linux, key))


def _inner_paths(linux, key):
    paths = linux[key]
    if (type(paths) is list and set(map(type, paths)) == {str}
            and max(map(len, paths)) <= LARGEST_NAME // 4):
        joined = enclosed(paths)
        if joined.count("\0") == len(paths) + 1 and are_clean(joined):
            return list(paths)
    return strings(linux, key, "/linux", wrong_absolute_inner_path)


def _read_settings(document, found, problems):
    linux = document.get("linux", {})
    if "sysctl" in linux or "timeOffsets" in linux or "netDevices" in linux:
        from sandboxfs.spec import check_settings

        check_settings.read(linux, found)
    resources = object_of(linux, "resources", "resources", "/linux")
    memory = object_of(resources or {}, "memory", "memory", "/linux/resources")
    if memory is not None:
        limit = integer(memory, "limit", "/linux/resources/memory", -(2**63), 2**63 - 1, -1)
        found.memory_limit = limit if limit > 0 else None


# The parts of an object `linux`; of anything else `read` tells the fault.
PARTS = (_read_mappings, _read_devices, _read_paths, _read_settings)


# -- rules between values -----------------------------------------------------------------


def has_namespace(found, kind):
    """Return whether a `Spec` has a namespace of a type, new or joined."""
    return any(entry.type == kind for entry in found.namespaces)


def namespace_rules(found):
    """Yield the faults of namespaces, and of what needs one."""
    seen = set()
    for entry in found.namespaces:
        if entry.type in seen:
            yield SpecError(
                f"/linux/namespaces/{entry.index}/type", "", f'"{entry.type}"',
                "stands twice; a container has one namespace of a type",
            )
        seen.add(entry.type)
    # Without a namespace of its own the host's name would be changed.
    for key, value in (("hostname", found.hostname), ("domainname", found.domainname)):
        if value and "uts" not in seen:
            yield SpecError(f"/{key}", "", f'"{value}"', "needs a uts namespace")
    for entry in found.namespaces if found.time_offsets else ():
        if entry.type == "time" and entry.path:
            yield SpecError(
                "/linux/timeOffsets", text="can't be set on a time namespace that is joined"
            )
    if found.time_offsets and "time" not in seen:
        yield SpecError("/linux/timeOffsets", text="needs a time namespace")
    if found.net_devices and "network" not in seen:
        yield SpecError("/linux/netDevices", text="needs a network namespace")


def mapping_rules(found):
    """Yield the faults of the mappings of the user namespace and of idmapped mounts."""
    if (found.uid_mappings or found.gid_mappings) and not has_namespace(found, "user"):
        key = "uidMappings" if found.uid_mappings else "gidMappings"
        yield SpecError(f"/linux/{key}", text="needs a user namespace")
    if bool(found.uid_mappings) != bool(found.gid_mappings):
        yield SpecError(
            "/linux/" + ("gidMappings" if found.uid_mappings else "uidMappings"),
            text="is missing: uidMappings and gidMappings come together, or neither",
        )
    for key, mappings in (
        ("/linux/uidMappings", found.uid_mappings), ("/linux/gidMappings", found.gid_mappings),
    ):
        if mappings:
            yield from _range_rules(mappings, key)
    for mount in found.mounts:
        if mount.uid_mappings:
            yield from _range_rules(mount.uid_mappings, f"/mounts/{mount.index}/uidMappings")
            yield from _range_rules(mount.gid_mappings, f"/mounts/{mount.index}/gidMappings")


def _range_rules(mappings, pointer):
    """user_namespaces(7): ranges stay below 2^32 - 1 and overlap on neither side."""
    for field, key in (("container_id", "containerID"), ("host_id", "hostID")):
        ranges = sorted(
            (getattr(mapping, field), mapping.size, index)
            for index, mapping in enumerate(mappings)
        )
        end = 0
        for first, size, index in ranges:
            if first + size > LARGEST_ID + 1:
                yield SpecError(
                    f"{pointer}/{index}", "", f"{key} {first}, size {size}",
                    f"the last id allowed is {LARGEST_ID}",
                )
            if first < end:
                yield SpecError(
                    f"{pointer}/{index}", "", f"{key} {first}, size {size}",
                    "overlaps with another range",
                )
            end = max(end, first + size)


def setting_rules(found):
    """Yield the faults of what `check_settings` reads."""
    if found.sysctl or found.net_devices:
        from sandboxfs.spec import check_settings

        yield from check_settings.rules(found)
