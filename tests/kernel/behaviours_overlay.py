"""The overlay: lowers, their order, and what writes do (and don't)."""

import os
import struct

from sandboxfs.kernel import abi
from tests.kernel.behaviours_table import behaviour
from tests.kernel.behaviours_tools import (
    USER,
    bind,
    config,
    fails,
    holds,
    inside,
    mode_of,
    mount_on,
    owner_of,
    read,
    refused,
    rootfs,
    same,
    tmpfs,
    tree,
    write,
)

KEEP_TMP = {"tmp": "keep"}


@behaviour
def every_write_goes_to_the_upper(engine):
    rootfs({"etc/group": b"old", "var/gone": b"", "bin/tool": b"#!", "link": "/etc/group"})

    def check(view):
        write("/etc/new", b"made inside")
        write("/etc/group", b"changed inside")
        os.chmod("/bin/tool", 0o700)
        os.chown("/bin", 5, 6)
        os.unlink("/var/gone")
        os.rmdir("/var")
        os.rename("/link", "/etc/link")
        os.setxattr("/etc/passwd", "trusted.note", b"x")
        os.utime("/etc/passwd", (1, 1))
        os.chmod("/", 0o700)
        same(read("/etc/new"), b"made inside")
        same(read("/etc/link"), b"changed inside")
        same(sorted(os.listdir("/")), ["bin", "dev", "etc", "proc", "sys", "tmp"])

    inside(engine, config(), check)  # which compares all of the scratch directory


@behaviour
def the_root_is_one_overlay_and_its_upper_is_on_no_path(engine):
    rootfs()

    def check(view):
        same(view.points(), ["/"], "mountpoints")
        record = view.at("/")
        same(record.type, b"overlay", "type")
        same(record.propagation, abi.MS_PRIVATE, "propagation")
        same(view.flags("/"), set(), "flags")
        holds(",".join(view.superblock("/")), "lowerdir", "upperdir", "workdir")
        same(os.listdir("/.."), os.listdir("/"), "above the root")

    inside(engine, config(), check, overrides=KEEP_TMP)


@behaviour
def marks_in_a_layer_redirect_no_lookup(engine):
    # An image that carries overlayfs's own mark: with redirect_dir=on it would show /secret.
    rootfs({"secret/inside": b"", "dir/own": b""})
    os.setxattr("rootfs/dir", "trusted.overlay.redirect", b"/secret")

    def check(view):
        same(os.listdir("/dir"), ["own"])

    inside(engine, config(), check)


@behaviour
def the_root_has_the_owner_and_mode_of_the_image(engine):
    rootfs()
    os.chown("rootfs", 12, 34)
    os.chmod("rootfs", 0o2711)

    def check(view):
        same((mode_of("/"), owner_of("/")), (0o2711, (12, 34)))

    inside(engine, config(), check)


@behaviour
def the_root_has_the_acl_of_the_image(engine):
    rootfs()
    # acl(5) as an xattr: version 2, then (tag, permissions, id); user 1234 may do all.
    entries = [(1, 7, -1), (2, 7, 1234), (4, 5, -1), (16, 7, -1), (32, 5, -1)]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    os.setxattr("rootfs", "system.posix_acl_access", acl)

    def check(view):
        same(os.getxattr("/", "system.posix_acl_access"), acl)

    inside(engine, config(), check)


@behaviour
def the_root_has_the_label_of_the_image(engine):
    rootfs()
    label = b"system_u:object_r:container_file_t:s0\0"
    os.setxattr("rootfs", "security.selinux", label)

    def check(view):
        same(os.getxattr("/", "security.selinux"), label)

    inside(engine, config(), check)


@behaviour
def lowers_stack_in_the_order_given_below_root_path(engine):
    rootfs({"which": b"root", "dir/root": b""})
    tree("second", {"which": b"second", "two": b"second", "dir/second": b""})
    tree("third", {"which": b"third", "two": b"third", "three": b"third", "dir": b"a file"})

    def check(view):
        same([read("/" + name) for name in ("which", "two", "three")],
             [b"root", b"second", b"third"])
        same(sorted(os.listdir("/dir")), ["root", "second"])
        write("/three", b"inside")

    inside(engine, config(), check, overrides={"lower": ["second", "third"]})


