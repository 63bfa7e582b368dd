"""What a runtime has mounted, taken over into the new root; and that root, laid over the old.

The new root is attached over the rootfs first; then mounts are moved from below it onto the same
places of it, since a mount that is attached can't be moved into a detached tree.  In the end what
is there is compared with what was there: every mount carried over, nothing else.  On any failure
they are moved back, and the new root is taken away.
"""

import _stat as stat
import errno
from time import monotonic

from sandboxfs.build import assemble, mounts
from sandboxfs.build import gather as gatherer
from sandboxfs.build.engine import detach
from sandboxfs.build.failure import worded
from sandboxfs.errors import HookError, MountError, shown
from sandboxfs.kernel import abi, fscontext, mounttable, resolve, submounts
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import (
    more_descriptors,
    mount_id,
    mount_setattr,
    move_mount,
    open_tree,
    set_group,
)
from sandboxfs.plan import operations as kinds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxfs.build.assemble import _Assembly
    from sandboxfs.kernel.mountinfo import MountRecord
    from sandboxfs.plan.live import Live

_CLONE = abi.OPEN_TREE_CLONE | abi.AT_EMPTY_PATH
_RDONLY = abi.MOUNT_ATTR_RDONLY
_INHERITED = (
    abi.MOUNT_ATTR_NOSUID | abi.MOUNT_ATTR_NODEV | abi.MOUNT_ATTR_NOEXEC
    | abi.MOUNT_ATTR_NOSYMFOLLOW
)


# -- gather: the caller's side ---------------------------------------------------------------


def rootfs(materials, operation, here):
    """Keep the rootfs (a descriptor) as what everything is carried from; returns a clone of it.

    The clone is of its own mount alone.  MountError if the path leads to another mount by now.
    """
    live = materials.live
    if mount_id(here)[0] not in (live.root.id, live.root.old_id):
        raise MountError(operation.origin, "open", operation.path,
                         "leads to another mount than a moment ago", errno.ESTALE)
    materials.rootfs = here
    unbindable = live.root.propagation & abi.MS_UNBINDABLE
    if unbindable:
        mount_setattr(here, 0, 0, abi.MS_PRIVATE)
    try:
        fd = materials.own(open_tree(here, b"", _CLONE))
    finally:
        if unbindable:
            mount_setattr(here, 0, 0, abi.MS_UNBINDABLE)
    mount_setattr(fd, 0, 0, abi.MS_PRIVATE)
    return fd


# -- assemble: the container's side, which is the same here ----------------------------------


def attach(assembly, operation):
    """Move one mount, with all below it, to its place in the new root; or overlay a clone of it.

    One at a time: a thousand of them need no thousand descriptors.
    """
    place = assembly.place
    source = place.find(operation)
    try:
        status = os.fstat(source)
        directory = stat.S_ISDIR(status.st_mode)
        target = assembly.maker.link_itself(assembly.compiled[operation][0], directory)
        try:
            if stat.S_ISDIR(os.fstat(target).st_mode) != directory:
                mounts.mismatch(assembly, OSError(errno.ENOTDIR, ""), operation, "what is mounted "
                                f"there is {'a directory' if directory else 'a file'}")
            attach_one = _overlay if operation.overlay else _move
            kind = attach_one(assembly, operation, source, target)
        finally:
            os.close(target)
        assembly.outcomes.append((operation, kind, ""))
        if kind == "move" and operation.type == "proc":
            # No link may lead into it (see `check_link`).
            assembly.attached.append((assembly.own(os.dup(source)), operation, False))
    finally:
        os.close(source)


def _move(assembly: "_Assembly", operation: kinds.Carry, source: int, target: int) -> str:
    place = assembly.place
    try:
        move_mount(source, target)
    except OSError as error:
        if error.errno != errno.EINVAL or operation.split:
            raise
    else:
        place.undo.append(lambda: place.move_back(assembly.root, operation))
        return "move"
    # What the host has mounted below the rootfs is locked there in a user namespace; what lies on
    # a shared mount stays there, too.  Neither is the runtime's to change later.
    clone = _clone_of(assembly, operation, source)
    try:
        move_mount(clone, target)
    finally:
        os.close(clone)
    return "bind"


def _overlay(assembly: "_Assembly", operation: kinds.Carry, source: int, target: int) -> str:
    clone = _cloned(source, False)
    try:
        mount_setattr(clone, _RDONLY, 0, abi.MS_PRIVATE)
        mount, own = mounts.overlay_bind(assembly, operation, clone, os.fstat(clone))
        if not own:
            mount = assembly.own(os.dup(mount))
    finally:
        os.close(clone)
    move_mount(mount, target)
    assembly.place.made(mount)
    if own:
        assembly.attached.append((mount, operation, True))
    return "overlay" if own else "bind"


