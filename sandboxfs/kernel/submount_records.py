"""The records of what is mounted below a directory, for `submounts.below`, where something is."""

import sys
from _struct import Struct
from errno import EXDEV

from sandboxfs.kernel import mountinfo
from sandboxfs.kernel import system as os
from sandboxfs.kernel.mounttable import (
    STATMOUNT_MNT_BASIC,
    STATMOUNT_MNT_POINT,
    Statmount,
    parents_first,
    record_of,
)
from sandboxfs.kernel.submounts import MANY_MOUNTS, same_file
from sandboxfs.kernel.syscalls import listmount, read_all

_U64 = Struct("=Q")
_BRIEF = STATMOUNT_MNT_BASIC | STATMOUNT_MNT_POINT


def of_listed(ids, descriptor, number, is_mount_root, limit=None):
    """Return the records below a directory, which may be among the mounts `ids`.

    number, is_mount_root: what `mount_id` says of the directory.  See `submounts.below`.
    """
    statmount = Statmount()
    if not statmount.tells_everything(ids[0]):
        old_number = record_of(statmount.read(number, STATMOUNT_MNT_BASIC)).old_id
        return by_mountinfo(descriptor, old_number, is_mount_root)[:limit]
    try:
        point = record_of(statmount.read(number, STATMOUNT_MNT_POINT)).mountpoint
    except PermissionError:
        point = b""
    prefix = _path_of(descriptor, point, is_mount_root)
    if not is_mount_root:
        ids = _ids_below(descriptor, statmount, ids, number, prefix)[:limit]
    return _relative(parents_first(_records_of(statmount, ids)), prefix)


def by_mountinfo(descriptor, number, is_mount_root):
    """Return the records below a directory on the mount that mountinfo numbers `number`."""
    records = parents_first(mountinfo.of_process())
    point = b""
    for record in records:
        if record.id == number:
            point = record.mountpoint
    prefix = _path_of(descriptor, point, is_mount_root)
    return _relative(_select(records, number, prefix), prefix)


def _ids_below(descriptor, statmount, ids, top, prefix):
    """Return those of `ids` that lie on the mount `top` under `prefix`, the directory's path."""
    if len(ids) > MANY_MOUNTS:
        seen = _ids_seen_from(descriptor)
        if seen is not None:
            return seen
    brief = []
    for each in ids:
        try:
            brief.append(record_of(statmount.read(each, _BRIEF)))
        except FileNotFoundError:
            continue
    return [record.id for record in _select(parents_first(brief), top, prefix)]


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
        answer = read_all(reader)
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


def _path_of(descriptor, mountpoint, is_mount_root):
    """Return the path of a directory from our root; `mountpoint` is its mount's, or empty."""
    if is_mount_root and mountpoint:
        return mountpoint
    path = os.readlink(b"/proc/self/fd/%d" % descriptor)
    if not mountpoint and not same_file(path, descriptor):
        raise OSError(EXDEV, "the directory lies outside of the root of this process")
    return path