@behaviour
def lowers_can_be_given_by_annotations_in_the_order_of_their_numbers(engine):
    rootfs()
    for name in ("a", "b", "c"):
        tree(name, {"which": name.encode(), name: b""})

    def check(view):
        same(read("/which"), b"a")
        assert {"a", "b", "c"} <= set(os.listdir("/"))

    prefix = "dev.sandboxfs.lower"
    annotations = {prefix + ".2": "c", prefix: "a", prefix + ".1": "b"}
    inside(engine, config(annotations=annotations), check)


@behaviour
def the_root_takes_its_attributes_from_the_topmost_lower(engine):
    rootfs()
    tree("second", {})
    os.chmod("second", 0o700)
    os.chmod("rootfs", 0o751)

    def check(view):
        same(mode_of("/"), 0o751)

    inside(engine, config(), check, overrides={"lower": "second"})


ODD_NAMES = ("a:b", "a,b", "a\\b", "a\nb", "a=b", "a b", "a'\"b", "ä€", "\\", ":", "#", "-o")


@behaviour
def a_lower_may_have_any_name(engine):
    for number, name in enumerate(ODD_NAMES):
        rootfs({"number": b"%d" % number}, base=name)
        tree(name + "2", {"second": b"%d" % number})

        def check(view, expected=b"%d" % number):
            same((read("/number"), read("/second")), (expected, expected))

        inside(engine, config(root=name), check, overrides={"lower": name + "2"})


@behaviour
def a_lower_may_have_a_name_that_is_no_utf8(engine):
    bundle = os.fsdecode(b"bundle\xff:,\\\n")
    rootfs({"here": b"yes"}, base=os.path.join(bundle, "rootfs"))
    tree(os.path.join(bundle, "more"), {"second": b"yes"})

    def check(view):
        same((read("/here"), read("/second")), (b"yes", b"yes"))

    lower = os.path.join(os.getcwd(), bundle, "more")
    inside(engine, config(), check, bundle=bundle, overrides={"lower": lower})


@behaviour
def an_upper_may_have_any_name(engine):
    rootfs()
    for name in (*ODD_NAMES, os.fsdecode(b"\xff\xfe")):
        os.makedirs(name)

        def check(view):
            write("/new", b"inside")

        overrides = {"overlay": "dir=" + os.path.join(os.getcwd(), name)}
        inside(engine, config(), check, overrides=overrides, written=[name])
        same(os.listdir(name), [])


@behaviour
def in_a_user_namespace_the_overlay_keeps_its_marks_in_user_xattrs(engine):
    rootfs({"etc/old": b"x"})
    for name in ("etc", "etc/old", "dev"):
        os.chown("rootfs/" + name, USER, USER)

    def check(view):
        holds(view.superblock("/"), "userxattr")
        write("/etc/new", b"inside")
        write("/etc/old", b"changed")
        os.unlink("/etc/old")
        same(sorted(os.listdir("/etc")), ["new", "passwd"])

    inside(engine, config(), check, user=USER, overrides=KEEP_TMP)


@behaviour
def for_root_the_overlay_keeps_its_marks_in_trusted_xattrs(engine):
    rootfs()

    def check(view):
        assert "userxattr" not in view.superblock("/")

    inside(engine, config(), check)


# -- overlay=… -----------------------------------------------------------------------------


@behaviour
def overlay_none_is_the_rootfs_itself(engine):
    rootfs()
    mount_on("rootfs/data", settings=[(b"mode", b"700")])

    def check(view):
        holds(view.notes(), "none: the rootfs itself; missing mountpoints are made in it")
        same(view.at("/").type, b"tmpfs", "the scratch file system itself")
        same(view.at("/").root.rpartition(b"/")[2], b"rootfs")
        same(view.points(), ["/", "/data", "/made"])
        same(view.at("/data").propagation, abi.MS_PRIVATE)
        write("/etc/new", b"inside")
        write("/data/new", b"inside")

    document = config({"destination": "/made", "type": "tmpfs"})
    inside(engine, document, check, overrides={"overlay": "none", **KEEP_TMP},
           written=["rootfs"])
    same(read("rootfs/etc/new"), b"inside")
    same(read("rootfs/data/new"), b"inside")
    same(mode_of("rootfs/made"), 0o755)


