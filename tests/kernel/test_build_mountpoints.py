"""Mountpoints that are made in the upper before it is joined are what overlayfs would have made."""

import errno
import fcntl
import os
import stat
import struct
import sys
import time

import pytest

import sandboxfs.build
from sandboxfs.build import mountpoints
from sandboxfs.kernel import abi, syscalls
from sandboxfs.plan import from_spec
from sandboxfs.spec import load
from tests.support import in_namespace, make_bundle, untouched

pytestmark = pytest.mark.needs("root", "overlay", "detached-nesting")

# linux/fs.h
FS_IOC_GETFLAGS, FS_IOC_SETFLAGS = 0x80086601, 0x40086602
FS_IMMUTABLE_FL, FS_APPEND_FL = 0x10, 0x20
LONG_AGO = (10**18 + 1, 10**18 + 2)
COUNT = 4
# With it the plan is one that `build.usual` builds.
DEV = {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]}
# Version 2; user::rwx, user:1234:rwx, group::r-x, mask::rwx, other::r-x.
DEFAULT_ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *entry) for entry in (
        (0x01, 7, 0xFFFFFFFF), (0x02, 7, 1234), (0x04, 5, 0xFFFFFFFF), (0x10, 7, 0xFFFFFFFF),
        (0x20, 5, 0xFFFFFFFF))
)


def plain(lower):
    """What the rootfs has no word of."""
    return lower / "new/deep/er"


def existing(lower):
    (lower / "there").mkdir(mode=0o751)
    os.chown(lower / "there", 1234, 4321)
    return lower / "there"


def below_existing(lower):
    (lower / "a/b/c").mkdir(parents=True)
    for path, mode, owner in (("a", 0o711, 5), ("a/b", 0o1777, 0), ("a/b/c", 0o555, 7)):
        os.chown(lower / path, owner, owner)
        os.chmod(lower / path, mode)
    return lower / "a/b/c/new"


def with_some_there(lower):
    (lower / "some/2/inside").mkdir(parents=True)
    return lower / "some"


def with_all_there(lower):
    for number in range(COUNT):
        there = lower / f"all/{number}"
        there.parent.mkdir(exist_ok=True)
        there.touch() if number % 2 else there.mkdir(mode=0o700)
    return lower / "all"


def in_the_root(lower):
    return lower


def handing_down_its_group(lower):
    (lower / "group").mkdir()
    os.chown(lower / "group", 0, 4321)
    (lower / "group").chmod(0o2775)
    return lower / "group"


def with_a_default_acl(lower):
    (lower / "acl").mkdir()
    os.setxattr(lower / "acl", "system.posix_acl_default", DEFAULT_ACL)
    return lower / "acl"


def with_an_attribute(lower):
    (lower / "attribute").mkdir()
    os.setxattr(lower / "attribute", "user.word", b"kept")
    return lower / "attribute/new"


def behind_a_link(lower):
    (lower / "target").mkdir()
    (lower / "link").symlink_to("target")
    return lower / "link"


# Whether it is for us, and not for overlayfs.
PLACES = {
    plain: True, existing: True, below_existing: True, with_some_there: True,
    with_all_there: False, in_the_root: True, handing_down_its_group: False,
    with_a_default_acl: False, with_an_attribute: False, behind_a_link: False,
}


@pytest.fixture
def point(tmp_path):
    """Return a directory that roots are attached on."""
    (tmp_path / "point").mkdir()
    return tmp_path / "point"


@pytest.fixture
def made(monkeypatch):
    """Yield a list that gets, for each build, the number of mountpoints made in the upper."""
    counts = []
    make = mountpoints.Upper.make

    def counted(self, *arguments):
        result = make(self, *arguments)
        counts.append(len(self.calls.ready))
        return result

    monkeypatch.setattr(mountpoints.Upper, "make", counted)
    return counts


def bundle_with(tmp_path, place, mounts=()):
    """Return (bundle, destinations): binds in a place, of directories and of files in turn."""
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    bundle = make_bundle(tmp_path)
    parent = os.path.relpath(place(bundle.rootfs), bundle.rootfs)
    destinations = [os.path.normpath(f"/{parent}/{number}") for number in range(COUNT)]
    for path, directories, files in os.walk(bundle.rootfs, topdown=False):
        for name in (*directories, *files):
            os.utime(os.path.join(path, name), ns=LONG_AGO, follow_symlinks=False)
    document = bundle.document
    document["mounts"] = [*mounts, *(
        {"destination": destination, "type": "bind", "options": ["bind", "ro"],
         "source": str(tmp_path / ("file" if number % 2 else "directory"))}
        for number, destination in enumerate(destinations)
    )]
    document["linux"].update(maskedPaths=[], readonlyPaths=[])
    bundle.write(document)
    return bundle, destinations


