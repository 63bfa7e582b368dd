"""`type: cgroup`: cgroup2 where the host is unified, else one mount a hierarchy.

Sources: cgroup_namespaces(7), Documentation/admin-guide/cgroup-v1/cgroups.rst.
"""

import errno

from sandboxfs.build.calls import READ_ONLY, mkdirat, symlinkat
from sandboxfs.kernel import abi, fscontext, resolve
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import (
    filesystem_type,
    mount_setattr,
    move_mount_path,
    open_tree,
)

_REFUSED = (errno.EPERM, errno.EBUSY, errno.EACCES)
_CGROUP2_SUPER_MAGIC = 0x63677270
_SOURCE = (abi.FSCONFIG_SET_STRING, b"source", b"cgroup", 0)
_MODE = (abi.FSCONFIG_SET_STRING, b"mode", b"755", 0)


def mount(assembly, operation):
    """Attach the cgroup file systems of the container at the operation's destination."""
    target = assembly.own(assembly.maker.directory(os.fsencode(operation.destination)))
    hierarchies = memberships()
    host = _Host()
    if _are_unified([names for names, _path in hierarchies]):
        top = _hierarchy(assembly, operation, "", dict(hierarchies)[""], host)
        _propagate(top, operation)
        # Whatever is made in it is a cgroup of the machine.
        assembly.attach(top, target, operation, False)
        return
    _one_a_hierarchy(assembly, operation, target, hierarchies, host)


def _propagate(mount, operation):
    """Apply the propagation that was asked for to a mount that isn't attached yet."""
    if operation.propagation:
        mount_setattr(mount, 0, 0, operation.propagation, operation.propagation_recursive)


def prepare(preparation, operation):
    """Prepare the calls for a new cgroup namespace; returns the slot of the mount, or None.

    Which hierarchies there are is asked again at the build.
    """
    if not operation.new_namespace or operation.no_follow or operation.propagation:
        return None
    try:
        text = table()
    except OSError:
        return None
    calls = preparation.calls
    names = [names for names, _path in memberships(text)]
    is_unified = _are_unified(names)
    preparation.entries.append((None, calls.has_hierarchies, (text, names, is_unified)))
    if is_unified:
        names = [""]
        calls.of_the_machine.add(operation)
        top = preparation.filesystem(b"cgroup2", (_SOURCE,), operation.attributes)
    else:
        top = _prepare_hierarchies(preparation, names, operation.attributes)
    path = preparation.compiled[operation][0]
    target, name = preparation.mountpoint(path, resolve.REAL_DIRECTORY)
    preparation.attach(top, target, name)
    preparation.forget(operation)
    preparation.entries.append((None, calls.note_hierarchies, (operation, names)))
    return top


def _prepare_hierarchies(preparation, hierarchies, attributes):
    """Prepare what `_one_a_hierarchy` does; returns the slot of the tmpfs."""
    top = preparation.filesystem(
        b"tmpfs", (_SOURCE, _MODE), attributes & ~abi.MOUNT_ATTR_RDONLY)
    for names in hierarchies:
        directory = os.fsencode(_directory(names))
        type, settings = _settings(names)
        preparation.entries.append((None, mkdirat, (top, directory, 0o755)))
        for name in directory.split(b","):
            if name != directory:
                preparation.entries.append((None, symlinkat, (directory, top, name)))
        preparation.attach(preparation.filesystem(type, settings, attributes), top, directory)
    if attributes & abi.MOUNT_ATTR_RDONLY:
        preparation.do(abi.SYS_mount_setattr, top, b"", abi.AT_EMPTY_PATH, READ_ONLY, 32)
    return top


