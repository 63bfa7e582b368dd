"""The mount namespace that a container is created in, and our root at its rootfs's path.

A mount that we attach must not reach the host, although the mounts that it lies on are mostly
shared with the host's.  So the copies of these become slaves first, and are given back to the
host's peers afterwards (MOVE_MOUNT_SET_GROUP, Linux 5.15): what is mounted on the host later
still arrives, and what a container mounts on an rshared volume still reaches the host.
"""

import _stat as stat
import errno
import sys

from sandboxfs.build import gather
from sandboxfs.build.assemble import assemble
from sandboxfs.build.engine import detach
from sandboxfs.build.failure import worded
from sandboxfs.errors import HookError, MountError, shown
from sandboxfs.kernel import abi, fscontext
from sandboxfs.kernel import system as os
from sandboxfs.kernel.foreign import string_buffer
from sandboxfs.kernel.syscalls import (
    mount_id,
    mount_setattr,
    move_mount,
    open_tree,
    set_group,
    setns,
    statmount,
    unshare,
)
from sandboxfs.plan import in_front
from sandboxfs.plan.base import cleaned
from sandboxfs.plan.operations import Attach, Cover
from sandboxfs.runtime import document as documents
from sandboxfs.runtime.paths import agreed, opened, real
from sandboxfs.runtime.request import config_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sandboxfs.build.root import Root
    from sandboxfs.plan.operations import Operation, Plan
    from sandboxfs.runtime.document import Document
    from sandboxfs.runtime.request import Request
    from sandboxfs.spec.model import Spec

_DEEPEST = 2048  # PATH_MAX holds no more names
_PATH = abi.O_PATH | os.O_CLOEXEC
# How often we begin anew while mounts of the host change in the moment that counts.
_ATTEMPTS = 30
# Where a root is attached that can't be at its own path.  A runtime needs nothing of these.
_ELSEWHERE = ("/sys/kernel/debug", "/sys/kernel/config", "/sys/fs/fuse/connections", "/mnt",
              "/media")


def enter(spec: "Spec", request: "Request", changed: "Document | None") -> "Root | None":
    """Enter a mount namespace in which the container's root is ours; returns it, if it has one.

    changed: the document that the runtime is to read instead, or None.  Raises SpecError,
    MountError or HookError; the process ends then, and its namespace with it.
    """
    origin = _Origin()
    config = config_of(request) or f"{spec.bundle}/config.json"
    path, changed = _target(spec, config, changed)
    plan = None
    if spec.overrides.overlay != "none":
        mounted = [*map(cleaned, documents.column(spec.document, "destination"))]
        plan = in_front.plan(spec, mounted, path, request.id)
    for _attempt in range(_ATTEMPTS):
        place = _Place(origin)
        if plan is not None:
            place.add(plan.operations[-1], path)
            for operation in plan.operations:
                if isinstance(operation, Cover):
                    source = operation.source.removeprefix(f"{spec.bundle}/")
                    place.add(operation, agreed(str(spec.bundle), source, operation.origin))
        document = place.document(config) if changed is not None else None
        _unshared()
        place.enter()
        if changed is not None and document is not None:
            _replace_document(*document, changed)
        root = None if plan is None else _attached_root(plan, place)
        is_done = False
        try:
            if is_done := origin.give_back():
                return root  # what is open is closed at exec
            origin.go_back()
        finally:
            if root is not None and not is_done:
                root.materials.cleanup(failed=True)
        if root is not None:
            root.close()
        place.close()
    raise HookError("runtime", "", path, "mounts of the host changed each time while it was "
                    f"attached, {_ATTEMPTS} times", errno.EAGAIN)


def _unshared() -> None:
    try:
        unshare(abi.CLONE_NEWNS)
    except OSError as error:
        hint = None
        if error.errno == errno.EPERM:
            hint = ("it takes CAP_SYS_ADMIN over the mount namespace: start the runtime as root, "
                    "or in a user namespace of yours; with the annotation "
                    "dev.sandboxfs.overlay=none the container gets no root of ours")
        raise MountError("runtime", "unshare", "CLONE_NEWNS", "", error.errno or 0, hint) from error


def _target(
    spec: "Spec", config: str, changed: "Document | None"
) -> "tuple[str, Document | None]":
    """Return where the root is attached, and the document that says so.

    A runtime can't be given another `/`, and what is attached above the bundle would hide it.
    """
    bundle = str(spec.bundle)
    path = agreed(bundle, spec.root_path or "", "root.path")
    if spec.overrides.overlay == "none":
        return path, changed
    above = real(path, "root.path").rstrip("/") + "/"
    if not any(real(each, "bundle").startswith(above) for each in (bundle, config)):
        return path, changed
    taken = [bundle, config, *documents.column(spec.document, "source")]
    for place in _ELSEWHERE:
        if os.path.exists(place) and not any(f"{each}/".startswith(f"{place}/") for each in taken):
            changed = dict(changed or spec.document)
            changed["root"] = {**changed["root"], "path": place}
            return place, changed
    raise HookError("root.path", "", path, "holds the bundle, and no directory is free to attach "
                    f"the root on: {', '.join(_ELSEWHERE)}")


