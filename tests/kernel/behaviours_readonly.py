"""Read-only while building: what is sealed, and how mountpoints get into it all the same."""

import os

from sandboxfs.build import assemble, writable
from sandboxfs.kernel import abi
from tests.kernel.behaviours_images import EROFS, mount_image
from tests.kernel.behaviours_table import behaviour
from tests.kernel.behaviours_tools import (
    bind,
    bind_on,
    config,
    fails,
    holds,
    inside,
    mode_of,
    mount_on,
    read,
    refused,
    rootfs,
    same,
    tmpfs,
    tree,
    write,
)

DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "fd", "stdin", "stdout", "stderr",
           "ptmx", "core")


def _complete_rootfs(entries=None):
    """Make an image in which nothing has to be made."""
    rootfs({"tmp/": 0, "point/": 0, **(entries or {})})


def _flips(calls):
    """Record the calls that take RDONLY away; they are made as usual."""
    original = writable.mount_setattr

    def recorded(fd, attr_set=0, attr_clr=0, *rest):
        if attr_clr & abi.MOUNT_ATTR_RDONLY:
            calls.append(attr_clr)
        original(fd, attr_set, attr_clr, *rest)

    writable.mount_setattr = assemble.mount_setattr = recorded


@behaviour
def a_read_only_root_with_all_mountpoints_is_never_writable(engine):
    _complete_rootfs()
    calls = []

    def check(view):
        same(calls, [], "calls that made something writable")
        same(view.flags("/"), {"ro"})
        for path in ("/new", "/etc/passwd", "/etc/new"):
            fails("EROFS", write, path)
        write("/point/new")
        write("/tmp/new")

    document = config(tmpfs("/point"), tmpfs("/dev"), readonly=True)
    inside(engine, document, check, prepare=lambda: _flips(calls))


@behaviour
def a_read_only_root_gets_its_missing_mountpoints_and_is_sealed(engine):
    rootfs()
    calls = []
    write("file", b"bound")

    def check(view):
        same(calls, [abi.MOUNT_ATTR_RDONLY], "made writable once")
        same(view.flags("/"), {"ro"})
        fails("EROFS", write, "/new")
        fails("EROFS", os.mkdir, "/made/deep/other")
        same(read("/made/file"), b"bound")
        same(view.points(), ["/", "/made/deep/point", "/made/file", "/tmp"])
        same([mode_of(path) for path in ("/made", "/made/deep")], [0o755, 0o755])

    document = config(tmpfs("/made/deep/point"), bind("/made/file", "file"), readonly=True)
    inside(engine, document, check, prepare=lambda: _flips(calls))


@behaviour
def a_writable_root_stays_writable(engine):
    rootfs()

    def check(view):
        same(view.flags("/"), set())
        write("/new")

    inside(engine, config(tmpfs("/made")), check)


@behaviour
def a_failed_build_of_a_read_only_root_leaves_nothing(engine):
    rootfs()
    error = refused(engine, config(tmpfs("/made/point"), tmpfs("/other", "nonsense=1"),
                                   readonly=True))
    same((error["origin"], error["operation"], error["errno"]),
         ("mounts[1]", "fsconfig nonsense=1", "EINVAL"))


@behaviour
def a_mount_in_a_read_only_tmpfs_gets_its_mountpoint(engine):
    rootfs({"outer/": 0})
    write("file", b"bound")

    def check(view):
        same(view.flags("/outer"), {"ro"})
        fails("EROFS", write, "/outer/new")
        fails("EROFS", os.mkdir, "/outer/a/new")
        write("/outer/a/b/new")
        same(read("/outer/file"), b"bound")
        same(view.points(), ["/", "/outer", "/outer/a/b", "/outer/file"])
        same((mode_of("/outer/a"), mode_of("/outer/file")), (0o755, 0o644))

    document = config(tmpfs("/outer", "ro"), tmpfs("/outer/a/b"), bind("/outer/file", "file"))
    inside(engine, document, check, overrides={"tmp": "keep"})


@behaviour
def a_chain_of_read_only_mounts_gets_all_mountpoints(engine):
    rootfs()

    def check(view):
        for path in ("/a", "/a/b", "/a/b/c"):
            same(view.flags(path), {"ro"}, path)
            fails("EROFS", write, path + "/new")
        write("/a/b/c/d/new")
        same(view.points(), ["/", "/a", "/a/b", "/a/b/c", "/a/b/c/d"])

    document = config(tmpfs("/a", "ro"), tmpfs("/a/b", "ro"), tmpfs("/a/b/c", "ro"),
                      tmpfs("/a/b/c/d"), readonly=True)
    inside(engine, document, check, overrides={"tmp": "keep"}, prepare=None)