def table():
    """Return /proc/self/cgroup (bytes).  OSError."""
    fd = os.open("/proc/self/cgroup", os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = os.read(fd, 65536)
        while more := os.read(fd, 65536):
            text += more
        return text
    finally:
        os.close(fd)


def memberships(text=None):
    """Return [(controllers joined by commas, path)] of this process, from /proc/self/cgroup.

    The unified hierarchy has no controllers' names.  In a new cgroup namespace paths are "/".
    text: what `table` returned, if it was read before.  OSError.
    """
    lines = os.fsdecode(table() if text is None else text).split("\n")
    return [tuple(line.split(":", 2)[1:]) for line in lines if line]


def has(text, names, is_unified):
    """Whether the hierarchies are these, and used so; text: a `table` that has these names."""
    now = table()
    if now != text and [each for each, _path in memberships(now)] != names:
        return False
    return _are_unified(names) == is_unified


def _are_unified(names):
    """Whether of the hierarchies with these controllers the unified one is all that is used.

    As systemd has it, what is mounted on /sys/fs/cgroup decides: version 1 may be compiled in
    and in use by nobody.
    """
    return "" in names and (len(names) == 1 or _is_cgroup2_mounted())


def _is_cgroup2_mounted():
    """Whether a cgroup2 lies on /sys/fs/cgroup."""
    try:
        top = os.open("/sys/fs/cgroup", abi.O_PATH | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return filesystem_type(top) == _CGROUP2_SUPER_MAGIC
    finally:
        os.close(top)


def _directory(names):
    """Return the name of a hierarchy's directory."""
    return names.removeprefix("name=") or "unified"


def _one_a_hierarchy(assembly, operation, target, hierarchies, host):
    """For cgroup v1 and hybrid: a tmpfs, a directory a hierarchy, links for co-mounted ones."""
    attributes = operation.attributes
    tmpfs = assembly.own(
        fscontext.create(b"tmpfs", [_SOURCE, _MODE], attributes & ~abi.MOUNT_ATTR_RDONLY)
    )
    mounts = []
    for names, path in hierarchies:
        directory = _directory(names)
        fd = _hierarchy(assembly, operation, names, path, host)
        if fd < 0:
            continue
        os.mkdir(directory, 0o755, dir_fd=tmpfs)
        for name in directory.split(","):
            if name != directory:
                os.symlink(directory, name, dir_fd=tmpfs)
        mounts.append((directory, fd))
    if attributes & abi.MOUNT_ATTR_RDONLY:
        mount_setattr(tmpfs, abi.MOUNT_ATTR_RDONLY)
    # A tree that isn't attached gets its propagation before it is, and older kernels attach
    # nothing to such a one; what is attached to a shared mount becomes shared itself.
    is_detached = assembly.engine.name == "detached"
    if not is_detached:
        assembly.attach(tmpfs, target, operation, True)
    for directory, fd in mounts:
        if operation.propagation_recursive:
            _propagate(fd, operation)
        move_mount_path(fd, tmpfs, os.fsencode(directory))
    _propagate(tmpfs, operation)
    if is_detached:
        assembly.attach(tmpfs, target, operation, True)


def _hierarchy(assembly, operation, names, path, host):
    """Return a mount of one hierarchy, or -1 for a unified one that this hybrid host lacks.

    A fresh one in a new cgroup namespace, else a bind of the container's own cgroup.
    """
    if operation.new_namespace:
        try:
            fd = assembly.own(_fresh(names, operation.attributes))
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
        else:
            assembly.outcomes.append(outcome(operation, names))
            return fd
    mountpoint = host.mountpoint(names)
    if mountpoint is None:
        return -1
    # In a namespace of our own the path is relative to its root, which is what is mounted.
    source = os.path.join(mountpoint, os.fsencode(path.lstrip("/")))
    fd = assembly.own(
        open_tree(abi.AT_FDCWD, source, abi.OPEN_TREE_CLONE | abi.AT_RECURSIVE)
    )
    # The whole tree: what is mounted below would stay writable (runc CVE-2023-25809).
    atime = operation.attributes & abi.MOUNT_ATTR__ATIME
    mount_setattr(
        fd, operation.attributes, abi.MOUNT_ATTR__ATIME if atime else 0, abi.MS_PRIVATE, True)
    assembly.outcomes.append((operation, "bind", os.fsdecode(source)))
    return fd


def outcome(operation, names):
    """Return what became of an operation's hierarchy, mounted anew."""
    return operation, "cgroup" if names else "cgroup2", names


def _fresh(names, attributes):
    type, settings = _settings(names)
    return fscontext.create(type, settings, attributes)


def _settings(names):
    """Return the type of a hierarchy's file system and its settings."""
    if not names:
        return b"cgroup2", [_SOURCE]
    if names.startswith("name="):
        return b"cgroup", [_SOURCE, fscontext.flag(b"none"),
                           fscontext.string(b"name", os.fsencode(names[5:]))]
    return b"cgroup", [_SOURCE, *[fscontext.flag(os.fsencode(name)) for name in names.split(",")]]


class _Host:
    """Where the host has hierarchies mounted: read when first asked for, since tables are long."""

    def __init__(self):
        self.mounts = None

    def mountpoint(self, names):
        """Return where the host mounts the hierarchy, or None."""
        if self.mounts is None:
            self.mounts = _host_mountpoints()
        wanted = set(os.fsencode(names).split(b",")) if names else set()
        # The last one may hide others.
        for words, mountpoint in reversed(self.mounts):
            if words == wanted or (wanted and wanted <= words):
                return mountpoint
        return None


def _host_mountpoints():
    """Return [(superblock option words, mountpoint)] of this namespace's cgroup mounts.

    The unified hierarchy has no words.  Only their lines of mountinfo are parsed: a host may
    have thousands of others.
    """
    from sandboxfs.kernel import mountinfo

    with open("/proc/self/mountinfo", "rb", buffering=0) as file:
        table = b"".join(iter(lambda: file.read(1 << 18), b""))
    lines = [line for line in table.splitlines() if b" - cgroup" in line]
    return [
        (set() if record.type == b"cgroup2" else set(record.superblock_options.split(b",")),
         record.mountpoint)
        for record in mountinfo.parse(b"\n".join(lines))
    ]