def planned(bundle):
    """Return a bundle's plan, for the engine that this is about."""
    plan = from_spec.plan(load.load(bundle))
    plan.engine = "detached"
    return plan


def built(bundle, point, destinations, times=1):
    """Return the tree that a build leaves, below the binds: {path: what is told of it}."""
    plan = planned(bundle)
    began = time.time_ns() - 10**9
    for _again in range(times - 1):
        sandboxfs.build(plan).close()
    with sandboxfs.build(plan) as root:
        root.attach(point)
    for destination in reversed(destinations):
        mounted = os.path.realpath(f"{point}{destination}")
        assert os.path.ismount(mounted), destination
        syscalls.umount2(os.fsencode(mounted), abi.MNT_DETACH)
    tree = {}
    for path, directories, files in os.walk(point):
        directories[:] = [each for each in directories if each != "dev"]
        for name in (*directories, *files):
            tree[os.path.relpath(os.path.join(path, name), point)] = told(
                os.path.join(path, name), began)
    syscalls.umount2(os.fsencode(point), abi.MNT_DETACH)
    return tree


def told(path, began):
    status = os.lstat(path)
    return (
        stat.S_IFMT(status.st_mode), oct(status.st_mode), status.st_uid, status.st_gid,
        *("now" if each >= began else each for each in (status.st_atime_ns, status.st_mtime_ns)
          if stat.S_ISDIR(status.st_mode)),
        sorted(os.listxattr(path, follow_symlinks=False)),
    )


@pytest.mark.parametrize(("times", "mounts"), [(1, []), (1, [DEV]), (3, [DEV])])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_the_tree_is_the_one_that_overlayfs_makes(
    tmp_path, point, monkeypatch, made, place, times, mounts
):
    bundle, destinations = bundle_with(tmp_path, place, mounts)

    def build():
        ours = built(bundle, point, destinations, times)
        count = len(made)
        monkeypatch.setattr(mountpoints, "MANY", COUNT + 1)
        theirs = built(bundle, point, destinations, times)
        assert len(made) == count >= times, "the control has to be made by overlayfs"
        return ours, theirs, made[-1]

    with untouched(bundle.rootfs):
        ours, theirs, count = in_namespace(build)
    assert ours == theirs
    assert ours
    assert bool(count) == PLACES[place]


def test_a_copy_that_can_not_be_given_away_is_left_to_overlayfs(tmp_path, monkeypatch, made, point):
    bundle, destinations = bundle_with(tmp_path, existing, [DEV])

    def refused(_fd, _uid, _gid):
        raise PermissionError(errno.EPERM, "no")

    def build():
        monkeypatch.setattr(mountpoints, "fchownat", refused)
        ours = built(bundle, point, destinations)
        assert made == [0]
        return ours

    with untouched(bundle.rootfs):
        assert in_namespace(build)["there"][1:4] == (oct(stat.S_IFDIR | 0o751), 1234, 4321)


@pytest.mark.parametrize("number", range(1, 5))
def test_a_copy_is_whole_or_left_to_overlayfs(tmp_path, monkeypatch, number, point):
    """The process may run out of descriptors at any of the directories."""
    bundle, destinations = bundle_with(tmp_path, below_existing, [DEV])
    calls = []

    def failing(*arguments):
        calls.append(arguments)
        return -1 if len(calls) == number else openat(*arguments)

    openat = mountpoints.openat

    def build():
        monkeypatch.setattr(mountpoints, "MANY", COUNT + 1)
        theirs = built(bundle, point, destinations)
        monkeypatch.undo()
        monkeypatch.setattr(mountpoints, "openat", failing)
        return built(bundle, point, destinations), theirs, len(calls)

    with untouched(bundle.rootfs):
        ours, theirs, count = in_namespace(build)
    assert count >= number
    assert ours == theirs


