"""Mount options: every word of config.md's table, and what words do together."""

import os

from sandboxfs.kernel import abi, syscalls
from tests.kernel.behaviours_table import behaviour
from tests.kernel.behaviours_tools import (
    bind,
    config,
    holds,
    inside,
    mount,
    mount_on,
    read,
    refused,
    rootfs,
    same,
    set_propagation,
    table,
    tmpfs,
    tree,
    write,
)

KEEP_TMP = {"tmp": "keep"}
ALL = (
    abi.MOUNT_ATTR_RDONLY | abi.MOUNT_ATTR_NOSUID | abi.MOUNT_ATTR_NODEV
    | abi.MOUNT_ATTR_NOEXEC | abi.MOUNT_ATTR_NODIRATIME | abi.MOUNT_ATTR_NOSYMFOLLOW
    | abi.MOUNT_ATTR_NOATIME
)
ALL_WORDS = {"ro", "nosuid", "nodev", "noexec", "nodiratime", "nosymfollow", "noatime"}
SET = ("ro", "nosuid", "nodev", "noexec", "nodiratime", "nosymfollow", "noatime", "strictatime")
CLEAR = {
    "rw": "ro", "suid": "nosuid", "dev": "nodev", "exec": "noexec", "diratime": "nodiratime",
    "symfollow": "nosymfollow", "relatime": "noatime", "atime": "noatime",
}


def _each(engine, cases, entry):
    """Build one root with a mount a case; compare flags.  cases: [(words, expected flags)]."""
    mounts = [entry(f"/m/{number}", *words) for number, (words, _flags) in enumerate(cases)]

    def check(view):
        for number, (words, flags) in enumerate(cases):
            same(view.flags(f"/m/{number}"), set(flags), " ".join(words))

    inside(engine, config(*mounts), check, overrides=KEEP_TMP)


# -- words that set and clear --------------------------------------------------------------


@behaviour
def every_word_that_sets_does_on_a_new_file_system(engine):
    rootfs()
    cases = [((word,), {word}) for word in SET] + [(("relatime",), ()), (("defaults",), ())]
    _each(engine, cases, tmpfs)


@behaviour
def every_word_that_sets_does_on_a_bind(engine):
    rootfs()
    tree("source", {})

    def entry(destination, *words):
        return bind(destination, "source", *words)

    cases = [((word,), {word}) for word in SET] + [(("relatime",), ()), (("defaults",), ())]
    _each(engine, cases, entry)


@behaviour
def every_word_that_clears_does_on_a_bind(engine):
    rootfs()
    mount_on("source", attributes=ALL)

    def entry(destination, *words):
        return bind(destination, "source", *words)

    cases = [((word,), ALL_WORDS - {cleared}) for word, cleared in CLEAR.items()
             if word != "atime"]
    _each(engine, [((), ALL_WORDS), (("defaults",), ALL_WORDS), *cases], entry)


@behaviour
def a_cleared_atime_word_means_relatime(engine):
    rootfs()
    cases = [
        (("noatime", "atime"), ()), (("strictatime", "nostrictatime"), ()),
        (("relatime", "norelatime"), ()), (("noatime", "nostrictatime"), ("noatime",)),
        (("strictatime", "atime"), ("strictatime",)), (("atime",), ()), (("norelatime",), ()),
        (("nostrictatime",), ()), (("noatime", "norelatime"), ("noatime",)),
    ]
    _each(engine, cases, tmpfs)


@behaviour
def a_cleared_atime_word_on_a_bind_means_relatime(engine):
    rootfs()
    mount_on("source", attributes=abi.MOUNT_ATTR_NOATIME)
    mount_on("strict", attributes=abi.MOUNT_ATTR_STRICTATIME)
    document = config(bind("/a", "source", "atime"), bind("/b", "strict", "nostrictatime"),
                      bind("/c", "source", "norelatime"), bind("/d", "source"))

    def check(view):
        same([view.flags(path) for path in ("/a", "/b", "/c", "/d")],
             [set(), set(), set(), {"noatime"}])

    inside(engine, document, check)


