"""The spec's mounts: new file systems and binds."""

import _stat as stat
import errno

from sandboxfs.build.gather import idmap
from sandboxfs.errors import MountError
from sandboxfs.kernel import abi, fscontext, resolve
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import mount_setattr

_RDONLY = abi.MOUNT_ATTR_RDONLY


def filesystem(assembly, operation):
    path = assembly.compiled[operation][0]
    made = assembly.maker.made
    try:
        if operation.real_directory:
            target = assembly.own(assembly.maker.real_directory(path))
        elif operation.no_follow:
            target = assembly.own(assembly.maker.link_itself(path, True))
        else:
            target = assembly.own(assembly.maker.directory(path))
    except NotADirectoryError as error:
        mismatch(assembly, error, operation, f"a {operation.type} needs a directory")
    mount, kind = instance(assembly, operation, target, assembly.maker.made != made)
    if operation.copy_up:
        from sandboxfs.build import copyup

        copyup.copy_up(assembly, target, mount, operation)
    if operation.propagation:
        mount_setattr(mount, 0, 0, operation.propagation, operation.propagation_recursive)
    assembly.attach(mount, target, operation, kind == "own")


def instance(assembly, operation, target, made):
    """Return (mount, ``"own"`` or ``"bind"``): a fresh instance, else what it falls back to."""
    _path, type, settings = assembly.compiled[operation]
    attributes = operation.attributes
    if operation.mode_from_mountpoint:
        mode = 0o1777 if made else stat.S_IMODE(os.fstat(target).st_mode)
        settings = [*settings, fscontext.string(b"mode", b"%o" % mode)]
    if operation.copy_up:
        attributes &= ~_RDONLY
    try:
        mount = assembly.own(fscontext.create(type, settings, attributes))
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EBUSY, errno.EACCES):
            raise
        fallback = assembly.materials.sources.get(operation)
        if fallback is None:
            raise
        # The kernel refuses a fresh instance to whoever doesn't own the namespace.
        assembly.outcomes.append((operation, "bind", operation.fallback_bind))
        return fallback, "bind"
    if operation.label and operation.type == "mqueue":
        # It takes no context= but keeps a label of its own.
        os.setxattr(f"/proc/self/fd/{mount}", "security.selinux", operation.label.encode())
    assembly.outcomes.append((operation, operation.type, ""))
    return mount, "own"


def bind(assembly, operation):
    source = assembly.materials.sources[operation]
    path = assembly.compiled[operation][0]
    if type(source) is bytes:  # copy-symlink
        copied_symlink(assembly, operation, source)
        return
    if operation.idmap == "container":
        idmap(source, assembly.user_namespace, operation.idmap_recursive)
    status = os.fstat(source)
    directory = stat.S_ISDIR(status.st_mode)
    if operation.no_follow:
        target = assembly.own(assembly.maker.link_itself(path, directory))
    else:
        target = bind_target(assembly, operation, path, directory)
    own = False
    if operation.overlay:
        source, own = overlay_bind(assembly, operation, source, status)
    elif operation.nested:
        source, own = prepared(assembly, operation, source, status)
    assembly.outcomes.append((operation, "overlay" if own else "bind", ""))
    assembly.attach(source, target, operation, own)
    if own and operation in assembly.materials.submounts:
        from sandboxfs.build import view

        view.lay_below(assembly, operation, source)


def cover(assembly, operation):
    """Attach an overlay over a bind's source; what is neither file nor directory keeps its own."""
    source = assembly.materials.sources[operation]
    status = os.fstat(source)
    mount, own = overlay_bind(assembly, operation, source, status)
    if not own and not stat.S_ISDIR(status.st_mode):
        return
    assembly.place.cover(operation, mount)
    assembly.outcomes.append((operation, "overlay" if own else "read-only bind", ""))
    if own and operation in assembly.materials.submounts:
        from sandboxfs.build import view

        view.lay_below(assembly, operation, mount)


def copied_symlink(assembly, operation, target):
    """Make a symlink anew; one of the same target may be there already."""
    from sandboxfs.build import devices

    def find(operation):
        parent, name = assembly.maker.parent(assembly.compiled[operation][0])
        return assembly.own(parent), name

    try:
        devices.in_writable(assembly, operation, devices.make_symlink, target, find=find)
    except FileExistsError as error:
        parent, name = find(operation)
        there = os.stat(name, dir_fd=parent, follow_symlinks=False)
        if not stat.S_ISLNK(there.st_mode) or os.readlink(name, dir_fd=parent) != target:
            raise MountError(operation.origin, "symlink", operation.destination,
                             "something else is there already", errno.EEXIST) from error
    assembly.outcomes.append((operation, "symlink", ""))


def bind_target(assembly, operation, path, directory):
    maker = assembly.maker
    try:
        return assembly.own(maker.directory(path) if directory else maker.file(path))
    except (NotADirectoryError, IsADirectoryError) as error:
        kind = "a directory" if directory else "a file"
        mismatch(assembly, error, operation, f"the source {operation.source} is {kind}")


def mismatch(assembly, error, operation, wanted):
    """Raise the error of a mountpoint that is of the wrong kind, naming both kinds."""
    path = os.fsencode(operation.destination)
    try:
        fd = assembly.own(resolve.open_in_root(assembly.root, path, resolve.ANY_NO_FOLLOW))
    except OSError:
        raise error from None  # something on the way there, not the mountpoint itself
    mode = os.fstat(fd).st_mode
    number, found = error.errno, "a directory" if stat.S_ISDIR(mode) else "a file"
    if stat.S_ISLNK(mode):
        found = f"a symlink to {os.fsdecode(os.readlink(b'', dir_fd=fd))}"
        if getattr(operation, "real_directory", False):
            number = errno.ELOOP
    text = f"{wanted}, and what exists at the destination is {found}"
    raise MountError(
        operation.origin, "mountpoint", operation.destination, text, number,
    ) from error


def overlay_bind(assembly, operation, source, status):
    """Writes to this bind go to an upper of its own: (mount, is it our own).

    A file is copied.  Devices, sockets and FIFOs hold nothing that could be written; what
    overlayfs refuses is bound read-only.
    """
    if stat.S_ISREG(status.st_mode):
        from sandboxfs.build import copyup

        copy = copyup.file_on(assembly.engine, source, status, assembly.own)
        mount_setattr(copy, operation.attributes)
        return copy, True
    if stat.S_ISDIR(status.st_mode):
        from sandboxfs.build import view

        over = view.cover_bind(assembly, operation, source, status)
        if over is not None:
            return over, True
        assembly.outcomes.append((operation, "read-only bind", "overlayfs refuses it as a lower"))
    return source, False


def prepared(assembly, operation, source, status):
    """A bind that later mounts need something in: (mount, is it our own).

    What is missing in one that was asked for read-only, or whose file system is, can't be
    made in the source: an overlay with a tmpfs upper is put over it.
    """
    if not stat.S_ISDIR(status.st_mode) or not os.fstatvfs(source).f_flag & os.ST_RDONLY:
        return source, False
    if not any(_missing(source, path) for path in operation.nested):
        return source, False
    from sandboxfs.build import view

    over = view.cover_bind(assembly, operation, source, status)
    if over is None:
        return source, False
    assembly.outcomes.append((operation, "synthesised", "a mountpoint is missing in it"))
    return over, True


def _missing(directory, path):
    try:
        os.close(resolve.open_in_root(directory, os.fsencode(path)))
    except (FileNotFoundError, NotADirectoryError):
        return True
    return False
