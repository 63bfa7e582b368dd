"""Device nodes, their binds, and the links of /dev.

By descriptor, never through a name that somebody else could exchange: /dev is a mount of our
own, or a real directory (runc CVE-2026-41579), and nodes are looked at after they were made.
"""

import _stat as stat
import errno

from sandboxfs.build.compiled import cleaned
from sandboxfs.build.gather import device
from sandboxfs.errors import MountError
from sandboxfs.kernel import abi, resolve
from sandboxfs.kernel import system as os
from sandboxfs.kernel.maker import Maker
from sandboxfs.kernel.syscalls import fchmodat2, fchownat

# No directory known yet: (descriptor, whether it is ours alone).
_UNKNOWN = (-1, False)


def node(assembly, operation):
    if operation.by_bind:
        bind_node(assembly, operation, assembly.materials.sources[operation])
        return
    _path, head, name, mode, number = assembly.compiled[operation]
    kind = stat.S_IFMT(mode)
    parent = assembly.dev.get(head, _UNKNOWN)
    owner = assembly.host_ids(operation.uid, operation.gid)
    try:
        if parent[1] and owner == (0, 0):
            # A tmpfs of our own that nobody else has seen: the name stays what it is.
            os.mknod(name, mode, number, dir_fd=parent[0])
            if not assembly.umask_is_clear:
                os.chmod(name, stat.S_IMODE(mode), dir_fd=parent[0])
            return
    except OSError:
        pass  # there already, or read-only: the long way knows what to do
    try:
        in_writable(assembly, operation, _make_node, mode, number, owner)
    except FileExistsError:
        check_existing(assembly, operation, kind, number)
    except PermissionError:
        fd = assembly.own(device(operation, os.fsencode(operation.path), operation.type,
                             operation.major, operation.minor))
        bind_node(assembly, operation, fd)


def in_writable(assembly, operation, call, *arguments, find=None):
    """Call with (parent directory, name) of a path, by a writable way if it is read-only.

    find: returns these two for the operation; `device_directory` unless given.
    """
    while True:
        parent, name = find(operation) if find else device_directory(assembly, operation)
        try:
            return call(parent, name, *arguments)
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
        way = assembly.writable(parent)
        if way is None:
            assembly.dev.clear()  # the tree was changed: the paths lead elsewhere now
            continue
        try:
            return call(way, name, *arguments)
        finally:
            if way != parent:
                os.close(way)


def check_existing(assembly, operation, kind, number):
    parent, name = device_directory(assembly, operation)
    found = os.stat(name, dir_fd=parent, follow_symlinks=False)
    if not _is_node(found, kind, number):
        raise MountError(operation.origin, "mknod", operation.path,
                         "something else is there already", errno.EEXIST)
    assembly.outcomes.append((operation, "skipped", "it is there already"))


def bind_node(assembly, operation, source):
    target = assembly.own(in_writable(assembly, operation, _make_file))
    assembly.attach(source, target, operation, False)
    assembly.outcomes.append((operation, "bind", ""))


def device_directory(assembly, operation):
    """Return (descriptor of the parent, name).

    /dev that is no mount of ours must be a real directory: an image's symlink there
    could lead into a bind of the host (runc CVE-2026-41579).
    """
    _path, head, name, *_ = assembly.compiled[operation]
    found = assembly.dev.get(head)
    if found is None:
        found = assembly.dev[head] = device_parent(assembly, head)
    return found[0], name


def device_parent(assembly, head):
    """Return (descriptor, whether it is the root of a file system that only we see)."""
    if not (head + b"/").startswith(b"/dev/"):
        return assembly.own(assembly.maker.directory(head or b"/")), False
    for mount, operation, own in reversed(assembly.attached):
        destination = cleaned(operation)
        if destination == head:
            alone = own and getattr(operation, "type", "") == "tmpfs"
            return mount, alone and not os.fstat(mount).st_mode & stat.S_ISGID
        if destination == b"/dev":
            # By the mount itself: the path to it may hold a link, and lie in a volume.
            inside = Maker(mount, assembly.owner, assembly.writable)
            return assembly.own(inside.real_directory(head[len(b"/dev/"):])), False
    return assembly.own(assembly.maker.real_directory(head)), False


def symlink(assembly, operation):
    if operation.only_if is not None and not os.path.lexists(operation.only_if):
        assembly.outcomes.append((operation, "skipped", f"no {operation.only_if} here"))
        return
    _path, head, name, *_ = assembly.compiled[operation]
    parent = assembly.dev.get(head, _UNKNOWN)
    try:
        if parent[1]:
            os.symlink(operation.target, name, dir_fd=parent[0])
            return
    except OSError:
        pass  # there already, or read-only: the long way knows what to do
    try:
        in_writable(assembly, operation, make_symlink, operation.target)
    except FileExistsError:
        assembly.outcomes.append((operation, "skipped", "it is there already"))


def make_symlink(parent, name, target):
    os.symlink(target, name, dir_fd=parent)


def _make_node(parent, name, mode, number, owner):
    """Make a device node or FIFO with its mode and (uid, gid), whatever the umask is."""
    os.mknod(name, mode, number, dir_fd=parent)
    made = os.open(name, abi.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        status = os.fstat(made)
        # In a volume that others write to, the name may stand for something else by now.
        if not _is_node(status, stat.S_IFMT(mode), number):
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        if (status.st_uid, status.st_gid) != owner:
            fchownat(made, *owner)
        if status.st_mode != mode:
            fchmodat2(made, stat.S_IMODE(mode))
    finally:
        os.close(made)


def _is_node(status, kind, number):
    return stat.S_IFMT(status.st_mode) == kind and (
        kind == stat.S_IFIFO or status.st_rdev == number
    )


def _make_file(parent, name):
    """Open the file `name`, made if missing, by itself: ELOOP for a link."""
    try:
        os.mknod(name, resolve.FILE_MODE | stat.S_IFREG, dir_fd=parent)
    except FileExistsError:
        pass  # the image's own, or somebody was faster
    fd = os.open(name, abi.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    if stat.S_IFMT(os.fstat(fd).st_mode) in (stat.S_IFLNK, stat.S_IFDIR):
        os.close(fd)
        raise OSError(errno.EEXIST, "a symlink or a directory is where the device goes")
    return fd
