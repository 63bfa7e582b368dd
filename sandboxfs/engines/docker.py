"""Docker: a runtime of daemon.json.  It has no place for hooks, and sends no annotations."""

import os
from glob import glob

from sandboxfs.engines import edits, runtimes
from sandboxfs.engines.record import Registration, read

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from sandboxfs.engines import Wish

CONFIG = "/etc/docker/daemon.json"
NAME = "sandboxfs"


def registration(wish: "Wish") -> Registration:
    """Return the registration of the runtime `sandboxfs`."""
    name, path = _default(wish)
    found = {name: path} if path is not None else {}
    made, programs = runtimes.with_programs("docker", wish.dest, wish.config, found)
    made.edits[_file(wish)] = edits.Key("runtimes", NAME, {"path": programs[name]})
    made.notes += [
        "Tell Docker: systemctl reload docker",
        f"docker run --runtime {NAME} gives a container its root from sandboxfs.",
    ]
    return made


def manifest(wish: "Wish") -> str:
    """Return the path of the list of what `registration` writes."""
    return runtimes.manifest("docker", wish.dest)


def users(wish: "Wish", ours: "Iterable[str]") -> "Iterator[str]":
    """Yield, in words, what of Docker's names the runtime or one of the paths `ours`."""
    path, document = _file(wish), _document(wish)
    if document.get("default-runtime") == NAME:
        yield f"{path} makes {NAME} the default runtime"
    paths = set(ours)
    for name, table in _runtimes(document).items():
        if name != NAME and table.get("path") in paths:
            yield f"{path} gives {table['path']} to the runtime {name}"
    root = document.get("data-root", "/var/lib/docker")
    for file in sorted(glob(os.path.join(root, "containers/*/hostconfig.json"))):
        content = read(file)
        if content and edits.json_object(file, content).get("Runtime") == NAME:
            container = os.path.basename(os.path.dirname(file))
            yield f"container {container[:12]} of Docker was made with it"


def _file(wish: "Wish") -> str:
    return os.path.realpath(wish.engine_config or CONFIG)


def _document(wish: "Wish") -> "dict[str, Any]":
    return edits.json_object(_file(wish), read(_file(wish)) or b"")


def _runtimes(document: "dict[str, Any]") -> "dict[str, dict[str, Any]]":
    """Return what a daemon.json says of runtimes, without what is no table."""
    tables = document.get("runtimes")
    return {name: table for name, table in tables.items() if isinstance(table, dict)} if (
        isinstance(tables, dict)) else {}


def _default(wish: "Wish") -> "tuple[str, str | None]":
    """Return name and path of the runtime that Docker uses by default."""
    document = _document(wish)
    name = document.get("default-runtime", "runc")
    path = _runtimes(document).get(name, {}).get("path")
    if name == NAME or path is None:
        return "runc", runtimes.on_path("runc")
    return name, runtimes.on_path(path)
