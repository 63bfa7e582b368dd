"""A kubelet's side of the CRI, as small as the tests need it, and containerd with that plugin.

Messages are written by hand from the numbers in Kubernetes' api.proto (runtime.v1).  grpc lives in
a process of its own: its threads and descriptors would be in every test's way.
"""

import base64
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.runtimes.registration import install
from tests.runtimes.runtimes import Containerd, new_id, settle
from tests.runtimes.spaces import HAS_FRONT, Space
from tests.support import CHECKOUT, run
from tests.support.commands import ENVIRONMENT
from tests.support.namespace import KEPT, children

# -- messages: name → (number, what is in it; None: a text, number or flag; {}: a map) ---------

Schema = Mapping[str, tuple[int, Any]]
_NAMESPACES: Schema = {"network": (1, None), "pid": (2, None), "ipc": (3, None)}
_POD: Schema = {
    "metadata": (1, {"name": (1, None), "uid": (2, None), "namespace": (3, None)}),
    "log_directory": (3, None), "annotations": (7, {}),
    "linux": (8, {"cgroup_parent": (1, None),
                  "security_context": (2, {"namespace_options": (1, _NAMESPACES)})}),
}
_CONTAINER: Schema = {
    "metadata": (1, {"name": (1, None)}), "image": (2, {"image": (1, None)}),
    "command": (3, None), "args": (4, None),
    "mounts": (7, {"container_path": (1, None), "host_path": (2, None), "readonly": (3, None),
                   "propagation": (5, None)}),
    "annotations": (10, {}),
    "linux": (15, {"security_context": (2, {
        "capabilities": (1, {"add_capabilities": (1, None)}),
        "namespace_options": (3, _NAMESPACES), "readonly_rootfs": (7, None),
        "masked_paths": (13, None), "readonly_paths": (14, None)})}),
}
_ID: Schema = {"id": (1, None)}
REQUESTS: Mapping[str, Schema] = {
    "Version": {},
    "RunPodSandbox": {"config": (1, _POD), "runtime_handler": (2, None)},
    "StopPodSandbox": _ID, "RemovePodSandbox": _ID,
    "CreateContainer": {"pod": (1, None), "config": (2, _CONTAINER), "sandbox_config": (3, _POD)},
    "StartContainer": _ID, "RemoveContainer": _ID,
    "StopContainer": {**_ID, "timeout": (2, None)},
    "ExecSync": {**_ID, "cmd": (2, None), "timeout": (3, None)},
}
NODE = 2
# What a kubelet sends for containers that aren't privileged.
_PATHS = {
    "masked_paths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list",
                     "/sys/firmware"],
    "readonly_paths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
}
PRIVATE, HOST_TO_CONTAINER, BIDIRECTIONAL = range(3)


def encode(schema: Schema, values: Mapping[str, Any]) -> bytes:
    """Return a message in protobuf's encoding."""
    out = b""
    for name, value in values.items():
        number, inside = schema[name]
        if inside == {}:
            entry = {"key": (1, None), "value": (2, None)}
            value = [{"key": key, "value": each} for key, each in value.items()]
            inside = entry
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, int):
                out += _varint(number << 3) + _varint(each)
                continue
            content = encode(inside, each) if isinstance(each, Mapping) else each.encode()
            out += _varint(number << 3 | 2) + _varint(len(content)) + content
    return out


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def decode(message: bytes) -> dict[int, Any]:
    """Return the fields of a message, each once, by number: bytes or an integer."""
    fields: dict[int, Any] = {}
    stream = io.BytesIO(message)

    def number() -> int:
        value, shift = 0, 0
        while True:
            (byte,) = stream.read(1)
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while stream.tell() < len(message):
        key = number()
        fields[key >> 3] = stream.read(number()) if key & 7 == 2 else number()
    return fields


# -- asking --------------------------------------------------------------------------------


class Refused(Exception):
    """What the engine said instead of doing it."""


