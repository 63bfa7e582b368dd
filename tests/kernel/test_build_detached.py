"""What only detached trees promise: nothing is visible before the one call that shows it all."""

import ctypes
import gc
import glob
import os
import signal
import socket
import struct
import subprocess
from pathlib import Path

import pytest

import sandboxfs.build
from sandboxfs.build import assemble, calls, preparation, usual
from sandboxfs.build.compiled import compile_once
from sandboxfs.errors import MountError
from sandboxfs.kernel import abi, foreign, fscontext, mounttable, syscalls
from sandboxfs.plan import from_spec
from sandboxfs.spec import load
from tests.support import in_namespace, make_bundle, mount_tmpfs, set_propagation, table, untouched

pytestmark = pytest.mark.needs("root", "overlay", "detached-nesting")


MS_REMOUNT = 32  # linux/mount.h
# read(2), for what getdents64(2) would give.
READ = {"x86_64": 0}.get(os.uname().machine, 63)


def plan_of(bundle, **overrides):
    spec = load.load(bundle)
    for key, value in overrides.items():
        spec.overrides.set(key.replace("_", "."), value, key)
    plan = from_spec.plan(spec)
    plan.engine = "detached"
    return plan


def prepared_calls(plan):
    compile_once(plan)
    return preparation.prepared(plan)


def can_be_cloned(fd):
    """Whether what a descriptor refers to is still mounted, if only in a namespace of its own."""
    try:
        os.close(syscalls.open_tree(fd, b"", abi.OPEN_TREE_CLONE | abi.AT_EMPTY_PATH))
    except OSError:
        return False
    return True


def enter_an_empty_root():
    empty = fscontext.create(b"tmpfs", [], 0)
    syscalls.move_mount_path(empty, abi.AT_FDCWD, b"/")
    os.fchdir(empty)
    syscalls.pivot_root(b".", b".")
    syscalls.umount2(b".", abi.MNT_DETACH)
    os.chdir("/")
    os.close(empty)


@pytest.mark.parametrize("has_a_place", [True, False], ids=["", "no /proc"])
def test_the_private_tmpfs_leaves_with_the_old_root(tmp_path, has_a_place):
    bundle = make_bundle(tmp_path)

    def build():
        root = sandboxfs.build(plan_of(bundle))
        tmpfs = root.engine.scratch
        assert can_be_cloned(tmpfs)
        if not has_a_place:
            enter_an_empty_root()
        root.pivot()
        found = [(each.type, each.mountpoint) for each in table()]
        assert len([each for each in found if each[0] == b"overlay"]) == 1
        assert found[0][1] == b"/"
        gone = not can_be_cloned(tmpfs)
        root.close()
        return gone

    # Their names change with the root.
    assert in_namespace(build, check_descriptors=False) == has_a_place


def test_nothing_is_visible_until_attach_and_everything_after_it(tmp_path):
    bundle = make_bundle(tmp_path)
    point = tmp_path / "point"
    point.mkdir()

    def build():
        before = table()
        root = sandboxfs.build(plan_of(bundle))
        assert [str(each) for each in table()] == [str(each) for each in before]
        assert os.listdir(point) == []
        root.attach(point)
        assert len(table()) > len(before) + 5
        assert os.path.ismount(point / "proc")
        assert os.stat(point / "dev/null").st_rdev == os.makedev(1, 3)
        root.close()

    with untouched(bundle.rootfs):
        in_namespace(build)


def test_binds_are_made_by_prepared_calls_alone(tmp_path, monkeypatch):
    """A file and directories, with mountpoints that exist, and that are missing with parents."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    binds = (("/there/one", "one"), ("/there/file", "file"), ("/d/one", "one"),
             ("/d/two", "two"), ("/d/file", "file"), ("/d/e/f/one", "one"), ("/d/last", "file"))

    def config(document):
        document["mounts"] += [
            {"destination": path, "type": "bind", "source": str(tmp_path / name),
             "options": ["rbind", "ro"]} for path, name in binds
        ]

    bundle = make_bundle(tmp_path, config)
    (bundle.rootfs / "there/one").mkdir(parents=True)
    (bundle.rootfs / "there/file").touch()

    def build():
        done = []
        assembly = assemble._Assembly
        do_long = assembly.do_long

        def noted(self, calls, rest, attached):
            goes_on = do_long(self, calls, rest, attached)
            done.append(calls.steps[self.done - 1][0].origin)
            return goes_on

        monkeypatch.setattr(assembly, "do_long", noted)
        plan = plan_of(bundle)
        for _again in range(2):
            with sandboxfs.build(plan) as root:
                kinds = [kind for operation, kind, _detail in root.outcomes
                         if getattr(operation, "source", "").startswith(str(tmp_path))]
        return done, kinds

    done, kinds = in_namespace(build)
    first = len(bundle.document["mounts"]) - len(binds)
    assert [origin for origin in done if origin in
            {f"mounts[{number}]" for number in range(first, first + len(binds))}] == []
    assert kinds == ["bind"] * len(binds)


def test_no_directory_is_held_open_where_others_may_rename_it(tmp_path):
    """Neither in a bind's source nor in a rootfs without an overlay are mountpoints made ahead."""
    def config(document):
        document["mounts"] = [
            {"destination": path, "type": "bind", "source": str(tmp_path), "options": ["bind"]}
            for path in ("/d/one", "/v", "/v/in/two", "/v/three", "/d/e/four", "/link/../five")
        ]

    bundle = make_bundle(tmp_path, config)
    plan = plan_of(bundle)
    places = prepared_calls(plan).places
    assert {place.path for place in places} == {b"/", b"/d", b"/d/e"}
    plan = plan_of(bundle, overlay="none")
    assert prepared_calls(plan).places == []