@behaviour
def later_words_win_over_earlier_ones_of_their_group(engine):
    rootfs()
    cases = []
    for word, other in CLEAR.items():
        cases += [((word, other), {other}), ((other, word), ())]
    cases += [
        (("noatime", "strictatime"), {"strictatime"}), (("strictatime", "noatime"), {"noatime"}),
        (("noatime", "relatime"), ()), (("ro", "nosuid", "rw"), {"nosuid"}),
        (("ro", "rw", "ro", "nodev"), {"ro", "nodev"}), (("nodev", "defaults"), {"nodev"}),
    ]
    _each(engine, cases, tmpfs)
    tree("source", {})
    _each(engine, cases, lambda destination, *words: bind(destination, "source", *words))


@behaviour
def words_of_the_superblock_reach_it(engine):
    rootfs()
    cases = {
        "/a": (("sync",), {"sync"}), "/b": (("dirsync",), {"dirsync"}),
        "/c": (("lazytime",), {"lazytime"}), "/d": (("sync", "async"), set()),
        "/e": (("lazytime", "nolazytime"), set()), "/f": (("async", "sync"), {"sync"}),
        "/g": (("async", "nolazytime"), set()),
        "/h": (("sync", "dirsync", "lazytime", "ro"), {"sync", "dirsync", "lazytime"}),
    }

    def check(view):
        for path, (words, expected) in cases.items():
            found = view.superblock(path) & {"sync", "dirsync", "lazytime"}
            same(found, expected, " ".join(words))

    inside(engine, config(*(tmpfs(path, *words) for path, (words, _) in cases.items())), check)


@behaviour
def words_without_effect_are_accepted_and_said(engine):
    rootfs()
    tree("source", {})
    words = ("iversion", "noiversion", "silent", "loud", "mand", "nomand")

    def check(view):
        for path in ("/a", "/b"):
            same(view.flags(path), set())
        for word in words:
            holds(view.notes(), f"mounts[0]: option {word}: no effect",
                  f"mounts[1]: option {word}: no effect")
        warnings = "\n".join(view.plan.warnings)
        holds(warnings, "mounts[0]: mand: mandatory locks are gone", "mounts[1]: nomand:")
        assert "silent" not in warnings, warnings

    inside(engine, config(tmpfs("/a", *words), bind("/b", "source", *words)), check)


# -- propagation ---------------------------------------------------------------------------

WORDS = {
    "private": abi.MS_PRIVATE, "shared": abi.MS_SHARED, "slave": abi.MS_SLAVE,
    "unbindable": abi.MS_UNBINDABLE,
}


@behaviour
def without_a_word_a_mount_is_private(engine):
    rootfs()
    mount_on("source")
    mount_on("source/sub")
    set_propagation("source", abi.MS_SHARED, True)
    document = config(bind("/bind", "source"), bind("/tree", "source", "rbind"), tmpfs("/new"),
                      mount("/proc", "proc"))

    def check(view):
        for path in ("/", "/bind", "/tree", "/tree/sub", "/new", "/proc"):
            same(view.at(path).propagation, abi.MS_PRIVATE, path)

    inside(engine, document, check)


@behaviour
def every_propagation_word_is_applied_to_a_bind(engine):
    rootfs()
    mount_on("source")
    mount_on("source/sub")
    set_propagation("source", abi.MS_SHARED, True)
    entries = [bind(f"/{word}", "source", "rbind", word)
               for plain in WORDS for word in (plain, "r" + plain)]
    below = abi.MS_SHARED

    def check(view):
        for word, number in WORDS.items():
            same(view.at("/r" + word).propagation, number, f"r{word}")
            same(view.at(f"/r{word}/sub").propagation, number, f"r{word}, below")
            same(view.at("/" + word).propagation, number, word)
            # Of the top alone: what lies below keeps the relation of a clone.
            same(view.at(f"/{word}/sub").propagation, below, f"{word}, below")

    inside(engine, config(*entries), check)


