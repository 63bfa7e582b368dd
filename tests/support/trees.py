"""Looking at directory trees: is the lower layer what it was?"""

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

Entry = dict[str, object]


def snapshot(tree: str | bytes | Path) -> dict[bytes, Entry]:
    """Return everything a write could change below `tree`, by path relative to it.

    Content, type, mode, owner, mtime in ns, device number, extended attributes (ACLs among
    them), number of links; b"" is the tree itself.  Mounts below it are entered.
    """
    root = os.fsencode(tree)
    found = {}
    waiting = [b""]
    while waiting:
        name = waiting.pop()
        path = os.path.join(root, name) if name else root
        found[name] = entry = _entry(path)
        if entry["type"] == stat.S_IFDIR:
            entry["names"] = names = sorted(os.listdir(path))
            waiting += [os.path.join(name, each) for each in names]
    return found


def differences(before: dict[bytes, Entry], after: dict[bytes, Entry]) -> list[str]:
    """Return how two snapshots differ, one line a difference."""
    lines = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old is None or new is None:
            lines.append(f"{name!r}: {'new' if old is None else 'gone'}")
            continue
        lines += [
            f"{name!r}: {field} was {old.get(field)!r}, is {new.get(field)!r}"
            for field in sorted(old.keys() | new.keys())
            if old.get(field) != new.get(field)
        ]
    return lines


@contextmanager
def untouched(*trees: str | bytes | Path) -> Iterator[None]:
    """Assert that none of `trees` is changed inside the block, on error paths neither."""
    before = [snapshot(tree) for tree in trees]
    try:
        yield
    finally:
        found = [
            f"{os.fsdecode(tree)}: {line}"
            for tree, old in zip(trees, before, strict=True)
            for line in differences(old, snapshot(tree))
        ]
        assert not found, "a tree that must stay as it is was changed:\n" + "\n".join(found)


def _entry(path: bytes) -> Entry:
    info = os.lstat(path)
    kind = stat.S_IFMT(info.st_mode)
    entry: Entry = {
        "type": kind,
        "mode": oct(stat.S_IMODE(info.st_mode)),
        "uid": info.st_uid,
        "gid": info.st_gid,
        "mtime": info.st_mtime_ns,
        "rdev": info.st_rdev,
        "links": info.st_nlink,
        "xattrs": {
            name: os.getxattr(path, name, follow_symlinks=False)
            for name in sorted(os.listxattr(path, follow_symlinks=False))
        },
    }
    if kind == stat.S_IFREG:
        entry["content"] = hashlib.sha256(Path(os.fsdecode(path)).read_bytes()).hexdigest()
    elif kind == stat.S_IFLNK:
        entry["content"] = os.readlink(path)
    return entry
