"""containerd: a runtime of its CRI plugin, with our program or with a base spec that has hooks.

Imported files are merged by table only from containerd 2 on; before, one that has anything of the
CRI plugin replaces all of it.  So the runtime goes into a file of its own where config.toml is of
version 3 (containerd 2) and imports a directory, else to the end of the file that has the plugin's
settings.
"""

import json
import os
from glob import glob

from sandboxfs.engines import edits, runtimes
from sandboxfs.engines.record import Registration, checked
from sandboxfs.errors import SandboxError
from sandboxfs.hooks.registration import ANNOTATION_PREFIXES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from sandboxfs.engines import Wish

CONFIG = "/etc/containerd/config.toml"
HANDLER = "sandboxfs"
DROP_IN = "50-sandboxfs.toml"
SHIM = "io.containerd.runc.v2"
# What a config.toml that isn't there begins with: all versions of containerd read it.
EMPTY = b"version = 2\n"
# The plugin whose settings hold the runtimes, by the version of config.toml: up to 2, and later.
_PLUGINS = ("io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime")


def registration(wish: "Wish") -> Registration:
    """Return the registration of the runtime `sandboxfs`, in front of containerd's default."""
    path = _default(wish)
    found = {} if path is None else {"runc": path}
    made, programs = runtimes.with_programs("containerd", wish.dest, wish.config, found)
    add(made, wish, [], [f"BinaryName = {json.dumps(programs['runc'])}"])
    return made


def real(wish: "Wish") -> list[str]:
    """Return the paths of the runtimes behind the engine, none of them ours."""
    return [path for path in (_default(wish),) if path]


def manifest(wish: "Wish") -> str:
    """Return the path of the list of what `registration` writes."""
    return runtimes.manifest("containerd", wish.dest)


def add(registration: Registration, wish: "Wish", settings: list[str], options: list[str]) -> None:
    """Have containerd's configuration name the runtime with these settings and options."""
    def lines(document: "dict[str, Any]") -> list[str]:
        with_runc = _version(document) < 3 and not _runtimes(document)
        lines = tables(_plugin(document), settings, options, with_runc)
        return lines if document else [EMPTY.decode().strip(), *lines]

    files = documents(wish)
    main = files[_file(wish)]
    if main and _version(main) < 2:
        raise SandboxError("", "add a runtime to", _file(wish), "is of version 1, which containerd "
                           "2 reads in part only", hint="`containerd config migrate` prints it in "
                           "a later version")
    for path, document in files.items():
        if HANDLER in _runtimes(document):
            raise SandboxError("", "add a runtime to", path, f"has a runtime {HANDLER} already",
                               hint="uninstall what wrote it (sandboxfs uninstall, with or without "
                               "--hooks), or take it out")
    place = _drop_in(_file(wish), main)
    if place is not None:
        text = [edits.BEGIN, f"version = {_version(main)}",
                *tables(_plugin(main), settings, options), edits.END]
        registration.files[place] = (("\n".join(text) + "\n").encode(), 0o644)
    else:
        # The last file that has settings of the plugin is the one whose settings count.
        path = next((path for path in reversed(files) if any(_plugins(files[path]))), _file(wish))
        registration.edits[path] = edits.Block(lines, EMPTY)
    registration.notes += [
        "Restart containerd: systemctl restart containerd",
        f"Pods choose the runtime by a RuntimeClass with handler: {HANDLER}",
    ]


def tables(plugin: str, settings: list[str], options: list[str],
           with_runc: bool = False) -> list[str]:
    """Return the lines for a configuration that has no runtime `sandboxfs` in this plugin.

    with_runc: name runc as well.  Before containerd 2 a file that names a runtime drops those
    that are built in, runc among them, and then the CRI plugin isn't loaded: its default runtime
    is missing (seen with 1.6 and 1.7).
    """
    globs = ", ".join(f'"{prefix}*"' for prefix in ANNOTATION_PREFIXES)
    table = f"[plugins.{json.dumps(plugin)}.containerd.runtimes"
    lines = [
        f"{table}.{HANDLER}]",
        f'  runtime_type = "{SHIM}"',
        *(f"  {each}" for each in settings),
        f"  pod_annotations = [{globs}]",
        f"  container_annotations = [{globs}]",
    ]
    if options:
        lines += [f"{table}.{HANDLER}.options]", *(f"  {each}" for each in options)]
    if with_runc:
        lines += ["# Naming one runtime drops those that are built in.",
                  f"{table}.runc]", f'  runtime_type = "{SHIM}"']
    return lines


