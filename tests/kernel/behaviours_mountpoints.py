"""Mountpoints: what is reused, what is made, and how paths are resolved inside the root."""

import os
import socket
import stat

from sandboxfs.kernel import abi, syscalls
from tests.kernel.behaviours_table import behaviour
from tests.kernel.behaviours_tools import (
    USER,
    bind,
    config,
    holds,
    inside,
    mode_of,
    mount,
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


def uncovered(path):
    """Take the mount at a path away and return the stat of what it covered."""
    syscalls.umount2(os.fsencode(path), abi.MNT_DETACH)
    return os.lstat(path)


@behaviour
def an_existing_directory_is_reused_as_it_is(engine):
    rootfs({"point/inside": b""})
    os.chmod("rootfs/point", 0o2700)
    os.chown("rootfs/point", 5, 6)
    os.utime("rootfs/point", (1, 1))

    def check(view):
        status = uncovered("/point")
        same((stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime),
             (0o2700, 5, 6, 1))
        same(os.listdir("/point"), ["inside"])

    inside(engine, config(tmpfs("/point")), check)


@behaviour
def an_existing_file_is_reused_as_it_is(engine):
    rootfs({"point": b"content"})
    os.chmod("rootfs/point", 0o600)
    os.chown("rootfs/point", 5, 6)
    write("source", b"bound")

    def check(view):
        same(read("/point"), b"bound")
        status = uncovered("/point")
        same((stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid), (0o600, 5, 6))
        same(read("/point"), b"content")

    inside(engine, config(bind("/point", "source")), check)


@behaviour
def any_existing_non_directory_fits_a_file(engine):
    rootfs()
    os.mkfifo("rootfs/fifo")
    os.mknod("rootfs/node", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("rootfs/socket")
    listener.close()
    write("source", b"bound")

    def check(view):
        for name in ("/fifo", "/node", "/socket"):
            same(read(name), b"bound", name)

    inside(engine, config(*(bind(name, "source") for name in ("/fifo", "/node", "/socket"))),
           check)


@behaviour
def any_non_directory_can_be_bound(engine):
    rootfs()
    os.mkfifo("fifo")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("socket")
    listener.close()

    def check(view):
        assert stat.S_ISFIFO(os.stat("/a").st_mode)
        assert stat.S_ISSOCK(os.stat("/b").st_mode)
        same(os.stat("/c").st_rdev, os.makedev(1, 3))

    inside(engine, config(bind("/a", "fifo"), bind("/b", "socket"), bind("/c", "/dev/null")),
           check)


@behaviour
def a_directory_on_a_file_is_an_error_that_names_both(engine):
    rootfs({"point": b"a file"})
    tree("source", {})
    error = refused(engine, config(bind("/point", "source")))
    same((error["origin"], error["operation"], error["target"], error["errno"]),
         ("mounts[0]", "mountpoint", "/point", "ENOTDIR"))
    holds(error["text"], os.path.abspath("source"), "is a directory", "destination is a file")


@behaviour
def a_file_on_a_directory_is_an_error_that_names_both(engine):
    rootfs({"point/": 0})
    write("source")
    error = refused(engine, config(bind("/point", "source")))
    same((error["origin"], error["operation"], error["target"], error["errno"]),
         ("mounts[0]", "mountpoint", "/point", "EISDIR"))
    holds(error["text"], os.path.abspath("source"), "is a file", "destination is a directory")


@behaviour
def a_file_system_on_a_file_is_an_error_that_names_both(engine):
    rootfs({"point": b"a file"})
    error = refused(engine, config(tmpfs("/point")))
    same((error["origin"], error["target"], error["errno"]), ("mounts[0]", "/point", "ENOTDIR"))
    holds(error["text"], "tmpfs", "a directory", "a file")


@behaviour
def a_file_on_the_way_is_an_error(engine):
    rootfs({"file": b"x"})
    error = refused(engine, config(tmpfs("/file/deeper/point")))
    same((error["origin"], error["target"], error["errno"]),
         ("mounts[0]", "/file/deeper/point", "ENOTDIR"))


@behaviour
def missing_mountpoints_have_fixed_modes_and_belong_to_root(engine):
    rootfs()
    write("source")
    document = config(tmpfs("/a/b/point"), bind("/c/d/file", "source"))

    def check(view):
        for path in ("/a/b/point", "/c/d/file"):
            uncovered(path)
        found = {path: (mode_of(path), owner_of(path))
                 for path in ("/a", "/a/b", "/a/b/point", "/c", "/c/d", "/c/d/file")}
        expected = dict.fromkeys(found, (0o755, (0, 0)))
        expected["/c/d/file"] = (0o644, (0, 0))
        same(found, expected)
        same(read("/c/d/file"), b"")

    for umask in (0, 0o22, 0o77, 0o777):
        inside(engine, document, check, umask=umask)


@behaviour
def in_a_user_namespace_made_outside_mountpoints_belong_to_its_root(engine):
    rootfs()
    write("source")
    mapping = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    document = config(tmpfs("/a/point"), bind("/c/file", "source"), tmpfs("/dev"),
                      namespaces=[{"type": "mount"}, {"type": "user"}],
                      uidMappings=mapping, gidMappings=mapping)

    def check(view):
        same(owner_of("/a/point"), (100000, 100000), "the tmpfs")
        for path in ("/a/point", "/c/file"):
            uncovered(path)
        same({owner_of(path) for path in ("/a", "/a/point", "/c", "/c/file")},
             {(100000, 100000)})

    inside(engine, document, check)


# -- resolving -----------------------------------------------------------------------------


@behaviour
def symlinks_are_resolved_inside_the_root(engine):
    rootfs({
        "real/inner/": 0, "absolute": "/real", "relative": "real", "chain": "absolute",
        "up/link": "../../../../real", "escape": "/../../real", "deep": "/real/inner/..",
    })
    tree("real", {})  # what the same path leads to outside
    names = ("absolute", "relative", "chain", "up/link", "escape", "deep")

    def check(view):
        same(view.points(), sorted(["/", *(f"/real/{number}" for number in range(len(names)))]))

    inside(engine, config(*(tmpfs(f"/{name}/{number}") for number, name in enumerate(names))),
           check, overrides=KEEP_TMP)


@behaviour
def a_last_symlink_is_followed(engine):
    rootfs({"real/": 0, "link": "/real", "file": b"x", "filelink": "file"})
    write("source", b"bound")

    def check(view):
        same(view.points(), ["/", "/file", "/real"])
        same((os.readlink("/link"), os.readlink("/filelink")), ("/real", "file"))

    inside(engine, config(tmpfs("/link"), bind("/filelink", "source")), check,
           overrides=KEEP_TMP)


@behaviour
def a_dangling_last_symlink_is_followed_and_its_target_made(engine):
    rootfs({
        "absolute": "/new/directory", "etc/relative": "../made/file", "escape": "/../../out/side",
        "chain": "chained", "chained": "/far/end",
    })
    write("source", b"bound")
    document = config(tmpfs("/absolute"), bind("/etc/relative", "source"), tmpfs("/escape"),
                      tmpfs("/chain"))

    def check(view):
        same(view.points(), ["/", "/far/end", "/made/file", "/new/directory", "/out/side"])
        same(read("/etc/relative"), b"bound")
        same([mode_of(path) for path in ("/new", "/made", "/out", "/far")], [0o755] * 4)

    inside(engine, document, check, overrides=KEEP_TMP)
    assert not os.path.exists("/new/directory")


@behaviour
def a_dangling_symlink_on_the_way_is_followed_and_its_target_made(engine):
    rootfs({"link": "/not/there", "name": os.fsdecode(b"bytes\xff,:\n")})

    def check(view):
        same(view.points(), ["/", os.fsdecode(b"/bytes\xff,:\n/point"), "/not/there/point"])

    inside(engine, config(tmpfs("/link/point"), tmpfs("/name/point")), check, overrides=KEEP_TMP)


@behaviour
def links_in_a_circle_are_an_error(engine):
    rootfs({"a": "b", "b": "a"})
    error = refused(engine, config(tmpfs("/a/point")))
    same((error["origin"], error["target"], error["errno"]), ("mounts[0]", "/a/point", "ELOOP"))
    holds(error["hint"], "links lead in a circle")


@behaviour
def dots_never_leave_the_root(engine):
    rootfs({"dir/": 0, "missing": "../../nowhere/x"})

    def check(view):
        same(view.points(), ["/", "/a", "/b", "/dir/c", "/nowhere/x/point"])

    document = config(tmpfs("/../../a"), tmpfs("/dir/../../b"), tmpfs("/dir/./../dir//c/"),
                      tmpfs("/missing/point"))
    inside(engine, document, check, overrides=KEEP_TMP)


@behaviour
def a_destination_may_have_any_name(engine):
    rootfs()
    names = ["a:b", "a,b", "a\\b", "a\nb", "a=b", "a b", "a'\"b", "ä€", "\\040", "-o", "#", "..."]
    write("source", b"bound")

    def check(view):
        same(view.points(), sorted(["/", *(f"/d/{name}" for name in names),
                                    *(f"/f/{name}" for name in names)]))

    inside(engine, config(*(tmpfs("/d/" + name) for name in names),
                          *(bind("/f/" + name, "source") for name in names)),
           check, overrides=KEEP_TMP)


@behaviour
def a_bind_source_may_have_any_name(engine):
    rootfs()
    names = ["a:b", "a,b", "a\\b", "a\nb", "a=b", "a b", "a'\"b", "ä€", "\\040", "-o", "#"]
    for name in names:
        tree(name, {"file": name.encode()})

    def check(view):
        for number, name in enumerate(names):
            same(read(f"/{number}/file"), name.encode())

    inside(engine, config(*(bind(f"/{number}", name) for number, name in enumerate(names))),
           check)


@behaviour
def a_relative_bind_source_is_relative_to_the_bundle_of_any_name(engine):
    bundle = os.fsdecode(b"bundle\xff,:")
    rootfs(base=os.path.join(bundle, "rootfs"))
    tree(os.path.join(bundle, "data"), {"file": b"bound"})

    def check(view):
        same(read("/point/file"), b"bound")

    inside(engine, config(bind("/point", "data")), check, bundle=bundle)


@behaviour
def a_relative_destination_is_taken_from_the_root(engine):
    rootfs()

    def check(view):
        same(view.points(), ["/", "/relative/point"])
        holds(view.notes(), "mounts[0]: destination relative/point: relative, taken from /")

    inside(engine, config(tmpfs("relative/point")), check, overrides=KEEP_TMP)


@behaviour
def the_root_is_no_destination(engine):
    rootfs()
    for destination in ("/", "//", "/.", "/..", "/a/..", ".", "/etc/../"):
        error = refused(engine, config(tmpfs(destination)))
        same((error["kind"], error["origin"]), ("SpecError", "/mounts/0/destination"),
             destination)
        holds(error["text"], "the root itself")
    error = refused(engine, config(tmpfs("")))
    same((error["kind"], error["origin"]), ("SpecError", "/mounts/0/destination"))


@behaviour
def mounts_are_attached_in_listed_order(engine):
    rootfs()
    tree("first", {"file": b"first", "sub/": 0})
    tree("second", {"file": b"second", "sub/": 0})
    document = config(bind("/point", "first"), tmpfs("/point/sub"), bind("/point", "second"))

    def check(view):
        same(read("/point/file"), b"second")
        same(view.points(), ["/", "/point", "/point", "/point/sub"])
        uncovered("/point")
        same(read("/point/file"), b"first")
        # A parent listed after its child hides it: nothing is sorted.
        same(view.points(), ["/", "/point", "/point/sub"])

    inside(engine, document, check, overrides=KEEP_TMP)


# -- proc and sysfs ------------------------------------------------------------------------


@behaviour
def proc_and_sysfs_are_mounted_on_real_directories(engine):
    rootfs()

    def check(view):
        same((view.at("/proc").type, view.at("/sys").type), (b"proc", b"sysfs"))
        same(os.stat("/proc/self").st_ino, os.stat(f"/proc/{os.getpid()}").st_ino)

    inside(engine, config(mount("/proc", "proc", "proc"), mount("/sys", "sysfs", "sysfs", "ro")),
           check)


@behaviour
def proc_and_sysfs_are_made_where_missing(engine):
    tree("rootfs", {"etc/": 0})

    def check(view):
        same(view.points(), ["/", "/proc", "/sys/deep"])

    inside(engine, config(mount("/proc", "proc"), mount("/sys/deep", "sysfs")), check,
           overrides=KEEP_TMP)


@behaviour
def proc_and_sysfs_are_refused_behind_a_symlink(engine):
    for name, entries in (
        ("last", {"proc": "/real", "sys": "real", "real/": 0}),
        ("dangling", {"proc": "/nowhere", "sys": "nowhere"}),
    ):
        tree(name, entries)
        for kind, destination in (("proc", "/proc"), ("sysfs", "/sys")):
            error = refused(engine, config(mount(destination, kind), root=name))
            same((error["origin"], error["target"], error["errno"]),
                 ("mounts[0]", destination, "ELOOP"), name)
            holds(error["text"] + str(error["hint"]), "a symlink")
    tree("parent", {"link": "/real", "real/": 0})
    for kind in ("proc", "sysfs"):
        error = refused(engine, config(mount("/link/point", kind), root="parent"))
        same(error["errno"], "ELOOP")


@behaviour
def proc_and_sysfs_are_refused_on_a_file(engine):
    tree("rootfs", {"proc": b""})
    error = refused(engine, config(mount("/proc", "proc")))
    same((error["origin"], error["errno"]), ("mounts[0]", "ENOTDIR"))


ALLOWED_IN_PROC = (
    "cpuinfo", "diskstats", "meminfo", "stat", "swaps", "uptime", "loadavg",
)


@behaviour
def inside_proc_the_files_that_runc_allows_may_be_covered(engine):
    rootfs()
    write("source", b"bound")

    def check(view):
        for name in ALLOWED_IN_PROC:
            same(read("/proc/" + name), b"bound", name)
        if os.path.exists("/proc/sys/kernel/ns_last_pid"):
            same(read("/proc/sys/kernel/ns_last_pid"), b"bound")

    names = [name for name in (*ALLOWED_IN_PROC, "sys/kernel/ns_last_pid", "slabinfo",
                               "sys/crypto/fips_enabled") if os.path.exists("/proc/" + name)]
    inside(engine, config(mount("/proc", "proc"),
                          *(bind("/proc/" + name, "source") for name in names)), check)


@behaviour
def inside_proc_nothing_else_may_be_covered(engine):
    rootfs()
    write("source")
    for path in ("/proc/1", "/proc/self/attr", "/proc/sys", "/proc/sys/kernel/hostname",
                 "/proc/version", "/proc/./1", "/sys/../proc/1", "/proc//sysrq-trigger"):
        error = refused(engine, config(mount("/proc", "proc"), bind(path, "source")))
        same((error["kind"], error["origin"]), ("SpecError", "/mounts/1/destination"), path)
    error = refused(engine, config(mount("/proc", "proc"), tmpfs("/proc/1")))
    same(error["kind"], "SpecError")


@behaviour
def over_proc_only_proc_may_be_mounted(engine):
    rootfs()
    tree("source", {})
    error = refused(engine, config(tmpfs("/proc")))
    same((error["kind"], error["origin"]), ("SpecError", "/mounts/0/destination"))
    error = refused(engine, config(bind("/proc", "source")))
    same(error["kind"], "SpecError")


@behaviour
def the_hosts_proc_may_be_bound_on_proc(engine):
    # As rootless containers without a pid namespace of their own do.
    rootfs()

    def check(view):
        same(view.at("/proc").type, b"proc")

    inside(engine, config(bind("/proc", "/proc", "rbind")), check)


# -- the working directory -----------------------------------------------------------------


@behaviour
def the_working_directory_is_made_inside_the_root(engine):
    rootfs({"link": "/real"})

    def check(view):
        same([(mode_of(path), owner_of(path)) for path in ("/real", "/real/a", "/real/a/b")],
             [(0o755, (0, 0))] * 3)

    inside(engine, config(process={"cwd": "/link/a/b"}), check)


@behaviour
def a_working_directory_that_exists_is_left_as_it_is(engine):
    rootfs({"work/": 0})
    os.chmod("rootfs/work", 0o700)

    def check(view):
        same(mode_of("/work"), 0o700)

    inside(engine, config(process={"cwd": "/work"}), check)


@behaviour
def a_working_directory_below_a_mount_is_made_in_it(engine):
    rootfs()

    def check(view):
        assert os.path.isdir("/data/work")
        uncovered("/data")
        same(os.listdir("/data"), [])

    inside(engine, config(tmpfs("/data"), process={"cwd": "/data/work"}), check)


@behaviour
def a_working_directory_that_is_a_file_is_an_error(engine):
    rootfs({"work": b""})
    error = refused(engine, config(process={"cwd": "/work"}))
    same((error["origin"], error["target"], error["errno"]), ("process.cwd", "/work", "ENOTDIR"))


@behaviour
def a_root_can_be_attached_on_a_path_instead(engine):
    rootfs()
    os.makedirs("here")
    before = os.stat("here").st_ino

    def check(view):
        same(os.listdir("here"), os.listdir("here/"))
        assert os.path.isdir("here/made")
        assert os.stat("here").st_ino != before
        write("here/new")

    inside(engine, config(tmpfs("/made")), check, attach="here")
    mount_on("other")


@behaviour
def what_is_made_in_a_directory_that_hands_down_its_group_hands_it_down_too(engine):
    rootfs()

    def check(view):
        same([(oct(mode_of(path)), owner_of(path)) for path in ("/run/made", "/run/made/in")],
             [("0o2755", (0, USER))] * 2)

    document = config(tmpfs("/run", "mode=2755", f"gid={USER}"), tmpfs("/run/made/in/point"))
    for umask in (0, 0o77):
        inside(engine, document, check, umask=umask)


@behaviour
def devices_are_roots_whatever_group_their_directory_hands_down(engine):
    rootfs()

    def check(view):
        same({name: owner_of("/dev/" + name) for name in ("null", "zero", "tty")},
             {"null": (0, 0), "zero": (0, 0), "tty": (0, 0)})

    inside(engine, config(tmpfs("/dev", "mode=2755", f"gid={USER}")), check)