def _clone_of(assembly: "_Assembly", operation: kinds.Carry, source: int) -> int:
    place = assembly.place
    unbindable = []
    try:
        for destination in operation.unbindable:
            path = os.fsencode(destination)
            number = [record.id for record in place.live.records if record.mountpoint == path
                      and record.propagation & abi.MS_UNBINDABLE][-1]
            unbindable.append(place.find(operation, destination, number))
            mount_setattr(unbindable[-1], 0, 0, abi.MS_PRIVATE)
        return _cloned(source, bool(operation.below))
    finally:
        while unbindable:
            fd = unbindable.pop()
            try:
                mount_setattr(fd, 0, 0, abi.MS_UNBINDABLE)
            finally:
                os.close(fd)


def _cloned(fd: int, recursive: bool) -> int:
    try:
        return open_tree(fd, b"", _CLONE | (abi.AT_RECURSIVE if recursive else 0))
    except OSError as error:
        if error.errno == errno.EINVAL:
            error.hint = ("the mounts below it are locked together with it, and can't be carried "
                          "over one by one: leave the annotations of what lies below it out")
        raise


def set_aside(assembly: "_Assembly", operation: kinds.SetAside) -> None:
    """Take a mount that is made anew out of what was moved."""
    place = assembly.place
    here = place.found(assembly.root, operation.destination, operation.mount)
    try:
        shelf = place.shelf(assembly, operation, stat.S_ISDIR(os.fstat(here).st_mode))
        try:
            move_mount(here, shelf)
        finally:
            os.close(shelf)
        place.undo.append(lambda: place.move_back(assembly.root, operation))
    finally:
        os.close(here)


def make_readonly(assembly: "_Assembly", operation: kinds.ReadonlyMount) -> None:
    place, root = assembly.place, assembly.root

    def change(attributes: int, cleared: int) -> None:
        fd = resolve.open_in_root(root, os.fsencode(operation.path), resolve.ANY_NO_FOLLOW)
        try:
            if mount_id(fd)[1]:
                mount_setattr(fd, attributes, cleared)
        finally:
            os.close(fd)

    change(_RDONLY, 0)
    place.undo.append(lambda: change(0, _RDONLY))


# -- where it goes ---------------------------------------------------------------------------


