"""From a file to a document: what is opened, what is parsed, what is refused."""

import errno
import json
import os
import resource
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxfs.errors import MountError, SpecError
from sandboxfs.spec import load
from tests.support import CHECKOUT, containerd_spec, minimal_spec

MINIMAL = json.dumps(minimal_spec())


def refused(text):
    with pytest.raises(SpecError) as caught:
        load.load(text=text)
    assert "\n" not in caught.value.line()
    return caught.value


def test_a_bundle_is_a_directory_with_a_config_json(tmp_path):
    (tmp_path / "config.json").write_text(MINIMAL)
    spec = load.load(tmp_path)
    assert spec.bundle == str(tmp_path)
    assert spec.root_path == "rootfs"
    assert spec.process.args == ["/bin/true"]


def test_bytes_name_a_bundle_too(tmp_path):
    (tmp_path / "config.json").write_text(MINIMAL)
    assert load.load(os.fsencode(tmp_path)).bundle == str(tmp_path)


def test_with_a_config_alone_the_bundle_is_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "other.json").write_text(MINIMAL)
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    spec = load.load(config="../other.json")
    assert spec.bundle == str(tmp_path / "inside")
    assert spec.source_name == "../other.json"


def test_the_fields_of_containerds_default():
    spec = load.load(text=json.dumps(containerd_spec("sh", "-c", ":")))
    assert [mount.destination for mount in spec.mounts] == [
        "/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue", "/sys", "/run",
    ]
    assert spec.mounts[2].options[-1] == "gid=5"
    assert [entry.type for entry in spec.namespaces] == ["pid", "ipc", "uts", "mount", "network"]
    assert spec.process.args == ["sh", "-c", ":"]
    assert spec.process.rlimits == [("RLIMIT_NOFILE", 1024, 1024)]
    assert spec.process.no_new_privileges is True
    assert spec.process.capabilities["bounding"][0] == "CAP_CHOWN"
    assert len(spec.masked_paths) == 10
    assert spec.cgroups_path == "/default"
    assert spec.not_applied == ["/linux/resources/devices"]
    assert spec.warnings == []
    assert spec.overrides.overlay is None
    assert spec.hints == []


# -- the file -----------------------------------------------------------------------------


def machine_error(status, *arguments, **keywords):
    with pytest.raises(MountError) as caught:
        load.load(*arguments, **keywords)
    assert caught.value.exit_status == 125
    assert caught.value.errno == status
    return caught.value


def test_no_bundle(tmp_path):
    error = machine_error(errno.ENOENT, tmp_path / "none")
    assert error.line() == (
        f"bundle: open {tmp_path}/none: ENOENT: No such file or directory"
    )


def test_no_config_json(tmp_path):
    machine_error(errno.ENOENT, tmp_path)
    machine_error(errno.ENOENT, config=tmp_path / "none.json")


def test_a_bundle_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    machine_error(errno.ENOTDIR, tmp_path / "file")


def test_config_json_is_a_directory(tmp_path):
    (tmp_path / "config.json").mkdir()
    machine_error(errno.EISDIR, tmp_path)


def test_a_fifo_is_refused_and_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    machine_error(errno.EINVAL, tmp_path)
    machine_error(errno.EINVAL, config=tmp_path / "config.json")


def test_a_device_is_refused():
    machine_error(errno.EINVAL, config="/dev/zero")


def test_a_link_in_a_bundle_is_refused_and_named_by_the_user_followed(tmp_path):
    (tmp_path / "real.json").write_text(MINIMAL)
    (tmp_path / "config.json").symlink_to("real.json")
    error = machine_error(errno.ELOOP, tmp_path)
    assert "--config" in error.hint
    assert load.load(config=tmp_path / "config.json").root_path == "rootfs"


def test_no_descriptor_is_left(tmp_path):
    (tmp_path / "config.json").write_text(MINIMAL)
    before = os.listdir("/proc/self/fd")
    load.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SpecError):
        load.load(tmp_path)
    assert os.listdir("/proc/self/fd") == before


def test_a_file_over_the_cap_is_refused_unread(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(50 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SpecError, match="larger than 16 MiB"):
        load.load(tmp_path)
    # In KiB; reading all of it would have cost 50 MiB at least.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40 << 10


def test_a_file_of_the_cap_is_read(tmp_path):
    (tmp_path / "config.json").write_text(MINIMAL + " " * (load.LARGEST_FILE - len(MINIMAL)))
    assert load.load(tmp_path).root_path == "rootfs"
    assert "larger than" in refused(MINIMAL + " " * (load.LARGEST_FILE + 1 - len(MINIMAL))).text


# -- the text -----------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "told"), [
    (b"\xef\xbb\xbf" + MINIMAL.encode(), "byte order mark"),
    (MINIMAL.encode("utf-16"), "no UTF-8"),
    (MINIMAL.encode().replace(b"rootfs", b"root\xff"), "no UTF-8"),
    (MINIMAL.encode().replace(b"rootfs", b"\xed\xa0\x80"), "no UTF-8"),
    (MINIMAL + "x", "nothing may follow"),
    (MINIMAL + MINIMAL, "nothing may follow"),
    (MINIMAL + "\x0b", "nothing may follow"),
    ("", "no JSON value"),
    ("  \n", "no JSON value"),
    ("\u00a0{}", "line 1 column 1"),
    ("{", "line 1 column 2"),
    ("{'a': 1}", "line 1 column 2"),
    ('{"a": 1,}', "line 1"),
    ('{\n\n  "a" 1}', "line 3 column 7"),
    ('{"a": "\n"}', "control character"),
    ('{"a": "\0"}', "control character"),
    ('{"a": 01}', "line 1"),
    ("[" * 200_000, "nested too deeply"),
    ('{"a":' * 200_000, "nested too deeply"),
    ('{"hooks": ' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deeply"),
    ("[1]", "an object is allowed"),
    ("null", "an object is allowed"),
    ('"text"', "an object is allowed"),
    ("7", "an object is allowed"),
    ('{"a": 1' + "0" * 5000 + "}", "too many digits"),
])
def test_what_is_no_document(text, told):
    error = refused(text)
    assert told.lower() in error.line().lower()
    assert error.line().startswith("config.json: ")


