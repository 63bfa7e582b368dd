"""Our entry in a file that belongs to somebody else: put in, and taken out again.

An edit is made from the file without it (`apply`), and taken out of whatever the file has become
(`revert`).  Others may change the rest of the file meanwhile; who changes our entry is asked to
decide.
"""

import json
import tomllib

from sandboxfs.errors import SandboxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

BEGIN = "# >>> sandboxfs: written by `sandboxfs install`, removed by `sandboxfs uninstall`"
END = "# <<< sandboxfs"


class Block:
    """Lines at the end of a TOML file.

    lines: called with the parsed document without them, returns them (list of str).  start: what
    the file begins with where there is none.
    """

    kind = "block"

    def __init__(self, lines: "Callable[[dict[str, Any]], list[str]]", start: bytes = b"") -> None:
        self.lines = lines
        self.start = start

    def apply(self, path: str, base: "bytes | None") -> tuple[bytes, bytes]:
        """Return the content with the block, and what was added to `base`."""
        text = self.start if base is None else base
        if BEGIN.encode() in text:
            raise _changed(path)
        lines = [BEGIN, *self.lines(toml(path, text)), END]
        added = ("\n".join(lines) + "\n").encode()
        if text and not text.endswith(b"\n"):
            added = b"\n" + added
        try:
            toml(path, text + added)
        except SandboxError as error:
            raise SandboxError(
                "", "add a runtime to", path, f"its tables can't be added to ({error.text})",
                hint="write them as [tables] of their own, as `containerd config default` does",
            ) from error
        return text + added, added


class Key:
    """A key in the object `table` of a JSON file."""

    kind = "key"

    def __init__(self, table: str, name: str, value: object) -> None:
        self.table = table
        self.name = name
        self.value = value

    def apply(self, path: str, base: "bytes | None") -> tuple[bytes, bytes]:
        """Return the content with the key, and what was added to `base`."""
        document = json_object(path, base or b"")
        made = self.table not in document
        table = document.setdefault(self.table, {})
        if not isinstance(table, dict):
            raise SandboxError("", "read", path, f'"{self.table}" is no object')
        if self.name in table:
            raise SandboxError("", "", path, f'has "{self.name}" in "{self.table}", and it isn\'t '
                               "ours; nothing was touched", hint="rename it there")
        table[self.name] = self.value
        added = {"table": self.table, "name": self.name, "value": self.value, "made": made}
        return _dumped(document, base), json.dumps(added).encode()


def revert(kind: str, path: str, current: bytes, added: bytes) -> bytes:
    """Return `current` without what was added; it may be gone already.

    SandboxError: our entry was changed.
    """
    if kind == Block.kind:
        if added not in current and BEGIN.encode() in current:
            raise _changed(path)
        before, _added, after = current.partition(added)
        # The line that we had to end is followed by another one by now.
        return before + (b"\n" if after and added.startswith(b"\n") else b"") + after
    what = json.loads(added)
    document = json_object(path, current)
    table = document.get(what["table"])
    if not isinstance(table, dict) or what["name"] not in table:
        return current
    if table[what["name"]] != what["value"]:
        raise _changed(path)
    del table[what["name"]]
    if what["made"] and not table:
        del document[what["table"]]
    return _dumped(document, current)


def _changed(path: str) -> SandboxError:
    return SandboxError("", "", path, "holds an entry of ours that was changed, or that another "
                        "installation wrote; nothing was touched",
                        hint="take the entry out, or uninstall what wrote it")


def toml(path: str, text: bytes) -> "dict[str, Any]":
    """Return the parsed document; SandboxError with the line of a fault."""
    try:
        return tomllib.loads(text.decode())
    except ValueError as error:
        raise SandboxError("", "parse", path, str(error)) from error


def json_object(path: str, text: bytes) -> "dict[str, Any]":
    """Return the parsed object; an empty file has none of the keys."""
    try:
        document = json.loads(text) if text.strip() else {}
    except ValueError as error:
        raise SandboxError("", "parse", path, str(error)) from error
    if not isinstance(document, dict):
        raise SandboxError("", "parse", path, "is no JSON object")
    return document


def _dumped(document: "dict[str, Any]", like: "bytes | None") -> bytes:
    # As its owner indents it.
    lines = (like or b"").decode(errors="replace").splitlines()
    indents = (line[:-len(line.lstrip())] for line in lines if line.lstrip().startswith('"'))
    indent = next(filter(None, indents), "    ")
    return (json.dumps(document, indent=indent, ensure_ascii=False) + "\n").encode()