class Place:
    """The rootfs's mount, on which the new root is attached; `fd` is borrowed.

    What is attached on a shared mount reaches its peers, on the host, and pivot_root(2) refuses
    such a parent: it becomes private, and is given back to its peers when the root isn't
    attached in the end.

    live: the `plan.live.Live`.  undo: what puts the runtime's mounts back, called from the last
    to the first.
    """

    def __init__(self, fd: int, live: "Live") -> None:
        self.fd = fd
        self.live = live
        self.propagation = live.root.propagation
        self.peer = -1
        self.undo: list[Callable[[], None]] = []
        self.drawer = -1
        self.shelves: dict[str, str] = {}

    def make_private(self):
        if self.peer < 0 and self.propagation & abi.MS_SHARED:
            peer = open_tree(self.fd, b"", _CLONE)
            try:
                mount_setattr(self.fd, 0, 0, abi.MS_PRIVATE)
            except BaseException:
                os.close(peer)
                raise
            self.peer = peer

    def close_off(self):
        """Keep a runtime out of what the new root covers, now that this is in place.

        runc --no-pivot enters the directory it stood in before the hook: its container would
        write to the lower.  So it can neither write nor execute anything there.
        """
        mount_setattr(self.fd, _RDONLY | abi.MOUNT_ATTR_NOEXEC)

    # -- the runtime's mounts, before and after --------------------------------------

    def find(
        self, operation: kinds.Carry, destination: "str | None" = None, number: int = 0
    ) -> int:
        """Return a descriptor of a `Carry`'s mount where it still is, or of one that is below."""
        if destination is None:
            destination, number = operation.destination, operation.mount
        if operation.aside is None:
            return self.found(self.fd, destination, number)
        shelf = self.shelves[operation.aside] + destination[len(operation.aside):]
        return self.found(self.drawer, shelf, number)

    def found(self, root: int, path: str, number: int, uncover: bool = False) -> int:
        """Return a descriptor of the mount that the plan saw, by its id.

        uncover: unmount what somebody has mounted over it since then.
        """
        deadline = monotonic() + resolve.RETRY_SECONDS
        while True:
            # Directories of a shared volume may be renamed, but not the mount away from its file.
            fd = resolve.find_in_root(root, os.fsencode(path), resolve.ANY_NO_FOLLOW)
            if fd is not None:
                ids = (mount_id(fd)[0], mount_id(fd, abi.STATX_MNT_ID)[0])
                if number in ids:
                    return fd
                try:
                    if uncover and mount_id(fd)[1] and not self._knows(ids):
                        detach(fd)
                        continue
                finally:
                    os.close(fd)
            if monotonic() > deadline:
                raise MountError("runtime", "carry", path, "the path leads to another mount than "
                                 "a moment ago", errno.ESTALE)

    def _knows(self, ids: "tuple[int, int]") -> bool:
        return any(record.id in ids for record in self.live.records)

    def move_back(self, root: int, operation: "kinds.Carry | kinds.SetAside") -> None:
        """Move a mount back to where it was: a `Carry`'s below the rootfs, a `SetAside`'s above.

        root: the new one.
        """
        destination, number = operation.destination, operation.mount
        if isinstance(operation, kinds.SetAside):
            here = self.found(self.drawer, self.shelves[destination], number, True)
            base, path = root, destination
        else:
            here = self.found(root, destination, number, True)
            base, path = self.fd, destination
            if operation.aside is not None:
                base = self.drawer
                path = self.shelves[operation.aside] + destination[len(operation.aside):]
        try:
            there = resolve.open_in_root(base, os.fsencode(path), resolve.ANY_NO_FOLLOW)
            try:
                move_mount(here, there)
            finally:
                os.close(there)
        finally:
            os.close(here)

    def made(self, mount: int) -> None:
        """Take note of a mount that was made: it may lie on a moved one, and isn't its part."""
        self.undo.append(lambda: detach(mount))

    def shelf(self, assembly: "_Assembly", operation: kinds.SetAside, directory: bool) -> int:
        """Make a place for what is set aside, in the old root; returns its descriptor."""
        if self.drawer < 0:
            # Where it came from nothing is mounted now, and nobody comes by.
            under = resolve.open_in_root(self.fd, os.fsencode(operation.over))
            try:
                drawer = assembly.own(
                    fscontext.create(b"tmpfs", [fscontext.string(b"mode", b"0700")], 0))
                move_mount(drawer, under)
            finally:
                os.close(under)
            self.made(drawer)
            self.drawer = drawer
        name = f"{len(self.shelves)}"
        if directory:
            os.mkdir(name, 0o700, dir_fd=self.drawer)
        else:
            os.mknod(name, stat.S_IFREG | 0o600, dir_fd=self.drawer)
        self.shelves[operation.destination] = name
        return os.open(name, abi.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.drawer)

    def put_back(self) -> None:
        """Undo what was done to the runtime's mounts; one that fails doesn't keep the others."""
        failure = None
        while self.undo:
            try:
                self.undo.pop()()
            except OSError as error:
                failure = error
        if failure is not None:
            raise failure

    # --------------------------------------------------------------------------------

    def restore(self):
        if self.peer < 0:
            return
        try:
            set_group(self.peer, self.fd)
        except OSError:
            # Before Linux 5.15: shared again, if not with the same peers.
            mount_setattr(self.fd, 0, 0, abi.MS_SHARED)
        self.close()

    def close(self):
        if self.peer >= 0:
            os.close(self.peer)
            self.peer = -1


def build(plan):
    """Return the `Root` of a hook's plan; this process is the hook alone, with a clear umask."""
    materials = _gather(plan)
    try:
        return assemble.assemble(plan, materials, umask_is_clear=True)
    except BaseException:
        materials.close()
        materials.cleanup(failed=True)
        raise


def _gather(plan):
    try:
        more_descriptors()
    except OSError as error:
        raise MountError("build", "prlimit", "RLIMIT_NOFILE", "", error.errno) from error
    return gatherer.gather(plan)


def lay_over(root):
    """Leave a finished `Root` over the rootfs if it is as planned there; else take it away.

    Raises MountError where that can't be seen, HookError where it isn't as planned.
    """
    place = root.place
    try:
        try:
            root.engine.lay_over(root.fd, place)
            propagation = root.plan.operations[-1].propagation
            if propagation:
                # Last: what is mounted on a shared mount becomes shared.
                mount_setattr(root.fd, 0, 0, propagation)
            upper = root.materials.upper
            if upper is not None and not upper.keep:
                from sandboxfs.build.upper import mark_for_removal

                mark_for_removal(upper)
        except OSError as error:
            raise worded(error, root.plan.operations[-1], root.plan.live.path) from error
        try:
            _make_unbindable(root)
            found = _is_there(root) or differences(root)
            if not found:
                place.close_off()
        except OSError as error:
            raise worded(error, root.plan.operations[-1], root.plan.live.path, "verify") from error
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise HookError("verify", "", root.plan.live.path,
                            f"not as planned, and taken away again: {found[0]}{more}")
    except BaseException:
        leave_alone(root)
        raise
    place.close()


