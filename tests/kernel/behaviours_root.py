"""The root as a whole: /tmp, its propagation, and volumes that hints describe."""

import os

from sandboxfs.kernel import abi, syscalls
from tests.kernel.behaviours_table import behaviour
from tests.kernel.behaviours_tools import (
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

# -- /tmp ----------------------------------------------------------------------------------


def _tmp(engine, document, base="rootfs", **overrides):
    """Return (type of the mount at /tmp or None, notes and outcomes as text)."""

    def check(view):
        found = [each.type.decode() for each in view.table() if each.mountpoint == b"/tmp"]
        if found == ["tmpfs"] and not document["mounts"]:
            same(view.flags("/tmp"), {"nosuid", "nodev"})
            same((mode_of("/tmp"), owner_of("/tmp")), (0o1777, (0, 0)))
        outcomes = [detail for operation, _kind, detail in view.root.outcomes
                    if getattr(operation, "origin", "") == "/tmp"]
        return [found[-1] if found else None, view.notes() + "\n" + "\n".join(outcomes)]

    document["root"]["path"] = base
    return inside(engine, document, check, overrides=overrides)


@behaviour
def tmp_is_a_tmpfs_where_nothing_would_be_hidden(engine):
    rootfs(base="absent")
    same(_tmp(engine, config(), "absent")[0], "tmpfs")
    rootfs({"tmp/": 0}, base="empty")
    os.chmod("empty/tmp", 0o700)
    same(_tmp(engine, config(), "empty")[0], "tmpfs")


@behaviour
def tmp_is_left_alone_where_something_would_be_hidden(engine):
    cases = {
        "full": ({"tmp/file": b""}, "not empty"), "file": ({"tmp": b""}, "not a directory"),
        "link": ({"tmp": "/var/tmp", "var/tmp/": 0}, "a symlink"),
        "dangling": ({"tmp": "/no/where"}, "a symlink"),
        "hidden": ({"tmp/.X11-unix/": 0}, "not empty"),
    }
    for name, (entries, why) in cases.items():
        rootfs(entries, base=name)
        kind, said = _tmp(engine, config(), name)
        same(kind, None, name)
        holds(said, why)


@behaviour
def tmp_that_the_spec_mounts_is_left_alone(engine):
    rootfs()
    tree("source", {})
    for destination in ("/tmp", "/tmp/", "//tmp", "/x/../tmp", "tmp"):
        for choice in ("auto", "tmpfs"):
            kind, said = _tmp(engine, config(mount(destination, "tmpfs", "x", "size=64k")),
                              tmp=choice)
            same(kind, "tmpfs", destination)
            holds(said, "/tmp: left alone, mounts[0] mounts it")


@behaviour
def tmp_with_a_mount_inside_is_left_alone(engine):
    rootfs()
    kind, said = _tmp(engine, config(tmpfs("/tmp/cache")))
    same(kind, None)
    holds(said, "/tmp: left alone, /tmp/cache is mounted inside")


@behaviour
def tmp_that_a_mount_of_the_rootfs_covers_is_left_alone(engine):
    # A separate /tmp of the host under --rootfs /.
    rootfs()
    mount_on("rootfs/tmp")
    kind, said = _tmp(engine, config())
    same(kind, "overlay")
    holds(said, "a mount is there")
    rootfs(base="inside")
    mount_on("inside/tmp/deep")
    same(_tmp(engine, config(), "inside")[0], None)


@behaviour
def tmp_into_which_a_link_led_a_bind_is_left_alone(engine):
    rootfs({"link": "tmp", "tmp/": 0})
    tree("source", {})
    for place in ("/link/deep/er", "/link/./x"):
        kind, said = _tmp(engine, config(bind(place, "source")))
        same(kind, None, place)
        holds(said, "not empty")


@behaviour
def tmp_of_a_lower_below_is_left_alone(engine):
    rootfs()
    rootfs({"tmp/file": b""}, base="second")
    kind, said = _tmp(engine, config(), lower="second")
    same(kind, None)
    holds(said, "not empty")


@behaviour
def tmp_keep_is_never_and_tmp_tmpfs_always(engine):
    rootfs(base="absent")
    same(_tmp(engine, config(), "absent", tmp="keep")[0], None)
    rootfs({"tmp/file": b""}, base="full")
    same(_tmp(engine, config(), "full", tmp="tmpfs")[0], "tmpfs")
    kind, _said = _tmp(engine, config(tmpfs("/tmp/cache")), "absent", tmp="tmpfs")
    same(kind, "tmpfs")


@behaviour
def tmp_can_be_asked_for_by_annotation(engine):
    rootfs()
    same(_tmp(engine, config(annotations={"dev.sandboxfs.tmp": "keep"}))[0], None)


@behaviour
def tmp_is_made_in_a_read_only_root(engine):
    rootfs()
    same(_tmp(engine, config(readonly=True))[0], "tmpfs")


# -- propagation of the root ---------------------------------------------------------------


@behaviour
def the_root_is_private_unless_the_spec_says_otherwise(engine):
    rootfs()
    for word in (None, "private", "rprivate", "slave", "rslave"):
        fields = {} if word is None else {"rootfsPropagation": word}

        def check(view):
            same((view.at("/").propagation, view.at("/data").propagation),
                 (abi.MS_PRIVATE, abi.MS_PRIVATE))

        inside(engine, config(tmpfs("/data"), **fields), check)


@behaviour
def shared_and_unbindable_roots_are_made_after_the_pivot(engine):
    rootfs()
    for word, number in (("shared", abi.MS_SHARED), ("unbindable", abi.MS_UNBINDABLE)):
        for prefix, below in (("", abi.MS_PRIVATE), ("r", number)):

            def check(view, number=number, below=below):
                same((view.at("/").propagation, view.at("/data").propagation), (number, below))

            inside(engine, config(tmpfs("/data"), rootfsPropagation=prefix + word), check)


@behaviour
def what_is_mounted_inside_doesnt_reach_the_host(engine):
    rootfs()
    tree("volume", {"point/": 0})

    def check(view):
        mount_on("/volume/point", make=False)
        mount_on("/new")

    inside(engine, config(bind("/volume", "volume", "rbind")), check)


@behaviour
def what_is_mounted_on_a_shared_source_later_reaches_its_slave(engine):
    rootfs()
    mount_on("volume")
    os.makedirs("volume/late")
    document = config(bind("/shared", "volume", "rshared"), bind("/slave", "volume", "rslave"),
                      bind("/private", "volume"))

    def check(view):
        mount_on("/shared/late", make=False)
        same([point for point in view.points() if "late" in point],
             ["/shared/late", "/slave/late"])
        syscalls.umount2(b"/shared/late", 0)
        same([point for point in view.points() if "late" in point], [])

    inside(engine, document, check)


@behaviour
def a_mount_below_a_shared_bind_reaches_its_peers_and_comes_last(engine):
    rootfs()
    mount_on("volume")
    os.makedirs("volume/point")
    document = config(bind("/volume", "volume", "rshared"), tmpfs("/volume/point"),
                      tmpfs("/other"))

    def check(view):
        holds(view.notes(), "mounts[1]: lies below a shared bind")
        names = [step.origin for step in view.plan]
        assert names.index("mounts[1]") > names.index("mounts[2]"), names
        assert view.at("/volume/point")
        # Here, and with it at the source; the build's descriptors are still open.
        syscalls.umount2(b"/volume/point", abi.MNT_DETACH)

    inside(engine, document, check)


# -- hints ---------------------------------------------------------------------------------


def _hint(**fields):
    return {f"dev.gvisor.spec.mount.vol.{key}": value for key, value in fields.items()}


@behaviour
def a_tmpfs_of_the_container_takes_the_place_of_the_mount(engine):
    rootfs()
    tree("volume", {"file": b"of the host"})
    source = os.path.abspath("volume")
    annotations = _hint(source=source, type="tmpfs", share="container",
                        options="size=1M,mode=0750,uid=5,gid=6,rprivate")

    def check(view):
        same((view.at("/data").type, view.flags("/data")),
             (b"tmpfs", {"nosuid", "nodev", "noexec"}))
        same((os.listdir("/data"), mode_of("/data"), owner_of("/data")), ([], 0o750, (5, 6)))
        holds(view.superblock("/data"), "size=1024k")
        holds("\n".join(view.plan.warnings), "rprivate is dropped")
        write("/data/file", b"inside")

    inside(engine, config(bind("/data", source, "rbind", "noexec"), annotations=annotations),
           check)
    inside(engine, config(mount("/data", "tmpfs", source, "noexec"), annotations=annotations),
           check)


@behaviour
def a_hint_matches_the_source_exactly(engine):
    rootfs()
    tree("volume", {"file": b"of the host"})
    source = os.path.abspath("volume")

    def check(view):
        same(read("/data/file"), b"of the host")
        holds(view.notes(), "no mount has source")

    annotations = _hint(source=source + "/", type="tmpfs", share="container")
    inside(engine, config(bind("/data", source), annotations=annotations), check)


@behaviour
def binds_and_shared_volumes_are_left_as_they_are(engine):
    rootfs()
    tree("volume", {"file": b"of the host"})
    source = os.path.abspath("volume")

    def check(view):
        same(read("/data/file"), b"of the host")
        same(view.flags("/data"), {"nodev"})
        holds(view.notes(), "the mount is left as it is")

    for kind, share in (("bind", "container"), ("bind", "pod"), ("bind", "shared"),
                        ("tmpfs", "shared")):
        annotations = _hint(source=source, type=kind, share=share)
        inside(engine, config(bind("/data", source, "nodev"), annotations=annotations), check)


@behaviour
def a_mount_may_be_stricter_than_its_hint_and_never_looser(engine):
    rootfs()
    tree("volume", {})
    source = os.path.abspath("volume")
    for options, word, flag in (("ro", "rw", "ro"), ("noexec", "exec", "noexec"),
                                ("rw", "suid", "nosuid"), ("noatime", "atime", "noatime")):
        annotations = _hint(source=source, type="tmpfs", share="container", options=options)
        error = refused(engine, config(bind("/data", source, word), annotations=annotations))
        same(error["kind"], "SpecError", word)
        holds(error["line"], word, "looser than hint vol allows")

        def check(view, flag=flag):
            holds(view.flags("/data"), flag)

        inside(engine, config(bind("/data", source), annotations=annotations), check)


@behaviour
def a_hint_that_is_wrong_is_an_error_that_names_the_annotation(engine):
    rootfs()
    good = {"source": "/x", "type": "tmpfs", "share": "container"}
    for change in ({"type": "nfs"}, {"share": "all"}, {"source": ""}, {"options": "exec,dev"},
                   {"options": "size=1,nr_inodes=1"}, {"nonsense": "1"}):
        error = refused(engine, config(annotations=_hint(**good | change)))
        (key,) = change
        same((error["kind"], error["origin"]),
             ("SpecError", f"/annotations/dev.gvisor.spec.mount.vol.{key}"), change)
    for key in good:
        fields = {name: value for name, value in good.items() if name != key}
        error = refused(engine, config(annotations=_hint(**fields)))
        holds(error["text"], f"hint vol lacks {key}")
