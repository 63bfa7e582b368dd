"""The lines for containerd's config.toml, read by containerd itself, its CRI plugin loaded."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import run, run_cli

pytestmark = pytest.mark.needs("root", "containerd")

# Everything that containerd would write, or look at, elsewhere is kept below {path}.
CONFIG = """\
version = 2
root = "{path}/root"
state = "{path}/state"
disabled_plugins = ["io.containerd.snapshotter.v1.devmapper"]
[grpc]
  address = "{path}/socket"
[ttrpc]
  address = "{path}/ttrpc"
[plugins."io.containerd.internal.v1.opt"]
  path = "{path}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  stream_server_port = "0"
  disable_apparmor = true
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "{path}/cni"
  conf_dir = "{path}/cni"
"""


@contextmanager
def containerd(path: Path, lines: str) -> Iterator[str]:
    """Start a containerd of our own with `lines` in its config.toml; its socket's path."""
    config = path / "config.toml"
    config.write_text(CONFIG.format(path=path) + lines, "utf-8")
    socket = path / "socket"
    with open(path / "log", "wb") as log:
        process = subprocess.Popen(["containerd", "--config", config], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not socket.exists():
            assert process.poll() is None, (path / "log").read_text("utf-8")
            assert time.monotonic() < deadline, (path / "log").read_text("utf-8")
            time.sleep(0.05)
        yield str(socket)
    finally:
        process.terminate()
        process.wait(30)


def cri_plugin(socket: str) -> str:
    """Return the state of the CRI plugin, ``ok`` or ``error``; there is no other of its name."""
    listed = run("ctr", "-a", socket, "plugins", "ls", timeout=60, check=0).stdout
    (line,) = [line.split() for line in listed.splitlines() if " cri " in line]
    return line[-1]


@pytest.fixture
def installed(public_path: Path) -> tuple[Path, str]:
    """Where the registration went, and the lines that were printed."""
    dest = public_path / "containerd"
    done = run_cli("hooks", "install", "--for", "containerd", "--dest", dest, check=0)
    return dest, done.stdout.split("and restart it.\n")[1]


def test_containerd_takes_the_printed_lines_and_reads_the_base_spec(installed, public_path):
    dest, lines = installed
    with containerd(public_path, lines) as socket:
        assert cri_plugin(socket) == "ok"
        # That it has read the file is seen where there is none.
    (dest / "sandboxfs-base-spec.json").unlink()
    with containerd(public_path, lines) as socket:
        assert cri_plugin(socket) == "error"
    assert "sandboxfs-base-spec.json" in (public_path / "log").read_text("utf-8")


def test_the_table_of_runc_is_needed(installed, public_path):
    """What the comment in the lines says: whoever names one runtime loses the others."""
    _dest, lines = installed
    ours = lines.split("# Naming one runtime")[0]
    with containerd(public_path, ours) as socket:
        assert cri_plugin(socket) == "error"
    assert 'default_runtime_name = \\"runc\\"' in (public_path / "log").read_text("utf-8")
