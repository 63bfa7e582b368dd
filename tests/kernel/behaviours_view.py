"""Mounts that lie below a lower: part of the view, each under an overlay of its own."""

import os

from sandboxfs.kernel import abi
from tests.kernel.behaviours_table import behaviour
from tests.kernel.behaviours_tools import (
    USER,
    bind_on,
    config,
    fails,
    holds,
    inside,
    mode_of,
    mount,
    mount_on,
    owner_of,
    read,
    rootfs,
    same,
    set_propagation,
    tmpfs,
    tree,
    write,
)

KEEP_TMP = {"tmp": "keep"}


def _host_overlay(path, lower, base):
    """Mount an overlay of two new directories and `lower` on `path`, in this namespace."""
    for name in ("upper", "work"):
        os.makedirs(f"{base}/{name}")
    os.makedirs(path, exist_ok=True)
    settings = [(b"lowerdir", lower), (b"upperdir", f"{base}/upper"), (b"workdir", f"{base}/work")]
    mount_on(path, b"overlay",
             [(key, os.fsencode(os.path.abspath(value))) for key, value in settings])


@behaviour
def mounts_below_the_rootfs_are_shown_and_never_written(engine):
    rootfs()
    mount_on("rootfs/home", settings=[(b"mode", b"711"), (b"uid", b"5")])
    tree("rootfs/home", {"file": b"h", "user/": 0})
    mount_on("rootfs/home/user")
    write("rootfs/home/user/file", b"u")

    def check(view):
        same((mode_of("/home"), owner_of("/home")), (0o711, (5, 0)))
        same((read("/home/file"), read("/home/user/file")), (b"h", b"u"))
        for path in ("/home", "/home/user"):
            same(view.at(path).type, b"overlay", path)
            same(view.at(path).propagation, abi.MS_PRIVATE, path)
            write(path + "/file", b"inside")
            write(path + "/new", b"inside")
        same(view.outcome("overlay"), ["", "/home", "/home/user"])

    inside(engine, config(), check)


@behaviour
def flags_of_a_mount_below_the_rootfs_are_kept(engine):
    rootfs()
    flags = (abi.MOUNT_ATTR_NOSUID | abi.MOUNT_ATTR_NODEV | abi.MOUNT_ATTR_NOEXEC
             | abi.MOUNT_ATTR_NOATIME)
    mount_on("rootfs/data", attributes=flags)

    def check(view):
        same(view.flags("/data"), {"nosuid", "nodev", "noexec", "noatime"})

    inside(engine, config(), check)


@behaviour
def what_the_mount_of_the_rootfs_forbids_the_root_forbids(engine):
    mount_on("holder", attributes=abi.MOUNT_ATTR_NOSUID | abi.MOUNT_ATTR_NODEV)
    rootfs(base="holder/rootfs")

    def check(view):
        same(view.flags("/"), {"nosuid", "nodev"})
        write("/new")

    inside(engine, config(root="holder/rootfs"), check)


@behaviour
def a_read_only_mount_below_the_rootfs_is_writable_in_the_view(engine):
    # As the rootfs itself is: what is written goes to an upper.
    rootfs()
    mount_on("rootfs/data", attributes=abi.MOUNT_ATTR_RDONLY)

    def check(view):
        write("/data/new")

    inside(engine, config(), check)


@behaviour
def pseudo_file_systems_below_the_rootfs_are_not_carried_over(engine):
    rootfs({"data/": 0, "dev/pts/": 0, "dev/mqueue/": 0})
    kinds = {"proc": b"proc", "sys": b"sysfs", "dev/pts": b"devpts", "dev/mqueue": b"mqueue"}
    for name, kind in kinds.items():
        mount_on("rootfs/" + name, kind)
    # What is mounted below a pseudo file system isn't, either.
    mount_on("rootfs/sys/fs", make=False)
    mount_on("rootfs/data")

    def check(view):
        same(view.points(), ["/", "/data"])
        same([os.listdir("/" + name) for name in kinds], [[], [], [], []])

    inside(engine, config(), check, overrides=KEEP_TMP,
           written=["rootfs/" + name for name in kinds])


@behaviour
def a_namespace_mounted_on_a_file_is_not_carried_over(engine):
    rootfs({"run/netns/pod": b""})
    bind_on("/proc/self/ns/uts", "rootfs/run/netns/pod")

    def check(view):
        same(read("/run/netns/pod"), b"")
        same(view.points(), ["/"])

    inside(engine, config(), check, overrides=KEEP_TMP, written=["rootfs/run"])


