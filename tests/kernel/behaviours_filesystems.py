"""What only some mounts have: tmpfs, tmpcopyup, idmaps, symlink words, fallbacks."""

import os
import stat

from sandboxfs.kernel import abi, syscalls
from tests.kernel.behaviours_images import EROFS, mount_image
from tests.kernel.behaviours_table import behaviour
from tests.kernel.behaviours_tools import (
    USER,
    bind,
    config,
    fails,
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


# -- tmpfs ---------------------------------------------------------------------------------


@behaviour
def a_tmpfs_without_mode_takes_that_of_an_existing_mountpoint(engine):
    rootfs({"closed/": 0, "sticky/": 0})
    os.chmod("rootfs/closed", 0o710)
    os.chmod("rootfs/sticky", 0o1777)

    def check(view):
        same((mode_of("/closed"), mode_of("/sticky")), (0o710, 0o1777))

    inside(engine, config(tmpfs("/closed"), tmpfs("/sticky", "size=1m")), check)


@behaviour
def a_tmpfs_without_mode_on_a_mountpoint_that_was_made_is_open_to_all(engine):
    rootfs()

    def check(view):
        same((mode_of("/made"), mode_of("/deep/made"), mode_of("/deep")), (0o1777, 0o1777, 0o755))

    inside(engine, config(tmpfs("/made"), tmpfs("/deep/made")), check)


@behaviour
def a_tmpfs_with_mode_has_it(engine):
    rootfs({"point/": 0})

    def check(view):
        same((mode_of("/point"), mode_of("/made")), (0o700, 0o2751))

    inside(engine, config(tmpfs("/point", "mode=0700"), tmpfs("/made", "mode=2751")), check)


# -- tmpcopyup -----------------------------------------------------------------------------


def _furnished(base):
    """Fill a directory with one of everything."""
    tree(base, {"file": b"content", "sub/deep/inner": b"inner", "link": "file",
                "dangling": "/no/where", "empty/": 0})
    os.chmod(f"{base}/file", 0o4750)
    os.chown(f"{base}/sub", 3, 4)
    os.chmod(f"{base}/sub", 0o2710)
    os.lchown(f"{base}/link", 7, 8)
    os.setxattr(f"{base}/file", "trusted.note", b"value")
    os.setxattr(f"{base}/sub", "trusted.note", b"of a directory")
    os.link(f"{base}/file", f"{base}/hard")
    os.link(f"{base}/file", f"{base}/sub/harder")
    os.mkfifo(f"{base}/fifo", 0o640)
    os.mknod(f"{base}/node", stat.S_IFCHR | 0o660, os.makedev(1, 3))
    os.chown(f"{base}/node", 5, 6)
    os.chmod(f"{base}/node", 0o660)
    with open(f"{base}/sparse", "wb") as file:
        file.truncate(1 << 20)
    for path in ("file", "sub/deep", "sub", "."):
        os.utime(f"{base}/{path}", ns=(1_000_000_001, 2_000_000_003))


def _facts(base):
    """Return what a copy has to keep: names, modes, owners, times, xattrs, content."""
    found = {}
    for directory, names, files in os.walk(base):
        for name in names + files:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            fact = [status.st_mode, status.st_uid, status.st_gid, status.st_rdev]
            if not stat.S_ISLNK(status.st_mode):
                fact.append([(key, os.getxattr(path, key)) for key in os.listxattr(path)])
            if stat.S_ISREG(status.st_mode):
                fact += [read(path), status.st_nlink, status.st_mtime_ns]
            elif stat.S_ISLNK(status.st_mode):
                fact.append(os.readlink(path))
            found[os.path.relpath(path, base)] = fact
    return found


@behaviour
def tmpcopyup_copies_what_was_at_the_destination(engine):
    rootfs()
    _furnished("rootfs/data")
    expected = _facts("rootfs/data")

    def check(view):
        same(view.at("/data").type, b"tmpfs")
        same(_facts("/data"), expected)
        same(os.stat("/data/file").st_ino, os.stat("/data/hard").st_ino, "a hard link")
        same(os.stat("/data/sub").st_mtime_ns, 2_000_000_003)
        write("/data/file", b"inside")

    inside(engine, config(tmpfs("/data", "tmpcopyup")), check)


@behaviour
def tmpcopyup_into_a_read_only_tmpfs(engine):
    rootfs({"data/file": b"content"})

    def check(view):
        same((read("/data/file"), view.flags("/data")), (b"content", {"ro", "nodev"}))
        fails("EROFS", write, "/data/file")

    inside(engine, config(tmpfs("/data", "tmpcopyup", "ro", "nodev")), check)


@behaviour
def tmpcopyup_of_a_directory_that_was_missing_copies_nothing(engine):
    rootfs()

    def check(view):
        same(os.listdir("/made"), [])

    inside(engine, config(tmpfs("/made", "tmpcopyup")), check)


@behaviour
def tmpcopyup_copies_what_an_earlier_mount_put_there(engine):
    rootfs({"data/hidden": b""})
    tree("source", {"file": b"from the bind"})
    mount_on("source/below")
    write("source/below/file")

    def check(view):
        same(read("/data/file"), b"from the bind")
        same(sorted(os.listdir("/data")), ["below", "file"])
        same(os.listdir("/data/below"), [], "another mount's content")

    inside(engine, config(bind("/data", "source", "rbind"), tmpfs("/data", "tmpcopyup")), check)


@behaviour
def tmpcopyup_that_doesnt_fit_is_an_error(engine):
    rootfs()
    write("rootfs/data/big", bytes(1 << 20))
    error = refused(engine, config(tmpfs("/data", "tmpcopyup", "size=64k")))
    same((error["origin"], error["operation"], error["target"], error["errno"]),
         ("mounts[0]", "tmpcopyup", "/data", "ENOSPC"))


@behaviour
def tmpcopyup_is_for_tmpfs_only(engine):
    rootfs()
    tree("source", {})
    for entry in (bind("/a", "source", "tmpcopyup"), mount("/a", "mqueue", None, "tmpcopyup")):
        error = refused(engine, config(entry))
        same(error["kind"], "SpecError")
        holds(error["text"], "only a tmpfs can be filled")


# -- idmaps --------------------------------------------------------------------------------


def _mappings(*triples):
    return [dict(zip(("containerID", "hostID", "size"), triple, strict=True))
            for triple in triples]


@behaviour
def idmap_with_mappings_uses_them(engine):
    rootfs()
    mount_image(EROFS, b"erofs", "image")
    uids, gids = _mappings((1234, 5000, 1), (0, 100, 8)), _mappings((4321, 6000, 1), (0, 200, 9))
    document = config(
        *(bind(f"/{name}", "image", *words, uidMappings=uids, gidMappings=gids)
          for name, words in (("word", ("idmap",)), ("none", ()), ("tree", ("rbind", "ridmap")))),
        bind("/plain", "image"),
    )

    def check(view):
        for name in ("word", "none", "tree"):
            same(owner_of(f"/{name}/etc/owned"), (5000, 6000), name)
            same(owner_of(f"/{name}"), (107, 208), name)
            holds(view.flags("/" + name), "idmapped")
        same(owner_of("/plain/etc/owned"), (1234, 4321))

    inside(engine, document, check)


@behaviour
def ids_without_a_mapping_are_nobodys(engine):
    rootfs()
    mount_image(EROFS, b"erofs", "image")
    entry = bind("/a", "image", "idmap", uidMappings=_mappings((0, 9, 1)),
                 gidMappings=_mappings((0, 9, 1)))

    def check(view):
        same(owner_of("/a/etc/owned"), (65534, 65534))

    inside(engine, config(entry), check)


@behaviour
def idmap_maps_the_top_and_ridmap_the_whole_tree(engine):
    rootfs()
    mount_image(EROFS, b"erofs", "image")
    mount_image(EROFS, b"erofs", "below")
    fd = syscalls.open_tree(abi.AT_FDCWD, b"below", abi.OPEN_TREE_CLONE)
    syscalls.move_mount_path(fd, abi.AT_FDCWD, b"image/empty")
    os.close(fd)
    maps = {"uidMappings": _mappings((1234, 5000, 1)), "gidMappings": _mappings((4321, 6000, 1))}
    document = config(bind("/top", "image", "rbind", "idmap", **maps),
                      bind("/all", "image", "rbind", "ridmap", **maps))

    def check(view):
        same(owner_of("/top/etc/owned"), (5000, 6000))
        same(owner_of("/top/empty/etc/owned"), (1234, 4321))
        same(owner_of("/all/etc/owned"), (5000, 6000))
        same(owner_of("/all/empty/etc/owned"), (5000, 6000))

    inside(engine, document, check)


@behaviour
def idmap_without_mappings_uses_the_containers(engine):
    rootfs()
    mount_image(EROFS, b"erofs", "image")
    mapping = _mappings((0, 100000, 65536))
    document = config(bind("/a", "image", "idmap"), bind("/b", "image", "rbind", "ridmap"),
                      tmpfs("/dev"), namespaces=[{"type": "mount"}, {"type": "user"}],
                      uidMappings=mapping, gidMappings=mapping)

    def check(view):
        same((owner_of("/a/etc/owned"), owner_of("/b/etc/owned")),
             ((101234, 104321), (101234, 104321)))

    inside(engine, document, check)


@behaviour
def idmap_without_any_mappings_is_an_error(engine):
    rootfs()
    tree("source", {})
    for word in ("idmap", "ridmap"):
        error = refused(engine, config(bind("/a", "source", word)))
        same((error["kind"], error["origin"], error["target"]),
             ("SpecError", "/mounts/0/options", word))
        holds(error["text"], "neither the mount nor the container has mappings")


@behaviour
def one_kind_of_mappings_is_an_error(engine):
    rootfs()
    tree("source", {})
    for key in ("uidMappings", "gidMappings"):
        error = refused(engine, config(bind("/a", "source", **{key: _mappings((0, 1, 1))})))
        same(error["kind"], "SpecError")
        holds(error["origin"], "/mounts/0")
        holds(error["line"], "gidMappings" if key == "uidMappings" else "uidMappings")


@behaviour
def a_source_that_cant_be_idmapped_is_an_error_of_the_machine(engine):
    rootfs()
    maps = {"uidMappings": _mappings((0, 1, 1)), "gidMappings": _mappings((0, 1, 1))}
    error = refused(engine, config(bind("/a", "/proc", "rbind", "idmap", **maps)))
    same((error["kind"], error["origin"], error["operation"], error["target"]),
         ("MountError", "mounts[0]", "mount_setattr", "/proc"))


# -- crun's words for symlinks -------------------------------------------------------------


@behaviour
def copy_symlink_makes_a_link_of_the_same_target(engine):
    rootfs()
    os.symlink("../some,where: else", "link")
    tree("source", {"file": b"s"})
    document = config(bind("/deep/made", "link", "copy-symlink"),
                      bind("/directory", "source", "copy-symlink"))

    def check(view):
        same(os.readlink("/deep/made"), "../some,where: else")
        same(read("/directory/file"), b"s", "what is no symlink is bound")
        same(view.outcome("symlink"), [""])

    inside(engine, document, check)


@behaviour
def copy_symlink_over_the_same_link_is_fine_and_over_something_else_an_error(engine):
    rootfs({"same": "target", "other": "elsewhere", "file": b""})
    os.symlink("target", "link")

    def check(view):
        same(os.readlink("/same"), "target")

    inside(engine, config(bind("/same", "link", "copy-symlink")), check)
    for name in ("other", "file"):
        error = refused(engine, config(bind("/" + name, "link", "copy-symlink")))
        same((error["origin"], error["target"], error["errno"]),
             ("mounts[0]", "/" + name, "EEXIST"))


@behaviour
def copy_symlink_into_a_read_only_root(engine):
    rootfs({"tmp/": 0})
    os.symlink("target", "link")

    def check(view):
        same(os.readlink("/made"), "target")
        same(view.flags("/"), {"ro"})

    inside(engine, config(bind("/made", "link", "copy-symlink"), tmpfs("/dev"), readonly=True),
           check)


@behaviour
def src_nofollow_binds_the_link_itself(engine):
    rootfs({"point": "elsewhere"})
    os.symlink("target", "link")
    document = config(bind("/point", "link", "src-nofollow", "dest-nofollow"))

    def check(view):
        same(os.readlink("/point"), "target")
        same(view.points(), ["/", "/point"])

    inside(engine, document, check, overrides=KEEP_TMP)


@behaviour
def src_nofollow_of_what_is_no_link_is_a_plain_bind(engine):
    rootfs()
    tree("source", {"file": b"s"})

    def check(view):
        same(read("/a/file"), b"s")

    inside(engine, config(bind("/a", "source", "src-nofollow")), check)


@behaviour
def dest_nofollow_mounts_on_the_link_itself(engine):
    rootfs({"point": "/real", "real": b"untouched"})
    write("source", b"bound")

    def check(view):
        same(view.points(), ["/", "/point"])
        same((read("/real"), read("/point")), (b"untouched", b"bound"))

    inside(engine, config(bind("/point", "source", "dest-nofollow")), check, overrides=KEEP_TMP)


# -- locked flags --------------------------------------------------------------------------


def _locked():
    """Make a source whose flags are locked for a user namespace of another user."""
    flags = abi.MOUNT_ATTR_NOSUID | abi.MOUNT_ATTR_NODEV | abi.MOUNT_ATTR_NOEXEC
    mount_on("source", settings=[(b"mode", b"755")],
             attributes=flags | abi.MOUNT_ATTR_RDONLY | abi.MOUNT_ATTR_NOATIME)
    tree("rootfs", {"a/": 0, "tmp/": 0, "dev/": 0})
    for path in ("rootfs", "rootfs/a", "rootfs/dev"):
        os.chown(path, USER, USER)


@behaviour
def locked_flags_are_kept_where_nobody_asks(engine):
    _locked()
    locked = {"ro", "nosuid", "nodev", "noexec", "noatime"}

    def check(view):
        same(view.flags("/a"), locked)
        same(view.flags("/b"), locked | {"nosymfollow"})

    document = config(bind("/a", "source", "rbind"), bind("/b", "source", "rbind", "nosymfollow"),
                      tmpfs("/dev"))
    inside(engine, document, check, user=USER)


@behaviour
def clearing_a_locked_flag_is_a_clear_error(engine):
    _locked()
    for word in ("rw", "suid", "dev", "exec", "rrw", "relatime"):
        error = refused(engine, config(bind("/a", "source", "rbind", word)), user=USER)
        same((error["origin"], error["operation"], error["errno"]),
             ("mounts[0]", "mount_setattr", "EPERM"), word)
        holds(error["hint"], "locked")


# -- proc, sysfs, mqueue, devpts -----------------------------------------------------------


@behaviour
def sysfs_without_a_network_namespace_of_its_own_is_a_bind_of_the_hosts(engine):
    rootfs()
    os.chown("rootfs/sys", USER, USER)
    os.chown("rootfs/dev", USER, USER)

    def check(view):
        same(view.at("/sys").type, b"sysfs")
        holds(view.flags("/sys"), "ro", "nosuid")
        below = [point for point in view.points() if point.startswith("/sys/")]
        for point in below:
            holds(view.flags(point), "ro")
        same(view.outcome("bind")[0], "/sys")

    document = config(mount("/sys", "sysfs", "sysfs", "ro", "nosuid"), tmpfs("/dev"))
    inside(engine, document, check, user=USER)


@behaviour
def sysfs_with_a_network_namespace_is_fresh(engine):
    rootfs()
    for name in ("sys", "dev"):
        os.chown("rootfs/" + name, USER, USER)

    def check(view):
        same(view.points(), ["/", "/dev", *sorted(_BOUND_NODES), "/sys"])
        same(os.listdir("/sys/class/net"), ["lo"])

    document = config(mount("/sys", "sysfs", "sysfs"), tmpfs("/dev"),
                      namespaces=[{"type": "mount"}, {"type": "user"}, {"type": "network"}])
    inside(engine, document, check, user=USER, unshare=abi.CLONE_NEWNET, overrides=KEEP_TMP)


_BOUND_NODES = [f"/dev/{name}" for name in ("full", "null", "random", "tty", "urandom", "zero")]


@behaviour
def mqueue_and_devpts_are_fresh_instances(engine):
    rootfs()

    def check(view):
        same((view.at("/dev/mqueue").type, view.at("/dev/pts").type), (b"mqueue", b"devpts"))
        same(sorted(os.listdir("/dev/pts")), ["ptmx"])
        same(mode_of("/dev/pts/ptmx"), 0o666)
        same(os.readlink("/dev/ptmx"), "pts/ptmx")
        os.close(os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY))

    document = config(
        tmpfs("/dev", "mode=755"), mount("/dev/mqueue", "mqueue"),
        mount("/dev/pts", "devpts", "devpts", "newinstance", "ptmxmode=0666", "mode=620"),
        namespaces=[{"type": "mount"}, {"type": "ipc"}],
    )
    inside(engine, document, check, unshare=abi.CLONE_NEWIPC)


@behaviour
def a_label_without_selinux_is_a_warning(engine):
    if os.path.exists("/sys/fs/selinux/enforce"):
        return
    rootfs()

    def check(view):
        holds("\n".join(view.plan.warnings), "linux.mountLabel: this kernel has no SELinux")
        assert not any("context" in word for word in view.superblock("/a"))

    inside(engine, config(tmpfs("/a"), mountLabel="system_u:object_r:svirt_t:s0:c1,c2"), check)
