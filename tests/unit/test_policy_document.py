"""The operator's file: its keys, its faults and their lines, and whose file it has to be."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxfs import policy
from sandboxfs.errors import PolicyError
from sandboxfs.policy import document, faults, simple
from tests.support import CHECKOUT

PATH = "/etc/sandboxfs/config.toml"
WHOLE = """\
# What containers get unasked.
[overlay]
mode = "none"
size = "256M"
cap = "1G"

[hints]
size = "16M"
cap = "10%"

[annotations]
honour = [
    "dev.sandboxfs.tmp",
    "dev.gvisor.spec.mount",
]
host-paths = true

[log]
file = "/var/log/sandboxfs.log"
level = "debug"
"""


def parse(text):
    return document.parse(text.encode() if isinstance(text, str) else text, PATH)


def lines(text):
    """Return the lines of the errors that `text` gets."""
    with pytest.raises(PolicyError) as caught:
        parse(text)
    assert caught.value.exit_status == 65
    return [problem.line() for problem in caught.value.problems]


def test_every_key():
    found = parse(WHOLE)
    assert found.path == PATH
    assert (found.overlay, found.overlay_size, found.overlay_cap) == (
        "none", str(256 << 20), 1 << 30)
    assert (found.hint_size, found.hint_cap_text) == ("16M", "10%")
    assert found.hint_cap == policy.in_bytes("10%")
    assert found.annotations == ("dev.sandboxfs.tmp", "dev.gvisor.spec.mount")
    assert found.host_paths is True
    assert (found.log_path, found.log_level) == ("/var/log/sandboxfs.log", "debug")
    assert set(found.given) == set(document._KEYS)


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "[overlay]\n[log]\n"])
def test_what_isnt_said_is_the_default(text):
    found, default = parse(text), policy.Policy()
    for name in policy.Policy.__slots__:
        if name != "path":
            assert getattr(found, name) == getattr(default, name), name


def test_the_default_size_of_a_hint_stays_below_the_cap():
    assert parse('[hints]\ncap = "4K"\n').hint_size == "4K"
    assert parse('[hints]\ncap = "99%"\n').hint_size == "50%"


@pytest.mark.parametrize(("text", "expected"), [
    ('[overlay]\n\nmode = "dir=/x"\n',
     f'{PATH}:3: overlay.mode: "dir=/x": allowed: "tmpfs", "none"'),
    ("[overlay]\nmode = true\n", f'{PATH}:2: overlay.mode: true: allowed: "tmpfs", "none"'),
    ("[overlay]\nsize = 5\n", f"{PATH}:2: overlay.size: 5: has to be a string, in quotes"),
    ('[overlay]\nsize = "5X"\n', (f'{PATH}:2: overlay.size: "5X": a size is a number of bytes, '
     "or one with K, M, G or T (1024), or 1% to 100%")),
    ('[hints]\n# no limit?\ncap = "0"\n',
     (f'{PATH}:3: hints.cap: "0": a size of 0 would mean no limit at all; a size is a number of '
     "bytes, or one with K, M, G or T (1024), or 1% to 100%")),
    ('[overlay]\nsize = "2G"\ncap = "1G"\n', (f'{PATH}:2: overlay.size: "2G": is above '
     "overlay.cap, 1G")),
    ('[hints]\ncap = "1G"\nsize = "1025M"\n', (f'{PATH}:3: hints.size: "1025M": is above '
     "hints.cap, 1G")),
    ('[hints]\nsize = "51%"\n', f'{PATH}:2: hints.size: "51%": is above hints.cap, 50%'),
    ('[annotations]\nhost-paths = "yes"\n', (f'{PATH}:2: annotations.host-paths: "yes": allowed: '
     "true, false")),
    ("[annotations]\nhost_paths = true\n", (f"{PATH}:2: annotations.host_paths: true: unknown; "
     "[annotations] has honour, host-paths")),
    ('[log]\nfile = "hook.log"\n', f'{PATH}:2: log.file: "hook.log": allowed: an absolute path'),
    ('[log]\nlevel = "loud"\n', (f'{PATH}:2: log.level: "loud": allowed: "error", "warning", '
     '"info", "debug"')),
    ('\n\nlog.levels = "info"\n', f'{PATH}:3: log.levels: "info": unknown; [log] has file, level'),
    ("[overlay]\n[overlays]\n", (f"{PATH}:2: overlays: unknown; known tables: annotations, hints, "
     "log, overlay")),
    ("\nhints = 3\n", f"{PATH}:2: hints: 3: has to be a table: [hints]"),
    ("[[log]]\n", f"{PATH}:1: log: [{{}}]: has to be a table: [log]"),
    ('"a b" = 1\n', f"{PATH}:1: a b: 1: unknown; known tables: annotations, hints, log, overlay"),
])
def test_a_fault_is_named_with_its_line(text, expected):
    assert lines(text) == [expected]


@pytest.mark.parametrize("value", ['"dev.sandboxfs.tmp"', '["dev.sandboxfs.tmp", "x"]', "[1]", "{}",
                                   '["dev.sandboxfs.*"]', "[[]]"])
def test_only_known_annotations_can_be_honoured(value):
    (line,) = lines(f"[annotations]\nhonour = {value}\n")
    assert line.startswith(f"{PATH}:2: annotations.honour: ")
    assert '"dev.sandboxfs.overlay.size"' in line


def test_all_faults_at_once_in_the_order_of_the_file():
    found = lines('[log]\nlevel = "x"\n[overlay]\nmode = "x"\nwhat = 1\n')
    assert [line.split(": ")[:2] for line in found] == [
        [f"{PATH}:2", "log.level"], [f"{PATH}:4", "overlay.mode"], [f"{PATH}:5", "overlay.what"],
    ]


@pytest.mark.parametrize(("text", "line"), [
    ("[overlay]\nmode = none\n", 2), ("[overlay\n", 1), ("\n\n\n[a]\n[a]\n", 5),
    ('[log]\nfile = """\n\n', 3), ("[overlay]\nmode='none'\nmode='none'\n", 3),
    ("x = " + "9" * 5000 + "\n", 1), ("[log]\n\nx = 2024-13-77\n", 3),
    ("[overlay]\r\nmode = none\r\n", 2),
])
def test_what_is_no_toml_is_named_with_its_line(text, line):
    (found,) = lines(text)
    assert found.startswith(f"{PATH}:{line}: is no TOML: ")
    assert "\n" not in found


