"""The mount table of the real kernel, read both ways, in private namespaces."""

import contextlib
import os
import signal

import pytest

from sandboxfs.kernel import (
    abi,
    fscontext,
    mountinfo,
    mounttable,
    submount_records,
    submounts,
    syscalls,
)
from tests.support.host import attach, bind, mount_tmpfs
from tests.support.namespace import in_namespace

pytestmark = pytest.mark.needs("root")

AWKWARD = [b"plain", b"with space", b"with\nnewline", b"tab\tback\\slash", b"\xff\xfe", b"a\\040b"]


def stage(path):
    """A tmpfs of the test's own, in its own namespace."""
    mount_tmpfs(path)
    return os.fsencode(path)


@contextlib.contextmanager
def opened(path):
    descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def mounted(path, attributes=0):
    os.makedirs(path, exist_ok=True)
    mount_tmpfs(path, attributes=attributes)


def set_on(path, **attributes):
    with opened(path) as descriptor:
        syscalls.mount_setattr(descriptor, **attributes)


def below(path):
    with opened(path) as descriptor:
        return submounts.below(descriptor)


def points_below(path, **more):
    with opened(path) as descriptor:
        return [record.mountpoint for record in submounts.below(descriptor, **more)]


def by_mountinfo(path):
    """What `below` answers on a kernel without listmount."""
    with opened(path) as descriptor:
        number, is_root = syscalls.mount_id(descriptor)
        brief = mounttable.Statmount().read(number, mounttable.STATMOUNT_MNT_BASIC)
        old = mounttable.record_of(brief).old_id
        records = submount_records.by_mountinfo(descriptor, old, is_root)
    return [record.mountpoint for record in records]


def test_both_readers_tell_the_same(tmp_path):
    def check():
        base = stage(tmp_path)
        for position, name in enumerate(AWKWARD):
            mounted(base + b"/" + name, attributes=1 if position % 2 else 6)
        os.mkdir(base + b"/bound")
        os.makedirs(base + b"/plain dir")
        bind(base + b"/plain dir", base + b"/bound")
        set_on(base + b"/bound", propagation=abi.MS_SHARED)
        os.mkdir(base + b"/slave")
        bind(base + b"/bound", base + b"/slave")
        set_on(base + b"/slave", propagation=abi.MS_SLAVE)
        set_on(base, attr_set=abi.MOUNT_ATTR_NOATIME, attr_clr=abi.MOUNT_ATTR__ATIME)
        listed = {record.old_id: record for record in mounttable.by_listmount()}
        told = {
            record.id: record
            for record in mountinfo.of_process()
        }
        assert listed.keys() == told.keys()
        for number, record in listed.items():
            assert record.id >= mounttable.FIRST_UNIQUE_ID
            for field in set(mountinfo.MountRecord.__slots__) - {"id", "parent_id"}:
                assert getattr(record, field) == getattr(told[number], field), field
        by_point = {record.mountpoint: record for record in listed.values()}
        assert by_point[base].attributes == abi.MOUNT_ATTR_NOATIME
        assert by_point[base + b"/bound"].root == b"/plain dir"
        assert by_point[base + b"/bound"].propagation == abi.MS_SHARED
        assert by_point[base + b"/slave"].propagation == abi.MS_SLAVE
        assert by_point[base + b"/slave"].master == by_point[base + b"/bound"].peer_group
        for name in AWKWARD:
            assert base + b"/" + name in by_point

    in_namespace(check)


@pytest.mark.parametrize("own_mount", [True, False])
def test_below_finds_awkward_paths_and_only_those_below(tmp_path, own_mount):
    def check():
        base = stage(tmp_path)
        root = base + b"/ro ot"
        os.mkdir(root)
        if own_mount:
            mounted(root)
        mounted(base + b"/ro ot2/outside")
        assert points_below(root) == []
        for name in AWKWARD:
            mounted(root + b"/" + name)
        mounted(root + b"/plain/deep")
        assert sorted(points_below(root)) == sorted([*AWKWARD, b"plain/deep"])
        assert sorted(by_mountinfo(root)) == sorted([*AWKWARD, b"plain/deep"])
        assert len(points_below(root, limit=2)) == 2

    in_namespace(check)


@pytest.mark.parametrize("own_mount", [True, False])
def test_below_sees_stacks_hidden_mounts_and_what_covers_the_directory(tmp_path, own_mount):
    def check():
        base = stage(tmp_path)
        root = base + b"/root"
        os.mkdir(root)
        if own_mount:
            mounted(root)
        mounted(root + b"/x")
        mounted(root + b"/x/hidden")
        mounted(root + b"/x")
        with opened(root) as held:
            mounted(root)
            mounted(root + b"/on top")
            records = submounts.below(held)
        assert [record.mountpoint for record in records] == [
            b"x", b"x/hidden", b"x", b"", b"on top",
        ]
        assert records[2].parent_id == records[0].id
        # Through the path the covering mount is reached, and only what is on that one.
        assert points_below(root) == [b"on top"]

    in_namespace(check)


