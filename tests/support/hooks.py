"""What a runtime has done when it starts a hook, and that start: for tests without a runtime."""

import json
import os
from pathlib import Path
from typing import Any

from sandboxfs.hooks import registration
from sandboxfs.kernel import abi, fscontext, syscalls, usernamespace
from sandboxfs.spec import options
from sandboxfs.spec.model import IdMapping
from tests.support.bundles import Bundle
from tests.support.commands import LAUNCHER, Done, run
from tests.support.host import attach, mount_tmpfs
from tests.support.mounts import MountRecord, table

IDENTITY = "hook-test"
LOG = Path("/run/sandboxfs/hook.log")


class Runtime:
    """One container of a runtime, in this (private) mount namespace, where /run is ours.

    The rootfs is bound on itself and the spec's mounts are made below it; config.json has our
    hooks unless it has others.
    """

    def __init__(
        self, bundle: Bundle, *, propagation: int = abi.MS_PRIVATE, pseudo: bool = True,
        idmap: list[tuple[int, int, int]] | None = None,
    ) -> None:
        """Do it.  pseudo: proc, sysfs and mqueue too.  idmap: the rootfs's ids are mapped so."""
        self.bundle = bundle
        self.pseudo = pseudo
        if "hooks" not in bundle.document and (bundle.path / "config.json").is_file():
            bundle.write({**bundle.document, "hooks": registration.hooks_object(str(LAUNCHER))})
        self.rootfs = str(bundle.rootfs)
        mount_tmpfs("/run")
        self.bind(self.rootfs, self.rootfs, idmap)
        self.set_propagation(self.rootfs, propagation)
        self.mount_all()

    def mount_all(self) -> None:
        """Make the spec's mounts."""
        for mount in self.bundle.document.get("mounts", ()):
            if self.pseudo or mount["type"] not in ("proc", "sysfs", "mqueue"):
                self.mount(mount)

    def bind(
        self, source: str | Path, path: str | Path, idmap: list[tuple[int, int, int]] | None = None
    ) -> None:
        """Bind one mount, with mapped ids if asked."""
        fd = syscalls.open_tree(abi.AT_FDCWD, os.fsencode(source), abi.OPEN_TREE_CLONE)
        if idmap is not None:
            mappings = [IdMapping(*each) for each in idmap]
            owner = usernamespace.with_mappings(mappings, mappings)
            syscalls.mount_setattr(fd, abi.MOUNT_ATTR_IDMAP, userns_fd=owner)
            os.close(owner)
        attach(fd, path)

    def mount_tmpfs(self, path: str | Path, source: str = "tmpfs") -> None:
        """Mount a tmpfs that has a source's name."""
        attach(fscontext.create(b"tmpfs", [fscontext.string(b"source", source.encode())], 0), path)

    def change(self, path: str, attributes: int) -> None:
        """Set flags of the mount that a path leads to."""
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            syscalls.mount_setattr(fd, attributes)
        finally:
            os.close(fd)

    def set_propagation(self, path: str, propagation: int) -> None:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            syscalls.mount_setattr(fd, propagation=propagation)
        finally:
            os.close(fd)

    def mount(self, mount: dict[str, Any]) -> None:
        """Make one mount of a spec below the rootfs, and its mountpoint if it is missing."""
        words = options.parse(mount.get("options", []), "")
        target = Path(self.rootfs + mount["destination"])
        source = mount.get("source", mount.get("type", ""))
        if words.bind:
            is_directory = os.path.isdir(source)
            flags = abi.OPEN_TREE_CLONE | (abi.AT_RECURSIVE if words.recursive else 0)
            fd = syscalls.open_tree(abi.AT_FDCWD, os.fsencode(source), flags)
        else:
            is_directory = True
            settings = [fscontext.string(b"source", os.fsencode(source))]
            for key, value in words.data:
                name = os.fsencode(key)
                settings.append(fscontext.flag(name) if value is None
                                else fscontext.string(name, os.fsencode(value)))
            fd = fscontext.create(mount["type"].encode(), settings, 0)
        if is_directory:
            target.mkdir(parents=True, exist_ok=True)
        elif not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        if words.attributes:
            syscalls.mount_setattr(fd, words.attributes, words.cleared)
        attach(fd, target)
        if words.propagation:
            self.set_propagation(str(target), words.propagation)

    def state(self, **changes: Any) -> str:
        """Return the state that is written to a hook."""
        return json.dumps({
            "ociVersion": "1.0.2", "id": IDENTITY, "status": "creating", "pid": 1,
            "bundle": str(self.bundle.path), **changes,
        })

    def hook(
        self, name: str = "createContainer", *more: str, input: str | None = None, **how: Any
    ) -> Done:
        """Start a hook as runc does: the image's environment, the rootfs as working directory."""
        how = {"cwd": self.rootfs, "check": 0, **how}
        return run(*self.command(name, *more), input=self.state() if input is None else input,
                   **how)

    def command(self, name: str = "createContainer", *more: str) -> list[str]:
        return [str(LAUNCHER), "hook", name, *more]

    def mounts(self) -> list[MountRecord]:
        """Return the records at and below the rootfs, parents first, the rootfs first."""
        return [record for record in table() if self.contains(record.mountpoint)]

    def inside(self) -> list[MountRecord]:
        """Return the records of what the rootfs's path leads to; mountpoints as seen from it."""
        records = self.mounts()
        fd = os.open(self.rootfs, os.O_PATH | os.O_CLOEXEC)
        try:
            number = syscalls.mount_id(fd, abi.STATX_MNT_ID)[0]
        finally:
            os.close(fd)
        found, known = [], {number}
        for record in records:
            if record.id == number or record.parent_id in known:
                known.add(record.id)
                record.mountpoint = record.mountpoint[len(os.fsencode(self.rootfs)):] or b"/"
                found.append(record)
        return found

    def take_away(self) -> None:
        """Unmount what a hook has laid over the rootfs; the spec's mounts, gone with it, anew."""
        syscalls.umount2(os.fsencode(self.rootfs), abi.MNT_DETACH)
        self.mount_all()

    def contains(self, mountpoint: bytes) -> bool:
        root = os.fsencode(self.rootfs)
        return mountpoint == root or mountpoint.startswith(root + b"/")

    def log(self) -> str:
        """Return what the log holds."""
        return LOG.read_text("utf-8") if LOG.exists() else ""
