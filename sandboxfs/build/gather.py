"""The caller's side of a build: everything a path of the host leads to, as descriptors.

Nothing is attached here and nothing on the host changes; a clone made here belongs to no
namespace until `assemble` puts it into the tree.
"""

import _stat as stat
import errno

from sandboxfs.build.compiled import compile_once
from sandboxfs.build.failure import worded
from sandboxfs.build.siblings import Siblings, clone_call
from sandboxfs.errors import MountError
from sandboxfs.kernel import abi, resolve, submounts
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import (
    fail,
    mount_setattr,
    open_tree,
    packed,
    syscall,
)
from sandboxfs.plan.operations import (
    Bind,
    Cover,
    Filesystem,
    Lower,
    Mask,
    Node,
    Overlay,
    PlainRoot,
    Replica,
)

_CLONE = abi.OPEN_TREE_CLONE | abi.AT_EMPTY_PATH
_CLONE_TREE = _CLONE | abi.AT_RECURSIVE
_CLONE_PATH = abi.OPEN_TREE_CLONE
_CLONE_PATH_TREE = abi.OPEN_TREE_CLONE | abi.AT_RECURSIVE
# struct mount_attr.  A device's node is read-only, whose mode and owner are the host's; what is
# written to the device isn't concerned.
OF_A_LOWER = packed(abi.MOUNT_ATTR_RDONLY, 0, abi.MS_PRIVATE, 0)
OF_A_DEVICE = packed(
    abi.MOUNT_ATTR_RDONLY | abi.MOUNT_ATTR_NOSUID | abi.MOUNT_ATTR_NOEXEC, 0, abi.MS_PRIVATE, 0
)
_SETATTR, _HERE = abi.SYS_mount_setattr, abi.AT_FDCWD


class LowerMaterial:
    """One gathered lower: its clone, the stat of its root, what lies mounted below it.

    submounts: list of (path relative to the lower, clone, stat, type); skeleton: a
    `build.view.Skeleton` where the tree can't be cloned whole, else None.
    """

    __slots__ = ("fd", "root", "skeleton", "submounts")

    def __init__(self, fd, root, submounts=(), skeleton=None):
        self.fd = fd
        self.root = root
        self.submounts = submounts
        self.skeleton = skeleton


class Materials:
    """What gather hands to assemble; owns its descriptors until `taken`.

    lowers: list of `LowerMaterial`.  sources: dict from operation to a clone or, for a
    symlink to be made anew, its target (bytes).  directories: the `Bind`s whose source is known
    to be a directory.  fields: those of `build.compiled.Compiled`.  submounts: dict from a
    recursive `Bind` that an overlay may cover to what lies mounted below its source, as
    `build.view.Submount`s.
    null: a clone of the host's /dev/null.  roots: list of (path with a slash at its end,
    descriptor) of the lowers that are directories other than `/`.
    upper: `build.upper.UpperDirectory` of ``overlay=dir=``, or None; upper_mount: a clone of
    it.  upper_is_ours: it was made here and is removed by `cleanup`.  live: the plan's
    `plan.live.Live`, or None; rootfs: then the descriptor of the rootfs.
    """

    def __init__(self):
        self.live = None
        self.rootfs = -1
        self.lowers = []
        self.roots = []
        self.sources = {}
        self.directories = set()
        self.fields = {}
        self.submounts = {}
        self.null = -1
        self.upper = None
        self.upper_mount = -1
        self.upper_is_ours = True
        self.descriptors = []

    def own(self, fd):
        self.descriptors.append(fd)
        return fd

    def add_root(self, path, fd):
        start = path.rstrip(b"/") + b"/"
        if start != b"/":
            self.roots.append((start, fd))

    def close(self):
        """Close every descriptor; what was never attached is gone with it."""
        while self.descriptors:
            os.close(self.descriptors.pop())

    def cleanup(self, failed=False):
        """Remove what the build left on the host: an upper that is not kept, or that failed."""
        if self.upper is not None and self.upper_is_ours:
            self.upper.remove(failed)


