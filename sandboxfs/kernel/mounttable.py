"""The mount table as the kernel tells it: statmount and listmount, or mountinfo.

Both readers give the same `MountRecord`.  statmount(2) and listmount(2) (Linux 6.8; every
field of the record since 6.13) name mounts by ids that are never used again; mountinfo
(proc_pid_mountinfo(5)) is what older kernels and other processes' roots are read from.
Neither knows anything of a detached tree.
"""

import sys
from _struct import Struct
from errno import ENOENT, ENOSYS, EOVERFLOW, EPERM, ESRCH, EXDEV

from sandboxfs.kernel import abi
from sandboxfs.kernel import system as os
from sandboxfs.kernel.foreign import byref, c_char, c_size_t, c_uint, c_uint64, c_void_p
from sandboxfs.kernel.syscalls import _syscall, fail, mount_id

# _IOR(0xb7, 0x5, __u64) of include/uapi/linux/nsfs.h.
NS_GET_MNTNS_ID = 0x8008B705

LSMT_ROOT = 0xFFFFFFFFFFFFFFFF

STATMOUNT_SB_BASIC = 0x1
STATMOUNT_MNT_BASIC = 0x2
STATMOUNT_MNT_ROOT = 0x8
STATMOUNT_MNT_POINT = 0x10
STATMOUNT_FS_TYPE = 0x20
STATMOUNT_MNT_OPTS = 0x80
STATMOUNT_FS_SUBTYPE = 0x100
STATMOUNT_SB_SOURCE = 0x200
STATMOUNT_SUPPORTED_MASK = 0x1000

WHOLE_RECORD = (
    STATMOUNT_SB_BASIC | STATMOUNT_MNT_BASIC | STATMOUNT_MNT_ROOT | STATMOUNT_MNT_POINT
    | STATMOUNT_FS_TYPE | STATMOUNT_MNT_OPTS | STATMOUNT_FS_SUBTYPE | STATMOUNT_SB_SOURCE
)

SB_RDONLY = 1
# The order in which show_sb_opts() of fs/proc_namespace.c prints them, after ro or rw.
_SUPERBLOCK_WORDS = ((1 << 4, b"sync"), (1 << 7, b"dirsync"), (1 << 25, b"lazytime"))

# Unique ids start above all numbers that mountinfo can show (fs/namespace.c, mnt_id_ctr).
FIRST_UNIQUE_ID = 1 << 31

_ATTRIBUTE_OF_WORD = {
    b"ro": abi.MOUNT_ATTR_RDONLY,
    b"nosuid": abi.MOUNT_ATTR_NOSUID,
    b"nodev": abi.MOUNT_ATTR_NODEV,
    b"noexec": abi.MOUNT_ATTR_NOEXEC,
    b"nodiratime": abi.MOUNT_ATTR_NODIRATIME,
    b"nosymfollow": abi.MOUNT_ATTR_NOSYMFOLLOW,
    b"idmapped": abi.MOUNT_ATTR_IDMAP,
}

# struct statmount up to the strings this module asks for; struct mnt_id_req.
_STATMOUNT = Struct("=IIQIIQIIQQIIQQQQQIIQII")
_STATMOUNT_STRINGS = 512
_STATMOUNT_MASK = Struct("=8xQ")
_SUPPORTED_MASK_OFFSET = 144
_REQUEST = Struct("=IIQQQ")
_REQUEST_SIZE_VER0 = 24
_U64 = Struct("=Q")

_BRIEF = STATMOUNT_MNT_BASIC | STATMOUNT_MNT_POINT
# From about here on a forked child costs less than printing the whole table.
MANY_MOUNTS = 500

_call = _syscall(c_void_p, c_void_p, c_size_t, c_uint)


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


# -- statmount and listmount ---------------------------------------------------------------


def listmount(mount_id=LSMT_ROOT, namespace_id=0, limit=None):
    """Return the unique ids of all mounts below the mount `mount_id`, oldest first.

    namespace_id: of another mount namespace (Linux 6.11, `namespace_id_of`), 0 for ours.
    limit: stop after so many ids.  OSError: ENOSYS without the system call, ENOENT for an id
    that isn't there (a detached mount's for one), EPERM for one outside of our root.
    """
    found = []
    room = 32 if limit is None else min(limit, 512)
    last = 0
    while True:
        ids = (c_uint64 * room)()
        size = _REQUEST.size if namespace_id else _REQUEST_SIZE_VER0
        request = _REQUEST.pack(size, 0, mount_id, last, namespace_id)
        count = _call(abi.SYS_listmount, request, byref(ids), room, 0)
        if count < 0:
            fail("listmount")
        found += ids[:count]
        if limit is not None and len(found) >= limit:
            return found[:limit]
        if count < room:
            return found
        last = found[-1]
        room = 1024