@behaviour
def overlay_none_can_be_read_only(engine):
    rootfs({"point/": 0})

    def check(view):
        same(view.flags("/"), {"ro"})
        fails("EROFS", write, "/etc/new")
        write("/point/new")

    document = config({"destination": "/point", "type": "tmpfs"}, readonly=True)
    tree("rootfs", {"tmp/": 0})
    for name in ("null", "zero", "full", "random", "urandom", "tty", "fd", "stdin", "stdout",
                 "stderr", "ptmx", "core"):
        write("rootfs/dev/" + name)
    document["mounts"].append({"destination": "/dev", "type": "tmpfs"})
    inside(engine, document, check, overrides={"overlay": "none"})


@behaviour
def overlay_none_takes_no_further_lowers(engine):
    rootfs()
    error = refused(engine, config(), overrides={"overlay": "none", "lower": "rootfs"})
    holds(error["line"], "overlay: none: further lowers need an overlay")


def _names_in(fd):
    here = os.open(".", os.O_RDONLY | os.O_CLOEXEC, dir_fd=fd)
    try:
        return sorted(os.listdir(here))
    finally:
        os.close(here)


def _dir(suffix=""):
    os.makedirs("uppers", exist_ok=True)
    return {"overlay": f"dir={os.path.abspath('uppers')}{suffix}", **KEEP_TMP}


@behaviour
def overlay_dir_makes_upper_and_work_under_the_path_and_they_go(engine):
    rootfs()
    os.chmod("rootfs", 0o711)

    def check(view):
        write("/etc/new", b"inside")
        same(mode_of("/"), 0o711)
        upper = view.root.materials.upper
        same(_names_in(upper.fd), ["upper", "work"])
        return [_names_in(upper.parent), view.points()]

    names, points = inside(engine, config(), check, overrides=_dir(), written=["uppers"])
    same(len(names), 1)
    holds(names[0], "sandboxfs-")
    same(points, ["/"])
    same(os.listdir("uppers"), [])


@behaviour
def overlay_dir_keep_leaves_what_was_written_named_after_the_container(engine):
    rootfs({"etc/gone": b""})

    def check(view):
        write("/etc/new", b"inside")
        os.unlink("/etc/gone")

    inside(engine, config(), check, overrides=_dir(":keep"), written=["uppers"],
           change=lambda plan: named(plan, "box1"))
    same(os.listdir("uppers"), ["box1"])
    same(mode_of("uppers/box1"), 0o700)
    same(read("uppers/box1/upper/etc/new"), b"inside")
    same(os.lstat("uppers/box1/upper/etc/gone").st_rdev, 0, "a whiteout")


def named(plan, name):
    """Give a plan's overlay the name of a container."""
    for step in plan:
        if step.name == "overlay":
            step.label = name


@behaviour
def overlay_dir_takes_no_directory_that_is_there_already(engine):
    rootfs()
    error = refused(engine, config(), overrides=_dir(), change=lambda plan: named(plan, "."))
    same((error["origin"], error["operation"], error["errno"]), ("overlay", "mkdir", "EEXIST"))


@behaviour
def overlay_dir_has_to_exist(engine):
    rootfs()
    path = os.path.abspath("nowhere")
    error = refused(engine, config(), overrides={"overlay": "dir=" + path})
    same((error["origin"], error["operation"], error["target"], error["errno"]),
         ("overlay", "open", path, "ENOENT"))


@behaviour
def overlay_dir_has_to_be_able_to_be_an_upper(engine):
    rootfs()
    mount_on("upper", b"proc")
    error = refused(engine, config(), overrides={"overlay": "dir=" + os.path.abspath("upper")},
                    written=["upper"])
    same((error["origin"], error["operation"]), ("overlay", "mkdir"))