def test_an_upper_whose_times_can_not_be_kept_is_not_used(tmp_path, monkeypatch, point):
    bundle, destinations = bundle_with(tmp_path, below_existing, [DEV])

    def refused(*_arguments, **_how):
        raise OSError(errno.ENOMEM, "no")

    def build():
        monkeypatch.setattr(mountpoints, "MANY", COUNT + 1)
        theirs = built(bundle, point, destinations)
        monkeypatch.undo()
        monkeypatch.setattr(mountpoints.os, "utime", refused)
        return built(bundle, point, destinations), theirs

    with untouched(bundle.rootfs):
        ours, theirs = in_namespace(build)
    assert ours == theirs


def test_copies_belong_to_whom_the_lower_says_whoever_builds(tmp_path, point):
    def of_root(lower):
        (lower / "srv").mkdir()
        return lower / "srv"

    bundle, destinations = bundle_with(tmp_path, of_root, [DEV])

    def build():
        os.setegid(1234)
        tree = built(bundle, point, destinations)
        os.setegid(0)
        return tree

    with untouched(bundle.rootfs):
        assert in_namespace(build)["srv"][2:4] == (0, 0)


def test_an_earlier_mount_finds_nothing_of_what_later_ones_need(tmp_path, made, point):
    """A tmpfs takes its mode from a mountpoint that is there, and 1777 where it is missing."""
    def linked(lower):
        (lower / "run").mkdir(exist_ok=True)
        (lower / "var").mkdir(exist_ok=True)
        (lower / "var/run").symlink_to("../run")
        return lower / "run/app"

    tmpfs = {"destination": "/var/run/app", "type": "tmpfs", "source": "tmpfs", "options": []}
    bundle, destinations = bundle_with(tmp_path, linked, [DEV, tmpfs])

    def build():
        plan = planned(bundle)
        with sandboxfs.build(plan) as root:
            root.attach(point)
        return oct(os.stat(point / "run/app").st_mode), [
            os.path.ismount(f"{point}{each}") for each in destinations]

    assert in_namespace(build) == (oct(stat.S_IFDIR | 0o1777), [True] * COUNT)


def test_a_mount_that_a_link_led_over_the_place_gets_the_mountpoints(tmp_path, made, point):
    def covered(lower):
        (lower / "some").mkdir()
        (lower / "alias").symlink_to("some")
        return lower / "some"

    tmpfs = {"destination": "/alias", "type": "tmpfs", "source": "tmpfs", "options": []}
    bundle, destinations = bundle_with(tmp_path, covered, [DEV, tmpfs])

    def build():
        plan = planned(bundle)
        for _again in range(3):
            with sandboxfs.build(plan) as root:
                root.attach(point)
            for destination in destinations:
                assert os.path.ismount(f"{point}{destination}")
                syscalls.umount2(os.fsencode(f"{point}{destination}"), abi.MNT_DETACH)
            names = sorted(os.listdir(point / "some"))
            assert os.path.ismount(point / "some")
            syscalls.umount2(os.fsencode(point), abi.MNT_DETACH)
            assert names == [os.path.basename(each) for each in destinations]

    with untouched(bundle.rootfs):
        in_namespace(build)
    assert all(count == COUNT for count in made)


def remove(lower):
    for number in range(COUNT):
        there = lower / f"all/{number}"
        there.unlink() if number % 2 else there.rmdir()


def remove_one(lower):
    (lower / "all/2").rmdir()


def exchange_for_a_link(lower):
    (lower / "all/2").rmdir()
    (lower / "all/2").symlink_to("0")


def exchange_the_place_for_a_link(lower):
    (lower / "all").rename(lower / "elsewhere")
    (lower / "all").symlink_to("elsewhere")


def exchange_a_directory_for_a_file(lower):
    (lower / "all/2").rmdir()
    (lower / "all/2").touch()
    source = lower.parent.parent / "directory"
    source.rmdir()
    source.touch()
    (lower / "all/0").rmdir()
    (lower / "all/0").touch()


