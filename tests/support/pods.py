"""Pods of real containers: a runtime with our hooks, in a mount namespace of its own."""

import glob
import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import prctl

from sandboxfs.cli import pod
from sandboxfs.hooks import pods as store
from sandboxfs.kernel import fscontext
from tests.support.bundles import Bundle, busybox_rootfs
from tests.support.commands import ENVIRONMENT, LAUNCHER, Done, run, run_cli
from tests.support.host import WORKER, attach, mount_tmpfs
from tests.support.namespace import in_namespace, reap_orphans
from tests.support.specs import Document, default_spec

STORE = Path("/run/sandboxfs/pods")
HINT = {"source": "/volumes/cache", "type": "tmpfs", "share": "pod", "options": "size=1M"}


def on_host(
    function: Callable[..., Any], path: Path, runtime: str, *arguments: Any, **how: Any
) -> Any:
    """Call ``function(host, …)`` in a namespace whose /run is empty; all containers go with it."""

    def inside() -> Any:
        prctl.set_child_subreaper(1)
        mount_tmpfs("/run")
        if runtime == "crun":  # it refuses hybrid cgroups
            attach(fscontext.create(b"cgroup2", [], 0), "/sys/fs/cgroup")
        host = Host(path, runtime)
        try:
            return function(host, *arguments)
        finally:
            host.clean()

    return in_namespace(inside, **{"timeout": 120, **how})


class Host:
    """A runtime, and the containers it was asked for.

    hooks: the names of those that are registered.  prefix: a command to start the runtime by,
    for instance one that makes a mount namespace.
    """

    def __init__(self, path: Path, runtime: str) -> None:
        self.path = path
        self.runtime = runtime
        self.hooks = ["createRuntime", "createContainer", "poststop"]
        self.prefix: list[str] = []
        self.containers: list[Container] = []
        self.rootfs = path / "rootfs"
        if not self.rootfs.exists():
            busybox_rootfs(self.rootfs)

    def command(self, *arguments: str) -> list[str]:
        options = ["--root", str(self.path / "state")]
        if self.runtime == "crun":
            options.append("--cgroup-manager=disabled")
        return [*self.prefix, self.runtime, *options, *arguments]

    def container(self, name: str, **how: Any) -> "Container":
        """Make a bundle, not yet a container; `how` as for `document`."""
        made = Bundle(self.path / name)
        made.path.mkdir(exist_ok=True)
        made.write(self.document(name, **how))
        container = Container(self, f"{os.getpid()}-{name}", made)
        self.containers.append(container)
        return container

    def started(self, name: str, **how: Any) -> "Container":
        """Make a bundle, and of it a running container."""
        container = self.container(name, **how)
        done = container.create()
        assert done.returncode == 0, done.stderr
        container.start()
        return container

    def document(
        self,
        name: str,
        pod: str | None = "p1",
        hints: dict[str, dict[str, str]] | None = None,
        at: str | None = "/data",
        options: Sequence[str] = ("rbind", "rw"),
        type: str = "bind",
        source: str = "/volumes/cache",
        mounts: Sequence[Document] = (),
        annotations: dict[str, str] | None = None,
        change: Callable[[Document], object] | None = None,
    ) -> Document:
        """Return config.json.

        hints: fields by the hint's name, one named ``cache`` by default.  at: where the
        volume is mounted, or None.  mounts: further ones.
        """
        document = default_spec()
        document["root"] = {"path": str(self.rootfs)}
        document["process"]["args"] = ["/bin/sleep", "600"]
        document["process"].pop("rlimits", None)
        document["linux"]["cgroupsPath"] = f"/sandboxfs-test-{WORKER}-{os.getpid()}-{name}"
        said = {"dev.sandboxfs.pod": pod} if pod else {}
        for hint, fields in ({"cache": HINT} if hints is None else hints).items():
            said |= {f"dev.sandboxfs.mount.{hint}.{key}": fields[key] for key in fields}
        document["annotations"] = said | (annotations or {})
        if at is not None:
            real = self.path / source.strip("/").replace("/", "-")
            if type == "bind":
                # The runtime binds it before our hook puts the volume in its place.
                real.mkdir(exist_ok=True)
                for key, value in document["annotations"].items():
                    if value == source:
                        document["annotations"][key] = str(real)
                source = str(real)
            document["mounts"].append(
                {"destination": at, "source": source, "type": type, "options": list(options)}
            )
        document["mounts"] += mounts
        launcher = str(LAUNCHER)
        environment = ["PATH=/usr/sbin:/usr/bin"]
        document["hooks"] = {
            hook: [{"path": launcher, "args": [launcher, "hook", hook], "env": environment}]
            for hook in self.hooks
        }
        if change is not None:
            change(document)
        return document

    def clean(self) -> None:
        """End everything that was started, then reap it."""
        for container in self.containers:
            container.delete()
        reap_orphans()
        # A runtime that was killed, or whose state is gone, leaves these.
        for above in ("", "*/"):
            for left in glob.glob(f"/sys/fs/cgroup/{above}sandboxfs-test-{WORKER}-{os.getpid()}-*"):
                os.rmdir(left)