def users(wish: "Wish", ours: "Iterable[str]") -> "Iterator[str]":
    """Yield, in words, what of containerd's configuration will name one of the paths `ours`.

    The files are looked at as they will be without our entry.
    """
    paths = set(ours)
    for path, document in documents(wish).items():
        for value in _strings(document):
            if value in paths:
                yield f"{path} names {value}"
        for plugin in _plugins(document):
            if plugin.get("containerd", {}).get("default_runtime_name") == HANDLER:
                yield f"{path} makes {HANDLER} the default runtime"


def state(wish: "Wish") -> str:
    """Return the directory of containerd's state."""
    found = documents(wish)[_file(wish)].get("state")
    return found if isinstance(found, str) and found else "/run/containerd"


def documents(wish: "Wish") -> "dict[str, dict[str, Any]]":
    """Return path → parsed content of config.toml and what it imports, without what is ours.

    In containerd's order.
    """
    found: dict[str, dict[str, Any]] = {}
    main = _file(wish)
    pending = [main]
    while pending:
        path = pending.pop(0)
        content = None if path in wish.recorded.digests else wish.recorded.without_edit(path)
        if path in found or (content is None and path != main):
            continue
        document = edits.toml(path, EMPTY if content is None else content)
        found[path] = document
        pending += [os.path.realpath(name) for pattern in document.get("imports", ())
                    for name in sorted(glob(os.path.join(os.path.dirname(path), pattern)))]
    return found


def _file(wish: "Wish") -> str:
    return os.path.realpath(wish.engine_config or CONFIG)


def _version(document: "dict[str, Any]") -> int:
    version = document.get("version", 1)
    return version if isinstance(version, int) else 1


def _plugin(document: "dict[str, Any]") -> str:
    """Return the plugin whose settings hold the runtimes in a document of this version."""
    return _PLUGINS[_version(document) > 2]


def _plugins(document: "dict[str, Any]") -> "Iterator[dict[str, Any]]":
    """Yield the settings of the plugins that hold the runtimes."""
    plugins = document.get("plugins", {})
    for name in _PLUGINS:
        if isinstance(plugins.get(name), dict):
            yield plugins[name]


def _runtimes(document: "dict[str, Any]") -> "dict[str, Any]":
    found: dict[str, Any] = {}
    for plugin in _plugins(document):
        found |= plugin.get("containerd", {}).get("runtimes", {})
    return found


def _drop_in(path: str, document: "dict[str, Any]") -> "str | None":
    """Return where a file of our own is merged with config.toml, None where none is."""
    for pattern in document.get("imports", ()) if _version(document) >= 3 else ():
        place = os.path.join(os.path.dirname(path), pattern)
        if os.path.basename(place) == "*.toml" and "*" not in os.path.dirname(place):
            return checked(os.path.join(os.path.dirname(place), DROP_IN))
    return None


def _default(wish: "Wish") -> "str | None":
    """Return the path of the program behind containerd's default runtime."""
    name = "runc"
    tables: dict[str, Any] = {}
    for document in documents(wish).values():
        for plugin in _plugins(document):
            name = plugin.get("containerd", {}).get("default_runtime_name") or name
        tables |= _runtimes(document)
    table = tables.get(name, {})
    program = table.get("options", {}).get("BinaryName")
    if name == HANDLER or table.get("runtime_type", SHIM) != SHIM or not program:
        program = "runc"
    return runtimes.on_path(program)


def _strings(value: object) -> "Iterator[str]":
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)
