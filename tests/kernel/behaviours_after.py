"""After the mounts: devices, links, console, masked and read-only paths."""

import fcntl
import os
import stat
import struct

from sandboxfs.kernel import abi, syscalls
from tests.kernel.behaviours_table import behaviour
from tests.kernel.behaviours_tools import (
    USER,
    bind,
    bind_on,
    config,
    fails,
    holds,
    inside,
    mode_of,
    mount,
    owner_of,
    read,
    refused,
    rootfs,
    same,
    set_propagation,
    tmpfs,
    tree,
    write,
)

KEEP_TMP = {"tmp": "keep"}
DEFAULT = {
    "null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9),
    "tty": (5, 0),
}
LINKS = {
    "fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2", "ptmx": "pts/ptmx",
}


def _node(path, kind, major=None, minor=None, **fields):
    entry = {"path": path, "type": kind, **fields}
    if major is not None:
        entry.update(major=major, minor=minor)
    return entry


def _number(path):
    status = os.lstat(path)
    return stat.S_IFMT(status.st_mode), os.major(status.st_rdev), os.minor(status.st_rdev)


# -- devices and links ---------------------------------------------------------------------


@behaviour
def default_devices_and_links_are_made_whatever_the_umask(engine):
    for name, mounts in (("image", ()), ("tmpfs", (tmpfs("/dev"),))):
        rootfs(base=name)

        def check(view):
            for device, numbers in DEFAULT.items():
                path = "/dev/" + device
                same(_number(path), (stat.S_IFCHR, *numbers), path)
                same((mode_of(path), owner_of(path)), (0o666, (0, 0)), path)
            for link, target in LINKS.items():
                same(os.readlink("/dev/" + link), target)
            assert not os.path.lexists("/dev/console")
            with open("/dev/null", "wb") as file:
                file.write(b"x")

        inside(engine, config(*mounts, root=name), check)


@behaviour
def devices_and_links_are_in_the_mount_whose_mountpoint_was_missing(engine):
    tree("rootfs", {"proc/": 0})

    def check(view):
        for device, numbers in DEFAULT.items():
            same(_number("/dev/" + device), (stat.S_IFCHR, *numbers), device)
        for link, target in LINKS.items():
            same(os.readlink("/dev/" + link), target)

    document = config(mount("/proc", "proc"), tmpfs("/dev", "mode=755"))
    inside(engine, document, check)


@behaviour
def dev_core_is_a_link_where_kcore_exists(engine):
    rootfs()
    expected = os.path.lexists("/proc/kcore")

    def check(view):
        same(os.path.lexists("/dev/core"), expected)
        if expected:
            same(os.readlink("/dev/core"), "/proc/kcore")

    inside(engine, config(), check)


@behaviour
def links_that_exist_are_left_alone(engine):
    rootfs({"dev/fd": "elsewhere", "dev/stdin": b"a file", "dev/stdout/": 0})

    def check(view):
        same((os.readlink("/dev/fd"), read("/dev/stdin")), ("elsewhere", b"a file"))
        assert os.path.isdir("/dev/stdout")
        same(os.readlink("/dev/stderr"), "/proc/self/fd/2")

    inside(engine, config(), check)


@behaviour
def devices_of_every_kind_have_their_mode_and_owner(engine):
    rootfs()
    devices = [
        _node("/dev/c", "c", 1, 5, fileMode=0o640, uid=5, gid=6),
        _node("/dev/u", "u", 1, 5, fileMode=0o4601),
        _node("/dev/b", "b", 7, 3, fileMode=0o600, gid=6),
        _node("/dev/p", "p", fileMode=0o622, uid=7),
        _node("/dev/net/tun", "c", 10, 200),
        _node("/elsewhere/node", "c", 1, 3, fileMode=0o444),
    ]

    def check(view):
        same(_number("/dev/c"), (stat.S_IFCHR, 1, 5))
        same((mode_of("/dev/c"), owner_of("/dev/c")), (0o640, (5, 6)))
        same((_number("/dev/u"), mode_of("/dev/u")), ((stat.S_IFCHR, 1, 5), 0o4601))
        same((_number("/dev/b"), owner_of("/dev/b")), ((stat.S_IFBLK, 7, 3), (0, 6)))
        assert stat.S_ISFIFO(os.stat("/dev/p").st_mode)
        same((mode_of("/dev/p"), owner_of("/dev/p")), (0o622, (7, 0)))
        same((_number("/dev/net/tun"), mode_of("/dev/net")), ((stat.S_IFCHR, 10, 200), 0o755))
        same((_number("/elsewhere/node"), mode_of("/elsewhere/node")),
             ((stat.S_IFCHR, 1, 3), 0o444))

    inside(engine, config(tmpfs("/dev"), devices=devices), check)
    inside(engine, config(tmpfs("/dev"), devices=devices), check, umask=0o777)