@behaviour
def a_tmpfs_below_a_read_only_dev_gets_its_mountpoint(engine):
    rootfs()

    def check(view):
        same(view.flags("/dev"), {"ro", "nosuid"})
        write("/dev/shm/new")
        same(os.stat("/dev/null").st_rdev, os.makedev(1, 3))
        fails("EROFS", os.mkdir, "/dev/new")

    inside(engine, config(tmpfs("/dev", "ro", "nosuid", "mode=755"), tmpfs("/dev/shm")), check)


@behaviour
def a_mount_in_a_read_only_bind_that_has_the_mountpoint_uses_it(engine):
    rootfs()
    tree("volume", {"point/": 0, "file": b"v"})

    def check(view):
        same(view.at("/volume").type, b"tmpfs", "the bind itself")
        same(view.flags("/volume"), {"ro"})
        write("/volume/point/new")
        same(view.outcome("synthesised"), [])

    inside(engine, config(bind("/volume", "volume", "ro"), tmpfs("/volume/point")), check)


@behaviour
def a_mount_in_a_read_only_bind_without_mountpoint_is_synthesised(engine):
    rootfs()
    tree("volume", {"file": b"v", "sub/inner": b"i"})
    os.chmod("volume", 0o750)
    os.chown("volume", 7, 8)
    write("single", b"bound")

    def check(view):
        same(view.at("/volume").type, b"overlay")
        same(view.flags("/volume"), {"ro", "nosuid", "nodev"})
        same((read("/volume/file"), read("/volume/sub/inner")), (b"v", b"i"))
        same((mode_of("/volume"), os.stat("/volume").st_uid), (0o750, 7))
        fails("EROFS", write, "/volume/file")
        fails("EROFS", os.mkdir, "/volume/new")
        write("/volume/point/deep/new")
        same(read("/volume/sub/single"), b"bound")
        same(len(view.outcome("synthesised")), 1)
        same(view.points(),
             ["/", "/volume", "/volume/point/deep", "/volume/sub/single"])

    document = config(bind("/volume", "volume", "ro", "nosuid", "nodev"),
                      tmpfs("/volume/point/deep"), bind("/volume/sub/single", "single"))
    inside(engine, document, check, overrides={"tmp": "keep"})


@behaviour
def the_plan_says_that_a_mount_lies_in_a_read_only_bind(engine):
    rootfs()
    tree("volume", {})

    def check(view):
        (outer,) = (step for step in view.plan if getattr(step, "nested", ()))
        same((outer.origin, outer.nested), ("mounts[0]", ("point",)))

    inside(engine, config(bind("/volume", "volume", "ro"), tmpfs("/volume/point")), check)


@behaviour
def a_mount_in_a_writable_bind_makes_its_mountpoint_in_the_source(engine):
    rootfs()
    tree("volume", {"file": b"v"})

    def check(view):
        same(view.at("/volume").type, b"tmpfs", "the bind itself")
        write("/volume/point/new")

    inside(engine, config(bind("/volume", "volume"), tmpfs("/volume/point")), check,
           written=["volume"])
    same(sorted(os.listdir("volume")), ["file", "point"])
    same((os.listdir("volume/point"), mode_of("volume/point")), ([], 0o755))


@behaviour
def a_mount_in_a_recursive_read_only_bind_keeps_the_mounts_below(engine):
    rootfs()
    tree("volume", {"file": b"v"})
    mount_on("volume/sub", settings=[(b"mode", b"711")])
    write("volume/sub/file", b"s")
    mount_on("volume/sub/deep")
    write("volume/sub/deep/file", b"d")

    def check(view):
        same([read(f"/volume/{path}file") for path in ("", "sub/", "sub/deep/")],
             [b"v", b"s", b"d"])
        for path in ("/volume", "/volume/sub", "/volume/sub/deep"):
            same(view.flags(path), {"ro"}, path)
            fails("EROFS", write, path + "/new")
        write("/volume/point/new")

    document = config(bind("/volume", "volume", "rbind", "rro"), tmpfs("/volume/point"))
    inside(engine, document, check)


@behaviour
def a_mountpoint_missing_below_a_submount_of_a_read_only_bind_is_synthesised_there(engine):
    rootfs()
    tree("volume", {"file": b"v"})
    mount_on("volume/sub")
    write("volume/sub/file", b"s")

    def check(view):
        same((read("/volume/file"), read("/volume/sub/file")), (b"v", b"s"))
        for path in ("/volume", "/volume/sub"):
            holds(view.flags(path), "ro")
            fails("EROFS", write, path + "/new")
        write("/volume/sub/point/new")

    document = config(bind("/volume", "volume", "rbind", "rro"), tmpfs("/volume/sub/point"))
    inside(engine, document, check)


