"""CRI-O: a drop-in of crio.conf.d(5) for the runtime, podman's files for the hooks.

All annotations of a pod reach the runtime.  `allowed_annotations` is for CRI-O's own ones: it
refuses to start with others in that list.
"""

import json
import os
from glob import escape, glob

from sandboxfs.engines import edits, runtimes
from sandboxfs.engines.record import Registration, read

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from sandboxfs.engines import Wish

FILE = "50-sandboxfs.conf"
MAIN = "/etc/crio/crio.conf"
DROP_INS = "/etc/crio/crio.conf.d"
HANDLER = "sandboxfs"


def registration(wish: "Wish") -> Registration:
    """Return the registration of a runtime handler `sandboxfs`."""
    name, path = _default(wish)
    found = {name: path} if path is not None else {}
    made, programs = runtimes.with_programs("cri-o", wish.dest, wish.config, found)
    program = programs[name]
    lines = ["# Written by `sandboxfs install`.", f"[crio.runtime.runtimes.{HANDLER}]",
             f"runtime_path = {json.dumps(program)}", 'runtime_type = "oci"',
             f'runtime_root = "/run/{os.path.basename(program)}"', ""]
    made.files[_file(wish)] = ("\n".join(lines).encode(), 0o644)
    made.notes += [
        "Restart CRI-O: systemctl restart crio",
        f"Pods choose the runtime by a RuntimeClass with handler: {HANDLER}",
    ]
    return made


def real(wish: "Wish") -> list[str]:
    """Return the paths of the runtimes behind the engine, none of them ours."""
    return [path for path in (_default(wish)[1],) if path]


def manifest(wish: "Wish") -> str:
    """Return the path of the list of what `registration` writes."""
    return runtimes.manifest("cri-o", wish.dest)


def users(wish: "Wish", ours: "Iterable[str]") -> "Iterator[str]":
    """Yield, in words, what of CRI-O's configuration names the handler or one of `ours`."""
    paths = set(ours)
    own = _file(wish)
    for path, settings in _settings(wish):
        if settings.get("default_runtime") == HANDLER and own in paths:
            yield f"{path} makes {HANDLER} the default runtime"
        for name, table in settings.get("runtimes", {}).items():
            if table.get("runtime_path") in paths:
                yield f"{path} gives {table['runtime_path']} to the runtime {name}"


def _file(wish: "Wish") -> str:
    return os.path.join(wish.engine_config or DROP_INS, FILE)


def _settings(wish: "Wish") -> "Iterator[tuple[str, dict[str, Any]]]":
    """Yield path and `[crio.runtime]` of what CRI-O reads, in its order, but for our file."""
    drop_ins = os.path.join(escape(wish.engine_config or DROP_INS), "*")
    for path in (MAIN, *sorted(glob(drop_ins))):
        content = None if path == _file(wish) else read(os.path.realpath(path))
        if content is not None:
            yield path, edits.toml(path, content).get("crio", {}).get("runtime", {})


def _default(wish: "Wish") -> "tuple[str, str | None]":
    """Return name and path of the runtime that CRI-O uses by default."""
    default = ""
    tables: dict[str, Any] = {}
    for _path, settings in _settings(wish):
        default = settings.get("default_runtime") or default
        tables |= settings.get("runtimes", {})
    for name in filter(None, (default, *runtimes.NAMES)):
        path = tables.get(name, {}).get("runtime_path") or runtimes.on_path(name)
        if path and path != HANDLER and runtimes.executable([path]):
            return name, path
    return default, None
