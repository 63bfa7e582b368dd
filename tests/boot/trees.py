"""A tree with everything a file system can hold, and what of it must survive a move.

Used in guests, too: nothing but the standard library.
"""

import os
import stat
import struct
import zlib
from pathlib import Path

LONG = 11 << 20  # more than one piece of a long file
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)  # cap_net_bind_service=ep


def make_tree(root, attributes=True):
    """Fill the directory `root` (a path).  attributes: with extended ones (a ramfs has none)."""
    root = os.fsencode(root)

    def give(name, key, value, **options):
        if attributes:
            os.setxattr(path(name), key, value, **options)

    def path(name):
        return os.path.join(root, name)

    for name in (b"a", b"a/b", b"a/b/c", b"empty", b"sticky", b"\xff\xfe"):
        os.mkdir(path(name))
    for name, content in ((b"a/file", b"text\n"), (b"a/none", b""), (b"\xff\xfe/\x80\n", b"x")):
        _write(path(name), content)
    _write(path(b"a/long"), os.urandom(1 << 20) * 11 + b"tail")
    _write(path(b"setuid"), b"#!")
    os.chown(path(b"setuid"), 1234, 5678)
    os.chmod(path(b"setuid"), 0o4755)
    give(b"setuid", b"security.capability", CAPABILITY)
    give(b"a/long", b"security.capability", CAPABILITY)
    give(b"a", b"trusted.of-a-directory", b"\x00\xff")
    os.chmod(path(b"sticky"), 0o3777)
    os.chmod(path(b"a/none"), 0)
    _sparse(path(b"a/sparse"))
    for name in (b"one", b"a/two", b"a/b/c/three"):
        if name != b"one":
            os.link(path(b"one"), path(name))
        else:
            _write(path(name), b"1" * 5000)
    for number, name in enumerate((b"long1", b"a/long2", b"a/b/long3")):
        if number:
            os.link(path(b"long1"), path(name))
        else:
            _write(path(name), os.urandom(1 << 20) * 6)
    give(b"long1", b"trusted.linked", b"yes")
    os.symlink(b"\xe4/nowhere", path(b"link"))
    os.symlink(b"x" * 300, path(b"a/long-link"))
    os.link(path(b"link"), path(b"a/same-link"), follow_symlinks=False)
    give(b"link", b"trusted.of-a-link", b"1", follow_symlinks=False)
    os.mknod(path(b"null"), stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(path(b"a/disk"), stat.S_IFBLK | 0o640, os.makedev(7, 77))
    os.link(path(b"null"), path(b"a/null-too"))
    os.mkfifo(path(b"a/fifo"), 0o622)
    os.mknod(path(b"a/socket"), stat.S_IFSOCK | 0o600)
    os.lchown(path(b"link"), 3, 4)
    os.chown(path(b"a/fifo"), 5, 6)
    moment = 1_000_000_000_123_456_789
    for directory, directories, files in os.walk(root, topdown=False):
        for name in (*directories, *files, b"."):
            moment += 1_000_000_007
            times = (moment, moment - 5)
            os.utime(os.path.join(directory, name), ns=times, follow_symlinks=False)


def _write(path, content):
    with open(path, "wb") as file:
        file.write(content)


def _sparse(path):
    with open(path, "wb") as file:
        file.truncate(8 << 20)
        for offset in (8192, 4 << 20, (8 << 20) - 4096):
            file.seek(offset)
            file.write(b"data")


def description(root, skipped=()):
    """Return everything about a tree that a move has to keep, by path (bytes) relative to it.

    Types, modes, owners, times, device numbers, attributes, content, holes, and which names are
    one file.  skipped: names (bytes) in the root that aren't looked at.
    """
    root = os.fsencode(root)
    found, same = {}, {}
    waiting = [b""]
    while waiting:
        name = waiting.pop()
        path = os.path.join(root, name) if name else root
        status = os.lstat(path)
        found[name] = entry = _entry(path, status)
        if entry["type"] == stat.S_IFDIR:
            names = [each for each in os.listdir(path) if name or each not in skipped]
            entry["names"] = sorted(names)
            waiting += [os.path.join(name, each) for each in names]
        elif status.st_nlink > 1:
            same.setdefault(status.st_ino, []).append(name)
    for names in same.values():
        for name in names:
            found[name]["same"] = sorted(names)
    return found


def _entry(path, status):
    entry = {
        "type": stat.S_IFMT(status.st_mode),
        "mode": oct(stat.S_IMODE(status.st_mode)),
        "owner": (status.st_uid, status.st_gid),
        "mtime": status.st_mtime_ns,
        "device": status.st_rdev,
        "attributes": {
            name: os.getxattr(path, name, follow_symlinks=False)
            for name in _attribute_names(path)
        },
    }
    if entry["type"] == stat.S_IFREG:
        # Before it is read: on a ramfs reading fills holes.
        entry["pages"] = status.st_blocks // 8
        # Cheap where every instruction is emulated.
        entry["content"] = zlib.crc32(Path(os.fsdecode(path)).read_bytes())
    elif entry["type"] == stat.S_IFLNK:
        entry["content"] = os.readlink(path)
    return entry


def _attribute_names(path):
    try:
        return sorted(os.listxattr(path, follow_symlinks=False))
    except OSError:  # a ramfs has none
        return []


def differences(before, after):
    """Return how two descriptions differ, a line each."""
    lines = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old is None or new is None:
            lines.append(f"{name!r}: {'new' if old is None else 'gone'}")
        else:
            lines += [
                f"{name!r}: {key} was {old.get(key)!r}, is {new.get(key)!r}"
                for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
            ]
    return lines


def used(path):
    """Return the bytes that are allocated on the file system of `path`."""
    status = os.statvfs(Path(path))
    return (status.f_blocks - status.f_bfree) * status.f_frsize
