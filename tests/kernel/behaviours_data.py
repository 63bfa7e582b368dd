"""Words that are the file system's own, and `remount`."""

import os

from tests.kernel.behaviours_table import behaviour
from tests.kernel.behaviours_tools import (
    bind,
    config,
    fails,
    holds,
    inside,
    mount,
    read,
    refused,
    rootfs,
    same,
    tmpfs,
    tree,
    write,
)

KEEP_TMP = {"tmp": "keep"}


# -- unknown words -------------------------------------------------------------------------


@behaviour
def unknown_words_are_the_file_systems_own(engine):
    rootfs()

    def check(view):
        holds(view.superblock("/a"), "size=1024k", "nr_inodes=77", "mode=751", "uid=5", "gid=6")
        status = os.stat("/a")
        same((status.st_mode & 0o7777, status.st_uid, status.st_gid), (0o751, 5, 6))

    inside(engine, config(tmpfs("/a", "size=1m", "nr_inodes=77", "mode=0751", "uid=5", "gid=6",
                                "nosuid")), check)


@behaviour
def later_data_wins(engine):
    rootfs()

    def check(view):
        holds(view.superblock("/a"), "size=2048k")

    inside(engine, config(tmpfs("/a", "size=1m", "size=2m")), check)


@behaviour
def a_value_may_hold_equals_signs_and_other_signs(engine):
    rootfs()
    tree("a=b c:d", {"file": b"in the lower"})
    tree("upper=1", {})
    tree("work=1", {})
    paths = [os.path.abspath(name) for name in ("a=b c:d", "upper=1", "work=1")]
    entry = mount("/a", "overlay", "overlay", "lowerdir=" + paths[0].replace(":", "\\:"),
                  "upperdir=" + paths[1], "workdir=" + paths[2])

    def check(view):
        same(read("/a/file"), b"in the lower")

    inside(engine, config(entry), check, written=["upper=1", "work=1"])


@behaviour
def data_that_the_file_system_refuses_is_an_error_with_the_kernels_words(engine):
    rootfs()
    error = refused(engine, config(tmpfs("/made", "nonsense=1")))
    same((error["origin"], error["operation"], error["target"], error["errno"]),
         ("mounts[0]", "fsconfig nonsense=1", "/made", "EINVAL"))
    holds(error["text"], "the kernel says: ", "nonsense")
    error = refused(engine, config(tmpfs("/made", "mode=9")))
    same((error["operation"], error["errno"]), ("fsconfig mode=9", "EINVAL"))
    error = refused(engine, config(mount("/made", "nofs")))
    same((error["origin"], error["operation"], error["errno"]), ("mounts[0]", "fsopen", "ENODEV"))
    holds(error["hint"], "no such file system")


@behaviour
def an_unknown_word_on_a_bind_is_an_error(engine):
    rootfs()
    tree("source", {})
    for word in ("size=1m", "nonsense", "mode=755", "rnonsense", "RO", "context=x"):
        error = refused(engine, config(bind("/a", "source", "ro", word)))
        same((error["kind"], error["origin"]), ("SpecError", "/mounts/0/options/2"), word)
        holds(error["line"], word, "for a bind")


@behaviour
def several_values_in_one_word_are_an_error(engine):
    rootfs()
    for word in ("size=1k,nr_inodes=3", "ro,nosuid", "=1"):
        error = refused(engine, config(tmpfs("/a", "nodev", word)))
        same((error["kind"], error["origin"]), ("SpecError", "/mounts/0/options/1"), word)


@behaviour
def a_label_may_hold_a_comma(engine):
    from sandboxfs.spec import options

    for key in ("context", "fscontext", "defcontext", "rootcontext"):
        word = f"{key}=system_u:object_r:container_file_t:s0:c1,c2"
        same(options.parse([word]).data, [(key, word.partition("=")[2])])


@behaviour
def numbers_out_of_range_are_an_error(engine):
    rootfs()
    for word in ("size=99999999999999999999", "size=-1", "size=", "nr_inodes=x", "size=1q"):
        error = refused(engine, config(tmpfs("/a", word)))
        same((error["kind"], error["origin"]), ("SpecError", "/mounts/0/options/0"), word)


# -- remount -------------------------------------------------------------------------------


@behaviour
def a_remount_is_folded_into_the_mount_at_its_destination(engine):
    rootfs()
    tree("source", {})
    document = config(
        tmpfs("/a", "nosuid"), bind("/b", "source", "nodev"), tmpfs("/c", "ro", "noexec"),
        mount("/a", "tmpfs", None, "remount", "ro", "noexec"),
        bind("/b/", None, "remount", "bind", "ro"),
        mount("/c", "tmpfs", None, "remount", "rw"),
    )

    def check(view):
        same((view.flags("/a"), view.flags("/b"), view.flags("/c")),
             ({"nosuid", "ro", "noexec"}, {"nodev", "ro"}, {"noexec"}))
        same(view.points(), ["/", "/a", "/b", "/c"])
        holds(view.notes(), "mounts[3]: remount: folded into mounts[0]",
              "mounts[4]: remount: folded into mounts[1]")

    inside(engine, document, check, overrides=KEEP_TMP)


@behaviour
def a_remount_of_nothing_is_an_error(engine):
    rootfs()
    error = refused(engine, config(tmpfs("/b"), mount("/a", "tmpfs", None, "remount", "ro")))
    same((error["kind"], error["origin"]), ("SpecError", "/mounts/1/destination"))
    holds(error["text"], "no earlier mount")


@behaviour
def a_remount_changes_the_data_of_a_file_system(engine):
    rootfs()
    document = config(tmpfs("/a", "size=1m"), mount("/a", "tmpfs", None, "remount", "size=2m"))

    def check(view):
        holds(view.superblock("/a"), "size=2048k")

    inside(engine, document, check)


@behaviour
def what_later_mounts_need_is_found_in_what_a_remount_makes_read_only(engine):
    rootfs()
    tree("source", {})
    document = config(bind("/b", "source"), bind("/b", None, "remount", "bind", "ro"),
                      tmpfs("/b/point"))

    def check(view):
        same(view.flags("/b"), {"ro"})
        write("/b/point/new")

    inside(engine, document, check)


@behaviour
def a_remount_after_a_nested_mount_counts_from_the_start(engine):
    rootfs()
    document = config(tmpfs("/a"), tmpfs("/a/b"), mount("/a", "tmpfs", None, "remount", "ro"))

    def check(view):
        same((view.flags("/a"), view.flags("/a/b")), ({"ro"}, set()))

    inside(engine, document, check)


@behaviour
def a_remount_of_the_atime_words(engine):
    rootfs()
    document = config(tmpfs("/a", "strictatime"),
                      mount("/a", "tmpfs", None, "remount", "noatime"),
                      tmpfs("/b", "noatime"), mount("/b", "tmpfs", None, "remount", "relatime"))

    def check(view):
        same((view.flags("/a"), view.flags("/b")), ({"noatime"}, set()))

    inside(engine, document, check)


@behaviour
def an_idmap_on_what_is_no_bind_is_an_error(engine):
    rootfs()
    mapping = [{"containerID": 0, "hostID": 1000, "size": 1}]
    error = refused(engine, config(mount("/a", "tmpfs", "tmpfs", uidMappings=mapping,
                                         gidMappings=mapping)))
    same((error["kind"], error["origin"]), ("SpecError", "/mounts/0"))
    fails("ENOENT", os.stat, "rootfs/a")