class Client:
    """The process that speaks grpc."""

    def __init__(self, path: Path) -> None:
        words = f"from tests.runtimes.cri import serve; serve({str(path)!r})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            cwd=CHECKOUT, env=ENVIRONMENT)
        KEPT.add(self.process.pid)

    def ask(self, method: str, **values: Any) -> dict[int, Any]:
        """Call a method of the runtime service; returns the fields of its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = base64.b64encode(encode(REQUESTS[method], values)).decode()
        self.process.stdin.write(json.dumps([method, request]).encode() + b"\n")
        self.process.stdin.flush()
        error, answer = json.loads(self.process.stdout.readline())
        if error:
            raise Refused(f"{method}: {error}")
        return decode(base64.b64decode(answer))

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        KEPT.remove(self.process.pid)


def serve(path: str) -> None:
    """Pass requests on, a line each, until there are no more."""
    import grpc  # type: ignore[import-untyped, unused-ignore]

    with grpc.insecure_channel(f"unix://{path}") as channel:
        for line in sys.stdin:
            method, request = json.loads(line)
            call = channel.unary_unary(f"/runtime.v1.RuntimeService/{method}")
            try:
                message = call(base64.b64decode(request), timeout=60)
                answer = ["", base64.b64encode(message).decode()]
            except grpc.RpcError as error:
                answer = [error.details() or str(error.code()), ""]
            print(json.dumps(answer), flush=True)


# -- the engine ----------------------------------------------------------------------------


class Cri(Containerd):
    """containerd as the engine of a node: pods, with images of its own.

    Its handlers are the ways: ``plain``, ``hooks``, ``runtime``.
    """

    PAUSE, IMAGE = "docker.io/tests/pause:1", "docker.io/tests/image:1"

    def __init__(self, home: Path, name: str, space: Space) -> None:
        self.registered = home / f"{name}-registered"
        self.hooks = install(self.registered, space=space)
        super().__init__(home, name, space)
        self.client = Client(self.socket)

    def configuration(self) -> str:
        base = f'base_runtime_spec = "{self.registered}/containerd/sandboxfs-base-spec.json"'
        handlers = {"plain": ("", ""), "hooks": (base, "")}
        if HAS_FRONT:
            handlers["runtime"] = ("", f'BinaryName = "{self.front}"')
        head = _CONFIGURATION.format(home=self.home, socket=self.socket, pause=self.PAUSE)
        return head + "".join(_HANDLER.format(name=name, more=more, options=options)
                              for name, (more, options) in handlers.items())

    def import_images(self, rootfs: Path) -> None:
        """Import an image of a rootfs, and one that holds pods."""
        for name, command in ((self.PAUSE, ["/bin/busybox", "sleep", "1000000"]),
                              (self.IMAGE, ["/bin/sh"])):
            archive = self.home / "image.tar"
            _write_image(archive, rootfs, name, command)
            run(*self.ctr("--namespace=k8s.io", "images", "import", str(archive)),
                timeout=60, check=0)
            archive.unlink()

    def rootfs(self, container: str) -> Path:
        """Return where a container's image is mounted on the host."""
        return self.home / "state/io.containerd.runtime.v2.task/k8s.io" / container / "rootfs"

    def execute(self, container: str, script: str) -> str:
        """Run a script in a container; returns what it printed."""
        answer = self.client.ask(
            "ExecSync", id=container, cmd=["/bin/sh", "-c", script], timeout=20)
        return (answer.get(1, b"") + answer.get(2, b"")).decode()

    @contextmanager
    def pod(self, way: str, annotations: Mapping[str, str] | None = None) -> Iterator["Pod"]:
        """Run a pod, with the machine's network, until the block ends."""
        made, before = Pod(self, way, annotations or {}), children()
        try:
            made.start()
            yield made
        finally:
            made.remove()
            settle(before)

    def kept(self) -> list[str]:
        tasks = self.home / "state/io.containerd.runtime.v2.task/k8s.io"
        return [str(each) for each in tasks.iterdir()] if tasks.is_dir() else []

    def close(self) -> None:
        if hasattr(self, "client"):
            self.client.close()
        super().close()


class Pod:
    """A pod, and the containers that run in it."""

    def __init__(self, cri: Cri, way: str, annotations: Mapping[str, str]) -> None:
        self.cri = cri
        self.way = way
        self.id = ""
        self.containers: list[str] = []
        self.config: dict[str, Any] = {
            "metadata": {"name": "tests", "uid": f"uid-{way}", "namespace": "default"},
            "annotations": dict(annotations),
            "linux": {"cgroup_parent": f"/{new_id()}",
                      "security_context": {"namespace_options": {"network": NODE}}},
        }

    def start(self) -> None:
        """Raise `Refused` if it doesn't."""
        self.id = self.cri.client.ask(
            "RunPodSandbox", config=self.config, runtime_handler=self.way)[1].decode()

    def run(self, script: str = "", name: str = "one", **config: Any) -> str:
        """Start a container that runs a script and stays; returns its id."""
        security = {"namespace_options": {"network": NODE}, **_PATHS, **config.pop("security", {})}
        made = self.cri.client.ask(
            "CreateContainer", pod=self.id, sandbox_config=self.config,
            config={"metadata": {"name": name}, "image": {"image": self.cri.IMAGE},
                    "command": ["/bin/sh", "-c", f"{script}\nsleep 1000000"],
                    "linux": {"security_context": security}, **config})[1].decode()
        self.containers.append(made)
        self.cri.client.ask("StartContainer", id=made)
        return made

    def remove(self) -> None:
        for container in self.containers:
            self.cri.client.ask("StopContainer", id=container, timeout=0)
            self.cri.client.ask("RemoveContainer", id=container)
        if self.id:
            self.cri.client.ask("StopPodSandbox", id=self.id)
            self.cri.client.ask("RemovePodSandbox", id=self.id)
        # The engine leaves the pod's cgroups to the kubelet.
        parent = self.config["linux"]["cgroup_parent"]
        for hierarchy in Path("/sys/fs/cgroup").iterdir():
            if (path := Path(f"{hierarchy}{parent}")).is_dir():
                path.rmdir()


def _write_image(path: Path, rootfs: Path, name: str, command: list[str]) -> None:
    """Write an image of one layer, as ``docker save`` does."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        tar.add(rootfs, ".")
    content = layer.getvalue()
    config = json.dumps({
        "architecture": "amd64", "os": "linux", "config": {"Cmd": command},
        "rootfs": {"type": "layers",
                   "diff_ids": [f"sha256:{hashlib.sha256(content).hexdigest()}"]},
    }).encode()
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    files = {"config.json": config, "layer.tar": content,
             "manifest.json": json.dumps(manifest).encode()}
    with tarfile.open(path, "w") as tar:
        for each, text in files.items():
            info = tarfile.TarInfo(each)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))


# Version 2, which containerd 2 reads as well.
_CONFIGURATION = """
version = 2
root = "{home}/root"
state = "{home}/state"
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.nri.v1.nri"]
[grpc]
  address = "{socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  disable_cgroup = true
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    conf_dir = "{home}/no-cni"
    bin_dir = "{home}/no-cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "plain"
"""
_HANDLER = """
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{name}]
  runtime_type = "io.containerd.runc.v2"
  pod_annotations = ["dev.sandboxfs.*"]
  container_annotations = ["dev.sandboxfs.*"]
  {more}
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{name}.options]
    {options}
"""