def test_bytes_that_are_no_text():
    assert lines(b'[overlay]\nmode = "\xff"\n') == [f"{PATH}:2: is no UTF-8: invalid start byte"]


def test_nesting_to_death():
    (line,) = lines("x = " + "[" * 30000 + "\n")
    assert line == f"{PATH}: is nested too deeply to be read"


@pytest.mark.parametrize(("text", "keys", "line"), [
    ("\n[a]\n\n b . c = 1", ("a", "b", "c"), 4),
    ("a = {b = 1,\tc = 2}", ("a", "c"), 1),
    ("a.b = 1\r\na.c = 2\r\n", ("a", "c"), 2),
    ('x = """\na = 1\n"""\na = 2\n', ("a",), 4),
    ("x = [\n1,\n#a\n]\n# a = 1\n\na = [\n2\n]\nb = 3\n", ("a",), 7),
    ("x = [\n1,\n#a\n]\n# a = 1\n\na = [\n2\n]\nb = 3\n", ("b",), 10),
    ("'a' = 1", ("a",), 1),
    ("[z]\n[a.b]\n[a]\nc=1", ("a",), 2),
    ("[z]\n[a.b]\n[a]\nc=1", ("a", "c"), 4),
])
def test_lines_of_keys(text, keys, line):
    assert faults.line_of(text, keys) == line


