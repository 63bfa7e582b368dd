"""Long lists of mounts: what is found once for many is what is found for each."""

import json
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandboxfs.errors import SpecError
from sandboxfs.kernel import abi
from sandboxfs.kernel import system as os
from sandboxfs.plan import from_spec, survey
from sandboxfs.plan.operations import Bind
from sandboxfs.spec import load, values

DESTINATIONS = st.sampled_from([
    "/data", "/data/1", "/data/1/2", "/data/2", "/data/", "//data", "/data/./1", "data/3", "/dev",
    "/dev/null", "/tmp", "/tmp/x", "/tmpx", "/data/1/../4", "/sys", "/sys/fs", "/.x", "/..",
])
WORDS = st.sampled_from([
    [], ["rbind"], ["rbind", "ro"], ["bind", "rro"], ["rbind", "shared"], ["rbind", "rslave"],
    ["rbind", "noatime", "nodev"], ["remount", "ro", "bind"], ["remount", "shared"], ["silent"],
    ["rbind", "mand"], ["rbind", "size=1"], ["rbind", "tmpcopyup"], ["rbind", "idmap"],
    ["bind", "dest-nofollow"], ["bind", "copy-symlink", "src-nofollow"], ["mode=755"], ["ro"],
])
ENTRY = st.fixed_dictionaries(
    {"destination": DESTINATIONS, "options": WORDS},
    optional={"type": st.sampled_from(["bind", "tmpfs", "sysfs", "cgroup"]),
              "source": st.sampled_from(["/src", "src", "volume"])},
)
ANNOTATIONS = st.sampled_from([
    {}, {}, {}, {"dev.sandboxfs.overlay.binds": "true"}, {"dev.sandboxfs.tmp": "keep"},
    {f"dev.sandboxfs.mount.v.{key}": value for key, value in (
        ("source", "volume"), ("type", "tmpfs"), ("share", "container"))},
])


def spec(mounts, annotations):
    document = {
        "ociVersion": "1.0.2", "root": {"path": "/rootfs"}, "mounts": mounts,
        "process": {"args": ["/bin/true"], "cwd": "/"}, "annotations": annotations,
        "linux": {"namespaces": [{"type": "mount"}]},
    }
    return load.load("/bundle", text=json.dumps(document), brief=True)


def planned(loaded):
    """Return the plan as JSON, or the fault that is told."""
    try:
        return from_spec.plan(loaded, survey.Facts()).to_json()
    except SpecError as error:
        return error.line()


@settings(max_examples=1500)
@given(st.lists(ENTRY, max_size=8), ANNOTATIONS)
def test_the_plan_is_that_of_each_mount_by_itself(mounts, annotations):
    try:
        loaded = spec(mounts, annotations)
    except SpecError:
        return
    with mock.patch.object(from_spec.Planner, "is_usual_bind", return_value=False):
        one_by_one = planned(loaded)
    assert planned(loaded) == one_by_one


@settings(max_examples=500)
@given(st.lists(ENTRY, max_size=8))
def test_what_lies_below_a_mount_that_may_be_read_only(mounts):
    try:
        plan = from_spec.plan(spec(mounts, {}), survey.Facts())
    except SpecError:
        return
    placed = [step for step in plan if hasattr(step, "destination")]
    wanted = dict.fromkeys(placed, ())
    for number, step in enumerate(placed):
        path = os.path.normpath("/" + step.destination.lstrip("/"))
        above = path
        while above != "/":
            above = os.path.dirname(above)
            under = [
                each for each in placed[:number] if may_be_read_only(each)
                and os.path.normpath("/" + each.destination.lstrip("/")) == above
            ]
            if under:
                wanted[under[-1]] += (path[len(above) + 1:],)
                break
    assert {step: tuple(step.nested) for step in placed} == wanted


def may_be_read_only(step):
    attributes = step.attributes | getattr(step, "tree_attributes", 0)
    return isinstance(step, Bind) or attributes & abi.MOUNT_ATTR_RDONLY


@pytest.mark.parametrize("path", [
    "/data", "/data/1", "/", "//", "/a//b", "/a/", "a", "", ".", "..", "/..", "/a/.", "/a/./b",
    "/a/../b", "/.a", "/a/.b", "/a/..b", "./a",
])
def test_clean_paths(path):
    plain = os.path.normpath("/" + path.lstrip("/"))
    assert from_spec.cleaned(path) == plain
    assert values.are_clean(values.enclosed(["/x", path, "/y"])) == (path == plain != "/")


def test_the_words_of_many_binds_are_parsed_once(monkeypatch):
    mounts = [{"destination": f"/data/{number}", "source": "/src", "options": ["rbind", "ro"]}
              for number in range(100)]
    loaded = spec(mounts, {})
    asked = []
    parse = from_spec.option_words.parse
    monkeypatch.setattr(
        from_spec.option_words, "parse", lambda *words: asked.append(words) or parse(*words))
    assert len(from_spec.plan(loaded, survey.Facts())) > 100
    assert len(asked) == 1