def belongs_inside(plan):
    """Return whether a plan has to be gathered in the mount namespace it is assembled in.

    Unprivileged users can clone mounts nowhere else.  And to a clone that is to be the root
    itself (``overlay=none``), mounts can be attached only where it was cloned.
    """
    if plan.user is not None and not plan.user.outside:
        return True
    return type(plan.operations[0]) is PlainRoot


def gather(plan, upper=None):
    """Return the `Materials` of a plan, from the caller's mount namespace.

    upper: the `UpperDirectory` that the plan asks for if it was made before; it stays the
    caller's.  Raises MountError naming the operation, the call and the path that failed.
    """
    materials = Materials()
    materials.live = plan.live
    materials.upper = upper
    materials.upper_is_ours = upper is None
    compiled = compile_once(plan)
    materials.fields = compiled.fields
    if compiled.gathering is None:
        compiled.gathering = _gathering(plan)
    try:
        _gather_all(materials, compiled.gathering)
    except BaseException:
        materials.close()
        materials.cleanup(failed=True)
        raise
    return materials


def _gather_all(materials, operations):
    """Gather for operations in their order; most of them are binds of directories."""
    fields, sources = materials.fields, materials.sources
    keep, is_directory = materials.descriptors.append, materials.directories.add
    asked = None
    for operation in operations:
        if type(operation) is not Bind:
            _STEPS[type(operation)](materials, operation)
            continue
        _path, source, flags, settings, plain = fields[operation]
        if settings is not asked:
            asked, call = settings, _call()
            number, attributes, more = clone_call(flags, settings)
        # With a slash at its end only a directory is opened, so that it is known to be one.
        fd = call(number, _HERE, source + b"/", flags, attributes, 32) if plain else -1
        if fd < 0:
            _bind(materials, operation)
            continue
        keep(fd)
        for how, rest in more:
            if call(_SETATTR, fd, b"", how, rest, 32) < 0:
                _set_bind(fd, operation, more)  # says why
        is_directory(operation)
        sources[operation] = fd


def _call():
    """Return syscall(2): where no thread waits for the interpreter's lock, the quick one."""
    if not submounts.own_process:
        return syscall
    from sandboxfs.build.calls import quick

    return quick


def _gathering(plan):
    """Return the operations that something has to be gathered for, siblings as one."""
    found, masked = [], False
    for operation in plan.compiled.operations:
        kind = type(operation)
        if kind is Mask and masked:
            continue
        masked = masked or kind is Mask
        if (kind is Filesystem and operation.fallback_bind is None) or (
            kind is Node and not operation.by_bind
        ):
            continue
        if kind in _STEPS:
            found.append(operation)
    return found