@behaviour
def every_propagation_word_is_applied_to_a_new_file_system(engine):
    rootfs()
    words = [word for plain in WORDS for word in (plain, "r" + plain)]

    def check(view):
        for word in words:
            expected = WORDS[word.removeprefix("r") if word[1:] in WORDS else word]
            if expected == abi.MS_SLAVE:
                expected = abi.MS_PRIVATE  # of no group that it could be a slave of
            same(view.at("/" + word).propagation, expected, word)

    inside(engine, config(*(tmpfs("/" + word, word) for word in words)), check)


@behaviour
def shared_and_slave_binds_keep_the_relation_to_their_source(engine):
    rootfs()
    mount_on("source")
    os.makedirs("source/late")
    set_propagation("source", abi.MS_SHARED)
    document = config(bind("/shared", "source", "rshared"), bind("/slave", "source", "rslave"),
                      bind("/private", "source", "rprivate"))
    (group,) = (each.peer_group for each in table() if each.mountpoint.endswith(b"/source"))

    def check(view):
        groups = {path: (view.at(path).peer_group, view.at(path).master)
                  for path in ("/shared", "/slave", "/private")}
        same(groups, {"/shared": (group, 0), "/slave": (0, group), "/private": (0, 0)})
        # A mount made inside reaches the shared peers, the host's among them, and the slaves.
        mount_on("/shared/late", make=False)
        assert view.at("/slave/late")
        assert "/private/late" not in view.points()
        syscalls.umount2(b"/shared/late", 0)

    inside(engine, document, check)


@behaviour
def later_propagation_words_win(engine):
    rootfs()
    mount_on("source")
    set_propagation("source", abi.MS_SHARED)
    document = config(bind("/a", "source", "rshared", "rprivate"),
                      bind("/b", "source", "private", "shared"))

    def check(view):
        same((view.at("/a").propagation, view.at("/b").propagation),
             (abi.MS_PRIVATE, abi.MS_SHARED))

    inside(engine, document, check)


# -- whole trees ---------------------------------------------------------------------------

RECURSIVE_SET = {
    "rro": "ro", "rnosuid": "nosuid", "rnodev": "nodev", "rnoexec": "noexec",
    "rnodiratime": "nodiratime", "rnoatime": "noatime", "rstrictatime": "strictatime",
    "rnosymfollow": "nosymfollow",
}
RECURSIVE_CLEAR = {
    "rrw": "ro", "rsuid": "nosuid", "rdev": "nodev", "rexec": "noexec",
    "rdiratime": "nodiratime", "ratime": "noatime", "rrelatime": "noatime",
    "rsymfollow": "nosymfollow",
}


def _tree_of_mounts(attributes=0):
    for path in ("source", "source/sub", "source/sub/deep"):
        mount_on(path, attributes=attributes & ~abi.MOUNT_ATTR_RDONLY)
    if attributes & abi.MOUNT_ATTR_RDONLY:
        fd = os.open("source", os.O_PATH)
        syscalls.mount_setattr(fd, abi.MOUNT_ATTR_RDONLY, recursive=True)
        os.close(fd)
    return ("", "/sub", "/sub/deep")


def _each_tree(engine, cases, below):
    mounts = [bind(f"/m/{number}", "source", "rbind", *words)
              for number, (words, _flags) in enumerate(cases)]

    def check(view):
        for number, (words, flags) in enumerate(cases):
            for path in below:
                same(view.flags(f"/m/{number}{path}"), set(flags), f"{words} {path}")

    inside(engine, config(*mounts), check)


@behaviour
def every_recursive_word_that_sets_reaches_the_whole_tree(engine):
    rootfs()
    below = _tree_of_mounts()
    cases = [((word,), {flag}) for word, flag in RECURSIVE_SET.items()]
    cases += [((word,), ()) for word in (*RECURSIVE_CLEAR, "rnorelatime", "rnostrictatime")]
    cases += [(("rro", "rnosuid", "rnodev", "rnoexec", "rnoatime"),
               {"ro", "nosuid", "nodev", "noexec", "noatime"})]
    _each_tree(engine, cases, below)