class _Statmount:
    """statmount(2) with a buffer that is kept between calls and grows when it must."""

    __slots__ = ("buffer", "namespace_id", "size")

    def __init__(self, namespace_id=0):
        self.namespace_id = namespace_id
        self._resize(2048)

    def _resize(self, size):
        self.size = size
        self.buffer = (c_char * size)()

    def read(self, mount_id, mask):
        """Return the bytes of struct statmount with its strings; OSError (ENOENT: gone)."""
        size = _REQUEST.size if self.namespace_id else _REQUEST_SIZE_VER0
        request = _REQUEST.pack(size, 0, mount_id, mask, self.namespace_id)
        while _call(abi.SYS_statmount, request, byref(self.buffer), self.size, 0) < 0:
            try:
                fail("statmount")
            except OSError as error:
                if error.errno != EOVERFLOW:
                    raise
            self._resize(self.size * 4)
        return self.buffer.raw

    def record(self, mount_id):
        """Return the `MountRecord` of `mount_id`."""
        return _record_of(self.read(mount_id, WHOLE_RECORD))

    def tells_everything(self, mount_id):
        """Return whether this kernel gives every field of a record (Linux 6.13)."""
        mask = STATMOUNT_SUPPORTED_MASK | WHOLE_RECORD
        raw = self.read(mount_id, mask)
        given = _STATMOUNT_MASK.unpack_from(raw)[0]
        if given & STATMOUNT_SUPPORTED_MASK:
            given = _U64.unpack_from(raw, _SUPPORTED_MASK_OFFSET)[0]
        # An empty string isn't reported as given, so without the mask of 6.15 only a mount
        # that has a source can tell that sources are known.
        return bool(given & STATMOUNT_SB_SOURCE)


def _text(raw, offset):
    start = _STATMOUNT_STRINGS + offset
    return raw[start:raw.index(b"\0", start)]


def _record_of(raw):
    (
        _size, options, mask, major, minor, _magic, flags, type_, mount_id, parent_id, old_id,
        old_parent_id, attributes, propagation, peer_group, master, _from, root, point, _ns,
        subtype, source,
    ) = _STATMOUNT.unpack_from(raw)
    record = MountRecord()
    record.id = mount_id
    record.parent_id = parent_id
    record.old_id = old_id
    record.old_parent_id = old_parent_id
    record.device = (major, minor)
    record.attributes = attributes
    record.propagation = propagation
    record.peer_group = peer_group
    record.master = master
    record.root = _text(raw, root) if mask & STATMOUNT_MNT_ROOT else b""
    record.mountpoint = _text(raw, point) if mask & STATMOUNT_MNT_POINT else b""
    record.type = _text(raw, type_) if mask & STATMOUNT_FS_TYPE else b""
    if mask & STATMOUNT_FS_SUBTYPE:
        record.type += b"." + _text(raw, subtype)
    record.source = _text(raw, source) if mask & STATMOUNT_SB_SOURCE else b""
    words = b"ro" if flags & SB_RDONLY else b"rw"
    if flags & ~SB_RDONLY:
        for flag, word in _SUPERBLOCK_WORDS:
            if flags & flag:
                words += b"," + word
    if mask & STATMOUNT_MNT_OPTS:
        words += b"," + _text(raw, options)
    record.superblock_options = words
    return record


def by_listmount(mount_id=LSMT_ROOT, namespace_id=0):
    """Return the records of all mounts below `mount_id`, itself included, parents first.

    Without arguments the whole table of the caller's namespace, as its root sees it.
    OSError: ENOSYS where the calls are missing or don't tell everything (before 6.13), else
    what listmount and statmount say.  A mount that goes away meanwhile is left out.
    """
    ids = listmount(mount_id, namespace_id)
    if mount_id != LSMT_ROOT:
        ids.insert(0, mount_id)
    statmount = _Statmount(namespace_id)
    if ids and not statmount.tells_everything(ids[0]):
        raise OSError(ENOSYS, "statmount doesn't tell the source of a mount")
    records = []
    for each in ids:
        try:
            record = statmount.record(each)
        except FileNotFoundError:
            continue
        if record.mountpoint:
            records.append(record)
    return parents_first(records)


