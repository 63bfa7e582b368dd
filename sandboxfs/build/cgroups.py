"""`type: cgroup`: cgroup2 where the host is unified, else one mount a hierarchy.

Sources: cgroup_namespaces(7), Documentation/admin-guide/cgroup-v1/cgroups.rst.
"""

import errno

from sandboxfs.kernel import abi, fscontext
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import mount_setattr, move_mount_path, open_tree

_REFUSED = (errno.EPERM, errno.EBUSY, errno.EACCES)


def mount(assembly, operation):
    """Attach the cgroup file systems of the container at the operation's destination."""
    target = assembly.own(assembly.maker.directory(os.fsencode(operation.destination)))
    hierarchies = memberships()
    host = _host_mountpoints()
    own = _unified_path(hierarchies, host)
    if own is not None:
        fd = _hierarchy(assembly, operation, "", own, host)
        # Whatever is made in it is a cgroup of the machine.
        assembly.attach(fd, target, operation, False)
        return
    _one_a_hierarchy(assembly, operation, target, hierarchies, host)


def memberships():
    """Return [(controllers joined by commas, path)] of this process, from /proc/self/cgroup.

    The unified hierarchy has no controllers' names.  In a new cgroup namespace paths are "/".
    """
    with open("/proc/self/cgroup", "rb", buffering=0) as file:
        lines = file.read(65536).decode().splitlines()
    return [tuple(line.split(":", 2)[1:]) for line in lines]


def _unified_path(hierarchies, host):
    """Return this process's cgroup of the unified hierarchy if that is all there is, or None.

    As systemd has it, what is mounted on /sys/fs/cgroup decides: version 1 may be compiled in
    and in use by nobody.
    """
    path = next((path for names, path in hierarchies if not names), None)
    if len(hierarchies) == 1:
        return path
    top = [words for words, mountpoint in host if mountpoint == b"/sys/fs/cgroup"]
    return path if top and not top[-1] else None


def _one_a_hierarchy(assembly, operation, target, hierarchies, host):
    """For cgroup v1 and hybrid: a tmpfs, a directory a hierarchy, links for co-mounted ones."""
    settings = [fscontext.string(b"source", b"cgroup"), fscontext.string(b"mode", b"755")]
    attributes = operation.attributes
    tmpfs = assembly.own(
        fscontext.create(b"tmpfs", settings, attributes & ~abi.MOUNT_ATTR_RDONLY)
    )
    mounts = []
    for names, path in hierarchies:
        directory = names.removeprefix("name=") or "unified"
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
    assembly.attach(tmpfs, target, operation, True)
    for directory, fd in mounts:
        move_mount_path(fd, tmpfs, directory.encode())


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
            assembly.outcomes.append((operation, "cgroup" if names else "cgroup2", names))
            return fd
    mountpoint = _mountpoint(names, host)
    if mountpoint is None:
        return -1
    # In a namespace of our own the path is relative to its root, which is what is mounted.
    source = os.path.join(mountpoint, os.fsencode(path.lstrip("/")))
    fd = assembly.own(
        open_tree(abi.AT_FDCWD, source, abi.OPEN_TREE_CLONE | abi.AT_RECURSIVE)
    )
    # The whole tree: what is mounted below would stay writable (runc CVE-2023-25809).
    mount_setattr(fd, operation.attributes, 0, abi.MS_PRIVATE, True)
    assembly.outcomes.append((operation, "bind", os.fsdecode(source)))
    return fd


def _fresh(names, attributes):
    if not names:
        return fscontext.create(b"cgroup2", [fscontext.string(b"source", b"cgroup")], attributes)
    settings = [fscontext.string(b"source", b"cgroup")]
    if names.startswith("name="):
        settings += [fscontext.flag(b"none"), fscontext.string(b"name", names[5:].encode())]
    else:
        settings += [fscontext.flag(name.encode()) for name in names.split(",")]
    return fscontext.create(b"cgroup", settings, attributes)


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


def _mountpoint(names, host):
    """Return where the host mounts the hierarchy, or None."""
    wanted = set(names.encode().split(b",")) if names else set()
    # The last one may hide others.
    for words, mountpoint in reversed(host):
        if words == wanted or (wanted and wanted <= words):
            return mountpoint
    return None
