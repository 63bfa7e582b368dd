"""What a runtime has mounted, taken over into the new root; and that root, laid over the old.

Mounts are cloned from where they are seen and attached at the same place of the new root.  In the
end what is there is compared with what was there: every mount carried over, nothing else.
"""

import _stat as stat
import errno
from time import monotonic

from sandboxfs.build import assemble, mounts
from sandboxfs.build import gather as gatherer
from sandboxfs.build.engine import detach
from sandboxfs.build.failure import worded
from sandboxfs.errors import HookError, MountError, shown
from sandboxfs.kernel import abi, mounttable, resolve, submounts
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
    """Clone one mount, with all below it if the operation says so, and attach it at its place.

    Both at once, since a runtime's mounts are in the namespace that is built in: a thousand of
    them need no thousand descriptors.
    """
    source = _clone_of(assembly.materials, operation)
    try:
        status = os.fstat(source)
        directory = stat.S_ISDIR(status.st_mode)
        target = assembly.maker.link_itself(assembly.compiled[operation][0], directory)
        try:
            if stat.S_ISDIR(os.fstat(target).st_mode) != directory:
                mounts.mismatch(assembly, OSError(errno.ENOTDIR, ""), operation, "what is mounted "
                                f"there is {'a directory' if directory else 'a file'}")
            mount, own = source, False
            if operation.overlay:
                mount, own = mounts.overlay_bind(assembly, operation, source, status)
            move_mount(mount, target)
        finally:
            os.close(target)
        assembly.outcomes.append((operation, "overlay" if own else "bind", ""))
        if own:
            assembly.attached.append((mount, operation, True))
        elif operation.type == "proc":
            # No link may lead into it (see `check_link`).
            assembly.attached.append((assembly.own(os.dup(source)), operation, False))
    finally:
        os.close(source)


def _clone_of(materials, operation):
    here = _found(materials, operation, operation.destination, operation.mount)
    unbindable = []
    try:
        for destination in operation.unbindable:
            unbindable.append(_found(materials, operation, destination))
            mount_setattr(unbindable[-1], 0, 0, abi.MS_PRIVATE)
        return _cloned(here, operation)
    finally:
        os.close(here)
        while unbindable:
            fd = unbindable.pop()
            try:
                mount_setattr(fd, 0, 0, abi.MS_UNBINDABLE)
            finally:
                os.close(fd)


def _found(materials, operation, destination, number=None):
    """Return a descriptor of the mount that the plan saw at a destination.

    number: its id, by default that of the unbindable mount that was there.
    """
    root, path = materials.rootfs, os.fsencode(destination)
    if number is None:
        number = [record.id for record in materials.live.records if record.mountpoint == path
                  and record.propagation & abi.MS_UNBINDABLE][-1]
    deadline = monotonic() + resolve.RETRY_SECONDS
    while True:
        # Directories of a shared volume may be renamed, but not the mount away from its file.
        fd = resolve.find_in_root(root, path, resolve.ANY_NO_FOLLOW)
        if fd is not None:
            if number in (mount_id(fd)[0], mount_id(fd, abi.STATX_MNT_ID)[0]):
                return fd
            os.close(fd)
        if monotonic() > deadline:
            raise MountError(operation.origin, "carry", destination,
                             "the path leads to another mount than a moment ago", errno.ESTALE)


def _cloned(fd, operation):
    try:
        clone = open_tree(fd, b"", _CLONE | (abi.AT_RECURSIVE if operation.recursive else 0))
    except OSError as error:
        if error.errno == errno.EINVAL:
            error.hint = ("the mounts below it are locked together with it, and can't be carried "
                          "over one by one: leave the annotations of what lies below it out")
        raise
    if operation.overlay:
        try:
            mount_setattr(clone, _RDONLY, 0, abi.MS_PRIVATE)
        except BaseException:
            os.close(clone)
            raise
    return clone


# -- where it goes ---------------------------------------------------------------------------


class Place:
    """The rootfs's mount, on which the new root is attached; `fd` is borrowed.

    What is attached on a shared mount reaches its peers, on the host, and pivot_root(2) refuses
    such a parent: it becomes private, and is given back to its peers when the root isn't
    attached in the end.
    """

    def __init__(self, fd, record):
        self.fd = fd
        self.propagation = record.propagation
        self.peer = -1

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
    """Attach a finished `Root` over the rootfs, verify it there; take it away if it is wrong.

    Raises MountError where it can't be attached, HookError where it isn't as planned.
    """
    place = root.place
    try:
        try:
            propagation = root.plan.operations[-1].propagation
            if propagation:
                # Last: what is mounted on a shared mount becomes shared.
                mount_setattr(root.fd, 0, 0, propagation)
            upper = root.materials.upper
            if upper is not None and not upper.keep:
                from sandboxfs.build.upper import mark_for_removal

                mark_for_removal(upper)
            root.engine.lay_over(root.fd, place)
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
        try:
            _take_away(root)
            place.restore()
        finally:
            root.materials.cleanup(failed=True)
        raise
    place.close()


def _make_unbindable(root):
    """Inside of a tree this is possible only now that it is attached."""
    for operation in root.plan.operations:
        for destination in getattr(operation, "unbindable", ()):
            path = os.fsencode(destination)
            fd = resolve.open_in_root(root.fd, path, resolve.ANY_NO_FOLLOW)
            try:
                mount_setattr(fd, 0, 0, abi.MS_UNBINDABLE)
            finally:
                os.close(fd)


def _take_away(root):
    try:
        detach(root.fd)
    except OSError as error:
        # EINVAL: it never was attached.
        if error.errno != errno.EINVAL:
            path = root.plan.live.path
            raise MountError("take away", "umount2", path, "", error.errno) from error


def is_changed(root):
    """Return whether a finished root is anything else than what the runtime made."""
    plain = type(root.plan.operations[0]) is kinds.PlainRoot
    return not plain or any(
        (type(operation) in (kinds.Filesystem, kinds.Tmp) and kind != "skipped")
        or kind in ("overlay", "synthesised")
        for operation, kind, _detail in root.outcomes
    )


def leave_alone(root):
    """Drop a finished root that isn't to be attached, with all that was made for it."""
    try:
        root.engine.abandon()
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
    """A mount that was carried over: in everything what its original is."""

    def __init__(self, record):
        self.record = record

    def differences(self, record):
        old = self.record
        if (record.type, record.device, record.root) != (old.type, old.device, old.root):
            yield f"{shown(record.type)} instead of the runtime's {shown(old.type)}"
        if record.attributes != old.attributes:
            yield _flags(record.attributes, old.attributes)
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
            want(b"/", _Made((live.root.type,), live.root.attributes, propagation))
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
            pending = [record]
            while pending:
                record = pending.pop()
                if record.propagation & abi.MS_UNBINDABLE and (
                    os.fsdecode(record.mountpoint) not in operation.unbindable
                ):
                    continue  # hidden: nothing can make a clone hold it
                want(record.mountpoint, _Carried(record))
                if operation.recursive:
                    pending += kept.get(record.id, ())[::-1]
    return wanted