class Container:
    """One container of a `Host`."""

    def __init__(self, host: Host, name: str, bundle: Bundle) -> None:
        self.host = host
        self.id = name
        self.bundle = bundle

    def spawn(self) -> "subprocess.Popen[bytes]":
        """Begin to create it; standard error goes to a file in the bundle."""
        with (self.bundle.path / "stderr").open("wb") as errors:
            return subprocess.Popen(
                self.host.command("create", "--bundle", str(self.bundle.path), self.id),
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
                env=ENVIRONMENT, cwd="/",
            )

    def create(self) -> Done:
        with self.spawn() as process:
            status = process.wait(60)
        text = (self.bundle.path / "stderr").read_text("utf-8", "replace")
        return subprocess.CompletedProcess([], status, "", text)

    def start(self) -> None:
        run(*self.host.command("start", self.id), check=0)

    def sh(self, script: str, check: int | None = 0) -> str:
        """Run a shell command in it; returns its output."""
        done = run(*self.host.command("exec", self.id, "/bin/sh", "-c", script), check=check)
        return done.stdout + (done.stderr if check is None else "")

    def state(self) -> Document:
        found: Document = json.loads(run(*self.host.command("state", self.id), check=0).stdout)
        return found

    @property
    def pid(self) -> int:
        return int(self.state()["pid"])

    def kill(self) -> None:
        """Kill its process behind the runtime's back: no poststop."""
        pid = self.pid
        os.kill(pid, 9)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                    break
            except FileNotFoundError:
                break
            time.sleep(0.01)

    def delete(self) -> None:
        """Take it away by the runtime, which runs poststop; no fault if it isn't there."""
        run(*self.host.command("delete", "--force", self.id))


def pods(*arguments: str) -> Any:
    """Return what ``sandboxfs pod … --json`` says."""
    done = run_cli("pod", *arguments, "--json", check=0)
    return json.loads(done.stdout)


def pods_here() -> Any:
    """Return the same without starting an interpreter for it."""
    return [pod.as_data(seen) for seen in store.all_pods()]


def store_mounts() -> list[str]:
    """Return where this mount namespace has something mounted in the store."""
    table = Path("/proc/self/mountinfo").read_text("utf-8").splitlines()
    return [line.split()[4] for line in table if line.split()[4].startswith(f"{STORE}/")]


def assert_nothing_left() -> None:
    """Assert that no pod is left: no mount, no record, no memory."""
    assert store_mounts() == []
    assert not STORE.exists() or os.listdir(STORE) in ([], ["lock"])


__all__ = ["HINT", "STORE", "Container", "Host", "assert_nothing_left", "on_host", "pods",
           "pods_here",
           "store_mounts"]
