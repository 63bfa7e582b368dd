"""Containers as a runtime leaves them to createRuntime, without a runtime."""

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import prctl

from sandboxfs.kernel import abi, syscalls
from tests.support.commands import Done, run_cli
from tests.support.host import bind, mount_tmpfs
from tests.support.namespace import in_namespace, reap_orphans, set_propagation
from tests.support.specs import Document

SOURCE = "/volumes/cache"
HINT = {"source": SOURCE, "type": "tmpfs", "share": "pod", "options": "size=1M"}


def on_fake_host(function: Callable[..., Any], *arguments: Any, **how: Any) -> Any:
    """Call ``function(host, …)`` in a namespace with an empty /run, and a place for bundles."""

    def inside() -> Any:
        prctl.set_child_subreaper(1)
        mount_tmpfs("/run")
        os.mkdir("/run/bundles")
        host = FakeHost()
        try:
            return function(host, *arguments)
        finally:
            for container in list(host.containers):
                container.end()
            reap_orphans()

    return in_namespace(inside, **{"timeout": 120, **how})


class FakeHost:
    """Where fake containers are made."""

    def __init__(self) -> None:
        self.containers: list[FakeContainer] = []

    def container(self, name: str, **how: Any) -> "FakeContainer":
        container = FakeContainer(self, name, **how)
        self.containers.append(container)
        return container


class FakeContainer:
    """A process with a mount namespace in which the spec's mounts are made, and its bundle.

    mounts: of the spec; each is a tmpfs at its destination.  hints: fields by name.  inside:
    called in the mount namespace when all is mounted.
    """

    def __init__(
        self,
        host: FakeHost,
        name: str,
        pod: str | None = "p1",
        hints: dict[str, dict[str, str]] | None = None,
        mounts: Sequence[Document] | None = None,
        annotations: dict[str, str] | None = None,
        inside: Callable[[Path], object] | None = None,
    ) -> None:
        self.host = host
        self.id = name
        self.bundle = Path("/run/bundles", name)
        self.rootfs = self.bundle / "rootfs"
        self.rootfs.mkdir(parents=True)
        said = {"dev.sandboxfs.pod": pod} if pod else {}
        for hint, fields in ({"cache": HINT} if hints is None else hints).items():
            said |= {f"dev.sandboxfs.mount.{hint}.{key}": fields[key] for key in fields}
        if mounts is None:
            mounts = [{"destination": "/data", "source": SOURCE, "type": "tmpfs", "options": []}]
        self.document: Document = {
            "ociVersion": "1.0.2", "root": {"path": "rootfs"}, "mounts": list(mounts),
            "annotations": said | (annotations or {}),
            "process": {"args": ["/bin/true"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
            "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}]},
        }
        self.write()
        self.pid = self._start(inside)

    def write(self) -> None:
        """Write config.json, after a change of `document`."""
        (self.bundle / "config.json").write_text(json.dumps(self.document), "utf-8")

    def _start(self, inside: Callable[[Path], object] | None) -> int:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                prctl.set_pdeathsig(signal.SIGKILL)
                syscalls.unshare(abi.CLONE_NEWNS)
                set_propagation(abi.MS_PRIVATE)
                bind(self.rootfs, self.rootfs)
                for mount in self.document["mounts"]:
                    place = self.rootfs / mount["destination"].strip("/")
                    place.mkdir(parents=True, exist_ok=True)
                    mount_tmpfs(place)
                if inside is not None:
                    inside(self.rootfs)
                os.write(writer, b".")
                signal.pause()
            finally:
                os._exit(0)
        os.close(writer)
        ready = os.read(reader, 1)
        os.close(reader)
        assert ready, "the fake container couldn't be set up"
        return child

    def state(self) -> str:
        """Return what a runtime writes to a hook."""
        return json.dumps({
            "ociVersion": "1.0.2", "id": self.id, "status": "created", "pid": self.pid,
            "bundle": str(self.bundle), "annotations": self.document["annotations"],
        })

    def hook(self, name: str, **how: Any) -> Done:
        """Run a hook for it, as a runtime does."""
        return run_cli("hook", name, input=self.state(), **how)

    def path(self, inside: str) -> Path:
        """Return the path by which the host reaches what is at `inside` in the container."""
        return Path(f"/proc/{self.pid}/root{self.rootfs}{inside}")

    def kill(self) -> None:
        """End its process; nobody tells the hooks."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0

    def end(self) -> None:
        """End its process, if that wasn't done yet."""
        self.kill()
        if self in self.host.containers:
            self.host.containers.remove(self)
