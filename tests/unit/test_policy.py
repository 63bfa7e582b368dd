"""The operator's policy: what it makes of a spec, and what it refuses."""

import pytest

from sandboxfs import policy
from sandboxfs.errors import SpecError
from sandboxfs.policy import Policy, in_bytes
from sandboxfs.spec import load

GVISOR = "dev.gvisor.spec.mount.cache."
OWN = "dev.sandboxfs."


def spec_with(annotations, memory_limit=None):
    document = {"ociVersion": "1.0.2", "root": {"path": "rootfs"}, "annotations": annotations}
    if memory_limit is not None:
        document["linux"] = {"resources": {"memory": {"limit": memory_limit}}}
    return load.from_document(document, "/bundle")


def hint(options=None, type="tmpfs", share="pod", prefix=GVISOR):
    fields = {"source": "/v", "type": type, "share": share}
    if options is not None:
        fields["options"] = options
    return {prefix + field: value for field, value in fields.items()}


def refused(rules, spec):
    with pytest.raises(SpecError) as caught:
        rules.apply(spec)
    return caught.value.problems


def test_without_a_file_the_overlay_is_a_tmpfs_of_the_plans_size():
    spec = spec_with({})
    Policy().apply(spec)
    assert spec.overrides.overlay == "tmpfs"
    assert spec.overrides.overlay_size is None
    assert spec.warnings == []


def test_the_operators_mode_and_size_are_for_containers_that_dont_say():
    rules = Policy()
    rules.overlay, rules.overlay_size = "none", "4096"
    spec = spec_with({})
    rules.apply(spec)
    assert (spec.overrides.overlay, spec.overrides.overlay_size) == ("none", None)
    rules.overlay = "tmpfs"
    spec = spec_with({OWN + "overlay": "none"})
    rules.apply(spec)
    assert (spec.overrides.overlay, spec.overrides.overlay_size) == ("none", None)
    spec = spec_with({OWN + "overlay": "tmpfs"})
    rules.apply(spec)
    assert spec.overrides.overlay_size == "4096"
    spec = spec_with({OWN + "overlay.size": "1K"})
    rules.apply(spec)
    assert spec.overrides.overlay_size == "1024"


def test_an_overlay_above_its_cap_is_refused_and_both_sizes_are_named():
    rules = Policy()
    rules.overlay_cap_text = "1G"
    rules.path, rules.given = "/etc/sandboxfs/config.toml", ("overlay.cap",)
    (problem,) = refused(rules, spec_with({OWN + "overlay.size": "2G"}))
    assert problem.line() == ("/annotations/dev.sandboxfs.overlay.size: size=2147483648: "
                              "an overlay of 2G is above the cap of 1G")
    assert problem.hint == "the cap is /etc/sandboxfs/config.toml: overlay.cap"
    rules.apply(spec_with({OWN + "overlay.size": "1G"}))


@pytest.mark.parametrize(("limit", "size"), [
    (None, str(1 << 30)), (-1, str(1 << 30)), (1 << 40, str(1 << 30)), (1 << 30, None),
])
def test_a_cap_holds_for_overlays_whose_size_nobody_says(limit, size):
    """The plan takes half of the memory limit, where that is less."""
    rules = Policy()
    rules.overlay_cap_text = "1G"
    spec = spec_with({}, limit)
    rules.apply(spec)
    assert spec.overrides.overlay_size == size


@pytest.mark.parametrize("cap", ["1G", "50%", None])
def test_a_hint_without_a_size_gets_the_operators(cap):
    rules = Policy()
    rules.hint_size, rules.hint_cap_text = "16M", cap
    for share in ("pod", "container"):
        spec = spec_with(hint("ro,noexec", share=share))
        rules.apply(spec)
        assert spec.hints[0].options == ["ro", "noexec", f"size={16 << 20}"]


@pytest.mark.parametrize("fields", [{"type": "bind"}, {"share": "shared"}])
def test_hints_that_change_no_mount_have_no_size(fields):
    spec = spec_with(hint("size=100T", **fields))
    Policy().apply(spec)
    assert spec.hints[0].options == [f"size={100 << 40}"]


@pytest.mark.parametrize(("cap", "asked", "said"), [
    ("1G", "2G", "of 2G is above the cap of 1G"),
    ("1G", str((1 << 30) + 1), "of 1073741825 bytes is above the cap of 1G"),
    ("64K", "100%", "of 100% of memory ({all}) is above the cap of 64K"),
    ("50%", "51%", "of 51% of memory ({some}) is above the cap of 50% of memory ({half})"),
    ("1%", "1T", "of 1T is above the cap of 1% of memory ("),
])
@pytest.mark.parametrize("prefix", [GVISOR, OWN + "mount.cache."])
def test_a_hint_above_the_cap_is_refused_and_both_sizes_are_named(cap, asked, said, prefix):
    rules = Policy()
    rules.hint_cap_text = cap
    (problem,) = refused(rules, spec_with(hint(f"mode=700,size={asked}", prefix=prefix)))
    assert problem.origin == f"/annotations/{prefix}options"
    amounts = {name: policy._shown(str(in_bytes(size)))
               for name, size in (("all", "100%"), ("some", "51%"), ("half", "50%"))}
    assert "the volume of hint cache " + said.format(**amounts) in problem.text


