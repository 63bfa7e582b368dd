"""The parser of mountinfo, and what is derived from a table."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxfs.kernel import abi, mountinfo, mounttable, submounts

LINE = (
    b"36 35 98:0 /mnt1 /mnt2 ro,noatime,nodiratime shared:7 master:3 propagate_from:2"
    b" - fuse.sshfs me@host:/x rw,lowerdir=a\\054b,x=y z"
)


def line(number, parent, mountpoint, words=b"rw,relatime", optional=b""):
    return b"%d %d 0:1 / %s %s%s - tmpfs none rw\n" % (
        number, parent, submounts.escape(mountpoint), words, optional,
    )


def table(*lines):
    return mounttable.parents_first(mountinfo.parse(b"".join(lines)))


def test_every_field_of_a_line_is_read():
    (record,) = mountinfo.parse(LINE)
    assert (record.id, record.parent_id, record.device) == (36, 35, (98, 0))
    assert (record.root, record.mountpoint) == (b"/mnt1", b"/mnt2")
    assert record.attributes == (
        abi.MOUNT_ATTR_RDONLY | abi.MOUNT_ATTR_NOATIME | abi.MOUNT_ATTR_NODIRATIME
    )
    assert record.propagation == abi.MS_SHARED | abi.MS_SLAVE
    assert (record.peer_group, record.master) == (7, 3)
    assert (record.type, record.source) == (b"fuse.sshfs", b"me@host:/x")
    # The file system's own escapes stay: only it knows what a comma in a value means.
    assert record.superblock_options == b"rw,lowerdir=a\\054b,x=y z"


@pytest.mark.parametrize(
    ("words", "attributes"),
    [
        (b"rw,relatime", 0),
        (b"rw", abi.MOUNT_ATTR_STRICTATIME),
        (b"rw,nodiratime", abi.MOUNT_ATTR_STRICTATIME | abi.MOUNT_ATTR_NODIRATIME),
        (b"rw,nodiratime,relatime", abi.MOUNT_ATTR_NODIRATIME),
        (b"rw,noatime", abi.MOUNT_ATTR_NOATIME),
        (b"ro,nosuid,nodev,noexec,relatime,nosymfollow,idmapped", 0x30000F),
    ],
)
def test_words_become_attributes(words, attributes):
    (record,) = table(line(2, 1, b"/x", words))
    assert record.attributes == attributes


@pytest.mark.parametrize(
    ("optional", "propagation"),
    [
        (b"", abi.MS_PRIVATE),
        (b" unbindable", abi.MS_UNBINDABLE),
        (b" master:4", abi.MS_SLAVE),
        (b" new_in_2040:1", abi.MS_PRIVATE),
    ],
)
def test_optional_fields_become_propagation(optional, propagation):
    (record,) = table(line(2, 1, b"/x", optional=optional))
    assert record.propagation == propagation


def test_an_empty_source_stays_a_field():
    (record,) = mountinfo.parse(b"2 1 0:1 / /x rw,relatime - tmpfs  rw,size=4k\n")
    assert (record.source, record.superblock_options) == (b"", b"rw,size=4k")


@pytest.mark.parametrize("wrong", [b"nonsense", b"1 2 3:4 / / rw", b"x 1 0:1 / / rw - t s rw"])
def test_a_line_of_something_else_is_an_error(wrong):
    with pytest.raises(ValueError, match="not a line of mountinfo"):
        mountinfo.parse(wrong)


@given(st.binary().filter(lambda path: b"\0" not in path))
def test_escapes_round_trip(path):
    escaped = submounts.escape(path)
    assert not set(escaped) & set(b" \t\n")
    assert mountinfo.unescape(escaped) == path


@given(st.lists(st.binary(min_size=1).filter(lambda path: b"\0" not in path), max_size=5))
def test_any_path_comes_back_from_a_table(paths):
    text = b"".join(line(number + 2, 1, b"/" + path) for number, path in enumerate(paths))
    assert [record.mountpoint for record in table(text)] == [b"/" + path for path in paths]


@given(st.permutations(range(2, 12)), st.data())
def test_parents_come_first_and_nothing_is_lost(numbers, data):
    parents = {}
    for position, number in enumerate(numbers):
        parents[number] = data.draw(st.sampled_from([1, *numbers[:position]]))
    order = data.draw(st.permutations(numbers))
    records = table(*(line(number, parents[number], b"/x") for number in order))
    seen = {1}
    for record in records:
        assert record.parent_id in seen
        seen.add(record.id)
    assert seen == {1, *numbers}


def test_what_is_covered_is_hidden():
    records = table(
        line(10, 1, b"/"),
        line(11, 10, b"/a"),
        line(12, 11, b"/a/inner"),
        line(13, 11, b"/a"),        # covers 11, and 12 with it
        line(14, 13, b"/a/inner"),  # on the cover: seen
        line(15, 10, b"/b/c"),
        line(16, 10, b"/b"),        # covers 15, which is on the same mount
        line(17, 15, b"/b/c/d"),
        line(18, 10, b"/bc"),
    )
    assert mounttable.hidden(records) == {11, 12, 15, 17}
    assert mounttable.stacking(records)[13] == 1
    assert mounttable.stacking(records)[14] == 0


def test_a_mount_on_the_readers_root_is_what_is_hidden():
    records = table(line(10, 1, b"/"), line(11, 10, b"/"), line(12, 11, b"/x"), line(13, 10, b"/y"))
    assert mounttable.hidden(records) == {11, 12}