def test_a_mount_moved_below_a_younger_one_comes_after_it(tmp_path):
    def check():
        base = stage(tmp_path)
        mounted(base + b"/old")
        mounted(base + b"/young")
        os.mkdir(base + b"/young/place")
        attach(syscalls.open_tree(abi.AT_FDCWD, base + b"/old", 0), base + b"/young/place")
        assert points_below(base) == [b"young", b"young/place"]
        ids = [record.id for record in below(base)]
        assert ids[0] > ids[1]

    in_namespace(check)


def test_below_a_bind_whose_root_is_no_file_systems_root(tmp_path):
    def check():
        base = stage(tmp_path)
        mounted(base + b"/tree/sub/inner")
        os.mkdir(base + b"/view")
        bind(base + b"/tree/sub", base + b"/view", recursive=True)
        (record,) = below(base + b"/view")
        assert (record.mountpoint, record.type) == (b"inner", b"tmpfs")
        assert points_below(base + b"/tree") == [b"sub/inner"]

    in_namespace(check)


@pytest.mark.parametrize("user", [0, 65534])
@pytest.mark.parametrize("jail_is_mount", [True, False])
def test_below_when_the_process_is_chrooted(tmp_path, jail_is_mount, user):
    def check():
        base = stage(tmp_path)
        os.chmod(base, 0o755)
        jail = base + b"/jail"
        os.mkdir(jail)
        if jail_is_mount:
            mounted(jail)
        mounted(jail + b"/root/inner")
        mounted(jail + b"/own")
        mounted(jail + b"/own/deep")
        mounted(base + b"/root/outside")
        os.mkdir(jail + b"/proc")
        attach(fscontext.create(b"proc", [], 0), jail + b"/proc")
        with opened(base + b"/root") as outside:
            os.chroot(jail)
            os.chdir("/")
            os.setresuid(user, user, user)
            assert points_below(b"/root") == [b"inner"]
            assert points_below(b"/own") == [b"deep"]
            with pytest.raises(OSError, match=r"outside of the root|not permitted"):
                submounts.below(outside)

    in_namespace(check)


def test_below_a_detached_tree_is_an_error_and_no_empty_answer(tmp_path):
    def check():
        base = stage(tmp_path)
        mounted(base + b"/inner")
        flags = abi.OPEN_TREE_CLONE | abi.AT_RECURSIVE
        clone = syscalls.open_tree(abi.AT_FDCWD, base, flags)
        with pytest.raises(FileNotFoundError):
            submounts.below(clone)
        os.close(clone)

    in_namespace(check)


def test_a_busy_table_is_answered_by_a_child_with_the_same_words(tmp_path):
    def check():
        base = stage(tmp_path)
        for number in range(submounts.MANY_MOUNTS):
            mounted(base + b"/busy/%d" % number)
        mounted(base + b"/root/inner")
        with opened(base + b"/root") as held:
            mounted(base + b"/root")
            assert [record.mountpoint for record in submounts.below(held)] == [b"inner", b""]
            by_child = submount_records._ids_seen_from(held)
            assert [record.id for record in submounts.below(held)] == by_child
            # Who may not chroot asks for every path instead.
            os.setresuid(65534, 65534, 65534)
            assert submount_records._ids_seen_from(held) is None
            assert [record.id for record in submounts.below(held)] == by_child

    in_namespace(check)


def test_the_table_of_another_process():
    def check():
        table = mounttable.read(os.getpid())
        assert [record.mountpoint for record in table] == [
            record.mountpoint for record in mounttable.read()
        ]
        return [(record.mountpoint, record.type) for record in table]

    assert in_namespace(check)[0][0] == b"/"


@contextlib.contextmanager
def chrooted_child(root):
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.chroot(root)
        os.write(told, b"x")
        signal.pause()
    os.read(ready, 1)
    os.close(ready)
    os.close(told)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_another_process_in_a_root_of_its_own_is_read_from_that_root(tmp_path):
    def check():
        base = stage(tmp_path)
        mounted(base + b"/jail/inner")
        with chrooted_child(base + b"/jail") as child:
            return [record.mountpoint for record in mounttable.read(child)]

    assert in_namespace(check) == [b"/inner"]


def test_a_process_that_is_not_there():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(ProcessLookupError, match=str(child)):
        mounttable.read(child)