def test_what_is_mounted_below_the_lower_is_seen_in_a_namespace_entered_meanwhile(tmp_path):
    """A plan that was built before, and in another mount namespace, whose table tells nothing."""
    bundle = make_bundle(tmp_path)
    (bundle.rootfs / "below").mkdir()

    def names(plan):
        with sandboxfs.build(plan) as root:
            return os.listdir(f"/proc/self/fd/{root.fd}/below")

    def build():
        plan = plan_of(bundle)
        assert names(plan) == []
        syscalls.unshare(abi.CLONE_NEWNS)
        for _again in range(2):
            assert names(plan) == []
        mount_tmpfs(bundle.rootfs / "below")
        (bundle.rootfs / "below/inside").touch()
        return names(plan)

    assert in_namespace(build, check_descriptors=False) == ["inside"]


def entry(name, length=24):
    """Return a struct linux_dirent64."""
    return struct.pack("=QQHB", 1, 1, length, 4) + name.ljust(length - 19, b"\0")


@pytest.mark.parametrize(("listed", "empty"), [
    ((entry(b"."), entry(b"..")), True),
    ((entry(b"."), entry(b".."), entry(b"a")), False),
    ((entry(b"a"), entry(b"b")), False),  # FUSE may leave the dots out
    ((entry(b"a name of some length", 48),), False),
])
def test_a_directory_is_empty_only_if_nothing_else_is_listed(listed, empty):
    reader, writer = os.pipe()
    os.write(writer, b"".join(listed))
    os.close(writer)
    buffer = foreign.string_buffer(256)
    found = calls.lists_nothing(READ, foreign.c_int(reader), buffer, 256)
    os.close(reader)
    assert (found == 0) is empty


def test_a_listing_that_comes_in_pieces_is_read_to_its_end():
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    there.send(entry(b".") + entry(b".."))
    there.send(entry(b"more"))
    buffer = foreign.string_buffer(256)
    assert calls.lists_nothing(READ, foreign.c_int(here.fileno()), buffer, 256) < 0
    here.close()
    there.close()


def test_a_root_that_is_closed_is_gone(tmp_path):
    bundle = make_bundle(tmp_path)

    def build():
        before = table()
        for _each in range(20):
            with sandboxfs.build(plan_of(bundle)) as root:
                assert root.fd >= 0
            assert root.fd == -1
        assert len(table()) == len(before)

    in_namespace(build)


def test_a_builder_that_is_killed_leaves_nothing(tmp_path):
    bundle = make_bundle(tmp_path)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            syscalls.unshare(abi.CLONE_NEWNS)
            root = sandboxfs.build(plan_of(bundle))
            os.write(writer, b"built" if root.fd >= 0 else b"not")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    with untouched(bundle.rootfs):
        assert os.read(reader, 5) == b"built"
        os.close(reader)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_roots_of_one_plan_share_no_file_system(tmp_path):
    """Not even the empty one that hides directories: who may remount it writes to it."""
    bundle = make_bundle(tmp_path)
    points = [tmp_path / f"point{number}" for number in range(4)]
    for point in points:
        point.mkdir()

    def build():
        plan = plan_of(bundle)
        for point in points:
            with sandboxfs.build(plan) as root:
                root.attach(point)
                root.verify()
        hiding = points[0] / "sys/firmware"
        # mount(2), as a payload with CAP_SYS_ADMIN may call it.
        assert ctypes.CDLL(None).mount(
            None, os.fsencode(hiding), None, MS_REMOUNT, b"nr_inodes=9,nr_blocks=9") == 0
        (hiding / "planted").write_text("x", "utf-8")
        with sandboxfs.build(plan) as root:
            root.attach(tmp_path / "last")
        return [os.listdir(point / "sys/firmware") for point in (*points, tmp_path / "last")]

    (tmp_path / "last").mkdir()
    assert in_namespace(build) == [["planted"], [], [], [], []]