@given(st.lists(st.sampled_from(["", "# c", "[t{n}]", "k{n} = 1", "k{n} = [\n1,\n\n2\n]",
                                 'k{n} = """\nk = 1\n"""']), max_size=12))
def test_the_line_of_any_key_is_where_its_statement_begins(parts):
    text, wanted, line, table = "", None, 1, ()
    for number, part in enumerate(parts):
        statement = part.replace("{n}", str(number))
        name = statement.split(" ")[0].strip("[]")
        if statement.startswith("["):
            table = (name,)
            wanted = (table, line)
        elif statement.startswith("k"):
            wanted = ((*table, name), line)
        text += statement + "\n"
        line += statement.count("\n") + 1
    if wanted is not None:
        assert faults.line_of(text, wanted[0]) == wanted[1]


# -- without the library ------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    WHOLE, "", "# c\n", "[a]\nb='x'  # c\n", "[a] # c\nb-c_9 = true\nc=[]\nd = ['x',\t\"y\" , ]",
    "[a]\nb = [ # c\n\n 'x' # c\n , 'y' ] # c\n c = false\n[b]", '[a]\nb = "ä # = ]"\n',
])
def test_what_operators_write_is_read_without_the_library(text):
    assert simple.tables(text) == tomllib.loads(text)


@pytest.mark.parametrize("text", [
    "a = 'x'", "[a]\nb = 1", "[a.b]", "[[a]]", "[a]\n[a]", "[a]\nb='x'\nb='x'", "[a]\nb.c='x'",
    '[a]\nb = "x\\n"', '[a]\nb = """x"""', "[a]\nb = ", "[a]\nb = 'x' 'y'", "[a]\nb = truer",
    "[a]\nb = [1]", "[a]\nb = [,]", "[a]\nb = ['x' 'y']", "[a]\nb = ['x',,]", "[a]\nb = ['x'",
    "[a]\nb = {}", "[a]\r\nb = 'x'\r\n", "[a]\n\x00", "[a]\nb = 'x", "[a", "[]", "[a]\nb",
    "[a]\nb =", "[a]\n= 'x'", "[a]\n'b' = 'x'", "[a]\nb = 'x'\x0c", "\ufeff[a]", "[a]b = 'x'",
    "[a]\nb = # 'x'", "[a]\nb c = 'x'", "[a]\nb = ['x'\n#",
])
def test_of_anything_else_nothing_is_guessed(text):
    assert simple.tables(text) is None


@given(st.lists(st.sampled_from([
    "[", "]", "[a]", "[b]", "a", "b", " ", "\t", "\n", "\r\n", "=", "'", '"', "true", "false", ",",
    "#", "\\", "é", "\x7f", "\u2028", "{", "}", ".", "-", "1", "'x'", '"y"', "a = ", "\n[c]\n",
]), max_size=30).map("".join))
def test_what_is_read_without_it_is_what_it_says(text):
    found = simple.tables(text)
    if found is not None:
        assert found == tomllib.loads(text)


@pytest.mark.parametrize(("text", "library"), [
    ("[overlay]\nsize = '1G'\n[annotations]\nhonour = ['dev.sandboxfs.tmp']\n", False),
    ("overlay.size = '1G'\n", True),
])
def test_the_library_is_imported_only_where_it_has_to_be_asked(text, library, public_path):
    path = public_path / "config.toml"
    path.write_text(text, "utf-8")
    path.chmod(0o644)
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from sandboxfs import policy\n"
            "assert policy.load(sys.argv[2]).overlay_size == str(1 << 30)\n"
            "print(*({'tomllib', 're', 'os', 'enum', 'typing', 'json'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-ISB", "-c", code, CHECKOUT, path],
                          capture_output=True, text=True, check=True)
    assert ("tomllib" in done.stdout) == library
    assert library or done.stdout == "\n"


# -- the file ---------------------------------------------------------------------------


@pytest.fixture
def file(public_path):
    path = public_path / "config.toml"
    path.write_text(WHOLE, "utf-8")
    path.chmod(0o644)
    return path