def record(number):
    """Return the record of one mount of our namespace, by the number that `mount_id` gave.

    OSError: ENOENT for one that isn't there, a detached mount's for example.
    """
    if number >= FIRST_UNIQUE_ID:
        statmount = _Statmount()
        try:
            if statmount.tells_everything(number):
                return statmount.record(number)
            number = _record_of(statmount.read(number, STATMOUNT_MNT_BASIC)).old_id
        except OSError as error:
            if error.errno != ENOSYS:
                raise
    for each in from_mountinfo(_mountinfo(b"self")):
        if each.id == number:
            return each
    raise OSError(ENOENT, os.strerror(ENOENT))


def old_mount_id(descriptor):
    """Return (mountinfo's number of the mount, whether the file is its root); see `mount_id`.

    It holds for the mounts of other namespaces too, whose unique ids can stay unknown.
    """
    return mount_id(descriptor, abi.STATX_MNT_ID)


def namespace_id_of(path):
    """Return the id of the mount namespace that the file `path` (/proc/PID/ns/mnt) names.

    OSError: EACCES or EPERM where the process isn't ours to look at, ENOTTY before 6.11.
    """
    import fcntl

    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _U64.unpack(fcntl.ioctl(descriptor, NS_GET_MNTNS_ID, b"\0" * 8))[0]
    finally:
        os.close(descriptor)


# -- mountinfo -----------------------------------------------------------------------------


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


def escape(path):
    r"""Return `path` as mountinfo writes it: space, tab, newline and backslash in octal."""
    return (
        path.replace(b"\\", b"\\134").replace(b" ", b"\\040").replace(b"\t", b"\\011")
        .replace(b"\n", b"\\012")
    )


def from_mountinfo(source):
    """Return the records of a mountinfo table, in its order.

    source: the table's bytes, or a descriptor of an open mountinfo file, read to its end.
    ValueError for a line that isn't one of such a table.
    """
    text = source if isinstance(source, bytes) else _read_all(source)
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


def _read_all(descriptor):
    chunks = []
    while chunk := os.read(descriptor, 1 << 18):
        chunks.append(chunk)
    return b"".join(chunks)


def _mountinfo(process):
    return _proc_file(process + b"/mountinfo")


def _proc_file(name):
    descriptor = os.open(b"/proc/" + name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _read_all(descriptor)
    finally:
        os.close(descriptor)


# -- the readers people use ----------------------------------------------------------------


def read(pid=None):
    """Return the mount table, parents first: ours, or the one that process `pid` sees.

    With unique ids where the kernel has them.  OSError: FileNotFoundError for a process that
    isn't there, PermissionError for one whose namespace isn't ours to look at.
    """
    try:
        if pid is None:
            return by_listmount()
        return _of_process(pid)
    except OSError as error:
        # What statmount can't answer, the process's mountinfo can: no such call, no ioctl, a
        # namespace of which we aren't master, a root that isn't the namespace's.
        if pid is not None and not os.path.exists(f"/proc/{pid}"):
            raise ProcessLookupError(ESRCH, f"no process {pid}") from None
        if error.errno == ESRCH:
            raise
    return parents_first(from_mountinfo(_mountinfo(b"self" if pid is None else b"%d" % pid)))


def _of_process(pid):
    records = by_listmount(namespace_id=namespace_id_of(f"/proc/{pid}/ns/mnt"))
    descriptor = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_CLOEXEC)
    try:
        number, is_root = mount_id(descriptor)
    finally:
        os.close(descriptor)
    # statmount's paths start at the namespace's root, ours have to start at the process's.
    if not is_root or not any(each.id == number and each.mountpoint == b"/" for each in records):
        raise OSError(EXDEV, "the process is chrooted")
    return records


def parents_first(records):
    """Return `records` so that no mount comes before its parent, else in the order given.

    Ids grow with time, but a mount can have been moved below a younger one.
    """
    numbers = {record.id for record in records}
    placed = set()
    waiting = {}
    ordered = []
    for record in records:
        parent = record.parent_id
        if parent in numbers and parent not in placed and parent != record.id:
            waiting.setdefault(parent, []).append(record)
            continue
        ready = [record]
        while ready:
            next_one = ready.pop()
            ordered.append(next_one)
            placed.add(next_one.id)
            if waiting:
                ready += reversed(waiting.pop(next_one.id, ()))
    return ordered


