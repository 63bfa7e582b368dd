"""Joining existing namespaces by path, and time namespaces with offsets.

Loaded only for plans that ask for it.  The parent opens every path beforehand, by its own
view of the files; the child joins descriptors.  A pid or time namespace takes the
*children* of who joins it.

Sources: setns(2), ioctl_ns(2), time_namespaces(7), config-linux.md ("Namespaces").
"""

import errno
import os
from fcntl import ioctl

from sandboxfs.errors import MountError, ProcessError
from sandboxfs.kernel import abi
from sandboxfs.kernel.syscalls import setns, unshare
from sandboxfs.process.namespaces import FILES, FLAGS

NS_GET_NSTYPE = 0xB703

FOR_CHILDREN = ("pid", "time")


class Join:
    """One namespace to join: its `type`, `origin`, `path`, and the open descriptor."""

    __slots__ = ("fd", "origin", "path", "type")

    def __init__(self, type, origin, path, fd):
        self.type = type
        self.origin = origin
        self.path = path
        self.fd = fd

    def enter(self):
        """Join it; an OSError is the caller's."""
        setns(self.fd, FLAGS[self.type])

    def error(self, failure):
        """Return the `MountError` of a refusal."""
        hint = None
        if failure.errno == errno.EPERM:
            hint = (
                "joining needs CAP_SYS_ADMIN in the user namespace that owns the namespace; "
                "to get it, list that user namespace by its path too"
            )
        return MountError(self.origin, "setns", self.path, "", failure.errno, hint)


def open_all(plan):
    """Open the namespaces that the plan joins, the user namespace first, the mount one last."""
    found = []
    user = plan.user
    if user is not None and user.path is not None:
        index = next(
            (entry.index for entry in plan.spec.namespaces if entry.type == "user"), None
        )
        found.append(_open("user", _origin(index), user.path))
    entries = [entry for entry in plan.namespaces if entry.path is not None]
    # setns to a mount namespace moves the root and the working directory: last.
    for entry in sorted(entries, key=lambda entry: entry.type == "mount"):
        found.append(_open(entry.type, _origin(entry.index), entry.path))
    return found


def _origin(index):
    return "linux.namespaces" if index is None else f"linux.namespaces[{index}]"


def _open(type, origin, path):
    try:
        # O_NONBLOCK: the path may name anything, a FIFO without a writer too.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise MountError(origin, "open", path, "", error.errno) from None
    try:
        kind = ioctl(fd, NS_GET_NSTYPE)
    except OSError:
        os.close(fd)
        raise MountError(
            origin, "open", path, "is no namespace file", errno.EINVAL,
            hint=f"such files are /proc/PID/ns/{FILES[type]}, or binds of them",
        ) from None
    if kind != FLAGS[type]:
        os.close(fd)
        actual = next((name for name, flag in FLAGS.items() if flag == kind), "other")
        raise MountError(
            origin, "open", path, f"is a {actual} namespace, not a {type} one", errno.EINVAL
        )
    if type in ("mount", "user"):
        _refuse_own(type, origin, path, fd)
    return Join(type, origin, path, fd)


def _refuse_own(type, origin, path, fd):
    own, asked = os.stat(f"/proc/self/ns/{FILES[type]}"), os.fstat(fd)
    if (own.st_dev, own.st_ino) != (asked.st_dev, asked.st_ino):
        return
    os.close(fd)
    if type == "mount":
        raise MountError(
            origin, "setns", path, "is this process's own mount namespace: its root would be "
            "replaced", errno.EINVAL, hint="leave the path out, and a new one is made",
        )
    raise MountError(
        origin, "setns", path, "is this process's own user namespace, which can't be joined",
        errno.EINVAL, hint="leave the entry out",
    )


def enter(joins, types=None):
    """Join those of `types` (all by default); returns the ones refused with EPERM."""
    refused = []
    for join in joins:
        if types is not None and join.type not in types:
            continue
        try:
            join.enter()
        except OSError as error:
            if error.errno != errno.EPERM:
                raise join.error(error) from None
            refused.append(join)
    return refused


def enter_all(joins):
    """Join all of `joins`; EPERM is an error."""
    for join in joins:
        try:
            join.enter()
        except OSError as error:
            raise join.error(error) from None


def close(joins):
    """Close the descriptors."""
    for join in joins:
        os.close(join.fd)


class ForChildren:
    """The pid and time namespaces of the next child, set in this process, and undone.

    Within the ``with`` block every child lands in them; this process itself stays.
    """

    __slots__ = ("joins", "offsets", "undo")

    def __init__(self, joins, offsets):
        self.joins = [join for join in joins if join.type in FOR_CHILDREN]
        self.offsets = offsets
        self.undo = []

    def __enter__(self):
        try:
            if self.offsets:
                self._keep("time")
                new_time_namespace(self.offsets)
            for join in self.joins:
                self._keep(join.type)
                enter_all([join])
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _keep(self, type):
        own = os.open(f"/proc/self/ns/{FILES[type]}", os.O_RDONLY | os.O_CLOEXEC)
        self.undo.append((own, FLAGS[type]))

    def __exit__(self, _type, _value, _traceback):
        for own, flag in self.undo:
            setns(own, flag)
            os.close(own)
        self.undo.clear()

    def in_child(self):
        """Drop the child's copies of what undoes it."""
        for own, _flag in self.undo:
            os.close(own)
        self.undo.clear()


def new_time_namespace(offsets):
    """Give this process's next children a new time namespace with these offsets.

    offsets: dict from clock to (seconds, nanoseconds) (config-linux.md, "Offset for Time
    Namespace").
    """
    call, target = "unshare", "CLONE_NEWTIME"
    try:
        unshare(abi.CLONE_NEWTIME)
        call, target = "write", "/proc/self/timens_offsets"
        for clock, (seconds, nanoseconds) in offsets.items():
            line = f"{clock} {seconds} {nanoseconds}\n"
            fd = os.open(target, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, line.encode())
            finally:
                os.close(fd)
    except OSError as error:
        hint = None
        if error.errno == errno.ERANGE:
            hint = "with the offset the clock would be negative, or beyond 146 years"
        raise ProcessError("linux.timeOffsets", call, target, "", error.errno, hint) from None
