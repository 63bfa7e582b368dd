"""A whole build as one list of calls, from the lower's directory to the last read-only path.

For a plan that a program builds again and again: what `gather` and `assemble` come to in the usual
case, without their looking for the other ones.  Where anything is unusual (a call fails, something
is mounted below the lower, its directory has an owner or a mode of its own) the attempt ends, what
it opened is closed, and those two build the root or say what is wrong.  So nothing is decided
here, as in `build.calls`.
"""

import _stat as stat
import sys
from time import time

from sandboxfs.build import engine as engines
from sandboxfs.build.assemble import INHERITED, makes_as_root
from sandboxfs.build.calls import cloned, never, quick
from sandboxfs.build.gather import OF_A_DEVICE, OF_A_LOWER
from sandboxfs.build.preparation import prepared
from sandboxfs.build.root import Root
from sandboxfs.build.siblings import Siblings, clone_call
from sandboxfs.kernel import abi
from sandboxfs.kernel import system as os
from sandboxfs.kernel.foreign import QuickFunction, c_int, string_buffer
from sandboxfs.kernel.submount_watch import Watch
from sandboxfs.kernel.syscalls import flags_of, function, has_threads, libc
from sandboxfs.plan.operations import Bind, Filesystem, Lower, Mask, Overlay

_openat = function("openat")
_PATH = abi.O_PATH | os.O_CLOEXEC
_CLONE = abi.OPEN_TREE_CLONE | abi.OPEN_TREE_CLOEXEC | abi.AT_EMPTY_PATH
_CLONE_NAMED = (abi.OPEN_TREE_CLONE | abi.OPEN_TREE_CLOEXEC | abi.AT_SYMLINK_NOFOLLOW
                | abi.AT_NO_AUTOMOUNT)
_LISTXATTRAT = abi.SYS_listxattrat
_OPEN_TREE, _SETATTR, _HERE = abi.SYS_open_tree, abi.SYS_mount_setattr, abi.AT_FDCWD
# stx_rdev_major and stx_rdev_minor.
_NULL = (1).to_bytes(4, sys.byteorder) + (3).to_bytes(4, sys.byteorder)
# Of struct statx: stx_uid, stx_gid and stx_mode, of a directory like the ones root makes.
_statx = libc.function("statx", QuickFunction)
_HOW = abi.AT_EMPTY_PATH | abi.AT_STATX_DONT_SYNC
_WANTED = abi.STATX_BASIC_STATS | abi.STATX_MNT_ID | abi.STATX_MNT_ID_UNIQUE
# Seconds; the coarsest clock of a file system has two (FAT).
_LONG_AGO = 3
_ROOTS = bytes(8) + (stat.S_IFDIR | 0o755).to_bytes(2, sys.byteorder)


def build(plan):
    """Return the `Root` of a plan, or None where it takes `gather` and `assemble`."""
    free = plan.compiled.usual
    try:
        # Another thread may be building the same plan; and the umask is the whole process's.
        if free is None or has_threads() or not makes_as_root():
            return None
        usual = free.pop() if free else Usual(plan)
    except OSError:
        return None  # too few descriptors even for that: the long way says where they end
    opened = []
    umask = os.umask(0)
    try:
        usual.watch = plan.compiled.watch = plan.compiled.watch or Watch()
        if usual.build(opened):
            free.append(usual)
            return usual.root(plan, opened)
        plan.compiled.usual = None
    except BaseException:
        while opened:
            os.close(opened.pop())
        raise
    finally:
        usual.watch = None
        os.umask(umask)
    while opened:
        os.close(opened.pop())
    return None


