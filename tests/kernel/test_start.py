"""What `sandboxfs run` loads: the exact set, since every module costs all who start it."""

import os
import subprocess
from pathlib import Path

from sandboxfs import archive
from tests.support import default_spec

LAUNCHER = Path(__file__).parents[2] / ".venv/bin/sandboxfs"
# What is not ours: C modules, and of Python's own only what costs nothing.
OTHERS = {
    "_ctypes", "_json", "_signal", "_stat", "_struct", "errno", "gc",
    "marshal", "posix", "sys", "time",
}


def loaded(command):
    """Return the modules that a command of the interpreter imports, by -X importtime."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines[1:]}


def interpreter():
    return LAUNCHER.read_text().splitlines()[0][2:].split()[0]


def ordinary_spec():
    """Containerd's default, and what docker and kubernetes add to it."""
    document = default_spec()
    document["mounts"].append({
        "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
        "options": ["nosuid", "noexec", "nodev", "ro"],
    })
    document["linux"]["namespaces"].append({"type": "cgroup"})
    return document


def test_run_loads_exactly_this(bundle):
    python = [interpreter(), "-ISB", "-X", "importtime"]
    bare = loaded([*python, "-c", "pass"])
    # --debug: module by module, not from the archive, which importtime knows nothing of.
    command = ["run", "--debug", "--bundle", os.fspath(bundle(ordinary_spec())), "--", "/bin/true"]
    found = loaded([*python, str(LAUNCHER), *command]) - bare
    ours = {name for name in found if name.startswith("sandboxfs")}
    assert ours == set(archive.HOT)
    assert found - set(archive.HOT) <= OTHERS


def test_the_archive_is_read_and_whole(tmp_path):
    """The launcher's own lines load every hot module, without one import by path."""
    lines = [*archive.start_lines(), "print(len([m for m in sys.modules if 'sandboxfs' in m]))"]
    script = tmp_path / "start"
    script.write_text("import marshal, sys\n" + "\n".join(lines) + "\n")
    assert archive.write() is not None
    done = subprocess.run(
        [interpreter(), "-ISB", str(script)], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{len(archive.HOT)}\n"


def test_a_stale_archive_is_left_alone(tmp_path, monkeypatch):
    """One changed source is enough: nothing comes from the archive then."""
    content = archive.content()
    monkeypatch.setattr(archive.os, "fstat", lambda _fd: _Status())
    stale = archive.content()
    for text, modules in ((content, len(archive.HOT)), (stale, 0)):
        path = tmp_path / "archive"
        path.write_bytes(text)
        lines = "\n".join(archive.start_lines()).replace(ascii(archive.path()), ascii(str(path)))
        script = tmp_path / "start"
        script.write_text(
            "import marshal, sys\n" + lines
            + "\nprint(len([m for m in sys.modules if 'sandboxfs' in m]))\n"
        )
        done = subprocess.run([interpreter(), "-ISB", str(script)], capture_output=True,
                              text=True, check=True)
        assert done.stdout == f"{modules}\n"


class _Status:
    st_mtime_ns = 1
    st_size = 1


def test_what_fails_in_the_archive_leaves_nothing_half_loaded(tmp_path):
    """A truncated archive: the modules that came before are taken back."""
    path = tmp_path / "archive"
    path.write_bytes(archive.content()[:-2000])
    lines = "\n".join(archive.start_lines()).replace(ascii(archive.path()), ascii(str(path)))
    script = tmp_path / "start"
    script.write_text(
        "import marshal, sys\n" + lines
        + "\nprint([m for m in sys.modules if 'sandboxfs' in m])\n"
    )
    done = subprocess.run([interpreter(), "-ISB", str(script)], capture_output=True, text=True,
                          check=True)
    assert done.stdout == "[]\n"