def test_a_child_keeps_its_descriptors_whatever_its_parent_had_watched(tmp_path):
    """Numbers that were a watch's before the fork may be the child's own files by then."""
    bundle = make_bundle(tmp_path)
    secret = tmp_path / "secret"
    secret.mkdir()

    def in_child(plan, before):
        os.closerange(3, 100)
        mine = {}
        while len(mine) < len(before) + 20:
            fd = os.open(secret, os.O_RDONLY | os.O_DIRECTORY)
            mine[fd] = os.fstat(fd)
        for _again in range(2):
            with sandboxfs.build(plan) as root:
                assert os.listdir(f"/proc/self/fd/{root.fd}/sys/firmware") == []
        del plan
        gc.collect()
        assert {fd: os.fstat(fd) for fd in mine} == mine

    def build():
        plan = plan_of(bundle)
        for _again in range(3):
            sandboxfs.build(plan).close()
        before = os.listdir("/proc/self/fd")
        child = os.fork()
        if child == 0:
            status = 1
            try:
                in_child(plan, before)
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        with sandboxfs.build(plan) as root:
            return root.fd >= 0

    assert in_namespace(build)


def test_two_roots_are_built_side_by_side(tmp_path):
    bundles = [make_bundle(tmp_path, name=name) for name in ("one", "two")]
    for bundle in bundles:
        (bundle.rootfs / "which").write_text(bundle.path.name, "utf-8")

    def build():
        roots = [sandboxfs.build(plan_of(bundle)) for bundle in bundles]
        points = [tmp_path / f"point-{bundle.path.name}" for bundle in bundles]
        for root, point in zip(roots, points, strict=True):
            point.mkdir()
            root.attach(point)
        (points[0] / "etc/new").write_text("x", "utf-8")
        found = [(point / "which").read_text("utf-8") for point in points]
        assert not (points[1] / "etc/new").exists()
        for root in roots:
            root.close()
        return found

    assert in_namespace(build) == ["one", "two"]