class Usual:
    """The calls of a plan; used by one build at a time.

    entries: as those of `Calls`, None where the plan isn't one for this; gathered: those of them
    that open what the plan takes from the host, and null those for /dev/null.  outcomes: what
    becomes of the plan's operations, but for what is missing.  watch: the plan's, during a build.
    bare: the lower's identity and time of change, when it was found without attributes.
    """

    __slots__ = (
        "bare", "calls", "entries", "gathered", "here", "null", "outcomes", "status", "watch",
    )

    def __init__(self, plan):
        self.calls = calls = prepared(plan)
        self.here = c_int(-1)
        self.status = string_buffer(256)
        self.gathered: list = []
        self.null: list = []
        self.entries: list | None = None
        self.bare: tuple | None = None
        self.watch = None
        if self.is_possible(plan):
            self.gathered = self.gathering(plan)
            self.join()
        self.outcomes = [(calls.joined, "overlay", "")]
        for operation, _end, outcome, _mount in calls.steps:
            if type(operation) is Siblings:
                self.outcomes += [(bind, "bind", "") for bind in operation.operations]
            elif outcome is not None:
                self.outcomes.append(outcome)

    def join(self):
        """Take what `calls` has by now, after what is gathered."""
        calls = self.calls
        # The only lower has nothing mounted in it, or the build isn't this one.
        self.entries = [*self.gathered, *(calls.overlay or ()), *[
            entry for entry in calls.entries if entry[1] != calls.has_no_submounts]]
        for index, (slot, call, arguments) in enumerate(self.entries):
            if call is quick and arguments[0] == _OPEN_TREE and arguments[1] is calls.null:
                # Gathered in this namespace, the mount itself can be the first one that hides.
                self.entries[index] = None, self.use_null, (slot,)
                break

    def is_possible(self, plan):
        """Whether every operation of a plan has calls of its own, and takes nothing else."""
        if (plan.user is not None or plan.live is not None or plan.engine == "attached"
                or self.calls.overlay is None
                or any(call is never for _slot, call, _arguments in self.calls.entries)):
            return False
        for step in plan.operations:
            kind = type(step)
            if ((kind is Lower and not step.submounts)
                    or (kind is Overlay and step.upper is not None)
                    or (kind is Filesystem and step.fallback_bind is not None)
                    or (kind is Bind and not plan.compiled.fields[step][4])):
                return False
        return sum(type(step) is Lower for step in plan.operations) == 1

    # -- the entries of the gathering ----------------------------------------------------

    def gathering(self, plan):
        """Return the entries that open what the plan takes from the host."""
        calls, masked = self.calls, False
        entries: list = []
        for step in plan.compiled.operations:
            kind = type(step)
            if kind is Lower:
                here = self.here
                entries.append((here, _openat, (_HERE, os.fsencode(step.path), _PATH)))
                entries.append((None, self.is_usual_lower, ()))
                entries += cloned(calls.lower, here, b"", _CLONE, OF_A_LOWER)
            elif kind is Bind or (kind is Siblings and step.operations[0] in calls.sources):
                # Some siblings are prepared each by itself.
                entries += [(None, self.clone_bind, self.bind_arguments(
                    bind, *plan.compiled.fields[bind][1:4]))
                    for bind in ([step] if kind is Bind else step.operations)]
            elif kind is Siblings:
                entries.append((None, self.clone_siblings, (step,)))
            elif kind is Mask and not masked:
                masked = True
                self.null = [
                    *cloned(calls.null, _HERE, b"/dev/null", _CLONE_NAMED, OF_A_DEVICE),
                    (None, self.is_null, ()),
                ]
                entries += self.null
        return entries

    def is_usual_lower(self):
        """Return 0 for a directory that a new upper takes after by itself, with no mounts below.

        A new directory of the upper belongs to root, has mode 0755 and neither label nor ACL.
        """
        here = self.here
        if _statx(here, b"", _HOW, _WANTED, self.status) < 0:
            return -1
        status = self.status[:152]
        if status[20:30] != _ROOTS:
            return -1
        identity = status[32:40] + status[136:152]  # inode, device, mount
        changed = status[96:108]
        if (identity, changed) != self.bare:
            if quick(_LISTXATTRAT, here, b".", 0, None, 0) != 0:
                return -1
            # A change of attributes changes this time, but for one right after another.
            seconds = int.from_bytes(changed[:8], sys.byteorder, signed=True)
            self.bare = (identity, changed) if time() - seconds > _LONG_AGO else None
        if self.watch.knows(identity):
            return 0
        fd = here.value
        # A mount's flags are watched, too.
        return 0 if not flags_of(fd) & INHERITED and self.watch.is_bare(fd, identity) else -1

    def is_null(self):
        """Return 0 if what was cloned is the host's /dev/null (runc CVE-2025-31133)."""
        if _statx(self.calls.null, b"", _HOW, _WANTED, self.status) < 0:
            return -1
        status = self.status[:136]
        kind = int.from_bytes(status[28:30], sys.byteorder)
        return 0 if stat.S_ISCHR(kind) and status[128:] == _NULL else -1

    def use_null(self, slot):
        slot.value = self.calls.null.value
        return 0

    def bind_arguments(self, operation, source, flags, settings):
        """Return the arguments of `clone_bind`, the first settings among its call's if it can."""
        call, attributes, more = clone_call(flags, settings)
        rest = flags, attributes, 32
        return (operation, self.calls.sources[operation],
                (call, _HERE, source + b"/", *rest), (call, _HERE, source, *rest), more)

    def clone_bind(self, operation, slot, directory, anything, settings):
        """Clone a bind's source, with its flags; returns below 0 where that fails."""
        # With a slash at its end only a directory is opened, so that it is known to be one.
        fd = quick(*directory)
        if fd >= 0:
            self.calls.directories.add(operation)
        else:
            fd = quick(*anything)
            if fd < 0:
                return fd
        self.calls.opened.append(fd)
        slot.value = fd
        for how, attributes in settings:
            if quick(_SETATTR, fd, b"", how, attributes, 32) < 0:
                return -1
        return 0

    def clone_siblings(self, siblings):
        """Clone the sources of many binds, with their flags; returns below 0 where that fails."""
        calls = self.calls
        clones, rest = siblings.clone(quick, calls.opened)
        if -1 in clones:
            return self.clone_others(siblings, clones)
        calls.directories.update(siblings.operations)
        calls.gathered.update(zip(siblings.operations, clones, strict=True))
        return 0 if siblings.set(quick, clones, rest) else -1

    def clone_others(self, siblings, clones):
        """Do the same where some are no directories; clones: those of the directories, or -1."""
        calls = self.calls
        number, attributes, _rest = clone_call(siblings.flags, siblings.settings)
        for index, operation in enumerate(siblings.operations):
            if clones[index] < 0:
                source = os.fsencode(operation.source)
                fd = quick(number, _HERE, source, siblings.flags, attributes, 32)
                if fd < 0:
                    return fd
                calls.opened.append(fd)
                clones[index] = fd
            else:
                calls.directories.add(operation)
            calls.gathered[operation] = clones[index]
        return 0 if siblings.set(quick, clones, siblings.settings) else -1

    # -- ahead of a build ----------------------------------------------------------------

    def go_ahead(self, watch):
        """Make what needs nothing of the host, and look at the lower.  Raises OSError.

        For a process that does nothing but wait for the one build of the plan.  watch: a `Watch`,
        or a `Look` if it is to be over soon: to end a `Watch` takes long.
        """
        self.watch = watch
        _slot, _call, arguments = self.gathered[0]
        self.here.value = _openat(*arguments)
        if self.here.value >= 0:
            self.is_usual_lower()
            os.close(self.here.value)
        self.gathered = [entry for entry in self.gathered if entry not in self.null]
        for slot, call, arguments in self.null:
            result = call(*arguments)
            if result < 0:
                # The masks of files wait, and say what is wrong.
                if self.calls.null.value >= 0:
                    os.close(self.calls.null.value)
                self.calls.null.value = -1
                break
            if slot is not None:
                slot.value = result
        umask = os.umask(0)
        try:
            done = self.calls.go_ahead()
        finally:
            os.umask(umask)
        if not done:
            for fd in self.calls.take():
                os.close(fd)
        self.join()

    # -- a build -------------------------------------------------------------------------

    def build(self, opened):
        """Make the calls; returns whether all were made.  opened: a list for the descriptors."""
        calls = self.calls
        if self.entries is None:
            return False
        calls.directories, calls.gathered = set(), {}
        calls.outcomes, calls.submounts = [*calls.ahead_outcomes], False
        calls.opened = opened
        calls.leave_places()
        keep = opened.append
        entries = self.entries
        rest = iter(entries)
        try:
            for slot, call, arguments in rest:
                result = call(*arguments)
                if result < 0:
                    count = calls.skipped(call, arguments)
                    if count is None:
                        return False
                    rest.__setstate__(len(entries) - rest.__length_hint__() + count)
                elif slot is not None:
                    slot.value = result
                    keep(result)
        except OSError:
            return False
        return True

    def root(self, plan, opened):
        """Return the `Root` that was built."""
        calls = self.calls
        engine = engines.Detached(opened.append, calls.joined.size)
        engine.scratch, engine.uppers = calls.scratch.value, 1
        return Root(plan, engine, calls.root.value, opened, [*self.outcomes, *calls.outcomes])
