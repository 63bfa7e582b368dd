"""Bundles made of busybox."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tests.support.specs import Document, default_spec


class Bundle:
    """A bundle on disk: `path`, its `rootfs`, and the `document` last written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rootfs = path / "rootfs"
        self.document: Document = {}

    def write(self, document: Document) -> None:
        """Write config.json."""
        self.document = document
        (self.path / "config.json").write_text(json.dumps(document), "utf-8")

    def __fspath__(self) -> str:
        return str(self.path)


def bundle(
    directory: Path,
    config: Document | Callable[[Document], Document | None] | None = None,
    *,
    name: str = "bundle",
    mountpoints: bool = True,
) -> Bundle:
    """Make a bundle with a busybox rootfs below `directory`.

    config: the whole document, or a function that changes `default_spec()` in place (or
    returns another), or None for the default spec.  mountpoints: see `busybox_rootfs`.
    """
    path = directory / name
    path.mkdir(mode=0o755)
    made = Bundle(path)
    busybox_rootfs(made.rootfs, mountpoints=mountpoints)
    if config is None:
        made.write(default_spec())
    elif callable(config):
        document = default_spec()
        made.write(config(document) or document)
    else:
        made.write(config)
    return made


def busybox_rootfs(path: Path, *, mountpoints: bool = True) -> Path:
    """Make a root with a static busybox at `path`; with the usual empty directories or not."""
    for name in ("bin", "etc", "root"):
        (path / name).mkdir(mode=0o755, parents=True, exist_ok=True)
    if mountpoints:
        for name in ("dev", "proc", "run", "sys"):
            (path / name).mkdir(mode=0o755)
        (path / "tmp").mkdir()
        (path / "tmp").chmod(0o1777)
    (path / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n", "utf-8")
    (path / "etc" / "group").write_text("root:x:0:\n", "utf-8")
    busybox = path / "bin" / "busybox"
    shutil.copy(busybox_program(), busybox)
    busybox.chmod(0o755)
    for applet in applets():
        os.symlink("busybox", path / "bin" / applet)
    # mkdir's mode is cut by the umask, the tests' expectations aren't.
    path.chmod(0o755)
    return path


def busybox_program() -> str:
    """Return the path of the machine's static busybox."""
    found = shutil.which("busybox", path="/bin:/usr/bin")
    assert found, "busybox-static is not installed: tools/setup test"
    return found


@cache
def applets() -> tuple[str, ...]:
    """Return the names busybox answers to, without its own."""
    done = subprocess.run(
        [busybox_program(), "--list"], capture_output=True, text=True, check=True
    )
    return tuple(name for name in done.stdout.split() if name != "busybox")