# -- propagation -----------------------------------------------------------------------------


class _Mount:
    """A mount that something is attached on.

    theirs, ours: descriptors of its root, in the caller's mount namespace and in our copy.
    is_shared: whether what is attached on it would reach the host.
    """

    __slots__ = ("is_shared", "ours", "theirs")

    def __init__(self, theirs: int, is_shared: bool) -> None:
        self.theirs = theirs
        self.ours = -1
        self.is_shared = is_shared


class _Origin:
    """Where we come from: the caller's mount namespace, root and working directory.

    mounts: those that something is attached on, by their id there.
    """

    def __init__(self) -> None:
        self.namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        self.root = os.open("/", _PATH | os.O_DIRECTORY)
        self.here = os.open(".", _PATH | os.O_DIRECTORY)
        # Polling it tells whether a mount of that namespace was made or taken away.
        self.table = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        self.mounts: dict[int, _Mount] = {}

    def mount_of(self, fd: int, path: str) -> _Mount:
        """Return the mount that a descriptor of the caller's namespace lies in."""
        number = mount_id(fd)[0]
        if number not in self.mounts:
            self.mounts[number] = _Mount(_root_of_mount(fd, path), _is_shared(number))
        return self.mounts[number]

    def give_back(self) -> bool:
        """Make peers of the caller's mounts again of our copies; returns whether nothing was lost.

        A change that happens while a copy is private never arrives there.
        """
        shared = [mount for mount in self.mounts.values() if mount.is_shared]
        if not shared or not _has_set_group():
            return True
        from select import POLLPRI, poll

        poller = poll()
        poller.register(self.table, POLLPRI)
        poller.poll(0)  # what has changed until now has arrived
        for mount in shared:
            mount_setattr(mount.ours, propagation=abi.MS_PRIVATE)
            set_group(mount.theirs, mount.ours)
        return not poller.poll(0)

    def go_back(self) -> None:
        """Enter the caller's mount namespace again; ours ends with that."""
        setns(self.namespace, abi.CLONE_NEWNS)
        # Its root is the namespace's own now, and so is the working directory.
        os.fchdir(self.root)
        os.chroot(".")
        os.fchdir(self.here)
        for mount in self.mounts.values():
            os.close(mount.theirs)
            if mount.ours >= 0:
                os.close(mount.ours)
        self.mounts.clear()


def _is_shared(number: int) -> bool:
    """Return whether the mount with this id is shared."""
    buffer = string_buffer(512)
    try:
        statmount(number, abi.STATMOUNT_MNT_BASIC, 0, buffer, 512)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            raise
        from sandboxfs.kernel import mounttable

        return bool(mounttable.record(number).propagation & abi.MS_SHARED)
    # mnt_propagation of struct statmount.
    return bool(int.from_bytes(buffer[72:80], sys.byteorder) & abi.MS_SHARED)


def _has_set_group() -> bool:
    """Return whether the kernel gives mounts to others' peers (Linux 5.15), by asking for nothing.

    Before, a copy stays a slave: what is mounted on the host arrives, nothing goes there.
    """
    try:
        set_group(-1, -1)
    except OSError as error:
        return error.errno == errno.EBADF
    return True


def _root_of_mount(fd: int, path: str) -> int:
    """Return a descriptor of the root of the mount that a descriptor lies in."""
    number, is_root = mount_id(fd)
    # A file has no `..`, and a link may have led to it.
    found: int = open_tree(fd, b"", abi.AT_EMPTY_PATH) if is_root else os.open(
        os.path.dirname(real(path, "runtime")), _PATH | os.O_DIRECTORY)
    for _level in range(_DEEPEST):
        here, is_root = mount_id(found)
        if here != number:
            break
        if is_root:
            return found
        above = os.open("..", _PATH | os.O_DIRECTORY, dir_fd=found)
        os.close(found)
        found = above
    os.close(found)
    raise HookError("runtime", "", path, "the mount that it lies on can't be reached by `..`: its "
                    "root is covered, or outside of a chroot", errno.EXDEV)


