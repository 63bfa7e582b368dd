"""`mounts` all at once and entry by entry: the same entries, the same faults."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandboxfs.errors import SpecError
from sandboxfs.spec import check, check_mounts, values
from sandboxfs.spec.model import Mount

LONG = "x" * 64
PATHS = st.one_of(
    st.sampled_from([
        "/data/1", "/data/2", "/data/1/", "/a/.b", "/a/./b", "/a/../b", "/..", "//", "/", "", ".",
        "./a", "data", "a/", "/proc", "/proc/cpuinfo", "/proc/1", "/a\0b", "\0", "/" + "x" * 255,
        "/" + "x" * 256, "/" + "é" * 127, "/" + "é" * 128, "/\udcff" * 40, "/" + LONG * 3,
        ("/" + LONG) * 62, ("/" + LONG) * 64,
    ]),
    st.text(st.sampled_from("/.a\0"), max_size=6),
)
WORDS = st.lists(
    st.sampled_from(["bind", "rbind", "ro", "nosuid", "remount", "size=1", "é", "", "a\0"]),
    max_size=3,
)
OTHERS = st.sampled_from([None, True, 0, 1.5, [], {}, "", "x", ["ro", 1], ["ro", []], ["ro", {}]])
ENTRY = st.fixed_dictionaries(
    {"destination": PATHS},
    optional={"type": st.sampled_from(["bind", "tmpfs", "", "proc", "b\0"]), "source": PATHS,
              "options": WORDS},
)
MAPPING = [{"containerID": 0, "hostID": 1000, "size": 1}]
KEYS = st.sampled_from([
    "destination", "type", "source", "options", "uidMappings", "gidMappings", "Source", "x", "",
])


@st.composite
def lists_of_mounts(draw):
    """Long lists of alike entries, with some unlike, and some of which no entry is made."""
    usual = {"destination": "/data", "type": "bind", "source": "/src", "options": ["rbind", "ro"]}
    entries = [dict(usual) for _ in range(draw(st.integers(0, 4)))]
    entries += draw(st.lists(ENTRY, max_size=3))
    for _ in range(draw(st.integers(0, 2)) if entries else 0):
        index = draw(st.integers(0, len(entries) - 1))
        if isinstance(entries[index], dict):
            entries[index][draw(KEYS)] = draw(st.one_of(OTHERS, PATHS, WORDS, st.just(MAPPING)))
        if draw(st.integers(0, 9)) == 0:
            entries[index] = draw(OTHERS)
    return draw(st.permutations(entries))


def fields(mount):
    """Return the fields of a `Mount`, mappings as tuples."""
    return [tuple(value) if isinstance(value, list) else value
            for value in (getattr(mount, name) for name in Mount.__slots__)]


def one_by_one(entries):
    """Return the fields of all entries, or the fault that is told."""
    try:
        found = values.each(entries, "/mounts", check_mounts._mount, None)
    except SpecError as error:
        return error.line()
    return [fields(mount) for mount in found]


@settings(max_examples=3000)
@given(lists_of_mounts())
def test_all_at_once_is_what_one_by_one_is(entries):
    found = check_mounts._all_at_once(entries)
    if found is not None:
        assert [fields(mount) for mount in found] == one_by_one(entries)


@given(lists_of_mounts())
def test_the_fault_is_that_of_the_entry(entries):
    told = one_by_one(entries)
    document = {"ociVersion": "1.0.2", "mounts": entries}
    if isinstance(told, str):
        with pytest.raises(SpecError) as caught:
            check.read(document)
        assert caught.value.line() == told
    else:
        assert [fields(mount) for mount in check.read(document).mounts] == told


@pytest.mark.parametrize("change", [
    {}, {"source": "/" + "x" * 255}, {"destination": "/a/.b"}, {"destination": "data"},
    {"destination": "/data/"}, {"destination": "/" + "é" * 127}, {"options": []}, {"type": ""},
])
@pytest.mark.parametrize("without", [None, "type", "source", "options"])
def test_what_is_usual_is_taken_at_once(change, without):
    """Or nothing is compared above."""
    usual = {"destination": "/data", "type": "bind", "source": "/src", "options": ["rbind", "ro"]}
    entries = [usual, {**usual, **change}]
    entries[0] = {key: value for key, value in entries[0].items() if key != without}
    found = check_mounts._all_at_once(entries)
    assert [fields(mount) for mount in found] == one_by_one(entries)


def test_the_same_words_are_one_object():
    """What depends on nothing but the words is found once for all that have them."""
    entries = [{"destination": f"/{number}", "options": ["rbind", "ro"]} for number in range(9)]
    found = check.read({"ociVersion": "1.0.2", "mounts": entries}).mounts
    assert len({id(mount.options) for mount in found}) == 1
