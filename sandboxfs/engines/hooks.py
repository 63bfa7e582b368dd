"""The hooks as files that engines read: their places and their contents.

podman and CRI-O read the same directory of JSON files (oci-hooks(5), schema 1.0.0), so one
registration is for both.  containerd takes hooks from the spec that its CRI plugin starts every
container's from (``base_runtime_spec``).  runc and crun read each bundle's own config.json.
"""

import json
import os

from sandboxfs.cli import launcher
from sandboxfs.engines import containerd
from sandboxfs.engines.record import Registration, checked
from sandboxfs.hooks import fitness
from sandboxfs.hooks import registration as formats

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sandboxfs.engines import Wish

# engine → (which of the two registrations, where that goes by default).
ENGINES = {
    "podman": ("oci", "/usr/share/containers/oci/hooks.d"),
    "cri-o": ("oci", "/usr/share/containers/oci/hooks.d"),
    "containerd": ("containerd", "/etc/containerd"),
}
LAUNCHER_DIRECTORY = "/usr/local/libexec"


def registration(wish: "Wish") -> Registration:
    """Return the registration of the hooks."""
    kind, _default = ENGINES[wish.engine]
    program = launcher_path(wish)
    found = Registration(manifest(wish))
    found.files[program] = (launcher.content(), 0o755)
    if kind == "containerd":
        _containerd(found, wish, program)
        return found
    for stage in formats.STAGES:
        path = os.path.join(_directory(wish), f"sandboxfs-{stage}.json")
        entry = formats.hooks_d(program, stage, wish.config, wish.annotated)
        found.files[path] = (_json(entry), 0o644)
    return found


def manifest(wish: "Wish") -> str:
    """Return the path of the list of what `registration` writes."""
    return os.path.join(_directory(wish), f"sandboxfs-{ENGINES[wish.engine][0]}-hooks.sha256")


def launcher_path(wish: "Wish") -> str:
    """Return where the launcher goes that the hooks are started by."""
    name = f"sandboxfs-{ENGINES[wish.engine][0]}-hook"
    return checked(wish.launcher or os.path.join(wish.dest or LAUNCHER_DIRECTORY, name))


def _directory(wish: "Wish") -> str:
    return checked(wish.dest or ENGINES[wish.engine][1])


def _containerd(found: Registration, wish: "Wish", program: str) -> None:
    path = os.path.join(_directory(wish), "sandboxfs-base-spec.json")
    found.files[path] = (_json(formats.with_hooks(wish.base, program, wish.config)), 0o644)
    settings = [f"base_runtime_spec = {json.dumps(path)}"]
    if wish.dest is None or wish.engine_config is not None:
        # Lines that an operator wrote, as they had to once, are theirs.
        by_hand = [text for text in containerd.users(wish, [path]) if path in text]
        if by_hand:
            found.notes += [*by_hand, "Restart containerd: systemctl restart containerd"]
        else:
            containerd.add(found, wish, settings, [])
        return
    # A directory was asked for, so nothing outside of it is touched.
    plugin = "io.containerd.grpc.v1.cri"
    lines = containerd.tables(plugin, settings, [], with_runc=True)
    found.notes += [
        "What is left to do: add these lines to containerd's configuration, and restart it.", "",
        "# /etc/containerd/config.toml, which begins with version = 2.  In one with version = 3",
        '# (containerd 2) the tables begin with plugins."io.containerd.cri.v1.runtime".  Where it',
        "# names runc already, leave that table out.",
        *lines,
    ]


def advice(runtimes: list[str]) -> list[str]:
    """Return, in words, why hooks can't be right with the runtimes of an engine, by their paths."""
    return [found for path in runtimes if (found := fitness.finding(path)) is not None]


def _json(document: object) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode("ascii")