@pytest.mark.parametrize(("text", "origin", "told"), [
    ('{"ociVersion": "1", "ociVersion": "1"}', "/ociVersion", "twice"),
    ('{"x": [0, {"a/b": 1, "a/b": 2}]}', "/x/1/a~1b", "twice"),
    ('{"x": {"y": NaN}}', "/x/y", "NaN"),
    ('{"x": [-Infinity]}', "/x/0", "-Infinity"),
    ('{"x": "\\ud800"}', "/x", "surrogate"),
    ('{"x": ["\\uDC00\\ud800"]}', "/x/0", "surrogate"),
    ('{"annotations": {"\\ud83d": ""}}', "/annotations/\ud83d", "surrogate"),
])
def test_what_the_grammar_of_python_lets_pass(text, origin, told):
    error = refused(text)
    assert error.origin == origin
    assert told in error.line()


def test_every_doubled_key_is_told():
    error = refused('{"a": 1, "a": 2, "b": {"c": 1, "c": 1, "d": NaN}}')
    assert [problem.origin for problem in error.problems] == ["/a", "/b/c", "/b/d"]


def test_whole_surrogate_pairs_are_characters():
    document = minimal_spec()
    document["root"]["path"] = "\U0001f600"
    assert "\\ud83d" in json.dumps(document)
    assert load.load(text=json.dumps(document)).root_path == "\U0001f600"


def test_white_space_around_the_document():
    assert load.load(text=f" \r\n\t{MINIMAL} \r\n\t").root_path == "rootfs"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(JSON, st.booleans())
def test_parse_agrees_with_json(value, ascii_only):
    try:
        text = json.dumps(value, ensure_ascii=ascii_only).encode()
    except UnicodeEncodeError:
        return
    try:
        text.decode()
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a lone surrogate, escaped
        with pytest.raises(SpecError, match="surrogate"):
            load.parse(text)
        return
    assert load.parse(text) == value


@given(st.binary(max_size=40) | st.text(alphabet='{}[]":,0\\ud8-INa e.', max_size=30))
def test_any_bytes_give_a_value_or_a_spec_error(text):
    raw = text.encode() if isinstance(text, str) else text
    try:
        value = load.parse(raw)
    except SpecError:
        return
    assert json.loads(raw) == value


def test_the_slow_parser_says_the_same():
    """Where the interpreter has no `_json`."""
    program = """if True:
        import sys
        sys.modules["_json"] = None
        from sandboxfs.errors import SpecError
        from sandboxfs.spec import load
        assert load.make_scanner is None
        print(load.parse(b' {"a": [1, 2.5, "x"]} '))
        for text in (b'{"a": 1, "a": 1}', b"[NaN]", b"{} x", b"", b"[" * 100000, b"{,}"):
            try:
                load.parse(text)
            except SpecError as error:
                print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "{'a': [1, 2.5, 'x']}",
        "/a: stands twice in one object",
        "/0: NaN: is no JSON number",
        "config.json: line 1 column 4: nothing may follow the JSON value",
        "config.json: no JSON value in it",
        "config.json: is nested too deeply to be read",
        "config.json: line 1 column 2: Expecting property name enclosed in double quotes",
    ]


def test_the_hot_path_imports_no_more_than_it_may(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(containerd_spec()))
    program = f"""if True:
        import sys
        sys.path.insert(0, {str(CHECKOUT)!r})
        import os
        before = set(sys.modules)
        from sandboxfs.spec import load, default
        load.load({str(tmp_path)!r})
        default.spec()
        print(*sorted(set(sys.modules) - before))
    """
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True
    )
    # Later interpreters have loaded errno already.
    assert [name for name in done.stdout.split() if name != "errno"] == [
        "_json", "sandboxfs", "sandboxfs.errors", "sandboxfs.kernel",
        "sandboxfs.kernel.system", "sandboxfs.spec",
        "sandboxfs.spec.check", "sandboxfs.spec.check_linux",
        "sandboxfs.spec.check_mounts", "sandboxfs.spec.check_process",
        "sandboxfs.spec.check_root", "sandboxfs.spec.default",
        "sandboxfs.spec.load", "sandboxfs.spec.model", "sandboxfs.spec.values",
    ]


def test_a_document_that_ends_early_is_told_before_json_was_ever_imported():
    """The C scanner raises a class of `json.decoder`, which hot code never imports."""
    program = (
        "import sys\n"
        "from sandboxfs.errors import SpecError\n"
        "from sandboxfs.spec import load\n"
        "assert 'json' not in sys.modules\n"
        "try:\n    load.parse(b'{\"a\": 1, \"b')\n"
        "except SpecError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True,
                          check=True, cwd=CHECKOUT)
    assert done.stdout == (
        "config.json: line 1 column 10: Unterminated string starting at\n"
    )
