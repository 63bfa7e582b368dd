"""What the runtime in front loads: the exact set, since every container's start waits for it."""

import subprocess
from pathlib import Path

import pytest

from sandboxfs import archive
from sandboxfs.cli import launcher
from sandboxfs.runtime import wrap
from tests.kernel.test_start import OTHERS
from tests.support import in_namespace
from tests.support.front import RECORDED, front, recorder

pytestmark = pytest.mark.needs("root", "overlay", "busybox", "launcher", "gcc")


def loaded(code: str, *arguments: str | Path) -> set[str]:
    """Return the modules that the interpreter imports for a program and its arguments."""

    def body() -> str:
        done = subprocess.run(
            [launcher.interpreter(), "-X", "importtime", "-ISBc", code, *arguments],
            capture_output=True, text=True, check=False)
        assert done.returncode in (0, RECORDED), done.stderr
        return done.stderr

    lines = [line for line in in_namespace(body).splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines[1:]}


def without_archive() -> str:
    lines = wrap._code(launcher.interpreter()).splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("try: from sandboxfs"))
    return "\n".join([lines[0], *lines[start:]])


def test_it_loads_exactly_this(bundle, public_path: Path) -> None:
    # As engines start it: with annotations, none of which are ours.
    made = bundle(lambda document: document.update(annotations={"org.example.of": "an engine"}))
    real = recorder(public_path)
    found = loaded(without_archive(), real, "runc", "", "00", "create", "--bundle", made.path, "id")
    found -= loaded("pass")
    ours = {name for name in found if name.startswith("sandboxfs")}
    assert ours == set(archive.RUNTIME)
    assert found - ours <= {*OTHERS, "gc", "select"}


def test_the_archive_is_what_it_reads(bundle, public_path: Path) -> None:
    archive.write()
    made = bundle()
    program = front(public_path, recorder(public_path))
    done = subprocess.run(
        ["strace", "-f", "-e", "trace=openat", program, "create", "--bundle", made.path, "id"],
        capture_output=True, text=True, check=False)
    opened = [line for line in done.stderr.splitlines() if "sandboxfs/" in line]
    assert done.returncode == RECORDED
    # The other one is the operator's.
    assert len(opened) == 2, opened
    assert archive.path("runtime") in opened[0]


def test_nothing_of_the_interpreter_looks_for_a_locale(bundle, public_path: Path) -> None:
    program = front(public_path, recorder(public_path))
    done = subprocess.run(
        ["strace", "-f", "-e", "trace=openat", program, "create", "--bundle", bundle().path, "id"],
        capture_output=True, text=True, check=False)
    assert done.returncode == RECORDED
    assert "locale" not in done.stderr
