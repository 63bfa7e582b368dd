"""podman: containers.conf(5) for the runtime, oci-hooks(5) for the hooks.

The runtime is named by its absolute path.  So podman takes what it can do from the last part of
the path, and fails if nothing is there: a name would be looked for in PATH.
"""

import json
import os
import subprocess
from glob import escape, glob

from sandboxfs.engines import edits, runtimes
from sandboxfs.engines.record import Registration, checked, read

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from sandboxfs.engines import Wish

FILE = "50-sandboxfs.conf"
SYSTEM = ("/usr/share/containers/containers.conf", "/etc/containers/containers.conf")
DROP_INS = "/etc/containers/containers.conf.d"
_LIKELY = ("/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin", "/sbin", "/bin")


def registration(wish: "Wish") -> Registration:
    """Return the registration that makes a program of ours podman's default runtime."""
    found, default = _found(wish)
    made, programs = runtimes.with_programs("podman", wish.dest, wish.config, found)
    path = _file(wish)
    lines = ["# Written by `sandboxfs install`: the runtime that podman uses unless it is told",
             "# another one (podman --runtime crun).", "[engine]",
             f"runtime = {json.dumps(programs[default])}", ""]
    made.files[path] = ("\n".join(lines).encode(), 0o644)
    made.notes.append("Containers that podman makes from now on get their root from "
                              f"sandboxfs; podman --runtime {default} makes one without.")
    files = _files(wish)
    for other, value in _settings(wish):
        if files.index(other) > files.index(path):
            made.notes.append(f"But {other} comes later, and makes {value} the runtime: "
                                      "take that out.")
    return made


def real(wish: "Wish") -> list[str]:
    """Return the paths of the runtimes behind the engine, none of them ours."""
    return [*_found(wish)[0].values()]


def manifest(wish: "Wish") -> str:
    """Return the path of the list of what `registration` writes."""
    return runtimes.manifest("podman", wish.dest)


def users(wish: "Wish", ours: "Iterable[str]") -> "Iterator[str]":
    """Yield, in words, what of podman's names one of the paths `ours`."""
    paths = set(ours)
    for path, document in _documents(wish):
        engine = document.get("engine", {})
        if engine.get("runtime") in paths:
            yield f"{path} makes {engine['runtime']} the runtime"
        for name, programs in engine.get("runtimes", {}).items():
            yield from (f"{path} gives {each} to the runtime {name}"
                        for each in programs if each in paths)
        # podman fails if a directory of hooks that it was told of isn't there.
        for directory in set(engine.get("hooks_dir", ())) & set(wish.recorded.made):
            yield f"{path} names {directory} as directory of hooks"
    for name, program in () if wish.hooks else _containers():
        if program in paths:
            yield f"container {name} of podman was made with {program}"


def _file(wish: "Wish") -> str:
    if wish.engine_config is not None:
        return os.path.join(wish.engine_config, FILE)
    if os.geteuid() == 0:
        return os.path.join(DROP_INS, FILE)
    return checked(os.path.join(_users(), "containers.conf.d", FILE))


def _users() -> str:
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(runtimes.home(), ".config")
    return os.path.join(base, "containers")


def _files(wish: "Wish") -> list[str]:
    """Return what podman reads, in its order, with our file among it."""
    directories = [DROP_INS, wish.engine_config or DROP_INS]
    files = [[path] for path in SYSTEM]
    if os.geteuid() != 0:
        files.append([os.path.join(_users(), "containers.conf")])
        directories.insert(1, os.path.join(_users(), "containers.conf.d"))
    own = _file(wish)
    for directory in dict.fromkeys(directories):
        found = glob(os.path.join(escape(directory), "*.conf"))
        files.append(sorted({*found, own} if directory == os.path.dirname(own) else found))
    return [path for each in files for path in each]


def _documents(wish: "Wish") -> "Iterator[tuple[str, dict[str, Any]]]":
    """Yield path and content of what podman reads, in its order, but for our file."""
    own = _file(wish)
    for path in _files(wish):
        content = None if path == own else read(os.path.realpath(path))
        if content is not None:
            yield path, edits.toml(path, content)


def _settings(wish: "Wish") -> "Iterator[tuple[str, str]]":
    """Yield the files that name a default runtime, and which."""
    for path, document in _documents(wish):
        value = document.get("engine", {}).get("runtime")
        if isinstance(value, str) and value:
            yield path, value


def _found(wish: "Wish") -> tuple[dict[str, str], str]:
    """Return name → path of the runtimes that podman finds, and the name of its default."""
    default: str | None = None
    tables: dict[str, list[str]] = {}
    for _path, document in _documents(wish):
        engine = document.get("engine", {})
        default = engine.get("runtime") or default
        tables |= engine.get("runtimes", {})
    found: dict[str, str] = {}
    for name in dict.fromkeys([*filter(None, [default]), *runtimes.NAMES]):
        likely = [name] if os.path.isabs(name) else [f"{each}/{name}" for each in _LIKELY]
        path = runtimes.executable([*tables.get(name, ()), *likely]) or runtimes.on_path(name)
        if path is not None and not path.startswith(runtimes.directory("podman", wish.dest)):
            found[name] = path
    return found, default if default and default in found else next(iter(found), "")


def _containers() -> "Iterator[tuple[str, str]]":
    """Yield name and runtime of the containers of the user who asks, stopped ones too."""
    program = runtimes.on_path("podman")
    data = "/var/lib"
    if os.geteuid() != 0:
        data = os.environ.get("XDG_DATA_HOME") or os.path.join(runtimes.home(), ".local/share")
    if program is None or not os.path.isdir(os.path.join(data, "containers/storage")):
        return
    listed = subprocess.run([program, "ps", "-aq", "--no-trunc"], capture_output=True, text=True,
                            check=False)
    names = listed.stdout.split()
    if not names:
        return
    shown = subprocess.run([program, "container", "inspect", "--format",
                            "{{.Name}} {{.OCIRuntime}}", *names], capture_output=True, text=True,
                           check=False)
    for line in shown.stdout.splitlines():
        name, _, runtime_path = line.partition(" ")
        yield name, runtime_path