def fault(path):
    with pytest.raises(PolicyError) as caught:
        policy.load(str(path))
    return str(caught.value)


def test_a_file_is_read(file):
    assert policy.load(str(file)).log_level == "debug"


def test_without_a_default_file_the_defaults_hold(monkeypatch, tmp_path):
    for missing in (tmp_path / "config.toml", tmp_path / "none" / "config.toml"):
        monkeypatch.setattr(policy, "FILE", str(missing))
        assert policy.load().path is None


def test_a_named_file_has_to_be_there(tmp_path):
    path = tmp_path / "config.toml"
    assert fault(path) == f"{path}: open: ENOENT: No such file or directory"


@pytest.mark.parametrize("default", [True, False])
def test_a_file_that_cant_be_reached_is_an_error_and_never_the_defaults(
    default, tmp_path, monkeypatch
):
    path = tmp_path / "loop"
    path.symlink_to(path)
    monkeypatch.setattr(policy, "FILE", str(path))
    with pytest.raises(PolicyError, match=f"^{path}: open: ELOOP"):
        policy.load(None if default else str(path))


@pytest.mark.parametrize(("place", "number"), [
    ("config.toml", "ENOENT"), ("", "ENOENT"), ("a file", "ENOTDIR"),
])
def test_a_link_without_a_target_is_an_error_and_never_the_defaults(
    place, number, tmp_path, monkeypatch
):
    path = tmp_path / "sandboxfs" / "config.toml"
    if place == "a file":
        path.parent.write_text("")
    else:
        (tmp_path / "sandboxfs" if not place else path).parent.mkdir(exist_ok=True)
        (path if place else path.parent).symlink_to(tmp_path / "unmounted")
    monkeypatch.setattr(policy, "FILE", str(path))
    with pytest.raises(PolicyError, match=f"^{path}: open: {number}"):
        policy.load()
    # The control: with nothing there, there is no policy of an operator.
    path.parent.unlink() if not place or place == "a file" else path.unlink()
    assert policy.load().path is None


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o777])
def test_a_file_others_can_write_is_refused(file, mode):
    file.chmod(mode)
    assert fault(file).startswith(f"{file}: is writable by others (mode {mode:04o})")


def test_a_file_in_a_directory_others_can_write_is_refused(file):
    file.parent.chmod(0o777)
    assert fault(file).startswith(f"{file}: others may write its directory {file.parent}")
    # In one like /tmp nobody else can rename it.
    file.parent.chmod(0o1777)
    assert policy.load(str(file)).overlay == "none"


@pytest.mark.needs("root")
def test_a_file_of_somebody_else_is_refused(file):
    os.chown(file, 1234, 0)
    assert fault(file) == f"{file}: belongs to user 1234, not to root"
    os.chown(file, 0, 0)
    os.chown(file.parent, 1234, 0)
    assert fault(file).startswith(f"{file}: others may write its directory")
    os.chown(file.parent, 65534, 0)  # the overflow id is somebody else, too, outside of namespaces
    assert fault(file).startswith(f"{file}: others may write its directory")


@pytest.mark.parametrize("kind", ["directory", "fifo", "device"])
def test_only_a_regular_file_is_opened(kind, public_path):
    path = public_path / "config.toml"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path, 0o644)
    else:
        path = Path("/dev/null")
    assert fault(path) == f"{path}: is not a regular file"


def test_a_file_without_end_is_refused(file):
    file.write_bytes(b"#" * (document.LARGEST_FILE + 1))
    assert fault(file) == f"{file}: is larger than 64 KiB"


def test_a_long_file_of_faults_is_answered_at_once():
    text = "\n".join(f"a{number}=1" for number in range(6000))
    assert lines(text)[0].startswith(f"{PATH}:1: a0: 1: unknown")
    assert lines(text)[-1].startswith(f"{PATH}:{faults.MOST_FAULTS}: ")