@pytest.mark.parametrize("change", [
    remove, remove_one, exchange_for_a_link, exchange_the_place_for_a_link,
    exchange_a_directory_for_a_file,
], ids=lambda change: change.__name__)
def test_what_changes_between_two_builds_of_a_plan_is_seen(tmp_path, change, point):
    """A plan that was built before does what a plan that wasn't does."""
    bundle, destinations = bundle_with(tmp_path, with_all_there, [DEV])

    def build():
        plan = planned(bundle)
        for _again in range(3):
            sandboxfs.build(plan).close()
        assert plan.compiled.usual
        change(bundle.rootfs)
        found = []
        for each in (plan, planned(bundle)):
            for _again in range(2):
                with sandboxfs.build(each) as root:
                    root.attach(point)
                found.append([
                    (os.path.ismount(os.path.realpath(f"{point}{destination}")),
                     os.path.samefile(f"{point}{destination}", tmp_path / source))
                    for destination, source in zip(
                        destinations, ("directory", "file") * COUNT, strict=False)
                ])
                syscalls.umount2(os.fsencode(point), abi.MNT_DETACH)
        return found

    found = in_namespace(build)
    assert found == [[(True, True)] * COUNT] * 4


def test_where_mountpoints_were_there_is_looked_again_once_one_is_missing(tmp_path, made, point):
    bundle, _destinations = bundle_with(tmp_path, with_all_there, [DEV])

    def build():
        plan = planned(bundle)
        for _again in range(3):
            sandboxfs.build(plan).close()
        there = [set(plan.compiled.usual[0].calls.there)]
        remove(bundle.rootfs)
        for _again in range(2):
            sandboxfs.build(plan).close()
            there.append(set(plan.compiled.usual[0].calls.there))
        return there, made

    there, counts = in_namespace(build)
    assert there == [{b"/all"}, set(), set()]
    assert counts == [0, 0, 0, 0, COUNT]


def test_a_source_may_be_a_file_and_a_directory_in_turn(tmp_path, point):
    """Of few binds, whose mountpoints overlayfs makes: nothing of the last build is believed."""
    bundle, destinations = bundle_with(tmp_path, plain, [DEV])
    bundle.document["mounts"] = bundle.document["mounts"][:3]
    bundle.write(bundle.document)
    source = tmp_path / "file"

    def build():
        plan = planned(bundle)
        for make, remove in ((source.touch, source.unlink), (source.mkdir, source.rmdir)) * 2:
            make()
            with sandboxfs.build(plan) as root:
                root.attach(point)
            assert os.path.samefile(f"{point}{destinations[1]}", source)
            syscalls.umount2(os.fsencode(point), abi.MNT_DETACH)
            remove()

    source.unlink()
    in_namespace(build)


def test_nothing_is_attached_to_a_link_that_another_mount_has_brought(
    tmp_path, monkeypatch, made, point
):
    def covered(lower):
        (lower / "some").mkdir()
        (lower / "alias").symlink_to("some")
        return lower / "some"

    cover = tmp_path / "cover"
    for name in ("0", "2"):
        (cover / name).mkdir(parents=True)
    (cover / "3").touch()
    (cover / "1").symlink_to("3")
    bind = {"destination": "/alias", "type": "bind", "source": str(cover), "options": ["bind"]}
    bundle, _destinations = bundle_with(tmp_path, covered, [DEV, bind])

    def mounts():
        plan = planned(bundle)
        with sandboxfs.build(plan) as root:
            root.attach(point)
        with open("/proc/self/mountinfo") as table:
            fields = [line.split() for line in table]
        syscalls.umount2(os.fsencode(point), abi.MNT_DETACH)
        return [(each[3], each[4]) for each in fields if each[4].startswith(str(point))]

    def build():
        ours = mounts()
        assert COUNT in made
        monkeypatch.setattr(mountpoints, "MANY", COUNT + 1)
        return ours, mounts()

    ours, theirs = in_namespace(build)
    assert ours == theirs
    assert f"{point}/some/1" not in [place for _root, place in ours]


def test_a_directory_that_may_not_be_changed_is_left_to_overlayfs(tmp_path):
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        assert mountpoints.copiable(directory) is not None
        flags = bytearray(4)
        fcntl.ioctl(directory, FS_IOC_GETFLAGS, flags)
        before = bytes(flags)
        for bit in (FS_IMMUTABLE_FL, FS_APPEND_FL):
            try:
                changed = int.from_bytes(before, sys.byteorder) | bit
                fcntl.ioctl(directory, FS_IOC_SETFLAGS, changed.to_bytes(4, sys.byteorder))
                assert mountpoints.copiable(directory) is None
            finally:
                fcntl.ioctl(directory, FS_IOC_SETFLAGS, before)
        assert mountpoints.copiable(directory) is not None
    finally:
        os.close(directory)