def _lower(materials, operation):
    path = os.fsencode(operation.path)
    try:
        here = os.open(path, abi.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise worded(error, operation, operation.path, "open") from error
    materials.own(here)
    status = os.fstat(here)
    try:
        if stat.S_ISREG(status.st_mode):
            from sandboxfs.build import images

            fd = materials.own(images.mount(here, operation))
            materials.lowers.append(LowerMaterial(fd, os.fstat(fd)))
            return
        if not stat.S_ISDIR(status.st_mode):
            raise MountError(operation.origin, "open", operation.path,
                             "neither a directory nor an image file")
        if operation.submounts:
            lower = _directory(materials, here, status)
        else:
            from sandboxfs.build import carry

            lower = LowerMaterial(carry.rootfs(materials, operation, here), status)
            mount_setattr(lower.fd, abi.MOUNT_ATTR_RDONLY)
        materials.lowers.append(lower)
        materials.add_root(path, here)
    except OSError as error:
        raise worded(error, operation, operation.path) from error


def _directory(materials, here, status):
    """Clone a directory and, each by itself, what is mounted below it."""
    below = submounts.below(here)
    try:
        fd = materials.own(open_tree(here, b"", _CLONE))
    except OSError as error:
        # EINVAL: mounts below are locked together with this one (mount_namespaces(7)).
        if not below or error.errno != errno.EINVAL:
            raise
        from sandboxfs.build import view

        return LowerMaterial(-1, status, (), view.skeleton(materials, here, below))
    if syscall(_SETATTR, fd, b"", abi.AT_EMPTY_PATH, OF_A_LOWER, 32) < 0:
        fail("mount_setattr")
    views = ()
    if below:
        from sandboxfs.build import view

        views = view.submounts(materials, here, below)
    return LowerMaterial(fd, status, views)


def _plain_root(materials, operation):
    try:
        if not operation.submounts:
            from sandboxfs.build import carry

            here = materials.own(os.open(operation.path, abi.O_PATH | os.O_CLOEXEC))
            materials.sources[operation] = carry.rootfs(materials, operation, here)
            return
        fd = open_tree(abi.AT_FDCWD, os.fsencode(operation.path), _CLONE_PATH_TREE)
        materials.sources[operation] = materials.own(fd)
        status = os.fstat(fd)
        if not stat.S_ISDIR(status.st_mode):
            raise MountError(operation.origin, "open_tree", operation.path,
                             "not a directory", hint="an image file needs an overlay, or "
                             "--overlay tmpfs")
        mount_setattr(fd, 0, 0, abi.MS_PRIVATE, True)
        materials.add_root(os.fsencode(operation.path), fd)
    except OSError as error:
        raise worded(error, operation, operation.path) from error


def _refuse_beside_a_skeleton(materials, operation):
    """A skeleton is many overlays on one tmpfs: it has no upper elsewhere and no further lower."""
    if not any(lower.skeleton is not None for lower in materials.lowers):
        return
    if len(materials.lowers) > 1 or operation.upper is not None:
        what = operation.upper or "several lowers"
        raise MountError(operation.origin, "overlay", what,
                         "a lower has mounts below it that are locked together for this user, "
                         "and its view takes neither further lowers nor an upper elsewhere",
                         hint="as root it does; or give a lower without mounts below it")


def _upper(materials, operation):
    _refuse_beside_a_skeleton(materials, operation)
    if operation.upper is not None:
        from sandboxfs.build.upper import UpperDirectory

        if materials.upper is None:
            materials.upper = UpperDirectory(operation)
        # By path again: it may have been made in another mount namespace.
        path = os.path.join(operation.upper, materials.upper.name)
        try:
            clone = materials.own(open_tree(abi.AT_FDCWD, os.fsencode(path), _CLONE_PATH))
            if not os.path.samestat(os.fstat(clone), os.fstat(materials.upper.fd)):
                raise OSError(errno.ESTALE, "the directory was replaced meanwhile")
            mount_setattr(clone, 0, 0, abi.MS_PRIVATE)
        except OSError as error:
            raise worded(error, operation, path) from error
        materials.upper_mount = clone


def _bind(materials, operation):
    """Clone a source, whatever it is."""
    _path, source, flags, settings, _plain = materials.fields[operation]
    if operation.copy_symlink or operation.source_no_follow:
        source = source.rstrip(b"/") or b"/"  # a slash at the end would have it followed
        if operation.copy_symlink and _is_symlink(operation, source):
            materials.sources[operation] = os.readlink(source)
            return
        flags |= abi.AT_SYMLINK_NOFOLLOW
    try:
        inside = _in_a_lower(materials, source, flags)
        if inside is None:
            fd = open_tree(abi.AT_FDCWD, source, flags)
        else:
            source = b"/proc/self/fd/%d" % materials.own(inside)
            fd = open_tree(inside, b"", flags | abi.AT_EMPTY_PATH)
        materials.own(fd)
        _set_bind(fd, operation, settings)
        if operation.recursive and (operation.overlay or operation.nested) and (
            stat.S_ISDIR(os.fstat(fd).st_mode)
        ):
            from sandboxfs.build import view

            materials.submounts[operation] = view.submounts_of_bind(materials, operation, source)
        if operation.idmap is not None and operation.idmap != "container":
            from sandboxfs.kernel import usernamespace

            owner = usernamespace.with_mappings(*operation.idmap)
            try:
                idmap(fd, owner, operation.idmap_recursive)
            finally:
                os.close(owner)
    except OSError as error:
        raise worded(error, operation, operation.source) from error
    materials.sources[operation] = fd


def _siblings(materials, siblings):
    """Clone the sources of many binds; one that isn't a directory, or can't be cloned, alone."""
    call = _call()
    operations = siblings.operations
    try:
        clones, rest = siblings.clone(call, materials.descriptors)
    except OSError as error:
        raise worded(error, operations[0], operations[0].source) from error
    if -1 in clones or not siblings.set(call, clones, rest):
        # Each by itself says what is wrong with it; what is a file has to be opened as one.
        for operation, fd in zip(operations, clones, strict=True):
            if fd < 0:
                _bind(materials, operation)
            else:
                _set_bind(fd, operation, siblings.settings)
                materials.directories.add(operation)
                materials.sources[operation] = fd
        return
    materials.directories.update(operations)
    materials.sources.update(zip(operations, clones, strict=True))


def _in_a_lower(materials, source, flags):
    """Return an O_PATH descriptor of a source that lies in a lower, else None.

    A lower's links are the image's, and lead to places of the image (podman CVE-2024-1753).
    """
    for start, root in materials.roots:
        if source.startswith(start):
            how = resolve.ANY_NO_FOLLOW if flags & abi.AT_SYMLINK_NOFOLLOW else resolve.ANY
            return resolve.open_in_root(root, source[len(start):] or b".", how)
    return None


def _is_symlink(operation, source):
    try:
        return stat.S_ISLNK(os.lstat(source).st_mode)
    except OSError as error:
        raise worded(error, operation, operation.source, "stat") from error


def _set_bind(fd, operation, settings):
    """Give an unattached clone its flags and its propagation."""
    for flags, attributes in settings:
        if syscall(_SETATTR, fd, b"", flags, attributes, 32) < 0:
            try:
                fail("mount_setattr")
            except OSError as error:
                raise worded(error, operation, operation.source) from error


def idmap(fd, user_namespace, recursive):
    """Map the ids of an unattached clone as the user namespace (a descriptor) does."""
    mount_setattr(fd, abi.MOUNT_ATTR_IDMAP, 0, 0, recursive, user_namespace)


def _fallback(materials, operation):
    path = os.fsencode(operation.fallback_bind)
    try:
        fd = materials.own(open_tree(abi.AT_FDCWD, path, _CLONE_PATH_TREE))
        mount_setattr(fd, operation.tree_attributes, 0, abi.MS_PRIVATE, True)
    except FileNotFoundError:
        return  # this host has none: the fresh instance is tried and says what is wrong
    except OSError as error:
        raise worded(error, operation, operation.fallback_bind) from error
    materials.sources[operation] = fd


def _replica(materials, operation):
    raise MountError(operation.origin, "replica", operation.destination,
                     f"hint {operation.hint} is shared in pod {operation.pod}: its volume is made "
                     "by the hook", hint="run makes single containers: leave the pod's annotation "
                     "out, or start the container through a runtime with the hook installed")


def _mask(materials, operation):
    materials.null = materials.own(device(operation, b"/dev/null", "c", 1, 3))


def _node(materials, operation):
    materials.sources[operation] = materials.own(
        device(operation, os.fsencode(operation.path), operation.type,
               operation.major, operation.minor)
    )


def device(operation, path, type, major, minor):
    """Return a clone of the host's device node at `path`, checked to be the one wanted.

    The node is opened without following a link and looked at by descriptor: whoever can
    write to /dev can't make us mount something else (runc CVE-2025-31133).
    """
    try:
        node = os.open(path, abi.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status = os.fstat(node)
            wanted = stat.S_IFCHR if type == "c" else stat.S_IFBLK
            if (stat.S_IFMT(status.st_mode) != wanted
                    or status.st_rdev != os.makedev(major, minor)):
                raise MountError(operation.origin, "open", path,
                                 f"not the device {type} {major}:{minor}")
            fd = open_tree(node, b"", _CLONE)
        finally:
            os.close(node)
        if syscall(_SETATTR, fd, b"", abi.AT_EMPTY_PATH, OF_A_DEVICE, 32) < 0:
            fail("mount_setattr")
    except OSError as error:
        raise worded(error, operation, path) from error
    return fd


_STEPS = {
    Lower: _lower, Overlay: _upper, PlainRoot: _plain_root, Bind: _bind, Cover: _bind,
    Filesystem: _fallback, Replica: _replica, Mask: _mask, Node: _node, Siblings: _siblings,
}
