"""Where this process's root lies in its mount namespace, and whether it is an initramfs.

Read from a procfs of our own: in an initramfs /proc may not be mounted yet, and what is mounted
there may be anything.

An initramfs is the kernel's own file system ``rootfs``, a ramfs or a tmpfs, which nobody can
mount a second time.  Until Linux 7.0 it is the very bottom of the mount namespace; since then it
lies on ``nullfs``, an empty file system that is.  A tmpfs root of any other origin looks the
same to statfs(2), but has another type in the mount table, and a parent.

Sources: Documentation/filesystems/ramfs-rootfs-initramfs.rst, init_mount_tree() of
fs/namespace.c, proc_pid_mountinfo(5).
"""

import os

from sandboxfs.errors import BootError
from sandboxfs.kernel import abi, fscontext, mountinfo, mounttable
from sandboxfs.kernel.syscalls import mount_id, read_all

ROOTFS = b"rootfs"
NULLFS = b"nullfs"


class Place:
    """The mounts that this process sees, and which of them is its root.

    records: `MountRecord`s with mountinfo's numbers.  root: the record of `/`, or None when the
    process was chrooted into a directory that is no mount.  is_bottom: nothing lies below it.
    is_initramfs.
    """

    __slots__ = ("is_bottom", "is_initramfs", "records", "root")

    def __init__(self, records, root, unique_id):
        self.records = records
        self.root = root
        self.is_bottom = root is not None and root.parent_id == root.id
        self.is_initramfs = (
            root is not None and root.type == ROOTFS and root.root == b"/"
            and (self.is_bottom or _lies_on_nullfs(unique_id))
        )

    def by_id(self, number):
        """Return the record with mountinfo's `number`, or None."""
        return next((record for record in self.records if record.id == number), None)

    def of(self, descriptor):
        """Return the record of the mount whose root `descriptor` is, or None."""
        number, is_root = mount_id(descriptor, abi.STATX_MNT_ID)
        return self.by_id(number) if is_root else None


def look():
    """Return the `Place` of this process; BootError when it may not mount procfs."""
    slash = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        number, is_root = mount_id(slash, abi.STATX_MNT_ID)
        unique_id, _ = mount_id(slash)
    finally:
        os.close(slash)
    records = _table()
    root = next((record for record in records if record.id == number), None)
    return Place(records, root if is_root else None, unique_id)


def _table():
    try:
        proc = fscontext.create(b"proc", [fscontext.string(b"subset", b"pid")], 0)
    except OSError as error:
        raise BootError(
            "", getattr(error, "call", "fsmount"), "proc", "", error.errno or 0,
            "switching roots is for root, with CAP_SYS_ADMIN",
        ) from error
    try:
        table = os.open("self/mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
        try:
            return mountinfo.parse(read_all(table))
        finally:
            os.close(table)
    finally:
        os.close(proc)


def _lies_on_nullfs(unique_id):
    """Return whether the mount lies on a nullfs that is the bottom (Linux 7.0).

    mountinfo doesn't show what is below our root, statmount(2) does.
    """
    if unique_id < mounttable.FIRST_UNIQUE_ID:
        return False  # a kernel without unique ids has no nullfs either
    statmount = mounttable.Statmount()
    try:
        parent = statmount.record(statmount.record(unique_id).parent_id)
    except OSError:
        return False  # it can't be told, so it isn't one
    return parent.type == NULLFS and parent.parent_id == parent.id
