"""Lowers with mounts below them: the throw-away view of a busy `/`.

Each mount below the lower gets an overlay of its own.  Where a lower's mounts are locked
together (user namespaces), overlayfs refuses it whole; there the root is a tmpfs skeleton
with one overlay a directory that has no mounts inside.
"""

import errno
import os
import stat

from sandboxfs.kernel import abi, fscontext, resolve
from sandboxfs.kernel.submounts import below as mounts_below
from sandboxfs.kernel.syscalls import (
    fchmodat2,
    flags_of,
    mount_id,
    mount_setattr,
    move_mount,
    open_tree,
)

# These come from the spec, not from the lower.
PSEUDO = frozenset((
    b"proc", b"sysfs", b"devtmpfs", b"devpts", b"mqueue", b"cgroup", b"cgroup2", b"debugfs",
    b"tracefs", b"securityfs", b"configfs", b"pstore", b"bpf", b"fusectl", b"hugetlbfs",
    b"binfmt_misc", b"efivarfs", b"autofs", b"rpc_pipefs", b"nsfs",
))
_CLONE = abi.OPEN_TREE_CLONE | abi.AT_EMPTY_PATH
_RDONLY = abi.MOUNT_ATTR_RDONLY
# What overlayfs answers to a lower that it can't use.
REFUSED = (
    errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTDIR, errno.ENODEV, errno.ELOOP, errno.ENOSYS,
    errno.EREMOTE,
)


# What opening a mountpoint says that is hidden, or closed to this user.
_NOT_SEEN = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EXDEV)


class Submount:
    """One mount below a lower: path relative to it, clone (or -1), stat, type, flags."""

    __slots__ = ("fd", "flags", "path", "status", "type")

    def __init__(self, path, fd, status, type, flags):
        self.path = path
        self.fd = fd
        self.status = status
        self.type = type
        self.flags = flags


def visible(here, below):
    """Return (record, descriptor) pairs of the mounts that are seen and no pseudo file systems.

    here: the lower's descriptor.  below: its records, parents first.  A mount below a pseudo
    file system, or hidden under a later one, is no part of the view.
    """
    left_out = []
    wanted = []
    for record in below:
        if record.type in PSEUDO:
            left_out.append(record.mountpoint + b"/")
        elif not record.mountpoint.startswith(tuple(left_out)):
            wanted.append(record)
    return _seen(here, wanted)


def submounts(materials, here, below):
    """Return the `Submount`s of a lower, cloned, parents first."""
    found = []
    for record, fd in visible(here, below):
        try:
            clone = materials.own(open_tree(fd, b"", _CLONE))
            mount_setattr(clone, _RDONLY, 0, abi.MS_PRIVATE)
            status = os.fstat(clone)
            found.append(Submount(record.mountpoint, clone, status, record.type, flags_of(clone)))
        finally:
            os.close(fd)
    return found


def attach_submounts(assembly, operation, lowers):
    """Attach an overlay for each mount below the lowers; the upper lowers win."""
    taken = set()
    for lower in lowers:
        for submount in lower.submounts:
            if submount.path in taken:
                continue
            taken.add(submount.path)
            try:
                target = resolve.open_in_root(assembly.root, submount.path, resolve.ANY_NO_FOLLOW)
            except FileNotFoundError:
                continue  # a lower above hides the place
            try:
                attach_one(assembly, operation, submount, target)
            finally:
                os.close(target)


def attach_one(assembly, operation, submount, target):
    """Attach one overlay, or what overlayfs refuses, read-only.

    On a machine that lives, something in /tmp may be gone since it was gathered.
    """
    try:
        _attach(assembly, operation, submount, target)
    except FileNotFoundError:
        if os.fstat(submount.fd).st_nlink:
            raise
        # The root of a mount that was removed can't be attached.
        name = os.fsdecode(submount.path)
        assembly.outcomes.append((operation, "skipped", f"/{name}: removed meanwhile"))


def _attach(assembly, operation, submount, target):
    name = os.fsdecode(submount.path)
    if stat.S_ISDIR(submount.status.st_mode):
        if not stat.S_ISDIR(os.fstat(target).st_mode):
            assembly.outcomes.append((operation, "skipped", f"/{name}: no directory there"))
            return
        try:
            mount = assembly.join_over(submount.fd, submount.status, submount.flags)
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            why = f"/{name}: overlayfs refuses {os.fsdecode(submount.type)} as a lower"
            assembly.outcomes.append((operation, "read-only bind", why))
            assembly.attach(submount.fd, target, operation, False)
            return
        assembly.outcomes.append((operation, "overlay", f"/{name}"))
        # Attached, the mount needs no descriptor: a busy host has thousands of them.
        try:
            move_mount(mount, target)
        finally:
            os.close(mount)
        return
    if stat.S_ISDIR(os.fstat(target).st_mode):
        assembly.outcomes.append((operation, "skipped", f"/{name}: a directory is there"))
        return
    assembly.outcomes.append((operation, "read-only bind", f"/{name}: a file has no overlay"))
    assembly.attach(submount.fd, target, operation, False)


