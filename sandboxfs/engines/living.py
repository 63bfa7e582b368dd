"""Who uses what we installed: containers that live, and pods with volumes of ours."""

import os
from glob import escape, glob

from sandboxfs.errors import SandboxError
from sandboxfs.hooks import pods as store
from sandboxfs.spec import load

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# Where containerd keeps a bundle for each living container, Docker's among them.
_STATES = ("/run/containerd", "/run/docker/containerd/daemon")
_BUNDLES = "io.containerd.runtime.v2.task/*/*"


def containers(paths: "Iterable[str]", states: "Iterable[str]" = ()) -> "Iterator[str]":
    """Yield, in words, the living containers that one of `paths` will be asked about again.

    An engine starts the runtime that made a container to stop and to delete it, and poststop hooks
    when it is gone.  states: further directories of a containerd's state.
    """
    wanted = [os.fsencode(path) for path in paths]
    for state in dict.fromkeys([*_STATES, *states]):
        for bundle in sorted(glob(os.path.join(escape(state), _BUNDLES))):
            # What the shim was told, and the hooks.
            if _names(bundle, ("runtime", "options.json", "config.json"), wanted):
                namespace, name = bundle.split("/")[-2:]
                yield f"container {name[:12]} of containerd lives (namespace {namespace})"
    for pid in filter(str.isdigit, os.listdir("/proc")):
        arguments = _arguments(pid)
        # podman and CRI-O have a conmon for each container, with the runtime and the bundle.
        if os.path.basename(arguments[0]) != b"conmon" or b"-b" not in arguments[:-1]:
            continue
        bundle = os.fsdecode(arguments[arguments.index(b"-b") + 1])
        if set(wanted) & set(arguments) or _names(bundle, ("config.json",), wanted):
            container = arguments[arguments.index(b"-c") + 1] if b"-c" in arguments[:-1] else b"?"
            yield f"container {os.fsdecode(container)[:12]} lives (its conmon is process {pid})"


def pods() -> "Iterator[str]":
    """Yield, in words, the pods of ours that have living containers."""
    for seen in store.all_pods():
        if seen.living:
            yield f"pod {seen.key} lives, {len(seen.living)} of its containers use its volumes"


def _names(bundle: str, files: "Iterable[str]", wanted: "list[bytes]") -> bool:
    for name in files:
        try:
            # Anybody's process may call itself so, and name a FIFO or a file without an end.
            content = load.read("/", os.path.join(bundle, name))
        except SandboxError:
            continue
        if any(path in content for path in wanted):
            return True
    return False


def _arguments(pid: str) -> "list[bytes]":
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().split(b"\0")
    except OSError:
        return [b""]