@behaviour
def every_recursive_word_that_clears_reaches_the_whole_tree(engine):
    rootfs()
    below = _tree_of_mounts(ALL)
    cases = [((word,), ALL_WORDS - {flag}) for word, flag in RECURSIVE_CLEAR.items()]
    cases += [(("rstrictatime",), ALL_WORDS - {"noatime"} | {"strictatime"})]
    _each_tree(engine, [((), ALL_WORDS), *cases], below)


@behaviour
def recursive_words_that_clear_another_atime_mean_relatime(engine):
    rootfs()
    below = _tree_of_mounts(abi.MOUNT_ATTR_STRICTATIME)
    _each_tree(engine, [((), {"strictatime"}), (("rnostrictatime",), ())], below)


@behaviour
def later_recursive_words_win(engine):
    rootfs()
    below = _tree_of_mounts()
    cases = [(("rro", "rrw"), ()), (("rrw", "rro"), {"ro"}),
             (("rnoatime", "rstrictatime"), {"strictatime"}),
             (("rstrictatime", "rrelatime"), ())]
    _each_tree(engine, cases, below)


@behaviour
def plain_words_reach_the_top_of_a_recursive_bind_only(engine):
    rootfs()
    _tree_of_mounts()
    document = config(bind("/m", "source", "rbind", "ro", "nosuid", "rnodev"))

    def check(view):
        same(view.flags("/m"), {"ro", "nosuid", "nodev"})
        same((view.flags("/m/sub"), view.flags("/m/sub/deep")), ({"nodev"}, {"nodev"}))

    inside(engine, document, check)


@behaviour
def recursive_words_on_a_new_file_system_are_its_own(engine):
    rootfs()
    cases = [((word,), {flag}) for word, flag in RECURSIVE_SET.items()]
    _each(engine, [*cases, (("ro", "rrw"), ()), (("rro", "rrw"), ())], tmpfs)


# -- what a bind is ------------------------------------------------------------------------


@behaviour
def a_bind_shows_the_source_and_nothing_mounted_below_unless_recursive(engine):
    rootfs()
    tree("source", {"file": b"s"})
    mount_on("source/sub")
    write("source/sub/file", b"below")

    def check(view):
        same((read("/a/file"), read("/b/file"), read("/b/sub/file")), (b"s", b"s", b"below"))
        same(os.listdir("/a/sub"), [])
        write("/b/sub/new")
        write("/a/file", b"through the bind")

    inside(engine, config(bind("/a", "source"), bind("/b", "source", "rbind")), check,
           written=["source"])
    same(read("source/file"), b"through the bind")


@behaviour
def the_bind_option_wins_over_the_type(engine):
    rootfs()
    tree("source", {"file": b"s"})
    entries = [mount("/a", "tmpfs", "source", "bind"), mount("/b", "none", "source", "rbind"),
               mount("/c", "proc", "source", "bind", "ro"),
               {"destination": "/d", "source": "source", "options": ["bind"]}]

    def check(view):
        same([read(f"/{name}/file") for name in "abcd"], [b"s"] * 4)

    inside(engine, config(*entries), check)


@behaviour
def type_bind_without_the_option_is_a_bind(engine):
    rootfs()
    tree("source", {"file": b"s"})

    def check(view):
        same((read("/a/file"), read("/b/file")), (b"s", b"s"))
        same(view.flags("/b"), {"ro"})

    inside(engine, config(mount("/a", "bind", "source"), mount("/b", "bind", "source", "ro")),
           check)


@behaviour
def a_bind_source_that_is_missing_is_an_error(engine):
    rootfs()
    error = refused(engine, config(bind("/a", "nowhere")))
    same((error["origin"], error["operation"], error["target"], error["errno"], error["kind"]),
         ("mounts[0]", "open_tree", os.path.abspath("nowhere"), "ENOENT", "MountError"))
    error = refused(engine, config({"destination": "/a", "type": "bind"}))
    same((error["kind"], error["origin"]), ("SpecError", "/mounts/0/source"))


@behaviour
def a_symlink_as_bind_source_is_followed(engine):
    rootfs()
    tree("source", {"file": b"s"})
    os.symlink("source", "link")

    def check(view):
        same(read("/a/file"), b"s")

    inside(engine, config(bind("/a", "link")), check)