@behaviour
def an_existing_device_that_is_the_same_is_left_as_it_is(engine):
    rootfs()
    os.mknod("rootfs/dev/null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.chmod("rootfs/dev/null", 0o600)
    os.mkfifo("rootfs/dev/fifo", 0o600)

    def check(view):
        same((_number("/dev/null"), mode_of("/dev/null")), ((stat.S_IFCHR, 1, 3), 0o600))
        assert stat.S_ISFIFO(os.stat("/dev/fifo").st_mode)

    inside(engine, config(devices=[_node("/dev/fifo", "p")]), check)


@behaviour
def an_existing_device_that_differs_is_an_error(engine):
    for name, make in (
        ("other number", lambda path: os.mknod(path, stat.S_IFCHR, os.makedev(1, 5))),
        ("other type", lambda path: os.mknod(path, stat.S_IFBLK, os.makedev(1, 3))),
        ("file", write), ("directory", os.mkdir),
        ("link", lambda path: os.symlink("/etc/passwd", path)),
        ("dangling", lambda path: os.symlink("/no/where", path)),
    ):
        rootfs(base=name)
        make(f"{name}/dev/null")
        error = refused(engine, config(root=name))
        same((error["origin"], error["operation"], error["target"], error["errno"]),
             ("default", "mknod", "/dev/null", "EEXIST"), name)
        error = refused(engine, config(root=name, devices=[_node("/dev/null", "c", 1, 3)]))
        same((error["origin"], error["target"]), ("linux.devices[0]", "/dev/null"), name)


@behaviour
def an_entry_replaces_the_default_device_of_its_path(engine):
    rootfs()
    devices = [_node("/dev/zero", "c", 1, 7, fileMode=0o600), _node("/dev//tty", "c", 1, 3)]

    def check(view):
        same((_number("/dev/zero"), mode_of("/dev/zero")), ((stat.S_IFCHR, 1, 7), 0o600))
        same(_number("/dev/tty"), (stat.S_IFCHR, 1, 3))

    inside(engine, config(tmpfs("/dev"), devices=devices), check)


@behaviour
def a_mount_on_a_default_device_is_no_obstacle(engine):
    rootfs()

    def check(view):
        same(_number("/dev/null"), (stat.S_IFCHR, 1, 5))
        same(_number("/dev/zero"), (stat.S_IFCHR, 1, 5))

    inside(engine, config(tmpfs("/dev"), bind("/dev/null", "/dev/zero")), check)


@behaviour
def nothing_is_made_in_a_dev_that_is_bound_from_the_host(engine):
    rootfs()
    tree("hostdev", {"own": b""})

    def check(view):
        same(os.listdir("/dev"), ["own"])
        holds(view.notes(), "/dev: no default devices and links, mounts[0] binds the host's",
              "linux.devices: not made")

    document = config(bind("/dev", "hostdev", "rbind"), devices=[_node("/dev/x", "c", 1, 3)])
    inside(engine, document, check)


@behaviour
def in_a_user_namespace_devices_are_binds_of_the_hosts(engine):
    rootfs()
    os.chown("rootfs/dev", USER, USER)

    def check(view):
        for name, numbers in DEFAULT.items():
            same(_number("/dev/" + name), (stat.S_IFCHR, *numbers), name)
            same(view.at("/dev/" + name).root.rpartition(b"/")[2], name.encode())
        with open("/dev/null", "wb") as file:
            file.write(b"x")
        same(os.readlink("/dev/fd"), "/proc/self/fd")
        assert stat.S_ISFIFO(os.stat("/dev/fifo").st_mode)

    inside(engine, config(tmpfs("/dev"), devices=[_node("/dev/fifo", "p")]), check, user=USER)


@behaviour
def in_a_user_namespace_made_outside_devices_are_binds_too(engine):
    rootfs()
    mapping = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    document = config(tmpfs("/dev"), namespaces=[{"type": "mount"}, {"type": "user"}],
                      uidMappings=mapping, gidMappings=mapping)

    def check(view):
        for name, numbers in DEFAULT.items():
            same(_number("/dev/" + name), (stat.S_IFCHR, *numbers), name)
            same(view.at("/dev/" + name).type, view.at("/dev/null").type)

    inside(engine, document, check)


@behaviour
def in_a_user_namespace_a_device_the_host_lacks_is_an_error(engine):
    rootfs()
    devices = [_node("/dev/not-there", "c", 1, 3)]
    error = refused(engine, config(tmpfs("/dev"), devices=devices), user=USER)
    same((error["origin"], error["target"], error["errno"]),
         ("linux.devices[0]", "/dev/not-there", "ENOENT"))
    devices = [_node("/dev/null", "c", 1, 5)]
    error = refused(engine, config(tmpfs("/dev"), devices=devices), user=USER)
    holds(error["text"], "not the device c 1:5")


@behaviour
def where_mknod_is_refused_the_hosts_node_is_bound(engine):
    rootfs()
    devices = [_node("/dev/full", "c", 1, 7)]

    def without_mknod():
        effective, permitted, inheritable = syscalls.capget()
        syscalls.capset(effective & ~(1 << 27), permitted & ~(1 << 27), inheritable)

    def check(view):
        for name, numbers in DEFAULT.items():
            same(_number("/dev/" + name), (stat.S_IFCHR, *numbers), name)
            assert view.at("/dev/" + name)

    inside(engine, config(tmpfs("/dev"), devices=devices), check, prepare=without_mknod)


@behaviour
def a_symlinked_dev_in_the_image_is_refused(engine):
    tree("rootfs", {"dev": "/real", "real/": 0})
    tree("real", {})
    error = refused(engine, config())
    same((error["origin"], error["target"]), ("default", "/dev/null"))
    holds({"ELOOP", "ENOTDIR"}, error["errno"])


@behaviour
def devices_overlaid_by_overlay_binds_stay_devices(engine):
    rootfs()

    def check(view):
        same(_number("/device"), (stat.S_IFCHR, 1, 3))

    inside(engine, config(bind("/device", "/dev/null")), check,
           overrides={"overlay.binds": "true"})


# -- the console ---------------------------------------------------------------------------


@behaviour
def a_terminal_is_a_pty_of_the_containers_own_devpts(engine):
    rootfs()
    document = config(
        tmpfs("/dev", "mode=755"), mount("/dev/pts", "devpts", "devpts", "newinstance"),
        process={"terminal": True, "consoleSize": {"height": 31, "width": 91},
                 "user": {"uid": 5, "gid": 6}},
    )

    def check(view):
        master, slave = view.root.console_master, view.root.console_slave
        same(os.stat("/dev/console").st_rdev, os.fstat(slave).st_rdev)
        same(os.stat("/dev/pts/0").st_rdev, os.fstat(slave).st_rdev)
        same((owner_of("/dev/console")[0], mode_of("/dev/console")), (5, 0o620))
        same(struct.unpack("HHHH", fcntl.ioctl(slave, 0x5413, bytes(8)))[:2], (31, 91))
        os.write(slave, b"hello")
        same(os.read(master, 5), b"hello")

    inside(engine, document, check)


@behaviour
def a_terminal_without_devpts_is_an_error(engine):
    rootfs()
    error = refused(engine, config(tmpfs("/dev"), process={"terminal": True}))
    same((error["origin"], error["errno"]), ("process.terminal", "ENODEV"))
    holds(error["text"], "needs a devpts")


# -- masked and read-only paths ------------------------------------------------------------


@behaviour
def masked_files_are_dev_null_and_masked_directories_empty(engine):
    rootfs({"secret": b"s", "dir/inside": b"", "other/inside": b"", "link": "/dir"})
    masked = ["/secret", "/dir", "/missing", "/missing/deeper", "/secret/below", "/other"]

    def check(view):
        same((_number("/secret"), read("/secret")), ((stat.S_IFCHR, 1, 3), b""))
        for path in ("/dir", "/other"):
            same(os.listdir(path), [])
            same(view.flags(path), {"ro", "nosuid", "nodev", "noexec"})
            fails("EROFS", os.mkdir, path + "/new")
        same(os.stat("/dir").st_dev, os.stat("/other").st_dev, "one shared tmpfs")
        status = os.statvfs("/dir")
        same((status.f_files, status.f_blocks), (1, 1))
        same(view.points(), ["/", "/dir", "/other", "/secret"])
        assert not os.path.lexists("/missing")
        same([detail for detail in view.outcome("skipped") if detail == "missing"],
             ["missing"] * 3)

    inside(engine, config(maskedPaths=masked), check, overrides=KEEP_TMP)


@behaviour
def masks_and_read_only_paths_in_kernel_file_systems_take_what_lies_there(engine):
    """Also where something was bound on an entry."""
    rootfs({"proc/": None, "sys/": None})
    tree("source", {"inside": b""})
    mounts = (mount("/proc", "proc"), mount("/sys", "sysfs", None, "ro"),
              bind("/sys/firmware", "source"), bind("/sys/module", "source"))

    def check(view):
        for path in ("/sys/firmware", "/proc/acpi", "/sys/kernel"):
            if os.path.exists(path):
                same(os.listdir(path), [], path)
        same(os.listdir("/sys/module"), ["inside"])
        fails("EROFS", write, "/sys/module/new")
        same(_number("/proc/keys"), (stat.S_IFCHR, 1, 3))
        fails("EROFS", write, "/proc/sys/kernel/hostname", b"x")
        points = view.points()
        same(points.count("/sys/firmware"), 2)
        same(points.count("/sys/module"), 2)
        assert "/proc/sys" in points
        assert "/proc/bus" in points

    document = config(
        *mounts, maskedPaths=["/proc/acpi", "/proc/kcore", "/proc/keys", "/sys/firmware",
                              "/sys/kernel"],
        readonlyPaths=["/proc/bus", "/proc/sys", "/proc/sysrq-trigger", "/sys/module"])
    inside(engine, document, check, overrides=KEEP_TMP)


@behaviour
def a_masked_symlink_masks_what_it_leads_to_inside_the_root(engine):
    rootfs({"link": "/../../target", "target/inside": b"", "dangling": "/no/where"})
    tree("target", {"inside": b""})

    def check(view):
        same(os.listdir("/target"), [])
        same(os.readlink("/link"), "/../../target")

    inside(engine, config(maskedPaths=["/link", "/dangling"]), check)


@behaviour
def masks_cover_what_mounts_put_there(engine):
    rootfs()

    def check(view):
        same(read("/proc/kcore") if os.path.exists("/proc/kcore") else b"", b"")
        same(os.listdir("/proc/irq"), [])
        same(os.listdir("/sys/firmware") if os.path.exists("/sys/firmware") else [], [])

    document = config(mount("/proc", "proc"), mount("/sys", "sysfs"),
                      maskedPaths=["/proc/kcore", "/proc/irq", "/sys/firmware"])
    inside(engine, document, check)


@behaviour
def what_is_mounted_below_a_read_only_path_is_read_only_with_it(engine):
    rootfs()

    def check(view):
        fails("EROFS", write, "/sys/fs/bpf/new")
        same(os.listdir("/sys/kernel"), [])

    document = config(
        mount("/proc", "proc"), mount("/sys", "sysfs"), tmpfs("/dev", "mode=755"),
        tmpfs("/sys/fs/bpf", "mode=755"), tmpfs("/sys/kernel/debug", "mode=755"),
        maskedPaths=["/sys/module", "/sys/kernel"], readonlyPaths=["/sys/fs"],
    )
    inside(engine, document, check)


@behaviour
def a_missing_masked_path_takes_no_other_along(engine):
    rootfs()

    def check(view):
        for path in ("/sys/module", "/sys/kernel", "/sys/fs"):
            same(os.listdir(path), [], path)

    document = config(
        mount("/proc", "proc"), mount("/sys", "sysfs"), tmpfs("/dev", "mode=755"),
        maskedPaths=["/sys/module", "/missing", "/sys/kernel", "/missing", "/sys/fs"],
    )
    inside(engine, document, check)


@behaviour
def a_false_dev_null_masks_nothing(engine):
    rootfs({"secret": b"s"})
    write("false")

    def falsify():
        syscalls.unshare(abi.CLONE_NEWNS)
        set_propagation("/", abi.MS_PRIVATE, True)
        bind_on("false", "/dev/null")

    error = refused(engine, config(tmpfs("/dev"), maskedPaths=["/secret"]), prepare=falsify)
    same((error["origin"], error["target"]), ("linux.maskedPaths[0]", "/dev/null"))
    holds(error["text"], "not the device c 1:3")


@behaviour
def read_only_paths_are_bound_on_themselves_and_keep_their_flags(engine):
    rootfs({"dir/inside": b"", "file": b"f", "missing-link": "/no/where"})

    def check(view):
        fails("EROFS", write, "/dir/inside")
        fails("EROFS", write, "/file")
        same(read("/file"), b"f")
        same(view.flags("/dir"), {"ro"})
        same(view.flags("/data/sub"), {"ro", "nosuid", "nodev", "noexec", "noatime"})
        write("/data/other")
        same(view.points(), ["/", "/data", "/data/sub", "/dir", "/file"])

    document = config(tmpfs("/data", "nosuid", "nodev", "noexec", "noatime"),
                      process={"cwd": "/data/sub"},
                      readonlyPaths=["/dir", "/file", "/missing", "/missing-link", "/data/sub"])
    inside(engine, document, check, overrides=KEEP_TMP)


@behaviour
def a_read_only_path_is_read_only_with_all_mounts_below_it(engine):
    rootfs()

    def check(view):
        fails("EROFS", write, "/data/new")
        fails("EROFS", write, "/data/sub/new")

    inside(engine, config(tmpfs("/data"), tmpfs("/data/sub"), readonlyPaths=["/data"]), check)


@behaviour
def masks_and_read_only_paths_are_private(engine):
    rootfs({"secret": b"", "dir/": 0})

    def check(view):
        for path in ("/secret", "/dir"):
            same(view.at(path).propagation, abi.MS_PRIVATE, path)

    inside(engine, config(maskedPaths=["/secret"], readonlyPaths=["/dir"]), check)
