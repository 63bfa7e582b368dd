"""The mount table as the kernel tells it: by statmount and listmount, or by `mountinfo`.

Both give the same `MountRecord`.  statmount(2) and listmount(2) (Linux 6.8; every
field of the record since 6.13) name mounts by ids that are never used again; mountinfo
(proc_pid_mountinfo(5)) is what older kernels and other processes' roots are read from.
Neither knows anything of a detached tree.
"""

from _struct import Struct
from errno import ENOENT, ENOSYS, EOVERFLOW, ESRCH, EXDEV

from sandboxfs.kernel import abi, mountinfo, syscalls
from sandboxfs.kernel import system as os
from sandboxfs.kernel.foreign import string_buffer
from sandboxfs.kernel.mountinfo import MountRecord
from sandboxfs.kernel.syscalls import listmount, mount_id

# _IOR(0xb7, 0x5, __u64) of include/uapi/linux/nsfs.h.
NS_GET_MNTNS_ID = 0x8008B705

STATMOUNT_SB_BASIC = 0x1
STATMOUNT_MNT_BASIC = abi.STATMOUNT_MNT_BASIC
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

# struct statmount up to the strings this module asks for.
_STATMOUNT = Struct("=IIQIIQIIQQIIQQQQQIIQII")
_STATMOUNT_STRINGS = 512
_STATMOUNT_MASK = Struct("=8xQ")
_SUPPORTED_MASK_OFFSET = 144
_U64 = Struct("=Q")


# -- statmount and listmount ---------------------------------------------------------------


class Statmount:
    """statmount(2) with a buffer that is kept between calls and grows when it must."""

    __slots__ = ("buffer", "namespace_id", "size")

    def __init__(self, namespace_id=0):
        self.namespace_id = namespace_id
        self._resize(2048)

    def _resize(self, size):
        self.size = size
        self.buffer = string_buffer(size)

    def read(self, mount_id, mask):
        """Return the bytes of struct statmount with its strings; OSError (ENOENT: gone)."""
        while True:
            try:
                syscalls.statmount(mount_id, mask, self.namespace_id, self.buffer, self.size)
            except OSError as error:
                if error.errno != EOVERFLOW:
                    raise
                self._resize(self.size * 4)
            else:
                return self.buffer.raw

    def record(self, mount_id):
        """Return the `MountRecord` of `mount_id`."""
        return record_of(self.read(mount_id, WHOLE_RECORD))

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


def record_of(raw):
    """Return the `MountRecord` of what `Statmount.read` gave; empty where it wasn't asked for."""
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


def by_listmount(mount_id=abi.LSMT_ROOT, namespace_id=0):
    """Return the records of all mounts below `mount_id`, itself included, parents first.

    Without arguments the whole table of the caller's namespace, as its root sees it.
    OSError: ENOSYS where the calls are missing or don't tell everything (before 6.13), else
    what listmount and statmount say.  A mount that goes away meanwhile is left out.
    """
    ids = listmount(mount_id, namespace_id)
    if mount_id != abi.LSMT_ROOT:
        ids.insert(0, mount_id)
    statmount = Statmount(namespace_id)
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
        statmount = Statmount()
        try:
            if statmount.tells_everything(number):
                return statmount.record(number)
            number = record_of(statmount.read(number, STATMOUNT_MNT_BASIC)).old_id
        except OSError as error:
            if error.errno != ENOSYS:
                raise
    for each in mountinfo.of_process():
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
    return parents_first(mountinfo.of_process(b"self" if pid is None else b"%d" % pid))


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
