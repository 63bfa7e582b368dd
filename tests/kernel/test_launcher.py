"""The launcher: what it is made of, what it starts with, and what it will not overwrite."""

import ast
import marshal
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sandboxfs.cli import launcher
from sandboxfs.errors import MountError, UsageError
from tests.support import CHECKOUT, LAUNCHER, run

BASE = os.path.realpath(sys._base_executable)


def _started(command, tmp_path):
    """Return (sys.path, flags) of what a launcher starts, called by `command`."""
    probe = tmp_path / "probe"
    probe.mkdir(exist_ok=True)
    (probe / "sandboxfs").mkdir(exist_ok=True)
    (probe / "sandboxfs" / "__init__.py").touch()
    (probe / "sandboxfs" / "__main__.py").write_text(
        "import sys\n"
        "def main():\n"
        "    f = sys.flags\n"
        "    print([sys.path, f.isolated, f.no_site, f.dont_write_bytecode, sys.argv[1:],\n"
        "           'site' in sys.modules])\n",
        "utf-8",
    )
    done = run(*command, "one", "t w o", check=0, env={"PYTHONPATH": str(tmp_path)})
    return ast.literal_eval(done.stdout)


@pytest.fixture
def probe_path(tmp_path, monkeypatch):
    """An import path on which `sandboxfs` is a stand-in that prints how it was started."""
    # The archive holds the real one.
    monkeypatch.setattr(launcher.archive, "path",
                        lambda kind="hot": str(tmp_path / f"no {kind} archive"))
    return [*launcher.import_path(BASE)[:2], str(tmp_path / "probe")]


@pytest.mark.parametrize("where", ["plain", "with space", "it's", "x" * 150, "é"])
def test_it_starts_isolated_wherever_it_lies(tmp_path, probe_path, where):
    path = tmp_path / where
    path.write_bytes(launcher.text(BASE, probe_path))
    path.chmod(0o755)
    assert _started([path], tmp_path) == [probe_path, 1, 1, 1, ["one", "t w o"], False]


@pytest.mark.parametrize("name", ["py thon", "it's python", "python" + "3" * 140])
def test_an_interpreter_that_no_shebang_can_name_is_started_by_a_shell(
    tmp_path, probe_path, name
):
    interpreter = tmp_path / name
    # A copy would look for its library beside itself; a script that passes on won't do, since
    # the kernel starts no script by a script.  The link is the interpreter.
    interpreter.symlink_to(BASE)
    path = tmp_path / "launcher"
    path.write_bytes(launcher.text(str(interpreter), probe_path))
    path.chmod(0o755)
    assert path.read_bytes().startswith(b"#!/bin/sh\n")
    assert _started([path], tmp_path) == [probe_path, 1, 1, 1, ["one", "t w o"], False]


def test_import_directories_with_any_name_are_kept(tmp_path):
    odd = tmp_path / "a\nb'\udc80"
    content = launcher.text(BASE, [str(odd)])
    assert content.isascii()
    line = content.decode("ascii").splitlines()[1]
    assert ast.literal_eval(line.partition("sys.path[:] = ")[2]) == [str(odd)]


@pytest.mark.parametrize("name", ["/a\\b/python", "/a\nb/python", "/\udc80/python"])
def test_an_interpreter_that_cant_be_named_is_refused(name):
    with pytest.raises(UsageError, match="no launcher can name"):
        launcher.text(name, [])


def test_what_is_compiled_at_each_start_is_the_first_line_alone():
    """The kernel passes it on as one argument; the bytecode that it executes is the last line."""
    first, *lines, last = launcher.text(BASE, ["/x"]).decode("ascii").splitlines()
    assert first == f"#!{BASE} -ISBc{launcher.COMMAND}"
    assert len(lines) == 7
    code = marshal.loads(bytes.fromhex(last[1:]))
    text = "\n".join(["import sys; del sys.argv[0]", *lines])
    assert code == compile(text, "<launcher>", "exec", dont_inherit=True, optimize=2)


COMMAND_FITS = launcher.LONGEST_SHEBANG - len(f"#! -ISBc{launcher.COMMAND}")
OPTIONS_FIT = launcher.LONGEST_SHEBANG - len("#! -ISB")


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize(
    ("length", "start"),
    [(COMMAND_FITS, "-ISBc"), (COMMAND_FITS + 1, "-ISB\n"), (OPTIONS_FIT, "-ISB\n"),
     (OPTIONS_FIT + 1, "/bin/sh\n")],
)
def test_a_first_line_that_a_kernel_would_cut_is_never_written(
    tmp_path, probe_path, length, start, by_name
):
    interpreter = "/" * (length - len(BASE)) + BASE
    path = tmp_path / "launcher"
    path.write_bytes(launcher.text(interpreter, probe_path))
    path.chmod(0o755)
    first = path.read_text("ascii").splitlines(keepends=True)[0]
    assert len(first) <= 128
    assert start in first
    command = [interpreter, "-ISB", path] if by_name else [path]
    assert _started(command, tmp_path) == [probe_path, 1, 1, 1, ["one", "t w o"], False]


