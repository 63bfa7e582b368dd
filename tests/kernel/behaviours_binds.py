"""Binds whose mountpoints are missing: what is made, where, and what is left alone.

Siblings are made in their directory by one descriptor of it, in the usual case: what would be
different if it led elsewhere by now has a behaviour here.
"""

import errno
import os
import stat
import struct

from sandboxfs.kernel import abi, syscalls
from tests.kernel.behaviours_table import Unavailable, behaviour
from tests.kernel.behaviours_tools import (
    USER,
    bind,
    config,
    fails,
    holds,
    inside,
    mode_of,
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
UMASKS = (0, 0o77)


def _sources(*names):
    """Make a directory `source/NAME` for each, with a file that has its name as content."""
    tree("source", {f"{name}/which": name.encode() for name in names})
    write("source/file", b"bound")


def _binds(*pairs):
    """Return binds of (destination, name of the source)."""
    return [bind(destination, f"source/{name}") for destination, name in pairs]


def _uncover(*paths):
    """Take the topmost mounts at the paths away."""
    for path in paths:
        syscalls.umount2(os.fsencode(path), abi.MNT_DETACH)


def _below(path):
    """Return {path: (mode, owner)} of everything below a directory."""
    found = {}
    for base, directories, files in os.walk(path):
        for name in directories + files:
            each = os.path.join(base, name)
            found[each] = oct(os.lstat(each).st_mode), owner_of(each)
    return found


DIRECTORY, FILE = (oct(stat.S_IFDIR | 0o755), (0, 0)), (oct(stat.S_IFREG | 0o644), (0, 0))


@behaviour
def missing_mountpoints_of_siblings_are_made_each_of_its_kind(engine):
    rootfs()
    _sources("one", "two")
    pairs = (("/d/one", "one"), ("/d/two", "two"), ("/d/file", "file"), ("/d/e/f/one", "one"),
             ("/d/e/file", "file"), ("/top", "two"), ("/topfile", "file"))

    def check(view):
        same(view.points(), sorted(["/", *(path for path, _name in pairs)]))
        same([read(path + "/which") for path in ("/d/one", "/d/two", "/d/e/f/one", "/top")],
             [b"one", b"two", b"one", b"two"])
        same([read(path) for path in ("/d/file", "/d/e/file", "/topfile")], [b"bound"] * 3)
        _uncover(*(path for path, _name in pairs))
        same(_below("/d"), {
            "/d/one": DIRECTORY, "/d/two": DIRECTORY, "/d/file": FILE, "/d/e": DIRECTORY,
            "/d/e/f": DIRECTORY, "/d/e/f/one": DIRECTORY, "/d/e/file": FILE,
        })
        same([mode_of(path) for path in ("/d", "/top", "/topfile")], [0o755, 0o755, 0o644])
        same([read(path) for path in ("/d/file", "/topfile")], [b"", b""])

    for umask in UMASKS:
        inside(engine, config(*_binds(*pairs)), check, overrides=KEEP_TMP, umask=umask)


@behaviour
def among_missing_siblings_what_exists_is_reused_as_it_is(engine):
    rootfs({"d/there/inside": b"", "d/file": b"content"})
    os.chmod("rootfs/d/there", 0o2710)
    os.chown("rootfs/d/there", 5, 6)
    os.chmod("rootfs/d/file", 0o600)
    _sources("one", "two", "three")

    def check(view):
        points = ["/d/file", "/d/one", "/d/other", "/d/there", "/d/two"]
        same(view.points(), ["/", *points])
        same((read("/d/there/which"), read("/d/file")), (b"three", b"bound"))
        _uncover(*points)
        same((mode_of("/d/there"), owner_of("/d/there"), os.listdir("/d/there")),
             (0o2710, (5, 6), ["inside"]))
        same((mode_of("/d/file"), read("/d/file")), (0o600, b"content"))
        same([mode_of(path) for path in ("/d/one", "/d/two", "/d/other")], [0o755, 0o755, 0o644])

    document = config(*_binds(("/d/one", "one"), ("/d/there", "three"), ("/d/two", "two"),
                              ("/d/file", "file"), ("/d/other", "file")))
    inside(engine, document, check, overrides=KEEP_TMP)


@behaviour
def siblings_behind_a_link_are_made_where_it_leads_inside_the_root(engine):
    rootfs({"real/": 0, "link": "/real", "up": "../../real", "away/": 0})
    tree("real", {})
    _sources("one", "two", "three", "four")

    def check(view):
        same(view.points(), ["/", "/away/one", "/real/four", "/real/one", "/real/three",
                             "/real/two"])
        same([read(f"/real/{name}/which") for name in ("one", "two", "three", "four")],
             [b"one", b"two", b"three", b"four"])

    document = config(*_binds(("/away/one", "one"), ("/link/one", "one"), ("/link/two", "two"),
                              ("/real/three", "three"), ("/up/four", "four")))
    inside(engine, document, check, overrides=KEEP_TMP)
    same(os.listdir("real"), [])


@behaviour
def among_missing_siblings_links_are_followed_inside_the_root(engine):
    rootfs({"real/": 0, "d/link": "../real", "d/new": "/made/by/link", "d/file": "/etc/passwd"})
    _sources("one", "two", "three")

    def check(view):
        same(view.points(), ["/", "/d/one", "/d/two", "/etc/passwd", "/made/by/link", "/real"])
        same((read("/real/which"), read("/made/by/link/which"), read("/etc/passwd")),
             (b"two", b"three", b"bound"))

    document = config(*_binds(("/d/one", "one"), ("/d/link", "two"), ("/d/new", "three"),
                              ("/d/file", "file"), ("/d/two", "two")))
    inside(engine, document, check, overrides=KEEP_TMP)


@behaviour
def what_a_link_covered_is_covered_for_the_siblings_that_follow(engine):
    rootfs({"d/": 0, "link": "d"})
    _sources("one", "two")

    def check(view):
        same(view.points(), ["/", "/d", "/d/one", "/d/two"])
        same(os.listdir("/d"), ["two"])
        _uncover("/d")
        same(os.listdir("/d"), ["one"])

    for options in ((), ("mode=755",)):
        document = config(*_binds(("/d/one", "one")), tmpfs("/link", *options),
                          *_binds(("/d/two", "two")))
        inside(engine, document, check, overrides=KEEP_TMP)


@behaviour
def what_a_bind_on_a_link_covered_is_covered_for_the_siblings_that_follow(engine):
    rootfs({"d/": 0, "link": "d"})
    _sources("one", "two")
    tree("cover", {})

    def check(view):
        same((view.points(), os.listdir("/d")), (["/", "/d", "/d/one", "/d/two"], ["two"]))
        _uncover("/d")
        same(os.listdir("/d"), ["one"])

    document = config(*_binds(("/d/one", "one")), bind("/link", "cover"),
                      *_binds(("/d/two", "two")))
    inside(engine, document, check, overrides=KEEP_TMP, written=("cover",))
    same(os.listdir("cover"), ["two"])


@behaviour
def what_a_mount_on_a_link_itself_covered_is_covered_for_what_follows(engine):
    rootfs({"d/e/": 0, "link": "d", "t/": 0, "here": "."})
    _sources("one", "two")

    def check(view):
        same((os.listdir("/d/e"), read("/d/e/two/which")), (["two"], b"two"))
        _uncover("/d/e/two", "/d/e")
        same(os.listdir("/d/e"), ["one"])
        same(sorted(os.listdir("/t")), ["a", "b"])
        _uncover("/t/a", "/t/b", "/t")
        same(os.listdir("/t"), [], "made in what is covered")

    document = config(
        *_binds(("/d/e/one", "one")), tmpfs("/link/e", "dest-nofollow", "mode=755"),
        *_binds(("/d/e/two", "two")),
        tmpfs("/t", "mode=755"), tmpfs("/here/t", "dest-nofollow", "mode=755"),
        tmpfs("/t/a", "mode=755"), *_binds(("/t/b", "one")),
    )
    inside(engine, document, check, overrides=KEEP_TMP)


@behaviour
def what_a_mount_covered_is_covered_for_the_siblings_that_follow(engine):
    rootfs()
    _sources("one", "two")
    # With a mode of its own a tmpfs needs no look at what it covers.
    for cover, *options in (("/a/b", "mode=755"), ("/a", "mode=755"), ("/a/b",), ("/a",)):

        def check(view, cover=cover):
            same(read("/a/b/two/which"), b"two")
            same(os.listdir("/a/b"), ["two"])
            _uncover(cover)
            same((os.listdir("/a"), os.listdir("/a/b")), (["b"], ["one"]))

        document = config(*_binds(("/a/b/one", "one")), tmpfs(cover, *options),
                          *_binds(("/a/b/two", "two")))
        inside(engine, document, check, overrides=KEEP_TMP)


@behaviour
def what_a_bind_covered_is_covered_for_the_siblings_that_follow(engine):
    rootfs()
    _sources("one", "two")
    for options in ((), ("ro",)):
        tree("cover", {"b/": 0})

        def check(view):
            same(read("/a/b/two/which"), b"two")
            same(os.listdir("/a/b"), ["two"])
            _uncover("/a")
            same((os.listdir("/a"), os.listdir("/a/b")), (["b"], ["one"]))

        document = config(*_binds(("/a/b/one", "one")), bind("/a", "cover", *options),
                          *_binds(("/a/b/two", "two")))
        inside(engine, document, check, overrides=KEEP_TMP,
               written=() if options else ("cover/b",))
        same(os.listdir("cover/b"), [] if options else ["two"])
        if not options:
            os.rmdir("cover/b/two")


@behaviour
def in_a_writable_bind_mountpoints_are_made_in_its_source(engine):
    rootfs()
    _sources("one", "two")
    tree("volume", {})

    def check(view):
        same(view.points(), ["/", "/v", "/v/d/file", "/v/d/one", "/v/two"])

    document = config(bind("/v", "volume"), *_binds(("/v/d/one", "one"), ("/v/d/file", "file"),
                                                    ("/v/two", "two")))
    inside(engine, document, check, overrides=KEEP_TMP, written=("volume",))
    same(_below("volume"), {"volume/d": DIRECTORY, "volume/d/one": DIRECTORY,
                            "volume/d/file": FILE, "volume/two": DIRECTORY})


@behaviour
def in_a_read_only_bind_mountpoints_are_made_over_its_source(engine):
    rootfs()
    _sources("one", "two")
    tree("volume", {"kept": b""})

    def check(view):
        same(sorted(os.listdir("/v")), ["d", "kept", "two"])
        same((read("/v/d/file"), read("/v/two/which")), (b"bound", b"two"))
        fails("EROFS", write, "/v/new")

    document = config(bind("/v", "volume", "ro"),
                      *_binds(("/v/d/one", "one"), ("/v/d/file", "file"), ("/v/two", "two")))
    inside(engine, document, check, overrides=KEEP_TMP)
    same(os.listdir("volume"), ["kept"])


@behaviour
def siblings_are_made_in_a_read_only_root_that_is_sealed_afterwards(engine):
    rootfs({"d/there/": 0})
    _sources("one", "two", "three")

    def check(view):
        same(view.flags("/"), {"ro"})
        for path in ("/new", "/d/new", "/d/e/new"):
            fails("EROFS", write, path)
        same([read(f"/d/{name}/which") for name in ("one", "two", "there")],
             [b"one", b"two", b"three"])
        same(read("/d/e/file"), b"bound")
        _uncover("/d/one", "/d/two", "/d/e/file")
        same([mode_of(path) for path in ("/d/one", "/d/two", "/d/e", "/d/e/file")],
             [0o755, 0o755, 0o755, 0o644])

    document = config(*_binds(("/d/one", "one"), ("/d/two", "two"), ("/d/there", "three"),
                              ("/d/e/file", "file")), readonly=True)
    inside(engine, document, check, overrides=KEEP_TMP)


@behaviour
def siblings_are_made_in_a_read_only_tmpfs(engine):
    rootfs()
    _sources("one", "two")

    def check(view):
        same(view.points(), ["/", "/t", "/t/file", "/t/one", "/t/two"])
        fails("EROFS", write, "/t/new")

    document = config(tmpfs("/t", "ro"), *_binds(("/t/one", "one"), ("/t/file", "file"),
                                                 ("/t/two", "two")))
    inside(engine, document, check, overrides=KEEP_TMP)


@behaviour
def of_two_binds_on_one_missing_mountpoint_the_later_is_on_top(engine):
    rootfs()
    _sources("one", "two", "three")

    def check(view):
        same(read("/d/p/which"), b"three")
        _uncover("/d/p")
        same(read("/d/p/which"), b"one")
        _uncover("/d/p")
        same(os.listdir("/d/p"), [])

    document = config(*_binds(("/d/p", "one"), ("/d/q", "two"), ("/d/p", "three")))
    inside(engine, document, check, overrides=KEEP_TMP)


@behaviour
def a_mountpoint_made_for_the_other_kind_is_an_error_that_names_both(engine):
    rootfs()
    _sources("one", "two")
    for first, second, number, words in (
        ("file", "one", "ENOTDIR", ("is a directory", "is a file")),
        ("one", "file", "EISDIR", ("is a file", "is a directory")),
    ):
        error = refused(engine, config(*_binds(("/d/x", "two"), ("/d/p", first), ("/d/p", second))))
        same((error["origin"], error["operation"], error["target"], error["errno"]),
             ("mounts[2]", "mountpoint", "/d/p", number))
        holds(error["text"], *words)


@behaviour
def among_missing_siblings_the_other_kind_is_an_error_that_names_both(engine):
    rootfs({"d/file": b"", "d/directory/": 0})
    _sources("one", "two")
    for path, name, number in (("/d/file", "one", "ENOTDIR"), ("/d/directory", "file", "EISDIR"),
                               ("/d/file/deeper", "one", "ENOTDIR")):
        error = refused(engine, config(*_binds(("/d/two", "two"), (path, name))))
        same((error["origin"], error["target"], error["errno"]), ("mounts[1]", path, number))


@behaviour
def siblings_made_in_a_directory_that_hands_down_its_group_belong_to_it(engine):
    rootfs({"d/": 0})
    os.chown("rootfs/d", 0, USER)
    os.chmod("rootfs/d", 0o2775)
    _sources("one", "two")
    directory, file = ("0o42755", (0, USER)), ("0o100644", (0, USER))

    def check(view):
        _uncover("/d/one", "/d/two", "/d/file", "/d/e/one")
        same(_below("/d"), {"/d/one": directory, "/d/two": directory, "/d/file": file,
                            "/d/e": directory, "/d/e/one": directory})

    document = config(*_binds(("/d/one", "one"), ("/d/two", "two"), ("/d/file", "file"),
                              ("/d/e/one", "one")))
    for umask in UMASKS:
        inside(engine, document, check, overrides=KEEP_TMP, umask=umask)


@behaviour
def a_default_acl_takes_nothing_from_the_modes_of_siblings(engine):
    rootfs({"d/": 0})
    # acl(5) as an xattr: version 2, then (tag, permissions, id): the owner alone may do anything.
    entries = ((1, 7, -1), (4, 0, -1), (0x20, 0, -1))
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    try:
        os.setxattr("rootfs/d", "system.posix_acl_default", acl)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        raise Unavailable("tmpfs-acl", "ACLs on tmpfs") from error
    _sources("one", "two")

    def check(view):
        _uncover("/d/one", "/d/two", "/d/file", "/d/e/one")
        same({path: mode for path, (mode, _owner) in _below("/d").items()},
             {"/d/one": "0o40755", "/d/two": "0o40755", "/d/file": "0o100644",
              "/d/e": "0o40755", "/d/e/one": "0o40755"})

    document = config(*_binds(("/d/one", "one"), ("/d/two", "two"), ("/d/file", "file"),
                              ("/d/e/one", "one")))
    for umask in UMASKS:
        inside(engine, document, check, overrides=KEEP_TMP, umask=umask)


@behaviour
def dots_and_slashes_in_a_destination_make_what_they_pass(engine):
    rootfs({"t/": 0})
    _sources("one", "two", "three", "four")

    def check(view):
        same(view.points(),
             ["/", "/d/four", "/d/one", "/d/three", "/d/two", "/t", "/t/five"])
        assert os.path.isdir("/d/x"), "passed on the way"
        assert os.path.isdir("/t/x"), "passed on the way"

    document = config(*_binds(("/d/one", "one"), ("/d/x/../two", "two"), ("/d/./three/", "three"),
                              ("//d//four", "four")),
                      tmpfs("/t", "mode=755"), tmpfs("/t/x/../five", "mode=755"))
    inside(engine, document, check, overrides=KEEP_TMP)


@behaviour
def a_bind_of_a_file_with_a_slash_at_its_end_is_refused_as_the_kernel_does(engine):
    rootfs()
    _sources("one")
    error = refused(engine, config(bind("/d/file", "source/file/")))
    same((error["origin"], error["operation"], error["errno"]),
         ("mounts[0]", "open_tree", "ENOTDIR"))


@behaviour
def a_missing_source_is_an_error_that_names_it(engine):
    rootfs()
    _sources("one")
    error = refused(engine, config(*_binds(("/d/one", "one"), ("/d/two", "two"))))
    same((error["origin"], error["operation"], error["target"], error["errno"]),
         ("mounts[1]", "open_tree", os.path.abspath("source/two"), "ENOENT"))


@behaviour
def links_to_sources_are_followed_for_both_kinds(engine):
    rootfs()
    _sources("one")
    tree("links", {"directory": "../source/one", "file": "../source/file", "chain": "directory"})

    def check(view):
        same((read("/d/a/which"), read("/d/b"), read("/d/c/which")), (b"one", b"bound", b"one"))

    document = config(bind("/d/a", "links/directory"), bind("/d/b", "links/file"),
                      bind("/d/c", "links/chain"))
    inside(engine, document, check, overrides=KEEP_TMP)


@behaviour
def a_source_in_the_image_is_found_inside_it_for_both_kinds(engine):
    rootfs({"data/in/which": b"image", "link": "/data", "outside": "/etc/shadow-of-the-host",
            "etc/shadow-of-the-host": b"the image's"})

    def check(view):
        same((read("/d/a/in/which"), read("/d/b")), (b"image", b"the image's"))

    document = config(bind("/d/a", "rootfs/link"), bind("/d/b", "rootfs/outside"))
    inside(engine, document, check, overrides=KEEP_TMP)


@behaviour
def siblings_are_made_without_an_overlay_in_the_rootfs_itself(engine):
    rootfs()
    _sources("one", "two")

    def check(view):
        same(view.points(), ["/", "/d/file", "/d/one", "/d/two"])

    document = config(*_binds(("/d/one", "one"), ("/d/two", "two"), ("/d/file", "file")))
    inside(engine, document, check, overrides={**KEEP_TMP, "overlay": "none"},
           written=("rootfs",))
    same(_below("rootfs/d"), {"rootfs/d/one": DIRECTORY, "rootfs/d/two": DIRECTORY,
                              "rootfs/d/file": FILE})