def _make_unbindable(root):
    """No clone is at first."""
    for operation, kind, _detail in root.outcomes:
        for destination in getattr(operation, "unbindable", ()) if kind == "bind" else ():
            path = os.fsencode(destination)
            fd = resolve.open_in_root(root.fd, path, resolve.ANY_NO_FOLLOW)
            try:
                mount_setattr(fd, 0, 0, abi.MS_UNBINDABLE)
            finally:
                os.close(fd)


def is_changed(root):
    """Return whether a finished root is anything else than what the runtime made."""
    plain = type(root.plan.operations[0]) is kinds.PlainRoot
    return not plain or any(
        (type(operation) in (kinds.Filesystem, kinds.Tmp) and kind != "skipped")
        or kind in ("overlay", "synthesised")
        for operation, kind, _detail in root.outcomes
    )


def leave_alone(root):
    """Take a finished root away, with all that was made for it, and put back what was moved."""
    try:
        root.engine.abandon()
    except OSError as error:
        path = root.plan.live.path
        raise MountError("take away", getattr(error, "call", "umount2"), path, "",
                         error.errno) from error
    finally:
        root.materials.cleanup(failed=True)


def _is_there(root):
    """Return a difference if the path doesn't lead to the new root: the runtime goes by it."""
    path = root.plan.live.path
    there = os.open(path, abi.O_PATH | os.O_CLOEXEC)
    try:
        if mount_id(there)[0] != mount_id(root.fd)[0]:
            return [f"{shown(path)}: leads to another mount than the new root"]
    finally:
        os.close(there)
    return []


# -- verify ----------------------------------------------------------------------------------


def differences(root, pid=None):
    """Return what of an attached root is otherwise than planned, a line each.

    What was carried over has to be what the runtime's table had, mount by mount; what was made
    has to have the type and flags that the plan says.  pid: compare what that process sees
    instead; what its runtime has mounted since then is told, too.
    """
    found = {}
    for record in _records(root) if pid is None else mounttable.read(pid):
        found.setdefault(record.mountpoint, []).append(record)
    wanted = _wanted(root, _tmp_in(root, found))
    for lower in root.materials.lowers if root.materials is not None else ():
        for submount in lower.submounts:
            path = b"/" + submount.path
            if path in found:  # a lower above may hide the place
                wanted.setdefault(path, []).insert(0, _OfALower())
    lines = []
    for path in dict.fromkeys([*wanted, *found]):
        _compare(path, wanted.get(path, ()), found.get(path, ()), lines)
    return lines


def _records(root):
    """Return the records of the root and all below it, as seen from it."""
    top = mounttable.record(mount_id(root.fd)[0])
    top.mountpoint = b"/"
    below = submounts.below(root.fd)
    for record in below:
        record.mountpoint = b"/" + record.mountpoint
    return [top, *below]


def _tmp_in(root, found):
    """Return where the mount on /tmp is in a table: a link may have led elsewhere."""
    fd = resolve.find_in_root(root.fd, b"/tmp")
    if fd is not None:
        try:
            numbers = (mount_id(fd)[0], mount_id(fd, abi.STATX_MNT_ID)[0])
        finally:
            os.close(fd)
        for path, records in found.items():
            if any(record.id in numbers for record in records):
                return path
    return b"/tmp"


def _compare(path, wanted, found, lines):
    """Compare the stack of mounts at one path, from below."""
    if len(wanted) == len(found) == 1 and not any(wanted[0].differences(found[0])):
        return
    # What is hidden may come in another order; what is left is compared one by one.
    found = list(found)
    missing = []
    for each in wanted:
        match = next((record for record in found if not any(each.differences(record))), None)
        if match is None:
            missing.append(each)
        else:
            found.remove(match)
    wanted = missing
    for at in range(max(len(wanted), len(found))):
        if at >= len(found):
            lines.append(f"{shown(path)}: nothing is mounted there")
        elif at >= len(wanted):
            lines.append(f"{shown(path)}: {shown(found[at].type)} is mounted there, and isn't "
                         "in the plan")
        else:
            lines += [f"{shown(path)}: {text}" for text in wanted[at].differences(found[at])]


