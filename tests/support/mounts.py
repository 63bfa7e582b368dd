"""Assertions on the parsed mount table."""

from pathlib import Path
from typing import Any

from sandboxfs.kernel import abi, mountinfo, mounttable

# A `sandboxfs.kernel.mountinfo.MountRecord`, whose module is unannotated.
MountRecord = Any


def table(pid: int | None = None) -> list[MountRecord]:
    """Return the mount table of this process, or of another one, from mountinfo."""
    name = "self" if pid is None else str(pid)
    return parsed(Path(f"/proc/{name}/mountinfo").read_bytes())


def parsed(text: str | bytes) -> list[MountRecord]:
    """Return the records of a mountinfo text, such as a payload's ``cat /proc/self/mountinfo``."""
    content = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    return list(mounttable.parents_first(mountinfo.parse(content)))


def points(records: list[MountRecord]) -> list[str]:
    """Return the mountpoints in the table's order."""
    return [record.mountpoint.decode("utf-8", "surrogateescape") for record in records]


def mount_at(records: list[MountRecord], path: str) -> MountRecord:
    """Return the topmost mount at `path`; asserts that there is one."""
    found = [each for each in records if each.mountpoint == path.encode()]
    assert found, f"nothing is mounted at {path}, only at {points(records)}"
    return found[-1]


def assert_mount(
    records: list[MountRecord],
    path: str,
    *,
    type: str | None = None,
    source: str | None = None,
    root: str | None = None,
    flags: set[str] | None = None,
    propagation: int | None = None,
    superblock: set[str] | None = None,
) -> MountRecord:
    """Assert what the topmost mount at `path` is, and return it.

    flags: exactly these words of ro, nosuid, nodev, noexec, noatime, nodiratime, nosymfollow,
    strictatime, idmapped.  propagation: `MS_PRIVATE` or `MS_SHARED` | `MS_SLAVE`.
    superblock: options of the file system that must be among its own.
    """
    record = mount_at(records, path)
    if type is not None:
        assert record.type.decode() == type, f"{path} is a {record.type!r}"
    if source is not None:
        assert record.source.decode() == source, f"{path} comes from {record.source!r}"
    if root is not None:
        assert record.root.decode() == root, f"{path} shows {record.root!r}"
    if flags is not None:
        assert flags_of(record) == flags, f"{path} has the flags {sorted(flags_of(record))}"
    if propagation is not None:
        assert record.propagation == propagation, f"{path}: propagation {record.propagation:#x}"
    if superblock is not None:
        options = set(record.superblock_options.decode().split(","))
        assert superblock <= options, f"{path} has the options {sorted(options)}"
    return record


_WORDS = {
    abi.MOUNT_ATTR_RDONLY: "ro",
    abi.MOUNT_ATTR_NOSUID: "nosuid",
    abi.MOUNT_ATTR_NODEV: "nodev",
    abi.MOUNT_ATTR_NOEXEC: "noexec",
    abi.MOUNT_ATTR_NOATIME: "noatime",
    abi.MOUNT_ATTR_STRICTATIME: "strictatime",
    abi.MOUNT_ATTR_NODIRATIME: "nodiratime",
    abi.MOUNT_ATTR_NOSYMFOLLOW: "nosymfollow",
    abi.MOUNT_ATTR_IDMAP: "idmapped",
}


def flags_of(record: MountRecord) -> set[str]:
    """Return a record's attributes as words; relatime, the default, has none."""
    return {word for value, word in _WORDS.items() if record.attributes & value}