@pytest.mark.parametrize(("cap", "asked"), [
    ("1G", "1G"), ("50%", "50%"), ("50%", "1%"), (None, "100%"), ("100%", "64K"),
])
def test_a_hint_within_the_cap_keeps_its_size(cap, asked):
    rules = Policy()
    rules.hint_cap_text = cap
    spec = spec_with(hint(f"size={asked}"))
    before = list(spec.hints[0].options)
    rules.apply(spec)
    assert spec.hints[0].options == before


def test_no_hint_is_larger_than_half_of_memory_where_the_operator_says_nothing():
    (problem,) = refused(Policy(), spec_with(hint("size=51%")))
    assert problem.hint == ("the cap is the default policy "
                            "(there is no /etc/sandboxfs/config.toml)")


@pytest.mark.parametrize(("key", "value", "path"), [
    ("overlay", "dir=/var/tmp", "/var/tmp"),
    ("overlay", "dir=here:keep", "/bundle/here"),
    ("lower", "/usr", "/usr"),
    ("lower.1", "/srv/image", "/srv/image"),
])
def test_host_paths_are_refused_unless_allowed(key, value, path):
    rules = Policy()
    (problem,) = refused(rules, spec_with({OWN + key: value}))
    assert problem.origin == f"/annotations/{OWN}{key}"
    assert problem.target == path
    assert "path of the host" in problem.text
    assert "annotations.host-paths = true in /etc/sandboxfs/config.toml" in problem.hint
    rules.host_paths = True
    spec = spec_with({OWN + key: value})
    rules.apply(spec)
    assert path in (spec.overrides.overlay_path, *spec.overrides.lowers)


def test_every_problem_is_reported_at_once():
    problems = refused(Policy(), spec_with({
        OWN + "overlay": "dir=/a", OWN + "lower": "/b", OWN + "lower.1": "/c", **hint("size=1000T"),
    }))
    assert [problem.target for problem in problems] == ["/a", "/b", "/c", f"size={1000 << 40}"]


FAMILIES = {
    OWN + "overlay": {OWN + "overlay": "none"},
    OWN + "overlay.size": {OWN + "overlay.size": "5"},
    OWN + "overlay.binds": {OWN + "overlay.binds": "true"},
    OWN + "tmp": {OWN + "tmp": "keep"},
    OWN + "engine": {OWN + "engine": "attached"},
    OWN + "lower": {OWN + "lower": "/x", OWN + "lower.1": "/y"},
    OWN + "pod": {OWN + "pod": "p"},
    OWN + "mount": hint(prefix=OWN + "mount.cache."),
    "dev.gvisor.spec.mount": hint(prefix="dev.gvisor.spec.mount.other.") | {
        "dev.gvisor.spec.mount.other.source": "/w"},
}


@pytest.mark.parametrize("family", policy.ANNOTATIONS)
def test_what_isnt_honoured_is_taken_out_with_a_warning_and_nothing_else_is(family):
    everything = {name: value for entry in FAMILIES.values() for name, value in entry.items()}
    rest = {name: value for name, value in everything.items() if name not in FAMILIES[family]}
    rules = Policy()
    rules.host_paths = True
    rules.annotations = tuple(name for name in policy.ANNOTATIONS if name != family)
    spec = spec_with({**everything, "org.example": "kept"})
    rules.apply(spec)
    expected = spec_with({**rest, "org.example": "kept"})
    Policy.apply(rules, expected)
    assert spec.annotations == expected.annotations
    for field in ("overlay", "overlay_size", "overlay_binds", "tmp", "engine", "lowers"):
        assert getattr(spec.overrides, field) == getattr(expected.overrides, field), field
    assert [one.name for one in spec.hints] == [one.name for one in expected.hints]
    assert sorted(warning.split(":")[0] for warning in spec.warnings) == sorted(
        f"annotation {name}" for name in FAMILIES[family]
    )


def test_every_annotation_we_know_can_be_refused():
    """A new override must not come past the operator's list."""
    from sandboxfs.spec import annotations

    assert set(FAMILIES) == set(policy.ANNOTATIONS)
    for key in annotations._KEYS:
        assert policy.family(annotations.PREFIX + key) is not None, key
    for prefix in annotations.HINT_PREFIXES:
        assert policy.family(prefix + "x.source") == prefix[:-1]


def test_what_isnt_honoured_is_no_host_path_either():
    rules = Policy()
    rules.annotations = ()
    spec = spec_with({OWN + "overlay": "dir=/a", OWN + "lower": "/b", **hint("size=1000T")})
    rules.apply(spec)
    assert (spec.overrides.overlay, spec.overrides.lowers, spec.hints) == ("tmpfs", [], [])
    assert len(spec.warnings) == 6


@pytest.mark.parametrize(("size", "number"), [
    (None, None), ("1", 1), ("1K", 1024), ("2g", 2 << 30),
])
def test_sizes_in_bytes(size, number):
    assert in_bytes(size) == number


def test_a_percentage_is_of_the_memory_the_kernel_has():
    with open("/proc/meminfo", encoding="ascii") as file:
        total = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemTotal"))
    assert in_bytes("100%") == total
    assert in_bytes("50%") == total // 2 // 4096 * 4096
