"""What the kernel has to give to either engine, shown without the rest of sandboxfs."""

import os
import stat

from sandboxfs.kernel import abi, fscontext, syscalls
from tests.kernel.behaviours_table import ATTACHED, DETACHED, behaviour, error_name, open_path


def _tmpfs_with(engine, path, attributes=0):
    """Return a tmpfs's descriptor: detached, or attached at the directory `path`."""
    fd = fscontext.create(b"tmpfs", [fscontext.string(b"mode", b"755")], attributes)
    if engine == ATTACHED:
        os.mkdir(path)
        syscalls.move_mount_path(fd, abi.AT_FDCWD, os.fsencode(path))
    return fd


@behaviour
def a_mount_below_a_mount_is_found_by_its_path(engine):
    root = _tmpfs_with(engine, "root")
    os.mkdir("outer", dir_fd=root)
    outer = fscontext.create(b"tmpfs", [], 0)
    point = os.open("outer", os.O_PATH, dir_fd=root)
    syscalls.move_mount(outer, point)
    os.mkdir("inner", dir_fd=outer)
    if engine == DETACHED:
        os.mkdir("root")
        syscalls.move_mount_path(root, abi.AT_FDCWD, b"root")
    assert os.listdir("root") == ["outer"]
    assert os.listdir("root/outer") == ["inner"]
    assert syscalls.mount_id(open_path("root/outer"))[0] == syscalls.mount_id(outer)[0]


@behaviour
def a_read_only_clone_refuses_writes_and_its_source_does_not(engine):
    os.makedirs("source/inside")
    clone = syscalls.open_tree(abi.AT_FDCWD, b"source", abi.OPEN_TREE_CLONE)
    syscalls.mount_setattr(clone, attr_set=abi.MOUNT_ATTR_RDONLY)
    root = _tmpfs_with(engine, "root")
    os.mkdir("bind", dir_fd=root)
    syscalls.move_mount(clone, os.open("bind", os.O_PATH, dir_fd=root))
    if engine == DETACHED:
        os.mkdir("root")
        syscalls.move_mount_path(root, abi.AT_FDCWD, b"root")
    assert error_name(os.mkdir, "root/bind/new") == "EROFS"
    os.mkdir("source/new")
    assert sorted(os.listdir("root/bind")) == ["inside", "new"]


@behaviour
def pivot_root_leaves_nothing_but_the_new_root(engine):
    root = _tmpfs_with(engine, "root")
    os.mkdir("here", dir_fd=root)
    os.mkdir("null", dir_fd=root)
    if engine == DETACHED:
        os.mkdir("root")
        syscalls.move_mount_path(root, abi.AT_FDCWD, b"root")
    os.chdir("root")
    syscalls.pivot_root(b".", b".")
    syscalls.umount2(b".", abi.MNT_DETACH)
    os.chdir("/")
    assert sorted(os.listdir("/")) == ["here", "null"]
    assert sorted(os.listdir("/..")) == ["here", "null"]
    assert stat.S_IMODE(os.stat("/").st_mode) == 0o755