class Skeleton:
    """The root of a view whose lower is locked together: made of its entries.

    entries: list of (path, status, link target or None, `Submount` or None), parents first.
    """

    def __init__(self, status):
        self.status = status
        self.entries = []

    def build(self, assembly):
        """Return a tmpfs with the directories, files' mountpoints and symlinks."""
        root = assembly.own(fscontext.create(
            b"tmpfs",
            [fscontext.string(b"source", b"tmpfs"),
             fscontext.string(b"mode", b"%o" % stat.S_IMODE(self.status.st_mode))],
            0,
        ))
        for path, status, link, _submount in self.entries:
            parent, _, name = path.rpartition(b"/")
            directory = root if not parent else resolve.open_in_root(
                root, parent, resolve.REAL_DIRECTORY)
            try:
                _make_entry(directory, name, status, link)
            finally:
                if directory != root:
                    os.close(directory)
        if assembly.seal:
            mount_setattr(root, _RDONLY)
        return root

    def fill(self, assembly, operation):
        """Attach an overlay or a read-only bind on every entry that has content."""
        for path, _status, _link, submount in self.entries:
            if submount is not None:
                target = resolve.open_in_root(assembly.root, path, resolve.ANY_NO_FOLLOW)
                try:
                    attach_one(assembly, operation, submount, target)
                finally:
                    os.close(target)


def _make_entry(directory, name, status, link):
    if link is not None:
        os.symlink(link, name, dir_fd=directory)
    elif stat.S_ISDIR(status.st_mode):
        os.mkdir(name, 0o755, dir_fd=directory)
        made = os.open(name, abi.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        try:
            fchmodat2(made, stat.S_IMODE(status.st_mode))
        finally:
            os.close(made)
    else:
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        os.close(os.open(name, flags, 0o644, dir_fd=directory))


def skeleton(materials, here, below):
    """Return the `Skeleton` of a directory whose mounts can't be cloned without each other."""
    result = Skeleton(os.fstat(here))
    pseudo = {record.mountpoint for record in below if record.type in PSEUDO}
    points = {record.mountpoint for record in below}
    types = {record.mountpoint: record.type for record in below}
    pending = [b""]
    while pending:
        parent = pending.pop()
        for path, fd in _children(here, parent):
            try:
                status = os.fstat(fd)
                link, submount = None, None
                if stat.S_ISLNK(status.st_mode):
                    link = os.readlink(b"", dir_fd=fd)
                elif path in pseudo or any(path.startswith(each + b"/") for each in pseudo):
                    pass  # an empty mountpoint: the spec mounts it
                elif stat.S_ISDIR(status.st_mode) and _holds(points, path):
                    pending.append(path)
                else:
                    submount = _cloned(materials, path, fd, status, types.get(path, b"a file"))
                result.entries.append((path, status, link, submount))
            finally:
                os.close(fd)
    return result


def _holds(points, path):
    start = path + b"/"
    return any(point.startswith(start) for point in points)


def _children(here, parent):
    """Yield (path, O_PATH descriptor) of a directory's entries, sorted; none if it is closed."""
    try:
        directory = resolve.open_in_root(here, parent or b".", resolve.READ)
    except PermissionError:
        return
    try:
        for name in sorted(os.listdir(directory)):
            entry = os.fsencode(name)
            try:
                fd = os.open(entry, abi.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            except (FileNotFoundError, PermissionError):
                continue
            yield (parent + b"/" + entry if parent else entry), fd
    finally:
        os.close(directory)


def _cloned(materials, path, fd, status, type):
    """Return the `Submount` of one entry without mounts inside; None for sockets and the like."""
    if not stat.S_ISDIR(status.st_mode) and not stat.S_ISREG(status.st_mode):
        return None
    clone = materials.own(open_tree(fd, b"", _CLONE))
    mount_setattr(clone, _RDONLY, 0, abi.MS_PRIVATE)
    return Submount(path, clone, status, type, flags_of(clone))


def submounts_of_bind(materials, operation, source):
    """Return what is mounted below a recursive bind's source, each cloned by itself.

    None where the mounts are locked together, so that none can be had without the others.
    """
    found = []
    here = os.open(source, abi.O_PATH | os.O_CLOEXEC)
    try:
        for record, fd in _seen(here, mounts_below(here)):
            try:
                clone = materials.own(open_tree(fd, b"", _CLONE))
                mount_setattr(clone, operation.tree_attributes, operation.tree_cleared,
                              abi.MS_PRIVATE)
                flags = flags_of(clone)
                if operation.overlay:
                    mount_setattr(clone, _RDONLY)
                status = os.fstat(clone)
                found.append(Submount(record.mountpoint, clone, status, record.type, flags))
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                return None
            finally:
                os.close(fd)
    finally:
        os.close(here)
    return found


def _seen(here, below):
    """Yield (record, descriptor) of the mounts below `here` that no other one hides."""
    for record in below:
        if not record.mountpoint:
            continue
        try:
            fd = resolve.open_in_root(here, record.mountpoint, resolve.ANY_NO_FOLLOW)
        except OSError as error:
            if error.errno not in _NOT_SEEN:
                raise
            continue
        if mount_id(fd)[0] in (record.id, record.old_id):
            yield record, fd
        else:
            os.close(fd)


def cover_bind(assembly, operation, source, status):
    """Return an overlay of one bind's own mount, or None: overlayfs refuses that as a lower."""
    if assembly.materials.submounts.get(operation, ()) is None:
        return None
    # The source has the flags of the host's mount, too; read-only is what it stays.
    attributes = flags_of(source) | operation.attributes & abi.MOUNT_ATTR_STRICTATIME
    if not operation.overlay:
        attributes |= _RDONLY
    try:
        return assembly.own(assembly.join_over(source, status, attributes))
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        return None


def lay_below(assembly, operation, over):
    """Attach on an attached overlay (`over`) what it can't show: the mounts below its lower."""
    for submount in assembly.materials.submounts.get(operation, ()):
        target = assembly.own(
            resolve.open_in_root(over, submount.path, resolve.ANY_NO_FOLLOW)
        )
        if operation.overlay and submount.type not in PSEUDO:
            attach_one(assembly, operation, submount, target)
        else:
            assembly.attach(submount.fd, target, operation, False)
