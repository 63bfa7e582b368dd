"""Masked and read-only paths (`linux.maskedPaths`, `linux.readonlyPaths`)."""

import _stat as stat

from sandboxfs.kernel import abi, fscontext, resolve
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import mount_setattr, move_mount, open_tree

_CLONE = abi.OPEN_TREE_CLONE | abi.AT_EMPTY_PATH
_RDONLY = abi.MOUNT_ATTR_RDONLY
_NO_ESCAPE = abi.MOUNT_ATTR_NOSUID | abi.MOUNT_ATTR_NODEV


def mask(assembly, operation):
    fd = existing(assembly, operation)
    if fd is None:
        return
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        hide_directory(assembly, fd)
    else:
        if assembly.hiding_null < 0:
            mount = assembly.hiding_null = assembly.materials.null
        else:
            mount = assembly.own(open_tree(assembly.hiding_null, b"", _CLONE))
        move_mount(mount, fd)


def hide_directory(assembly, fd):
    if assembly.hiding_tmpfs < 0:
        mount = assembly.hiding_tmpfs = assembly.own(fscontext.create(
            b"tmpfs",
            [fscontext.string(b"nr_inodes", b"1"), fscontext.string(b"nr_blocks", b"1"),
             fscontext.flag(b"ro")],
            _RDONLY | _NO_ESCAPE | abi.MOUNT_ATTR_NOEXEC,
        ))
    else:
        mount = assembly.own(open_tree(assembly.hiding_tmpfs, b"", _CLONE))
    move_mount(mount, fd)


def existing(assembly, operation):
    """Return the descriptor of a path to be hidden or sealed, or None if it is missing."""
    fd = resolve.find_in_root(assembly.root, assembly.compiled[operation][0])
    if fd is None:
        assembly.outcomes.append((operation, "skipped", "missing"))
    else:
        assembly.descriptors.append(fd)
    return fd


def readonly_path(assembly, operation):
    fd = existing(assembly, operation)
    if fd is None:
        return
    mount = assembly.own(open_tree(fd, b"", _CLONE | abi.AT_RECURSIVE))
    mount_setattr(mount, _RDONLY, 0, 0, True)
    move_mount(mount, fd)
