"""mountinfo, the mount table as text (proc_pid_mountinfo(5)), and the record of a mount.

`MountRecord` is what `mounttable` reads by statmount(2), too.
"""

from sandboxfs.kernel import abi
from sandboxfs.kernel.syscalls import read_all, read_file

_ATTRIBUTE_OF_WORD = {
    b"ro": abi.MOUNT_ATTR_RDONLY,
    b"nosuid": abi.MOUNT_ATTR_NOSUID,
    b"nodev": abi.MOUNT_ATTR_NODEV,
    b"noexec": abi.MOUNT_ATTR_NOEXEC,
    b"nodiratime": abi.MOUNT_ATTR_NODIRATIME,
    b"nosymfollow": abi.MOUNT_ATTR_NOSYMFOLLOW,
    b"idmapped": abi.MOUNT_ATTR_IDMAP,
}


class MountRecord:
    """One mount of a mount namespace.

    id, parent_id: unique ids (never reused) from statmount, mountinfo's numbers from
    mountinfo; old_id and old_parent_id are mountinfo's numbers in both cases.
    device: (major, minor).  root: bytes, what of the file system is mounted.
    mountpoint: bytes, as seen from the root of whoever the table was read for, without
    escapes; empty where that root doesn't reach it.  attributes: `MOUNT_ATTR_*`.
    propagation: `MS_SHARED` | `MS_SLAVE`, or `MS_PRIVATE`, or `MS_UNBINDABLE`.
    peer_group, master: numbers of peer groups, 0 for none.  type: bytes, with the subtype
    (``b"fuse.sshfs"``).  source: bytes.  superblock_options: bytes, comma separated, with
    the escapes of the file system, ``ro`` or ``rw`` first.
    """

    __slots__ = (
        "attributes", "device", "id", "master", "mountpoint", "old_id", "old_parent_id",
        "parent_id", "peer_group", "propagation", "root", "source", "superblock_options", "type",
    )

    def __repr__(self):
        return (
            f"MountRecord({self.id} on {self.parent_id}, {self.mountpoint!r}, {self.type!r},"
            f" {self.source!r}, root={self.root!r}, attributes={self.attributes:#x})"
        )


def parse(source):
    """Return the records of a mountinfo table, in its order.

    source: the table's bytes, or a descriptor of an open mountinfo file, read to its end.
    ValueError for a line that isn't one of such a table.
    """
    text = source if isinstance(source, bytes) else read_all(source)
    attributes = {}
    return [_parse_line(line, attributes) for line in text.split(b"\n") if line]


def _parse_line(line, known):
    fields = line.split(b" ")
    try:
        # Optional fields stand between the sixth field and a lone hyphen.
        end = fields.index(b"-", 6)
        number, parent, device, root, mountpoint, words = fields[:6]
        record = MountRecord()
        record.id = record.old_id = int(number)
        record.parent_id = record.old_parent_id = int(parent)
        major, _, minor = device.partition(b":")
        record.device = (int(major), int(minor))
        record.type = fields[end + 1]
        record.source = fields[end + 2]
        record.superblock_options = b" ".join(fields[end + 3:])
    except (ValueError, IndexError):
        raise ValueError(f"not a line of mountinfo: {line!r}") from None
    record.root = unescape(root) if b"\\" in root else root
    record.mountpoint = unescape(mountpoint) if b"\\" in mountpoint else mountpoint
    if b"\\" in record.type:
        record.type = unescape(record.type)
    if b"\\" in record.source:
        record.source = unescape(record.source)
    value = known.get(words)
    if value is None:
        value = known[words] = _attributes_of(words)
    record.attributes = value
    record.peer_group = record.master = record.propagation = 0
    if end == 6:
        record.propagation = abi.MS_PRIVATE
    else:
        _read_optional(record, fields[6:end])
    return record


def _read_optional(record, fields):
    for field in fields:
        tag, _, value = field.partition(b":")
        if tag == b"shared":
            record.peer_group = int(value)
            record.propagation |= abi.MS_SHARED
        elif tag == b"master":
            record.master = int(value)
            record.propagation |= abi.MS_SLAVE
        elif tag == b"unbindable":
            record.propagation |= abi.MS_UNBINDABLE
    if not record.propagation:
        record.propagation = abi.MS_PRIVATE


def _attributes_of(words):
    value = 0
    for word in words.split(b","):
        value |= _ATTRIBUTE_OF_WORD.get(word, 0)
        if word == b"noatime":
            value |= abi.MOUNT_ATTR_NOATIME
    # strictatime is the state without a word; relatime's value is 0.
    if b"atime" not in words.replace(b"nodiratime", b""):
        value |= abi.MOUNT_ATTR_STRICTATIME
    return value


def unescape(field):
    r"""Return `field` of a /proc table with its octal escapes (``\040``) undone."""
    first, *rest = field.split(b"\\")
    parts = [first]
    for part in rest:
        try:
            parts.append(bytes((int(part[:3], 8),)))
            parts.append(part[3:])
        except ValueError:
            parts.append(b"\\" + part)
    return b"".join(parts)


def of_process(process=b"self"):
    """Return the records that a process (bytes, a pid) sees, in the table's order."""
    return parse(read_file(b"/proc/" + process + b"/mountinfo"))