def hidden(records):
    """Return the ids of the mounts that no path reaches, since others cover them.

    records: a whole table, parents first.  A mount is covered by one on its own root, and what
    else is mounted on it is covered with it; so is a mount whose mountpoint lies below that of
    another on the same parent.  The mount that is the root of whoever reads is never covered:
    lookups start on it, so that what is mounted on "/" later is what no path reaches.
    """
    numbers = set()
    points = {}
    for record in records:
        numbers.add(record.id)
        points.setdefault(record.parent_id, {})[record.mountpoint] = record.id
    covers = {}
    unreachable = set()
    for record in records:
        parent = record.parent_id
        has_parent = parent in numbers and parent != record.id
        cover = points.get(record.id, {}).get(record.mountpoint)
        if cover is not None and cover != record.id:
            if not has_parent and record.mountpoint == b"/":
                unreachable.add(cover)
            else:
                covers[record.id] = cover
        if not has_parent:
            continue
        if (
            parent in unreachable
            or covers.get(parent, record.id) != record.id
            or _below_sibling(record.mountpoint, points[parent])
        ):
            unreachable.add(record.id)
    return unreachable.union(covers)


def _below_sibling(mountpoint, siblings):
    if len(siblings) == 1:
        return False
    cut = mountpoint.rfind(b"/")
    while cut > 0:
        mountpoint = mountpoint[:cut]
        if mountpoint in siblings:
            return True
        cut = mountpoint.rfind(b"/")
    return False


def stacking(records):
    """Return {id: how many mounts of the same stack lie under it} of a table, parents first."""
    by_id = {}
    height = {}
    for record in records:
        parent = by_id.get(record.parent_id)
        on_top = parent is not None and parent.mountpoint == record.mountpoint
        height[record.id] = height[parent.id] + 1 if on_top else 0
        by_id[record.id] = record
    return height


# -- in words ------------------------------------------------------------------------------

_WORDS = (
    (abi.MOUNT_ATTR_NOSUID, "nosuid"), (abi.MOUNT_ATTR_NODEV, "nodev"),
    (abi.MOUNT_ATTR_NOEXEC, "noexec"), (abi.MOUNT_ATTR_NODIRATIME, "nodiratime"),
    (abi.MOUNT_ATTR_NOSYMFOLLOW, "nosymfollow"), (abi.MOUNT_ATTR_IDMAP, "idmapped"),
)
_ATIME_WORDS = {abi.MOUNT_ATTR_NOATIME: "noatime", abi.MOUNT_ATTR_STRICTATIME: "strictatime"}


def words_of(attributes):
    """Return the words of `MOUNT_ATTR_*`, ``ro`` or ``rw`` first, relatime unsaid."""
    words = ["ro" if attributes & abi.MOUNT_ATTR_RDONLY else "rw"]
    words += [word for attribute, word in _WORDS if attributes & attribute]
    atime = _ATIME_WORDS.get(attributes & abi.MOUNT_ATTR__ATIME)
    return words + [atime] if atime else words


def propagation_of(record):
    """Return ``private``, ``unbindable``, or the peer groups: ``shared:3 slave:1``."""
    words = []
    if record.propagation & abi.MS_SHARED:
        words.append(f"shared:{record.peer_group}")
    if record.propagation & abi.MS_SLAVE:
        words.append(f"slave:{record.master}")
    if record.propagation & abi.MS_UNBINDABLE:
        words.append("unbindable")
    return " ".join(words) or "private"


# -- what lies below a directory -----------------------------------------------------------


def below(descriptor, limit=None):
    """Return the records of all mounts below the directory `descriptor`, parents first.

    What a recursive clone of the directory would hold: hidden mounts too, and those mounted
    on the directory itself (a descriptor got before a mount stays under it).  `mountpoint` is
    relative to the directory, empty for one on it.  limit: stop at so many records.

    OSError: ENOENT for a directory of a detached tree or another mount namespace, EXDEV for
    one outside of the caller's root, of which neither interface gives paths.
    """
    number, is_mount_root = mount_id(descriptor)
    try:
        ids = listmount(number, limit=limit if is_mount_root else None)
    except OSError as error:
        if error.errno == ENOSYS:
            return _below_by_mountinfo(descriptor, number, is_mount_root)[:limit]
        if error.errno != EPERM:
            raise
        # A mount whose root lies outside of our chroot may only be listed by the privileged.
        ids = listmount()
    if not ids or (not is_mount_root and len(ids) <= MANY_MOUNTS and _is_bare(descriptor)):
        return []
    statmount = _Statmount()
    if not statmount.tells_everything(ids[0]):
        old_number = _record_of(statmount.read(number, STATMOUNT_MNT_BASIC)).old_id
        return _below_by_mountinfo(descriptor, old_number, is_mount_root)[:limit]
    try:
        point = _record_of(statmount.read(number, STATMOUNT_MNT_POINT)).mountpoint
    except PermissionError:
        point = b""
    prefix = _path_of(descriptor, point, is_mount_root)
    if not is_mount_root:
        ids = _ids_below(descriptor, statmount, ids, number, prefix)[:limit]
    return _relative(parents_first(_records_of(statmount, ids)), prefix)


