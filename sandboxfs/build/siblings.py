"""Binds that go onto names beside each other and ask for the same: long lists are mostly of those.

What is known of one is known of all: which directory they go into, which one their sources lie in,
which calls each takes.  So a list of them is gathered and attached by loops that do nothing else.
"""

from sandboxfs.kernel import abi
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import HAS_OPEN_TREE_ATTR
from sandboxfs.plan.operations import Bind

# From so many on it is worth it.
MANY = 3
_NO_NAMES = frozenset((b"", b".", b".."))
_DIRECTORY = abi.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_HERE, _SETATTR = abi.AT_FDCWD, abi.SYS_mount_setattr


class Siblings:
    """Plain binds, one after the other, onto names in one directory.

    operations: the `Bind`s; names: theirs in the directory; below: its path, with a slash at its
    end.  sources, flags, settings: as `build.compiled.Compiled` has them of each.
    """

    __slots__ = ("below", "directory", "flags", "names", "operations", "settings", "sources")

    def __init__(self, below, operations, names, fields):
        self.below = below
        self.operations = operations
        self.names = names
        _target, source, self.flags, self.settings, _plain = fields[operations[0]]
        # With a slash at its end only a directory is opened, so that it is known to be one.
        self.sources = [fields[step][1] + b"/" for step in operations]
        head = source.rpartition(b"/")[0] + b"/"
        names = b"\0".join([b"", *self.sources]).replace(b"\0" + head, b"\0")
        self.directory = None
        if names.count(b"/") == len(operations) and b"\0/" not in names:
            self.directory = head
            self.sources = names[1:].split(b"\0")

    def clone(self, call, opened):
        """Clone the sources; returns a descriptor for each, below 0 for what is no directory.

        call: syscall(2).  opened: a list that gets the descriptors.  Raises OSError.
        """
        number, attributes, _rest = clone_call(self.flags, self.settings)
        flags, here, start, keep = self.flags, _HERE, len(opened), opened.append
        if self.directory is not None:
            here = os.open(self.directory, _DIRECTORY)
        try:
            for source in self.sources:
                keep(call(number, here, source, flags, attributes, 32))
        finally:
            clones = opened[start:]
            if -1 in clones:
                opened[start:] = [fd for fd in clones if fd >= 0]
            if here >= 0:
                os.close(here)
        return clones

    def set(self, call, clones):
        """Give the clones what the first call couldn't; returns whether all have it."""
        _number, _attributes, rest = clone_call(self.flags, self.settings)
        for how, attributes in rest:
            for fd in clones:
                if call(_SETATTR, fd, b"", how, attributes, 32) < 0:
                    return False
        return True


def clone_call(flags, settings):
    """Return the number of the call that clones a bind's source, its attributes, and the rest.

    flags: open_tree(2)'s.  settings: all of the bind; the rest are those that the call can't set.
    """
    if HAS_OPEN_TREE_ATTR and settings and not (flags ^ settings[0][0]) & abi.AT_RECURSIVE:
        return abi.SYS_open_tree_attr, settings[0][1], settings[1:]
    return abi.SYS_open_tree, None, settings


def grouped(operations, fields):
    """Return operations in their order, with `Siblings` instead of binds that are some.

    fields: those of `build.compiled.Compiled`.
    """
    result: list = []
    beside: list = []
    below, last, asked = b"", -1, None
    for step in operations:
        if type(step) is not Bind:
            asked = None
            result += together(below, beside, fields)
            beside = []
            result.append(step)
            continue
        target, _source, _flags, settings, plain = fields[step]
        slash = target.rfind(b"/")
        if settings is not asked or slash != last or not target.startswith(below):
            result += together(below, beside, fields)
            beside = []
            below, last, asked = target[:slash + 1], slash, settings
        if plain and not step.no_follow:
            beside.append(step)
        else:
            asked = None
            result += [*together(below, beside, fields), step]
            beside = []
    return result + together(below, beside, fields)


def together(below, binds, fields):
    """Return binds in one directory as a list of one `Siblings`, or as they are."""
    if len(binds) < MANY:
        return binds
    names = [fields[step][0][len(below):] for step in binds]
    if not _NO_NAMES.isdisjoint(names):
        return binds
    return [Siblings(below, binds, names, fields)]