@behaviour
def the_spec_mounts_pseudo_file_systems_where_the_host_has_them(engine):
    rootfs()
    mount_on("rootfs/proc", b"proc")

    def check(view):
        same(view.at("/proc").type, b"proc")
        same(view.flags("/proc"), {"nosuid"})

    inside(engine, config(mount("/proc", "proc", "proc", "nosuid")), check,
           written=["rootfs/proc"])


@behaviour
def a_file_mounted_below_the_rootfs_is_bound_read_only(engine):
    rootfs({"etc/hosts": b"of the image"})
    write("hosts", b"of the host")
    bind_on("hosts", "rootfs/etc/hosts")

    def check(view):
        same(read("/etc/hosts"), b"of the host")
        fails("EROFS", write, "/etc/hosts", b"inside")
        same(view.flags("/etc/hosts"), {"ro"})
        same(view.outcome("read-only bind"), ["/etc/hosts: a file has no overlay"])

    inside(engine, config(), check)


@behaviour
def a_mount_that_overlayfs_refuses_as_a_lower_is_bound_read_only(engine):
    rootfs()
    tree("one", {"file": b"deep"})
    _host_overlay("two", "one", "layers1")
    # The kernel stacks two file systems, and ours would be the third.
    _host_overlay("rootfs/deep", "two", "layers2")

    def check(view):
        same(read("/deep/file"), b"deep")
        fails("EROFS", write, "/deep/file")
        same(view.flags("/deep"), {"ro"})
        same(view.outcome("read-only bind"), ["/deep: overlayfs refuses overlay as a lower"])

    inside(engine, config(), check)


@behaviour
def a_hidden_mount_is_no_part_of_the_view(engine):
    rootfs()
    mount_on("rootfs/data")
    write("rootfs/data/hidden")
    mount_on("rootfs/data")
    write("rootfs/data/seen")
    mount_on("rootfs/data/inner")
    mount_on("rootfs/other/inner")
    mount_on("rootfs/other")

    def check(view):
        same(sorted(os.listdir("/data")), ["inner", "seen"])
        same(view.points(), ["/", "/data", "/data/inner", "/other"])

    inside(engine, config(), check, overrides=KEEP_TMP)


@behaviour
def a_mount_on_the_rootfs_itself_is_what_is_shown(engine):
    rootfs({"below": b""})
    mount_on("rootfs")
    rootfs({"above": b""})

    def check(view):
        assert "above" in os.listdir("/")
        assert "below" not in os.listdir("/")

    inside(engine, config(), check)


@behaviour
def mounts_below_every_lower_are_shown_and_the_upper_lower_wins(engine):
    rootfs({"both/": 0})
    tree("second", {"both/": 0, "only/": 0})
    for path in ("rootfs/both", "second/both", "second/only"):
        mount_on(path)
        write(path + "/file", path.encode())

    def check(view):
        same((read("/both/file"), read("/only/file")), (b"rootfs/both", b"second/only"))

    inside(engine, config(), check, overrides={"lower": "second"})


@behaviour
def a_mount_below_a_lower_that_a_file_hides_is_left_out(engine):
    rootfs({"point": b"a file"})
    mount_on("second/point")

    def check(view):
        same(read("/point"), b"a file")
        same(view.outcome("skipped")[0], "/point: no directory there")

    inside(engine, config(), check, overrides={"lower": "second"})


@behaviour
def mounts_below_a_lower_may_have_any_name(engine):
    rootfs()
    names = ["a:b", "a,b", "a\\b", "a\nb", "a b", "\\040", os.fsdecode(b"\xff\xfe")]
    for name in names:
        mount_on("rootfs/" + name)
        write(f"rootfs/{name}/file", os.fsencode(name))

    def check(view):
        for name in names:
            same(read(f"/{name}/file"), os.fsencode(name))
            write(f"/{name}/file", b"inside")

    inside(engine, config(), check)


@behaviour
def shared_mounts_below_the_rootfs_dont_get_ours(engine):
    rootfs()
    mount_on("rootfs/data")
    os.mkdir("rootfs/data/point")
    set_propagation("rootfs/data", abi.MS_SHARED)

    def check(view):
        write("/data/point/inside")
        same(view.at("/data").propagation, abi.MS_PRIVATE)

    inside(engine, config(tmpfs("/data/point")), check)