class _Made:
    """A mount that was made anew: its types, flags and propagation."""

    def __init__(self, types, attributes, propagation=abi.MS_PRIVATE):
        self.types = types
        self.attributes = attributes
        self.propagation = propagation

    def differences(self, record):
        if record.type not in self.types:
            yield f"file system {shown(record.type)} instead of {shown(self.types[0])}"
        if record.attributes != self.attributes:
            yield _flags(record.attributes, self.attributes)
        if record.propagation != self.propagation:
            word = "shared" if self.propagation & abi.MS_SHARED else "private"
            yield f"propagation {mounttable.propagation_of(record)} instead of {word}"


class _OfALower:
    """What a further lower has mounted below it: writable only through an overlay."""

    def differences(self, record):
        if record.type != b"overlay" and not record.attributes & _RDONLY:
            yield f"{shown(record.type)} of a lower, writable and without an overlay"


class _Carried:
    """A mount that was carried over: in everything what its original is, which most are.

    moved: it is that one.  more: attributes that it has got besides.
    """

    def __init__(self, record: "MountRecord", moved: bool, more: int) -> None:
        self.record = record
        self.moved = moved
        self.attributes = record.attributes | more

    def differences(self, record):
        old = self.record
        if (record.type, record.device, record.root) != (old.type, old.device, old.root) or (
            self.moved and record.id != old.id
        ):
            yield f"{shown(record.type)} instead of the runtime's {shown(old.type)}"
        if record.attributes != self.attributes:
            yield _flags(record.attributes, self.attributes)
        if (record.propagation, record.master) != (old.propagation, old.master) or (
            record.peer_group != old.peer_group
        ):
            yield (f"propagation {mounttable.propagation_of(record)} instead of "
                   f"{mounttable.propagation_of(old)}")


def _flags(found, wanted):
    words = [",".join(mounttable.words_of(attributes)) for attributes in (found, wanted)]
    return f"flags {words[0]} instead of {words[1]}"


def _wanted(root, tmp):
    """Return what has to be where: {path: [from below, `_Made` or `_Carried`]}.

    tmp: the path that the mount on /tmp is at.
    """
    plan = root.plan
    live, kept = plan.live, {}
    outcomes = {operation: kind for operation, kind, _detail in root.outcomes}
    for record in live.records:
        kept.setdefault(record.parent_id, []).append(record)
    by_id = {record.id: record for record in live.records}
    sealed = any(type(step) is kinds.Seal for step in plan.operations)
    aside = {step.mount for step in plan.operations if type(step) is kinds.SetAside}
    shut = {step.mount for step in plan.operations if type(step) is kinds.ReadonlyMount}
    propagation = plan.operations[-1].propagation or abi.MS_PRIVATE
    wanted = {}

    def want(path, expectation):
        wanted.setdefault(path, []).append(expectation)

    for operation in plan.operations:
        kind = type(operation)
        if kind is kinds.Overlay:
            flags = live.root.attributes & _INHERITED
            want(b"/", _Made((b"overlay",), flags | (_RDONLY if sealed else 0), propagation))
        elif kind is kinds.PlainRoot:
            flags = live.root.attributes | (_RDONLY if sealed else 0)
            want(b"/", _Made((live.root.type,), flags, propagation))
        elif kind is kinds.Filesystem:
            want(os.fsencode(operation.destination),
                 _Made((operation.type.encode(),), operation.attributes))
        elif kind is kinds.ReadonlyPath:
            flags = live.root.attributes & _INHERITED
            want(os.fsencode(operation.path), _Made((b"overlay",), flags | _RDONLY))
        elif kind is kinds.Tmp and outcomes.get(operation) == "tmpfs":
            want(tmp, _Made((b"tmpfs",), abi.MOUNT_ATTR_NOSUID | abi.MOUNT_ATTR_NODEV))
        elif kind is kinds.Carry:
            path = os.fsencode(operation.destination)
            record = by_id[operation.mount]
            if operation.overlay:
                made = outcomes.get(operation) == "overlay"
                want(path, _Made((b"overlay", b"tmpfs"), operation.attributes) if made else
                     _Made((record.type,), record.attributes | _RDONLY))
                continue
            pending, moved = [record], outcomes.get(operation) == "move"
            while pending:
                record = pending.pop()
                if record.id in aside or (
                    not moved and record.propagation & abi.MS_UNBINDABLE
                    and os.fsdecode(record.mountpoint) not in operation.unbindable
                ):
                    continue  # the latter is hidden: nothing can make a clone hold it
                more = _RDONLY if record.id in shut else 0
                want(record.mountpoint, _Carried(record, moved, more))
                pending += kept.get(record.id, ())[::-1]
    return wanted
