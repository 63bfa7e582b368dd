"""Overrides and hints, from annotations and from the command line's words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxfs.errors import SpecError, UsageError
from sandboxfs.spec import annotations
from sandboxfs.spec.annotations import override, overrides
from sandboxfs.spec.model import Overrides

GVISOR, OWN = annotations.HINT_PREFIXES


def of(**keys):
    return overrides(
        {"dev.sandboxfs." + key.replace("_", "."): value for key, value in keys.items()}, "/bundle"
    )


@pytest.mark.parametrize(("text", "value"), [
    ("1", "1"), ("4096", "4096"), ("64K", "65536"), ("64k", "65536"), ("1M", "1048576"),
    ("2G", "2147483648"), ("1t", "1099511627776"), ("007", "7"), ("1%", "1%"), ("100%", "100%"),
    (str(2**63 - 1), str(2**63 - 1)), ("8388607T", str(8388607 << 40)),
])
def test_sizes(text, value):
    assert annotations.size(text) == value


@pytest.mark.parametrize("text", [
    "", "0", "0G", "0%", "101%", "-1", "+1", " 1", "1 ", "1.5G", "1KB", "1P", "G", "%", "1e3",
    "0x10", "\u0661", "²", "1,nr_inodes=3", "99999999999999999999", str(2**63), "8388608T",
    "9" * 5000,
])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="a size is"):
        annotations.size(text)


@given(st.integers(1, 2**63 - 1))
def test_a_size_in_bytes_is_itself(number):
    assert annotations.size(str(number)) == str(number)


def test_nothing_is_set_without_annotations():
    found = overrides({"org.example": "x", "dev.sandboxfs.pod": "p"})
    for field in ("overlay", "overlay_path", "overlay_size", "overlay_binds", "tmp", "engine"):
        assert getattr(found, field) is None
    assert found.lowers == []
    assert found.origins == {}


def test_each_key():
    found = of(
        overlay="none", overlay_size="64M", overlay_binds="true", tmp="keep", engine="attached"
    )
    assert found.overlay == "none"
    assert found.overlay_size == str(64 << 20)
    assert found.overlay_binds is True
    assert found.tmp == "keep"
    assert found.engine == "attached"
    assert found.origins["overlay.size"] == "/annotations/dev.sandboxfs.overlay.size"


@pytest.mark.parametrize(("text", "path", "keep"), [
    ("dir=/var/up", "/var/up", False),
    ("dir=/var/up:keep", "/var/up", True),
    ("dir=up", "/bundle/up", False),
    ("dir=/a:keep/b:c", "/a:keep/b:c", False),
    ("dir=/a,b=c:keep:keep", "/a,b=c:keep", True),
])
def test_an_overlay_in_a_directory(text, path, keep):
    found = of(overlay=text)
    assert (found.overlay, found.overlay_path, found.overlay_keep) == ("dir", path, keep)


def test_lowers_are_ordered_by_their_numbers():
    found = overrides({
        "dev.sandboxfs.lower.10": "/ten", "dev.sandboxfs.lower.2": "two",
        "dev.sandboxfs.lower": "/first", "dev.sandboxfs.lower.1": "/one",
    }, "/bundle")
    assert found.lowers == ["/first", "/one", "/bundle/two", "/ten"]


@pytest.mark.parametrize(("key", "value"), [
    ("overlay", ""), ("overlay", "Tmpfs"), ("overlay", "dir"), ("overlay", "dir="),
    ("overlay", "dir=:keep"), ("overlay", "dir=/a\0b"),
    ("overlay.size", "0"), ("overlay.binds", "yes"), ("overlay.binds", ""),
    ("tmp", "tmpfs "), ("engine", "best"),
    ("lower", ""), ("lower.0", "/a"), ("lower.01", "/a"), ("lower.x", "/a"), ("lower.", "/a"),
])
def test_refusals_name_the_annotation(key, value):
    with pytest.raises(SpecError) as caught:
        overrides({"dev.sandboxfs." + key: value})
    assert caught.value.origin == "/annotations/dev.sandboxfs." + key
    assert caught.value.exit_status == 65


def test_the_command_line_uses_the_same_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = Overrides()
    override(found, "overlay", "dir=up:keep", "--overlay", UsageError)
    override(found, "lower", "one", "--lower", UsageError)
    override(found, "lower", "/two", "--lower", UsageError)
    assert found.overlay_path == str(tmp_path / "up")
    assert found.lowers == [str(tmp_path / "one"), "/two"]
    with pytest.raises(UsageError) as caught:
        override(found, "overlay.size", "0", "--overlay-size", UsageError)
    assert caught.value.line().startswith('--overlay-size: "0": a size of 0')
    assert caught.value.exit_status == 2


def test_the_stronger_ones_win_where_they_say_something():
    weak = of(overlay="dir=/a:keep", tmp="keep", lower="/low", overlay_binds="true")
    strong = Overrides()
    override(strong, "overlay", "tmpfs", "--overlay")
    override(strong, "overlay.binds", "false", "--overlay-binds")
    weak.merge(strong)
    assert (weak.overlay, weak.overlay_path, weak.overlay_keep) == ("tmpfs", None, False)
    assert weak.overlay_binds is False
    assert (weak.tmp, weak.lowers) == ("keep", ["/low"])
    assert weak.origins["overlay"] == "--overlay"
    override(strong, "lower", "/other", "--lower")
    weak.merge(strong)
    assert weak.lowers == ["/other"]


def test_unknown_keys_are_a_warning():
    warnings = []
    overrides({"dev.sandboxfs.overlays": "x"}, warnings=warnings)
    assert warnings == ["annotation dev.sandboxfs.overlays: unknown, ignored"]


# -- hints --------------------------------------------------------------------------------


def hint(prefix=GVISOR, name="cache", **fields):
    described = {"source": "/src", "type": "tmpfs", "share": "pod", **fields}
    return {f"{prefix}{name}.{field}": value for field, value in described.items()}


def refused(values):
    with pytest.raises(SpecError) as caught:
        annotations.hints(values)
    assert caught.value.origin.startswith("/annotations/")
    return caught.value


@pytest.mark.parametrize("prefix", annotations.HINT_PREFIXES)
def test_a_hint(prefix):
    warnings = []
    (found,) = annotations.hints(
        hint(prefix, options="rw,rprivate,size=64M,mode=1777,uid=0,noexec,nosuid",
             lifecycle="anything", directfs="true"),
        warnings,
    )
    assert (found.name, found.source, found.type, found.share) == (
        "cache", "/src", "tmpfs", "pod"
    )
    assert found.options == ["rw", "size=67108864", "mode=1777", "uid=0", "noexec", "nosuid"]
    assert warnings == [
        (f"annotation {prefix}cache.options: rprivate is dropped, a shared volume has no "
        "propagation")
    ]


def test_both_prefixes_may_describe_one_hint():
    both = {**hint(GVISOR), **hint(OWN, source="/src")}
    assert len(annotations.hints(both)) == 1
    error = refused({**hint(GVISOR), **hint(OWN, share="container")})
    assert error.origin == "/annotations/dev.sandboxfs.mount.cache.share"
    assert "dev.gvisor.spec.mount.cache.share" in error.text


def test_empty_options_are_none():
    (found,) = annotations.hints(hint(options=""))
    assert found.options == []


@pytest.mark.parametrize(("field", "value", "told"), [
    ("source", "", "a source"), ("source", "a\0", "a source"),
    ("type", "ext4", "tmpfs, bind"), ("type", "", "tmpfs, bind"),
    ("share", "all", "container, pod, shared"),
    ("size", "1", "unknown field"), ("Source", "/x", "unknown field"),
    ("options", "exec", "allowed"), ("options", "dev", "allowed"), ("options", "suid", "allowed"),
    ("options", "ro,", "empty word"), ("options", "bind", "allowed"),
    ("options", "size=1k,nr_inodes=3", "nr_inodes"), ("options", "size=0", "no limit"),
    ("options", "size", "allowed"), ("options", "ro=1", "allowed"),
    ("options", "size=99999999999999999999", "size is"),
    ("options", "mode=8", "octal"), ("options", "mode=", "octal"),
    ("options", "mode=17777", "7777"),
    ("options", "uid=-1", "id"), ("options", "gid=4294967295", "id"), ("options", "uid=", "id"),
])
def test_refused_fields_name_the_annotation(field, value, told):
    error = refused(hint(**{field: value}))
    assert error.origin == f"/annotations/dev.gvisor.spec.mount.cache.{field}"
    assert told in error.line()


@pytest.mark.parametrize("rest", ["", "cache", "cache.", ".source", "a.b.source", "a.source.x"])
def test_exactly_two_parts(rest):
    assert "NAME.FIELD" in refused({**hint(), GVISOR + rest: "x"}).text


@pytest.mark.parametrize("field", ["source", "type", "share"])
def test_what_a_hint_must_have(field):
    values = hint()
    del values[f"{GVISOR}cache.{field}"]
    error = refused(values)
    assert error.text == f"hint cache lacks {field}"


def test_two_hints_of_one_source():
    assert "same source" in refused({**hint(name="a"), **hint(name="b")}).text


def test_every_problem_is_collected():
    problems = []
    annotations.hints(
        {**hint(name="a", type="x"), **hint(name="b", source="/b", share="y")}, problems=problems
    )
    assert [problem.origin.rpartition(".")[2] for problem in problems if problem.target] == [
        "type", "share",
    ]