@behaviour
def a_read_only_root_is_read_only_where_mounts_lie_below_it(engine):
    rootfs({"tmp/": 0})
    mount_on("rootfs/data")

    def check(view):
        same(view.flags("/"), {"ro"})
        fails("EROFS", write, "/new")

    inside(engine, config(tmpfs("/made"), readonly=True), check)


@behaviour
def overlay_dir_holds_what_is_written_to_the_root_with_mounts_below(engine):
    rootfs()
    mount_on("rootfs/data")
    os.mkdir("uppers")

    def check(view):
        write("/new", b"inside")
        write("/data/new", b"inside")

    inside(engine, config(), check, overrides={"overlay": "dir=" + os.path.abspath("uppers")},
           written=["uppers"])
    same(os.listdir("uppers"), [])


# -- locked mounts: the skeleton -----------------------------------------------------------


def _machine():
    """Make a small machine with mounts; another user sees them locked together."""
    tree("machine", {
        "etc/hosts": b"h", "etc/own": b"o", "bin": "usr/bin", "usr/bin/tool": b"t", "proc/": 0,
        "home/": 0, "var/lib/": 0, "var/log/file": b"l", "top": b"a file", "dev/": 0, "tmp/": 0,
    })
    os.chown("machine/etc/own", USER, USER)
    os.chmod("machine", 0o755)
    os.chmod("machine/var", 0o775)
    mount_on("machine/home", settings=[(b"mode", b"777")])
    write("machine/home/file", b"f")
    os.chown("machine/home/file", USER, USER)
    mount_on("machine/proc", b"proc", make=False)
    mount_on("machine/var/lib", settings=[(b"mode", b"777")])
    mount_on("machine/dev", settings=[(b"mode", b"777")])
    mount_on("machine/locked", settings=[(b"mode", b"700")])
    write("machine/locked/file")
    mount_on("machine/locked/inner")


UNPRIVILEGED_DEV = tmpfs("/dev", "mode=755")


@behaviour
def over_locked_mounts_the_view_is_a_skeleton(engine):
    _machine()

    def check(view):
        same(view.at("/").type, b"tmpfs", "the root")
        same(os.readlink("/bin"), "usr/bin")
        same(read("/bin/tool"), b"t")
        same(read("/top"), b"a file")
        same((mode_of("/"), mode_of("/var")), (0o755, 0o775))
        same((read("/etc/hosts"), read("/home/file"), read("/var/log/file")), (b"h", b"f", b"l"))
        write("/home/file", b"inside")
        write("/home/new")
        write("/etc/own", b"inside")
        write("/etc/new", b"inside")
        write("/var/lib/new")
        write("/new")
        same(os.listdir("/proc"), [])
        for path in ("/etc", "/home", "/var/lib", "/usr"):
            same(view.at(path).type, b"overlay", path)

    inside(engine, config(UNPRIVILEGED_DEV, root="machine"), check, user=USER,
           written=["machine/proc"])


@behaviour
def the_skeleton_can_be_read_only(engine):
    _machine()

    def check(view):
        holds(view.flags("/"), "ro")
        fails("EROFS", write, "/new")
        same(os.listdir("/made"), ["point"])
        write("/made/point/new")

    document = config(UNPRIVILEGED_DEV, tmpfs("/made/point"), root="machine", readonly=True)
    inside(engine, document, check, user=USER, written=["machine/proc"])


@behaviour
def the_machines_own_root_is_a_lower_for_an_unprivileged_user(engine):
    def check(view):
        write("/etc/made-inside", b"x")
        same(read("/etc/made-inside"), b"x")
        assert os.path.exists("/bin/sh") or os.path.exists("/bin/busybox")

    inside(engine, config(UNPRIVILEGED_DEV, root="/"), check, user=USER)
    assert not os.path.exists("/etc/made-inside")


@behaviour
def the_machines_own_root_is_a_lower_for_root(engine):
    def check(view):
        write("/etc/made-inside", b"x")
        assert os.path.exists("/bin/sh") or os.path.exists("/bin/busybox")
        same(os.listdir("/proc"), [])

    inside(engine, config(tmpfs("/dev"), root="/"), check)
    assert not os.path.exists("/etc/made-inside")
