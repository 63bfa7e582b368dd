"""Binds that go onto names beside each other and ask for the same: long lists are mostly of those.

What is known of one is known of all: which directory they go into, which one their sources lie in,
which calls each takes.  So a list of them is gathered and attached by loops that do nothing else.
"""

import sys

from sandboxfs.kernel import abi, submounts
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import HAS_OPEN_TREE_ATTR, filesystem_type, flags_of, packed
from sandboxfs.plan.operations import Bind

# From so many on it is worth it; to open their sources' directory; to make a template of it.
MANY, A_DOZEN, VERY_MANY = 3, 12, 128
_NO_NAMES = frozenset((b"", b".", b".."))
_NOT_INSIDE = frozenset((b"/", b"./", b"../"))
_DIRECTORY = abi.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_HERE, _SETATTR = abi.AT_FDCWD, abi.SYS_mount_setattr
_CLONE, _ATTR = abi.OPEN_TREE_CLONE | abi.OPEN_TREE_CLOEXEC, abi.SYS_open_tree_attr
_TREE = abi.AT_EMPTY_PATH | abi.AT_RECURSIVE
# struct mount_attr
_NO_LINKS = packed(abi.MOUNT_ATTR_NOSYMFOLLOW, 0, abi.MS_PRIVATE, 0)
_LINKS = packed(0, abi.MOUNT_ATTR_NOSYMFOLLOW, 0, 0)


class Siblings:
    """Plain binds, one after the other, onto names in one directory.

    operations: the `Bind`s; names: theirs in the directory; below: its path, with a slash at its
    end.  sources: with a slash at their ends, in `directory` unless that is None.  flags, settings:
    as `build.compiled.Compiled` has them of each.
    """

    __slots__ = ("below", "directory", "flags", "names", "operations", "settings", "sources")

    def __init__(self, below, operations, names, fields):
        self.below = below
        self.operations = operations
        self.names = names
        _target, source, self.flags, self.settings, _plain = fields[operations[0]]
        # With a slash at its end only a directory is opened, so that it is known to be one.
        self.sources = [fields[step][1] + b"/" for step in operations]
        self.directory = None
        if len(operations) >= A_DOZEN:
            self.find_directory(source.rpartition(b"/")[0] + b"/")

    def find_directory(self, head):
        """Take `head` as the directory of the sources if all are names in it."""
        names = b"\0".join([b"", *self.sources]).replace(b"\0" + head, b"\0")
        found = names[1:].split(b"\0")
        # Not where a name leads out of it, as it does in any directory but a clone's.
        if names.count(b"/") == len(found) and _NOT_INSIDE.isdisjoint(found):
            self.directory, self.sources = head, found

    def clone(self, call, opened):
        """Clone the sources, with some of their settings; `set` gives them the rest.

        call: syscall(2).  opened: a list that gets the descriptors.  Returns a descriptor for each,
        below 0 for what is no directory, and the settings that are left.  Raises OSError.
        """
        number, attributes, rest = clone_call(self.flags, self.settings)
        flags, here = self.flags, _HERE
        if self.directory is not None:
            here = _open_directory(self.directory)
            if here < 0:
                return [-1] * len(self.sources), rest
        template, start, keep = -1, len(opened), opened.append
        try:
            if self.may_have_template(here):
                template = self.template(call, here)
            origin = here
            if template >= 0:
                origin = template
                number, flags, attributes, rest = _ATTR, _CLONE, _LINKS, []
            for source in self.sources:
                keep(call(number, origin, source, flags, attributes, 32))
        finally:
            clones = opened[start:]
            if -1 in clones:
                opened[start:] = [fd for fd in clones if fd >= 0]
            for fd in (template, here):
                if fd >= 0:
                    os.close(fd)
        return clones, rest

    def may_have_template(self, directory):
        """Whether one clone of the sources' directory can have the settings of all.

        It costs as much as some dozens of the calls that it saves: one for each recursive bind
        with a flag for its own mount alone.  Nothing may be mounted below the sources, and what is
        cloned be in no peer group.
        """
        if (len(self.operations) < VERY_MANY or self.directory is None or not HAS_OPEN_TREE_ATTR
                or [how for how, _attributes in self.settings] != [_TREE, abi.AT_EMPTY_PATH]):
            return False
        return (
            all(propagation in (0, abi.MS_PRIVATE) and not changed & abi.MOUNT_ATTR_NOSYMFOLLOW
                for changed, propagation in map(_asked, self.settings))
            and not flags_of(directory) & abi.MOUNT_ATTR_NOSYMFOLLOW
            # What it mounts where it is asked for something is mounted beside a clone.
            and filesystem_type(directory) != abi.AUTOFS_SUPER_MAGIC
            and submounts.is_surely_bare(directory)
        )

    def template(self, call, directory):
        """Return a private clone of the sources' directory with their settings, or below 0.

        Its own clones have them, too.  No symlink is followed in it, which would lead to what
        doesn't have them.
        """
        template = call(_ATTR, directory, b"", _CLONE | abi.AT_EMPTY_PATH, _NO_LINKS, 32)
        is_set = False
        try:
            is_set = template >= 0 and self.set(call, [template], self.settings)
        finally:
            if template >= 0 and not is_set:
                os.close(template)
        return template if is_set else -1

    def set(self, call, clones, settings):
        """Give clones some settings; returns whether all have them."""
        for how, attributes in settings:
            for fd in clones:
                if call(_SETATTR, fd, b"", how, attributes, 32) < 0:
                    return False
        return True


def _open_directory(path):
    try:
        return os.open(path, _DIRECTORY)
    except OSError:
        return -1  # each bind by itself says why


def _asked(setting):
    """Return the flags that a setting changes, and its propagation."""
    words = [int.from_bytes(setting[1][at:at + 8], sys.byteorder) for at in (0, 8, 16)]
    return words[0] | words[1], words[2]


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
