"""What a runtime does to its mounts after the hook, by what it opened before, still counts.

crun (1.28) opens a descriptor of each mount that is to be read-only, and makes it so by that when
all hooks are done.  Judged by writing: flags may be those of another mount.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from sandboxfs.hooks import registration
from sandboxfs.kernel import abi, syscalls
from tests.support import LAUNCHER, Bundle, in_namespace, untouched
from tests.support.hooks import Runtime
from tests.support.specs import Document

pytestmark = pytest.mark.needs("root", "overlay", "busybox", "launcher")

MakeBundle = Callable[..., Bundle]
ENGINES = (pytest.param("detached", marks=pytest.mark.needs("detached-nesting")), "attached")
# What crun would bind on itself, or hide, and where the payload may try to write.
READ_ONLY_PATHS = ("/proc/sys", "/etc", "/bind/sub")
WRITES = {
    "/bind": "/bind/x", "/bind/sub": "/bind/sub/x", "/mem": "/mem/x", "/mem/inner": "/mem/inner/x",
    "/etc": "/etc/x", "/proc/sys": "/proc/sys/kernel/domainname", "/hidden": "/hidden/x",
}


@pytest.fixture(params=ENGINES)
def prepared(request: pytest.FixtureRequest, bundle: MakeBundle, public_path: Path) -> Bundle:
    """A bundle whose spec says of nothing that it is read-only: only the runtime will."""
    (public_path / "source/sub").mkdir(parents=True)

    def change(document: Document) -> None:
        document["annotations"] = {"dev.sandboxfs.engine": request.param}
        document["hooks"] = registration.hooks_object(str(LAUNCHER))
        document["linux"]["readonlyPaths"] = document["linux"]["maskedPaths"] = []
        document["mounts"] += [
            {"destination": "/bind", "type": "bind", "source": str(public_path / "source"),
             "options": ["rbind"]},
            {"destination": "/mem", "type": "tmpfs", "source": "mem", "options": []},
            {"destination": "/mem/inner", "type": "tmpfs", "source": "inner", "options": []},
            {"destination": "/hidden", "type": "tmpfs", "source": "mask", "options": []},
        ]

    return bundle(change)


class Later(Runtime):
    """A runtime that has everything mounted, writable still, and descriptors of it."""

    def __init__(self, bundle: Bundle, way: str) -> None:
        super().__init__(bundle)
        for path in READ_ONLY_PATHS:
            self.bind(self.rootfs + path, self.rootfs + path)
        self.held = {path: self.opened(self.rootfs + path, way) for path in WRITES}

    @staticmethod
    def opened(path: str, way: str) -> int:
        if way == "open":
            return os.open(path, os.O_PATH | os.O_CLOEXEC)
        return syscalls.open_tree(abi.AT_FDCWD, path.encode(), 0)

    def finish(self) -> None:
        for fd in self.held.values():
            syscalls.mount_setattr(fd, abi.MOUNT_ATTR_RDONLY)

    def written(self) -> set[str]:
        """Return the places that can be written to."""
        found = set()
        for place, path in WRITES.items():
            try:
                fd = os.open(self.rootfs + path, os.O_WRONLY | (
                    0 if "proc" in path else os.O_CREAT), 0o600)
            except OSError:
                continue
            os.close(fd)
            found.add(place)
        return found

    def close(self) -> None:
        for fd in self.held.values():
            os.close(fd)


@contextmanager
def later(prepared: Bundle, way: str = "open") -> Iterator[Later]:
    runtime = Later(prepared, way)
    try:
        yield runtime
    finally:
        runtime.close()


@pytest.mark.parametrize("way", ["open", "open_tree"])
def test_read_only_after_the_hook_by_descriptors(
    prepared: Bundle, public_path: Path, way: str
) -> None:
    def body() -> None:
        with later(prepared, way) as runtime:
            runtime.hook()
            runtime.finish()
            assert runtime.written() == set()

    with untouched(public_path / "source"), untouched(prepared.rootfs / "etc"):
        in_namespace(body)


def test_control_all_of_it_can_be_written_before(prepared: Bundle, public_path: Path) -> None:
    def body() -> None:
        with later(prepared) as runtime:
            assert runtime.written() == set(WRITES)
            runtime.hook()
            # The image's own directory is read-only already: nothing else of it may be shown.
            assert runtime.written() == set(WRITES) - {"/etc"}

    in_namespace(body)
    assert (public_path / "source/x").exists()


def test_what_the_spec_has_read_only_is_so_without_the_runtime(
    prepared: Bundle, public_path: Path
) -> None:
    """Should it lose its descriptors: what the document says is done by the hook, too."""
    document = deepcopy(prepared.document)
    for mount in document["mounts"]:
        if mount["destination"] in ("/bind", "/mem", "/mem/inner"):
            mount["options"] = [*mount["options"], "ro"]
    document["linux"]["readonlyPaths"] = list(READ_ONLY_PATHS)
    document["linux"]["maskedPaths"] = ["/hidden", "/not/there"]
    document["root"]["readonly"] = True

    def body() -> None:
        with later(prepared) as runtime:
            prepared.write(document)
            for fd in runtime.held.values():
                syscalls.mount_setattr(fd, 0, abi.MOUNT_ATTR_RDONLY)
            runtime.hook()
            assert runtime.written() == set()
            with pytest.raises(OSError, match="Read-only file system"):
                (prepared.rootfs / "x").touch()
            runtime.finish()

    with untouched(public_path / "source"), untouched(prepared.rootfs / "etc"):
        in_namespace(body)


@pytest.mark.parametrize("overlay", ["tmpfs", "none"])
def test_the_image_never_becomes_writable(prepared: Bundle, overlay: str) -> None:
    """Whatever a runtime does by descriptors of the rootfs or of its own bind of a part."""
    document = prepared.document
    document["root"]["readonly"] = True
    document["annotations"].update({
        "dev.sandboxfs.overlay": overlay, "dev.sandboxfs.mount.v.source": "mem",
        "dev.sandboxfs.mount.v.type": "tmpfs", "dev.sandboxfs.mount.v.share": "container"})
    prepared.write(document)

    def body() -> None:
        with later(prepared) as runtime:
            own = runtime.opened(runtime.rootfs, "open")
            runtime.hook()
            # Without an overlay the runtime's own bind is the container's: its flags are its own.
            held = (own, runtime.held["/etc"]) if overlay == "tmpfs" else (own,)
            for fd in held:
                syscalls.mount_setattr(fd, 0, abi.MOUNT_ATTR_RDONLY | abi.MOUNT_ATTR_NOEXEC)
            os.close(own)
            for path in ("x", "bin/busybox", "etc/x")[:1 + len(held)]:
                with pytest.raises(OSError, match="Read-only file system"):
                    os.open(prepared.rootfs / path, os.O_CREAT | os.O_WRONLY)

    with untouched(prepared.rootfs / "etc"), untouched(prepared.rootfs / "bin"):
        in_namespace(body)


def test_what_is_made_anew_in_what_is_moved(
    prepared: Bundle, public_path: Path
) -> None:
    """The runtime's own mount is taken out of the tree, and what lies on it lies on the new one."""
    source = public_path / "source"
    (source / "file").write_text("before", "utf-8")
    document = prepared.document
    document["mounts"] += [
        {"destination": "/mem/inner/deep", "type": "tmpfs", "source": "deep", "options": []},
        {"destination": "/mem/file", "type": "bind", "source": str(source / "file"),
         "options": ["bind"]},
    ]
    document["annotations"].update({
        "dev.sandboxfs.overlay.binds": "true", "dev.sandboxfs.mount.v.source": "inner",
        "dev.sandboxfs.mount.v.type": "tmpfs", "dev.sandboxfs.mount.v.share": "container",
        "dev.sandboxfs.mount.v.options": "size=64k"})
    prepared.write(document)

    def body() -> None:
        with later(prepared) as runtime:
            (prepared.rootfs / "mem/inner/of-the-runtime").touch()
            (prepared.rootfs / "mem/inner/deep/kept").touch()
            (prepared.rootfs / "mem/kept").touch()
            runtime.hook()
            assert os.listdir(prepared.rootfs / "mem/inner") == ["deep"]
            assert os.listdir(prepared.rootfs / "mem/inner/deep") == ["kept"]
            (prepared.rootfs / "mem/file").write_text("after", "utf-8")
            (prepared.rootfs / "bind/new").touch()
            found = [each for each in runtime.inside() if each.mountpoint.startswith(b"/mem")]
            assert sorted(each.mountpoint for each in found) == [
                b"/mem", b"/mem/file", b"/mem/inner", b"/mem/inner/deep"]
            syscalls.mount_setattr(runtime.held["/mem"], abi.MOUNT_ATTR_RDONLY)
            with pytest.raises(OSError, match="Read-only file system"):
                (prepared.rootfs / "mem/x").touch()
            (prepared.rootfs / "mem/inner/x").touch()

    with untouched(source):
        in_namespace(body)


def test_mounts_keep_their_identity(prepared: Bundle) -> None:
    def body() -> None:
        with later(prepared) as runtime:
            before: dict[Any, Any] = {each.mountpoint: each.id for each in runtime.inside()[1:]}
            runtime.hook()
            found = {each.mountpoint: each.id for each in runtime.inside()[1:]}
            for path in (b"/etc", b"/tmp"):  # these are made
                before.pop(path, None)
                found.pop(path)
            assert found == before

    in_namespace(body)