def test_the_standard_library_comes_first_and_site_never():
    path = launcher.import_path(BASE)
    own = path.index(str(CHECKOUT))
    assert "/ctypes/" in _find("ctypes", path[:own])
    assert all(os.path.isabs(each) and os.path.isdir(each) for each in path)
    for name in launcher.REQUIRED:
        assert _find(name, path), name


def _find(name, path):
    from importlib.machinery import PathFinder

    found = PathFinder.find_spec(name, path)
    return found.origin if found else ""


def test_it_is_executable_whatever_the_umask(tmp_path):
    old = os.umask(0o077)
    try:
        launcher.write(str(tmp_path / "launcher"))
    finally:
        os.umask(old)
    assert (tmp_path / "launcher").stat().st_mode & 0o7777 == 0o755
    assert os.listdir(tmp_path) == ["launcher"]


def test_an_older_launcher_and_pips_are_replaced(tmp_path):
    path = tmp_path / "launcher"
    launcher.write(str(path))
    launcher.write(str(path))
    pips = "#!/usr/bin/python3\nimport sys\nfrom sandboxfs.__main__ import main\nsys.exit(main())\n"
    path.write_text(pips, "utf-8")
    launcher.write(str(path))
    assert path.read_bytes().startswith(f"#!{BASE} -ISBc".encode())


def _file(path):
    path.write_text("precious\n", "utf-8")


def _dangling(path):
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [_file, Path.mkdir, os.mkfifo])
def test_anything_else_is_left_alone(tmp_path, make):
    path = tmp_path / "launcher"
    make(path)
    before = path.lstat()
    with pytest.raises(UsageError, match="is no launcher of sandboxfs") as caught:
        launcher.write(str(path))
    assert "--force" in caught.value.hint
    assert path.lstat() == before
    assert os.listdir(tmp_path) == ["launcher"]


def test_a_dangling_link_is_left_alone(tmp_path):
    _dangling(tmp_path / "launcher")
    with pytest.raises(MountError, match="ENOENT"):
        launcher.write(str(tmp_path / "launcher"))
    assert os.listdir(tmp_path) == ["launcher"]


def test_force_replaces_a_file(tmp_path):
    path = tmp_path / "launcher"
    _file(path)
    launcher.write(str(path), force=True)
    assert launcher.WITNESS in path.read_bytes()


def test_force_does_not_replace_a_directory(tmp_path):
    (tmp_path / "launcher").mkdir()
    with pytest.raises(MountError, match="EISDIR"):
        launcher.write(str(tmp_path / "launcher"), force=True)
    assert os.listdir(tmp_path) == ["launcher"]


def test_a_missing_directory_is_a_clear_error(tmp_path):
    with pytest.raises(MountError, match=r"write .*: ENOENT"):
        launcher.write(str(tmp_path / "no" / "launcher"))


@pytest.mark.needs("launcher")
def test_the_set_ups_launcher_is_the_one_this_code_writes():
    assert LAUNCHER.read_bytes() == launcher.text(BASE, launcher.import_path(BASE))


@pytest.mark.needs("launcher")
def test_nothing_of_the_environment_reaches_the_import_path(tmp_path):
    (tmp_path / "errno.py").write_text("raise SystemExit('hijacked')\n", "utf-8")
    (tmp_path / "ctypes.py").write_text("raise SystemExit('hijacked')\n", "utf-8")
    environment = {
        "PYTHONPATH": str(tmp_path), "PYTHONHOME": str(tmp_path), "PYTHONSTARTUP": "/nonexistent",
    }
    done = run(LAUNCHER, "--version", cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr


def test_bytecode_is_compiled_where_python_is_told_not_to(tmp_path):
    package = tmp_path / "sandboxfs"
    subprocess.run(["cp", "-r", CHECKOUT / "sandboxfs", package], check=True)
    subprocess.run(["rm", "-rf", package / "cli" / "__pycache__"], check=True)
    script = (
        "import sys; sys.path[0] = sys.argv[1]\n"
        "from sandboxfs.cli import launcher; launcher.compile_package()\n"
    )
    subprocess.run(
        [sys.executable, "-B", "-c", script, tmp_path], check=True, cwd="/",
        env={"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert list((package / "cli" / "__pycache__").glob("launcher.*.pyc"))