def _ids_below(descriptor, statmount, ids, top, prefix):
    """Return those of `ids` that lie on the mount `top` under `prefix`, the directory's path."""
    if len(ids) > MANY_MOUNTS:
        seen = _ids_seen_from(descriptor)
        if seen is not None:
            return seen
    brief = []
    for each in ids:
        try:
            brief.append(_record_of(statmount.read(each, _BRIEF)))
        except FileNotFoundError:
            continue
    return [record.id for record in _select(parents_first(brief), top, prefix)]


def _is_bare(descriptor):
    """Return whether it is sure that no mount lies below a directory: mostly none does.

    One read of the shortest table there is (proc_pid_mountstats(5)), and no parsing.
    """
    path = os.readlink(b"/proc/self/fd/%d" % descriptor)
    # Where the path leads elsewhere (hidden, outside of our root) its words say nothing.
    if path == b"/" or not _same_file(path, descriptor):
        return False
    try:
        table = _proc_file(b"self/mountstats")
    except PermissionError:  # after a change of ids without exec
        return False
    words = b" mounted on " + escape(path)
    return words + b"/" not in table and words + b" " not in table


def _ids_seen_from(descriptor):
    """Return the ids of all mounts below a directory, listed by a child that is chrooted there.

    The kernel then does the choosing: on a host with thousands of mounts a child is cheaper
    than asking for the path of each.  None where that can't be done: without CAP_SYS_CHROOT,
    and with threads, which a forked child would be without.
    """
    # Of the interpreter's threads; unlike _thread's count it is right after a fork.
    if len(sys._current_frames()) > 1:  # noqa: SLF001 - documented in `sys`
        return None
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _list_from(descriptor, writer)
    os.close(writer)
    try:
        answer = _read_all(reader)
    finally:
        os.close(reader)
        status = os.waitpid(child, 0)[1]
    if status or len(answer) % _U64.size:
        return None
    return [number for (number,) in _U64.iter_unpack(answer)]


def _list_from(descriptor, writer):
    """In the child: write what listmount says of the directory as the root, and end."""
    status = 1
    try:
        os.fchdir(descriptor)
        os.chroot(b".")
        answer = b"".join(_U64.pack(number) for number in listmount())
        while answer:
            answer = answer[os.write(writer, answer):]
        status = 0
    finally:
        # Whatever happened: the parent's clean-up is not for the child to run.
        os._exit(status)


def _records_of(statmount, ids):
    records = []
    for each in ids:
        try:
            records.append(statmount.record(each))
        except FileNotFoundError:  # unmounted since it was listed
            continue
    return records


def _select(records, top, prefix):
    """Return the records below `prefix` on the mount `top`, of a table with parents first.

    Only for mounts directly on `top` does the path decide: two different places can have one
    path when one of them is hidden, but not two places of one mount.
    """
    start = prefix if prefix.endswith(b"/") else prefix + b"/"
    chosen = set()
    selected = []
    for record in records:
        if record.parent_id == top:
            point = record.mountpoint
            if not (point == prefix or point.startswith(start)):
                continue
        elif record.parent_id not in chosen:
            continue
        if record.id == top:
            continue
        chosen.add(record.id)
        selected.append(record)
    return selected


def _relative(records, prefix):
    cut = len(prefix) if prefix.endswith(b"/") else len(prefix) + 1
    for record in records:
        record.mountpoint = record.mountpoint[cut:]
    return records


def _below_by_mountinfo(descriptor, number, is_mount_root):
    records = parents_first(from_mountinfo(_mountinfo(b"self")))
    point = b""
    for record in records:
        if record.id == number:
            point = record.mountpoint
    prefix = _path_of(descriptor, point, is_mount_root)
    return _relative(_select(records, number, prefix), prefix)


def _path_of(descriptor, mountpoint, is_mount_root):
    """Return the path of a directory from our root; `mountpoint` is its mount's, or empty."""
    if is_mount_root and mountpoint:
        return mountpoint
    path = os.readlink(b"/proc/self/fd/%d" % descriptor)
    if not mountpoint and not _same_file(path, descriptor):
        raise OSError(EXDEV, "the directory lies outside of the root of this process")
    return path


def _same_file(path, descriptor):
    try:
        there = os.stat(path)
    except OSError:
        return False
    here = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
