"""What is read-only while the tree grows, and lacks a mountpoint: a way to make one."""

import _stat as stat
import errno

from sandboxfs.build.compiled import target_of
from sandboxfs.errors import MountError
from sandboxfs.kernel import abi
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import flags_of, mount_id, mount_setattr, move_mount, open_tree

_CLONE = abi.OPEN_TREE_CLONE | abi.AT_EMPTY_PATH
_RDONLY = abi.MOUNT_ATTR_RDONLY
# File systems of which every instance shows the same: a directory made there is the host's, too.
_OF_THE_MACHINE = ("cgroup", "cgroup2")


def way_into(assembly, here):
    """Return a writable way into the directory `here`, in which EROFS was met.

    The root itself is unsealed.  A mount of our own is cloned and the clone made
    writable (the twin).  Anything else is not ours to write: an overlay is put over it
    and None returned, so that the path is walked again.
    """
    number, _ = mount_id(here)
    if number == mount_id(assembly.root)[0]:
        if not assembly.sealed:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        mount_setattr(assembly.root, 0, _RDONLY)
        assembly.sealed = False
        return here
    for mount, operation, own in reversed(assembly.attached):
        if mount_id(mount)[0] == number:
            if own and getattr(operation, "type", "") not in _OF_THE_MACHINE:
                twin = open_tree(here, b"", _CLONE)
                mount_setattr(twin, 0, _RDONLY)
                if not os.fstatvfs(twin).f_flag & os.ST_RDONLY:
                    return twin
                os.close(twin)  # the superblock itself is read-only
            break
    if assembly.plan.live is not None:
        # What a runtime mounted read-only stays what it is; it couldn't make it either.
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    synthesise(assembly, here, number)
    return None


def synthesise(assembly, here, number):
    """Put an overlay with a tmpfs upper over the mount that `here` lies in."""
    for mount, operation, _own in assembly.attached:
        above = os.open(b"..", abi.O_PATH | os.O_CLOEXEC, dir_fd=mount) if stat.S_ISDIR(
            os.fstat(mount).st_mode) else -1
        if above >= 0:
            inside = mount_id(above)[0] == number
            os.close(above)
            if inside:
                raise MountError(operation.origin, "mountpoint", target_of(operation),
                                 "lies in a read-only mount in which a further mountpoint is "
                                 "missing and can't be made", errno.EROFS,
                                 hint="it is foreseen, and an overlay made in time, where "
                                 "the destinations lead there without a symlink")
    top = assembly.own(os.dup(here))
    while not mount_id(top)[1]:
        top = assembly.own(os.open(b"..", abi.O_PATH | os.O_CLOEXEC, dir_fd=top))
    lower = assembly.own(open_tree(top, b"", _CLONE))
    mount_setattr(lower, _RDONLY, 0, abi.MS_PRIVATE)
    status = os.fstat(top)
    over = assembly.own(assembly.join_over(lower, status, flags_of(top) | _RDONLY))
    move_mount(over, top)
    assembly.attached.append((over, assembly.plan.operations[0], True))
    assembly.outcomes.append((None, "synthesised", ""))