class _Point:
    """Where something is attached; `fd` is opened in our copy of the namespace.

    path: as the document or the command line has it.  origin: where it was asked for.  mount:
    the `_Mount` it lies in.
    """

    def __init__(self, path: str, origin: str, source: _Origin) -> None:
        self.path = path
        self.origin = origin
        self.fd = opened(path, origin)
        self.identity = os.fstat(self.fd)
        self.mount = source.mount_of(self.fd, path)

    def enter(self) -> None:
        """Open it in our copy, and let nothing that is attached there out of it."""
        self.open()
        if not os.path.samestat(os.fstat(self.fd), self.identity):
            raise MountError(self.origin, "open", self.path, "was replaced meanwhile", errno.ESTALE)
        if self.mount.is_shared and self.mount.ours < 0:
            self.mount.ours = _root_of_mount(self.fd, self.path)
            mount_setattr(self.mount.ours, propagation=abi.MS_SLAVE)

    def open(self) -> None:
        """Open it anew."""
        os.close(self.fd)
        self.fd = opened(self.path, self.origin)

    def check(self, mount: int) -> None:
        """Raise if the path doesn't lead to what was attached: the runtime goes by it."""
        there = opened(self.path, self.origin)
        try:
            if mount_id(there)[0] != mount_id(mount)[0]:
                raise MountError(self.origin, "open", self.path,
                                 "leads elsewhere than a moment ago", errno.ESTALE)
        finally:
            os.close(there)


class _Place:
    """All places of one container, and what `build.engine.AttachedOver` asks of the root's.

    fd: the descriptor of the root's place, borrowed.
    """

    def __init__(self, origin: _Origin) -> None:
        self.source = origin
        self.fd = -1
        self.points: dict[Operation | str, _Point] = {}

    def add(self, operation: "Operation", path: str) -> None:
        """Add the place that an operation of the plan attaches something on."""
        self.points[operation] = _Point(path, operation.origin, self.source)

    def document(self, path: str) -> tuple[_Point, _Point]:
        """Add the places of the document and of its directory; returns both."""
        for each in (path, os.path.dirname(path)):
            self.points[each] = _Point(each, "config.json", self.source)
        return self.points[path], self.points[os.path.dirname(path)]

    def enter(self) -> None:
        """Open them all in our copy of the namespace."""
        for point in self.points.values():
            point.enter()
        for operation, point in self.points.items():
            if isinstance(operation, Attach):
                self.fd = point.fd

    def cover(self, operation: "Operation", mount: int) -> None:
        """Attach a mount over the source of a bind."""
        point = self.points[operation]
        point.open()  # it may lie below another source that is covered by now
        move_mount(mount, point.fd)
        point.check(mount)

    def make_private(self) -> None:
        """It lets nothing out already."""

    def put_back(self) -> None:
        """Nothing was moved from where it was."""

    def restore(self) -> None:
        """A failure ends this process, and the namespace with it."""

    def close(self) -> None:
        """Close what was opened for an attempt."""
        for point in self.points.values():
            os.close(point.fd)
        self.points.clear()
        self.fd = -1


# -- what is attached ------------------------------------------------------------------------


def _attached_root(plan: "Plan", place: _Place) -> "Root":
    """Return the `Root` of a plan, built and attached."""
    operation = plan.operations[-1]
    point = place.points[operation]
    if not stat.S_ISDIR(point.identity.st_mode):
        raise MountError(operation.origin, "open", point.path, "", errno.ENOTDIR)
    materials = gather.gather(plan)
    try:
        root: Root = assemble(plan, materials, umask_is_clear=True, place=place)
        try:
            if materials.upper is not None and not materials.upper.keep:
                from sandboxfs.build.upper import mark_for_removal

                mark_for_removal(materials.upper)
            root.engine.lay_over(root.fd, place)
        except OSError as error:
            raise worded(error, operation, point.path) from error
        point.check(root.fd)
        return root  # noqa: TRY300 - the check is part of what is undone
    except BaseException:
        materials.cleanup(failed=True)
        raise


def _replace_document(point: _Point, directory: _Point, document: "Document") -> None:
    """Attach a file with the changed document over the one that the runtime will read.

    directory: the one that it lies in.
    """
    import json

    content = json.dumps(document).encode()
    settings = [fscontext.string(b"mode", b"0700"), fscontext.string(b"source", b"sandboxfs")]
    try:
        memory = fscontext.create(b"tmpfs", settings, abi.MOUNT_ATTR_NOSUID | abi.MOUNT_ATTR_NODEV)
        mode = stat.S_IMODE(point.identity.st_mode)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        file = os.open("config.json", flags, mode, dir_fd=memory)
        while content:
            content = content[os.write(file, content):]
        os.close(file)
        # Only a mount that is attached can be cloned before Linux 6.15.
        move_mount(memory, directory.fd)
        clone = open_tree(memory, b"config.json", abi.OPEN_TREE_CLONE)
        detach(memory)
        os.close(memory)
        move_mount(clone, point.fd)
    except OSError as error:
        call = getattr(error, "call", "write")
        raise MountError(point.origin, call, shown(point.path), "", error.errno or 0) from error
    point.check(clone)
    os.close(clone)