@behaviour
def only_the_top_of_a_recursive_bind_is_read_only_by_ro(engine):
    rootfs()
    tree("volume", {})
    mount_on("volume/sub")

    def check(view):
        same((view.flags("/volume"), view.flags("/volume/sub")), ({"ro"}, set()))
        write("/volume/point/new")

    document = config(bind("/volume", "volume", "rbind", "ro"), tmpfs("/volume/point"))
    inside(engine, document, check)


@behaviour
def a_read_only_superblock_gets_its_mountpoint_by_an_overlay(engine):
    rootfs()
    mount_image(EROFS, b"erofs", "image")

    def check(view):
        same(view.at("/image").type, b"overlay")
        same(read("/image/etc/image"), b"from an image\n")
        write("/image/new/point/file")
        same(mode_of("/image"), 0o751)
        assert view.outcome("synthesised"), view.root.outcomes

    inside(engine, config(bind("/image", "image", "ro"), tmpfs("/image/new/point")), check)


@behaviour
def a_read_only_superblock_bound_writable_gets_its_mountpoint_by_an_overlay(engine):
    rootfs()
    mount_image(EROFS, b"erofs", "image")

    def check(view):
        same(read("/image/etc/image"), b"from an image\n")
        fails("EROFS", write, "/image/etc/image")
        write("/image/new/point/file")
        assert view.outcome("synthesised"), view.root.outcomes

    inside(engine, config(bind("/image", "image"), tmpfs("/image/new/point")), check)


@behaviour
def a_read_only_superblock_with_the_mountpoint_stays_as_it_is(engine):
    rootfs()
    mount_image(EROFS, b"erofs", "image")

    def check(view):
        same(view.at("/image").type, b"erofs")
        write("/image/empty/file")
        same(view.outcome("synthesised"), [])

    inside(engine, config(bind("/image", "image"), tmpfs("/image/empty")), check)


@behaviour
def two_mountpoints_missing_in_a_read_only_superblock_share_one_overlay(engine):
    rootfs()
    mount_image(EROFS, b"erofs", "image")

    def check(view):
        write("/image/one/file")
        write("/image/two/three/file")
        assert view.points().count("/image") <= 2, view.points()

    document = config(bind("/image", "image"), tmpfs("/image/one"), tmpfs("/image/two/three"))
    inside(engine, document, check, overrides={"tmp": "keep"})


@behaviour
def a_missing_mountpoint_beside_a_mount_in_a_read_only_superblock_still_works(engine):
    rootfs()
    mount_image(EROFS, b"erofs", "image")

    def check(view):
        write("/image/empty/file")
        write("/image/new/file")

    # The first mountpoint exists, so the mount may be in place when the second is missing.
    document = config(bind("/image", "image"), tmpfs("/image/empty"), tmpfs("/image/new"))
    inside(engine, document, check)


@behaviour
def a_device_in_a_read_only_bound_directory_doesnt_reach_the_source(engine):
    rootfs()
    tree("volume", {"file": b"v"})

    def check(view):
        same(os.stat("/volume/null").st_rdev, os.makedev(1, 3))
        same(read("/volume/file"), b"v")
        fails("EROFS", write, "/volume/new")

    device = {"path": "/volume/null", "type": "c", "major": 1, "minor": 3}
    inside(engine, config(bind("/volume", "volume", "ro"), devices=[device]), check)


@behaviour
def a_working_directory_in_a_read_only_root_is_made(engine):
    rootfs()

    def check(view):
        same(mode_of("/srv/dir"), 0o755)
        same(view.flags("/"), {"ro"})

    inside(engine, config(readonly=True, process={"cwd": "/srv/dir"}), check)


@behaviour
def a_read_only_mount_of_the_host_is_no_obstacle_to_the_root(engine):
    rootfs()
    bind_on("rootfs", "rootfs", abi.MOUNT_ATTR_RDONLY)

    def check(view):
        write("/etc/new")

    inside(engine, config(tmpfs("/made")), check)


@behaviour
def a_link_into_a_read_only_bind_leads_to_nothing_that_is_written_to_its_source(engine):
    # Where no path says so, the bind isn't foreseen to need a mountpoint.
    rootfs({"data/": 0, "link": "/data"})
    tree("source", {"file": b"the host's"})

    def check(view):
        same(sorted(os.listdir("/data")), ["file", "point"])
        same(view.at("/data/point").type, b"tmpfs")
        fails("EROFS", write, "/data/new")
        same(len(view.outcome("synthesised")), 1)

    document = config(bind("/data", "source", "ro"), tmpfs("/link/point"))
    inside(engine, document, check, overrides={"tmp": "keep"})
