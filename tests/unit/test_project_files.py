"""The project itself: what is packaged, what is at the top, what the files promise."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.support import CHECKOUT, UNPRIVILEGED, run

PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text("utf-8"))


def _tracked():
    done = subprocess.run(
        ["git", "-c", f"safe.directory={CHECKOUT}", "ls-files", "-z"],
        cwd=CHECKOUT, capture_output=True, check=True,
    )
    return [Path(os.fsdecode(name)) for name in done.stdout.split(b"\0") if name]


def test_the_top_level_holds_nothing_that_isnt_needed():
    assert {path.parts[0] for path in _tracked()} <= {
        ".ci", ".gitignore", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE",
        "Makefile", "README.md", "benchmarks", "deploy", "docs", "pyproject.toml", "sandboxfs",
        "specs", "tests", "tools",
    }


def test_every_module_stands_in_the_architecture():
    """In the table of its room, or for a command in the room's one line."""
    text = (CHECKOUT / "ARCHITECTURE.md").read_text("utf-8")
    rooms = ("kernel", "spec", "policy", "plan", "build", "process", "state", "hooks",
             "runtime", "engines", "boot", "cli")
    for room in ("", *rooms):
        title = f"### `sandboxfs/{room}/`" if room else "### `sandboxfs/`"
        section = text.split(title)[1].split("\n##")[0]
        for path in (CHECKOUT / "sandboxfs" / room).glob("*.py"):
            if path.stem != "__init__":
                assert f"`{path.stem}`" in section, path


def test_the_tests_that_the_documentation_names_exist():
    for path in (CHECKOUT / "docs").glob("*.md"):
        for name in re.findall(r"tests/[\w/]+\.py", path.read_text("utf-8")):
            assert (CHECKOUT / name).exists(), f"{path.name}: {name}"


def test_a_wheel_holds_the_schemas_the_modules_and_the_type_marker(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    # A copy: the build writes beside the sources.
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(CHECKOUT / name, source)
    for name in ("sandboxfs", "specs", "tools"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(CHECKOUT / name, source / name, ignore=ignored)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-input",
         "--disable-pip-version-check", "--wheel-dir", tmp_path, source],
        check=True, stdin=subprocess.DEVNULL,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    assert any(name.startswith("sandboxfs/_specs/schema/") for name in packed)
    for path in (source / "specs").rglob("*.json"):
        assert f"sandboxfs/_specs/{path.relative_to(source / 'specs')}" in packed
    for path in (source / "sandboxfs").rglob("*.py"):
        assert str(path.relative_to(source)) in packed
    assert "sandboxfs/py.typed" in packed
    # Compiled, so it is a wheel of this architecture.
    assert "sandboxfs/runtime/front" in packed
    assert "-none-any" not in wheel.name
    assert not [name for name in packed if name.startswith("tests")]


@pytest.mark.parametrize("group", ["dependencies", "dev"])
def test_dependencies_have_a_lower_bound_and_no_pin(group):
    project = PROJECT["project"]
    entries = project["dependencies"] if group == "dependencies" else (
        project["optional-dependencies"]["dev"]
    )
    for entry in entries:
        assert ">=" in entry, entry
        assert not set("<~!").intersection(entry), entry
        assert "==" not in entry, entry


def test_the_mount_program_is_never_called():
    """The kernel is asked through the new mount API, in tests and tools as well."""
    words = [quote + name + quote for name in ("mount", "umount") for quote in "'\""]
    words += ["/bin/mount", "/bin/umount"]
    for path in _tracked():
        if path.suffix != ".py" or path.name == Path(__file__).name:
            continue
        for line in (CHECKOUT / path).read_text("utf-8").splitlines():
            called = "subprocess" in line or "run(" in line or "exec" in line or "Popen" in line
            assert not (called and any(word in line for word in words)), f"{path}: {line}"


def test_ci_calls_make_test_and_says_it_is_ci():
    script = (CHECKOUT / ".ci" / "run").read_text("utf-8")
    assert os.access(CHECKOUT / ".ci" / "run", os.X_OK)
    assert "make test" in script
    assert "CI=true" in script


@pytest.mark.parametrize("goal", ["", "everything"])
def test_the_set_up_refuses_other_goals(goal):
    done = subprocess.run(
        [CHECKOUT / "tools" / "setup", goal] if goal else [CHECKOUT / "tools" / "setup", "-"],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 1
    assert "usage" in done.stderr


def _elsewhere(path, lacking=(), **programs):
    """Copy the set-up to `path`, with a PATH that lacks programs and has others replaced."""
    (path / "tools").mkdir()
    shutil.copy(CHECKOUT / "tools" / "setup", path / "tools")
    shutil.copy(CHECKOUT / "pyproject.toml", path)
    programs_path = path / "bin"
    programs_path.mkdir()
    for program in Path("/usr/bin").iterdir():
        if program.name not in lacking and program.name not in programs:
            (programs_path / program.name).symlink_to(program)
    for name, script in programs.items():
        (programs_path / name.replace("_", "-")).unlink()
        (programs_path / name.replace("_", "-")).write_text(f"#!/bin/sh\n{script}\n", "utf-8")
        (programs_path / name.replace("_", "-")).chmod(0o755)
    return path / "tools" / "setup", {"PATH": str(programs_path)}


def test_without_apt_the_set_up_says_what_to_install(public_path):
    setup, environment = _elsewhere(public_path, lacking=("apt-get",))
    done = run(setup, "test", env=environment)
    assert done.returncode == 1
    assert "no apt" in done.stderr
    assert "busybox-static" in done.stderr
    assert "squashfs-tools" in done.stderr


@pytest.mark.needs("root")
def test_without_root_the_set_up_says_what_is_missing(public_path):
    nothing = 'test "$4" = gcc || echo installed'
    setup, environment = _elsewhere(public_path, dpkg_query=nothing)
    os.chown(public_path, UNPRIVILEGED, UNPRIVILEGED)
    done = run(setup, "demo", env=environment, uid=UNPRIVILEGED)
    assert done.returncode == 1
    assert "only root can install them: gcc" in done.stderr


@pytest.mark.needs("root")
def test_an_interpreter_in_a_closed_home_is_refused(public_path):
    setup, environment = _elsewhere(public_path, dpkg_query="echo installed")
    home = public_path / "home"
    home.mkdir(mode=0o700)
    shutil.copy(os.path.realpath(sys.executable), home / "python3")
    done = run(setup, "demo", env={**environment, "PYTHON": str(home / "python3")})
    assert done.returncode == 1
    assert "can't be executed by every user" in done.stderr
