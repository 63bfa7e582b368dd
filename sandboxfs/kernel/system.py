"""What the hot modules use of `os`, under its names and with its meanings.

`import os` alone costs a seventh of what a bare interpreter takes to start: it makes two dozen
abstract classes for its mapping of the environment.  Everything else of it is the built-in
module `posix`.  Hot modules say ``from sandboxfs.kernel import system as os``.
"""

import posix
import sys
from posix import *  # noqa: F403 - os does the same
from posix import _exit as _exit  # noqa: PLC0414 - for others, as os has it

devnull = "/dev/null"
_ENCODING = sys.getfilesystemencoding()
_ERRORS = sys.getfilesystemencodeerrors()
# os.environ decodes; posix's dict of bytes is something else, and under its name a trap.
del environ  # noqa: F821


def fsencode(name):
    """Return a path (str, bytes or path-like) as bytes."""
    name = posix.fspath(name)
    return name.encode(_ENCODING, _ERRORS) if isinstance(name, str) else name


def fsdecode(name):
    """Return a path (str, bytes or path-like) as str."""
    name = posix.fspath(name)
    return name.decode(_ENCODING, _ERRORS) if isinstance(name, bytes) else name


def _marks(name):
    return ("/", ".") if isinstance(name, str) else (b"/", b".")


class path:  # noqa: N801 - the name of a module in os
    """The functions of `os.path` that are used, for str and bytes."""

    @staticmethod
    def isabs(name):
        return posix.fspath(name)[:1] in ("/", b"/")

    @staticmethod
    def join(first, *others):
        result = posix.fspath(first)
        slash, _dot = _marks(result)
        for other in others:
            other = posix.fspath(other)
            if other.startswith(slash):
                result = other
            elif not result or result.endswith(slash):
                result += other
            else:
                result += slash + other
        return result

    @staticmethod
    def normpath(name):
        name = posix.fspath(name)
        slash, dot = _marks(name)
        parents = dot + dot
        kept = []
        for part in name.split(slash):
            if part == parents and kept and kept[-1] != parents:
                kept.pop()
            elif part not in (slash[:0], dot) and (part != parents or name[:1] != slash):
                kept.append(part)
        # POSIX lets exactly two slashes at the start mean something of their own.
        start = slash * (2 if name[:2] == slash * 2 and name[2:3] != slash else 1)
        return (start if name[:1] == slash else slash[:0]) + slash.join(kept) or dot

    @staticmethod
    def abspath(name):
        name = posix.fspath(name)
        if not path.isabs(name):
            here = posix.getcwd() if isinstance(name, str) else posix.getcwdb()
            name = path.join(here, name)
        return path.normpath(name)

    @staticmethod
    def dirname(name):
        name = posix.fspath(name)
        slash, _dot = _marks(name)
        head = name[:name.rfind(slash) + 1]
        return head.rstrip(slash) or head

    @staticmethod
    def exists(name):
        try:
            posix.stat(name)
        except (OSError, ValueError):
            return False
        return True

    @staticmethod
    def lexists(name):
        try:
            posix.lstat(name)
        except (OSError, ValueError):
            return False
        return True

    @staticmethod
    def samestat(one, other):
        return (one.st_ino, one.st_dev) == (other.st_ino, other.st_dev)