def test_a_root_is_attached_on_a_link_itself_and_never_behind_it(tmp_path):
    bundle = make_bundle(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")

    def build():
        with sandboxfs.build(plan_of(bundle)) as root:
            with pytest.raises(MountError) as caught:
                root.attach(tmp_path / "link")
            assert caught.value.operation == "move_mount"
            with pytest.raises(MountError):
                root.attach(str(tmp_path / "link") + "/")
            assert os.listdir(tmp_path / "real") == []

    in_namespace(build)


def test_what_the_host_mounts_after_the_build_reaches_slave_binds_once_attached(tmp_path):
    """A fact of the kernel that forbids ready-made roots for such plans."""
    volume = tmp_path / "volume"
    volume.mkdir()

    def config(document):
        document["mounts"].append({"destination": "/v", "type": "bind", "source": str(volume),
                                   "options": ["rbind", "rslave"]})

    bundle = make_bundle(tmp_path, config)
    point = tmp_path / "point"
    point.mkdir()

    def build():
        mount_tmpfs(volume)
        (volume / "late").mkdir()
        (volume / "later").mkdir()
        set_propagation(abi.MS_SHARED)
        root = sandboxfs.build(plan_of(bundle))
        mount_tmpfs(volume / "late")
        root.attach(point)
        mount_tmpfs(volume / "later")
        points = [each.mountpoint for each in table()]
        root.close()
        return [os.fsencode(point / "v" / name) in points for name in ("late", "later")]

    assert in_namespace(build) == [False, True]


def test_the_engine_is_found_by_trying(tmp_path):
    bundle = make_bundle(tmp_path)

    def build():
        plan = plan_of(bundle)
        plan.engine = "auto"
        with sandboxfs.build(plan) as root:
            return root.engine.name

    assert in_namespace(build) == "detached"


# -- images that tools of the distribution make --------------------------------------------


def _image(kind, tree, path):
    if kind == "erofs":
        command = ["mkfs.erofs", "--quiet", str(path), str(tree)]
    else:
        command = ["mksquashfs", str(tree), str(path), "-quiet", "-no-progress"]
    subprocess.run(command, check=True, capture_output=True)
    return path


def _loops(path):
    """Return how many loop devices lie over a file."""
    return sum(
        Path(found).read_text("utf-8", "replace").strip() == str(path)
        for found in glob.glob("/sys/block/loop*/loop/backing_file")
    )


@pytest.mark.parametrize(
    ("kind", "loops"),
    [
        pytest.param("erofs", 0, marks=pytest.mark.needs("mkfs.erofs", "erofs-file")),
        pytest.param("squashfs", 1, marks=pytest.mark.needs("mksquashfs", "squashfs")),
    ],
)
def test_an_image_of_a_whole_root_shows_what_it_was_made_of(kind, loops, tmp_path, public_path):
    bundle = make_bundle(tmp_path)
    many = bundle.rootfs / "many"
    many.mkdir()
    for number in range(300):
        (many / f"file {number}").write_bytes(os.urandom(number * 7))
    os.setxattr(many, "user.note", b"kept")
    image = _image(kind, bundle.rootfs, public_path / f"root.{kind}")
    bundle.document["root"]["path"] = str(image)
    bundle.write(bundle.document)
    point = tmp_path / "point"
    point.mkdir()

    def build():
        with sandboxfs.build(plan_of(bundle)) as root:
            meanwhile = _loops(image)
            root.attach(point)
            same = all(
                (point / "many" / path.name).read_bytes() == path.read_bytes()
                for path in many.iterdir()
            )
            (point / "many/new").write_text("x", "utf-8")
            return same, len(os.listdir(point / "many")), meanwhile

    with untouched(image.parent):
        assert in_namespace(build) == (True, 301, loops)


@pytest.mark.needs("mkfs.erofs", "erofs-loop")
def test_an_image_on_tmpfs_is_mounted_one_way_or_the_other(tmp_path):
    """EROFS on a file of tmpfs is refused by some kernels: a loop device is the fallback."""
    bundle = make_bundle(tmp_path)
    bundle.document["root"]["path"] = "/run/root.erofs"
    bundle.write(bundle.document)

    def build():
        mount_tmpfs("/run")
        _image("erofs", bundle.rootfs, "/run/root.erofs")
        with sandboxfs.build(plan_of(bundle)) as root:
            point = tmp_path / "point"
            point.mkdir()
            root.attach(point)
            return (point / "bin/busybox").stat().st_size

    assert in_namespace(build) == (bundle.rootfs / "bin/busybox").stat().st_size


# -- the table itself ----------------------------------------------------------------------


def test_a_tree_of_two_hundred_mounts_is_read_back_as_planned(tmp_path):
    def config(document):
        document["mounts"] = [
            {"destination": f"/m/{number}", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "ro" if number % 2 else "rw"]}
            for number in range(200)
        ]

    bundle = make_bundle(tmp_path, config)
    point = tmp_path / "point"
    point.mkdir()

    def build():
        with sandboxfs.build(plan_of(bundle, tmp="keep")) as root:
            root.attach(point)
            prefix = os.fsencode(point) + b"/m/"
            return {
                int(each.mountpoint[len(prefix):]): bool(each.attributes & abi.MOUNT_ATTR_RDONLY)
                for each in mounttable.read() if each.mountpoint.startswith(prefix)
            }

    assert in_namespace(build) == {number: bool(number % 2) for number in range(200)}


def test_an_acl_that_the_rootfs_gets_between_two_builds_is_kept(tmp_path, monkeypatch):
    """Not asked for again where the directory hasn't changed for some time."""
    # acl(5) as an xattr: version 2, then (tag, permissions, id); user 1234 may do all.
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", *entry) for entry in (
            (0x01, 7, 0xFFFFFFFF), (0x02, 7, 1234), (0x04, 5, 0xFFFFFFFF),
            (0x10, 7, 0xFFFFFFFF), (0x20, 5, 0xFFFFFFFF))
    )
    monkeypatch.setattr(usual, "_LONG_AGO", -5)
    bundle = make_bundle(tmp_path)

    def names(plan):
        with sandboxfs.build(plan) as root:
            return os.listxattr(f"/proc/self/fd/{root.fd}")

    def build():
        plan = plan_of(bundle)
        assert names(plan) == names(plan) == []
        assert plan.compiled.usual[0].bare
        os.setxattr(bundle.rootfs, "system.posix_acl_access", acl)
        os.chmod(bundle.rootfs, 0o755)
        return names(plan)

    assert in_namespace(build) == ["system.posix_acl_access"]


def test_what_was_changed_just_now_is_asked_for_again(tmp_path):
    bundle = make_bundle(tmp_path)

    def build():
        plan = plan_of(bundle)
        for _again in range(2):
            sandboxfs.build(plan).close()
        return plan.compiled.usual[0].bare

    assert in_namespace(build) is None
