"""What operators are told of a runtime before they register hooks."""

import shutil
from pathlib import Path

import pytest

from sandboxfs.hooks import fitness


def program(directory: Path, text: str) -> str:
    path = directory / "runtime"
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n", "utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(("text", "told"), [
    ("runc version 1.1.5+ds1\ncommit: x", None), ("runc version 1.3.5", None),
    ("runc version 1.3.6+ds1", "past"), ("runc version 1.4.0", None),
    ("runc version 1.4.2", None), ("runc version 1.4.3-rc.1", "past"),
    ("runc version 1.5.0", "past"), ("runc version v2.0", "past"),
    ("crun version 1.8.1\ncommit: f8a", None), ("crun version 1.28", None),
    ("crun version 1.29", "not tried with"), ("youki version 0.5.3", "not tried with"),
    ("hello", "no runtime that"),
])
def test_by_version(tmp_path: Path, text: str, told: str | None) -> None:
    found = fitness.finding(program(tmp_path, text))
    if told is None:
        assert found is None
    else:
        assert found is not None
        assert told in found
        assert "sandboxfs install" in found


def test_what_does_not_answer(tmp_path: Path) -> None:
    assert "doesn't tell its version" in (fitness.finding(str(tmp_path / "missing")) or "")


@pytest.mark.parametrize("name", ["runc", "crun"])
def test_of_this_machine(name: str) -> None:
    path = shutil.which(name, path="/usr/sbin:/usr/bin")
    if path is None:
        pytest.skip(f"{name} isn't installed")
    found = fitness.finding(path)
    assert found is None or found.startswith(f"{path} is {name} ")