@behaviour
def an_upper_that_is_not_kept_goes_when_the_build_fails(engine):
    rootfs()
    error = refused(engine, config(tmpfs("/data", "nonsense=1")), overrides=_dir(),
                    written=["uppers"])
    same(error["origin"], "mounts[0]")
    same(os.listdir("uppers"), [])


def _fill(path):
    """Write until the file system is full; return the KiB that fitted."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    count = 0
    try:
        while count < 1 << 14:
            count += os.write(fd, bytes(4096)) // 1024
    except OSError as error:
        same(error.errno, 28, "ENOSPC")
    finally:
        os.close(fd)
    return count


@behaviour
def overlay_size_is_the_total_of_all_uppers_of_the_root(engine):
    rootfs({"data/": 0})
    mount_on("rootfs/data")

    def check(view):
        first, second = _fill("/etc/big"), _fill("/data/big")
        assert 512 < first + second <= 1024, (first, second)
        assert second < 100, (first, second)

    inside(engine, config(), check, overrides={"overlay.size": "1M"})


@behaviour
def overlay_size_may_be_bytes_or_a_share_of_memory(engine):
    rootfs()

    def blocks(view):
        status = os.statvfs("/")
        return status.f_blocks * status.f_frsize

    total = int(read("/proc/meminfo").split()[1]) << 10
    same(inside(engine, config(), blocks, overrides={"overlay.size": "65536"}), 65536)
    same(inside(engine, config(), blocks, overrides={"overlay.size": "1G"}), 1 << 30)
    share = inside(engine, config(), blocks, overrides={"overlay.size": "25%"})
    assert abs(share - total // 4) < total // 100, (share, total)
    default = inside(engine, config(), blocks)
    assert abs(default - total // 2) < total // 50, (default, total)


@behaviour
def overlay_size_is_half_of_the_memory_limit_and_the_plan_says_so(engine):
    rootfs()

    def check(view):
        same(os.statvfs("/").f_blocks * os.statvfs("/").f_frsize, 4 << 20)
        holds(view.notes(), "overlay.size: 4194304: half of linux.resources.memory.limit")

    inside(engine, config(resources={"memory": {"limit": 8 << 20}}), check)


@behaviour
def overlay_binds_gives_every_writable_bind_an_overlay_of_its_own(engine):
    rootfs()
    tree("volume", {"old": b"x", "sub/inner": b"y"})
    os.chmod("volume", 0o750)
    os.chown("volume", 3, 4)
    write("single", b"content", 0o640)
    os.chown("single", 5, 6)
    os.setxattr("single", "trusted.note", b"n")
    tree("fixed", {"old": b"z"})

    def check(view):
        same((mode_of("/volume"), owner_of("/volume")), (0o750, (3, 4)))
        write("/volume/old", b"inside")
        write("/volume/sub/new")
        same((mode_of("/single"), owner_of("/single")), (0o640, (5, 6)))
        same(os.getxattr("/single", "trusted.note"), b"n")
        same(read("/single"), b"content")
        write("/single", b"inside")
        same(read("/single"), b"inside")
        same(view.flags("/volume"), {"nosuid"})
        same(view.at("/volume").type, b"overlay")
        fails("EROFS", write, "/fixed/old")

    document = config(bind("/volume", "volume", "nosuid"), bind("/single", "single"),
                      bind("/fixed", "fixed", "ro"))
    inside(engine, document, check, overrides={"overlay.binds": "true"})


@behaviour
def overlay_binds_reaches_mounts_below_a_recursive_bind(engine):
    rootfs()
    tree("volume", {"old": b"x"})
    mount_on("volume/sub")
    write("volume/sub/file", b"s")

    def check(view):
        same(read("/volume/sub/file"), b"s")
        write("/volume/sub/file", b"inside")
        write("/volume/sub/new")
        write("/volume/old", b"inside")

    inside(engine, config(bind("/volume", "volume", "rbind")), check,
           overrides={"overlay.binds": "true"})
