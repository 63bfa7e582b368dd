"""Replicas: a container's own mounts of its pod's masters, over what the runtime mounted there.

createRuntime runs on the host's side when the runtime has made all mounts below the rootfs in
the container's mount namespace, which a forked child enters here.  Places are found inside the
rootfs by the kernel, mounts attached to descriptors.
"""

import _stat as stat
import marshal
from _signal import SIGALRM, SIGKILL, alarm
from errno import ELOOP

from sandboxfs.build.failure import hint_for
from sandboxfs.errors import MountError, SandboxError
from sandboxfs.hooks.pod_record import start_of
from sandboxfs.kernel import abi, resolve, submounts, syscalls
from sandboxfs.kernel import system as os
from sandboxfs.kernel.maker import Maker

# A file system that doesn't answer on the way must not hold up the runtime for ever.
DEADLINE = 20  # seconds
_PR_SET_PDEATHSIG = 1
_CLONE = abi.OPEN_TREE_CLONE | abi.AT_EMPTY_PATH
# Where another container of the pod has put a symlink, nothing of this one is mounted.
_REAL = syscalls.OpenHow(
    abi.O_PATH | os.O_CLOEXEC, 0,
    abi.RESOLVE_IN_ROOT | abi.RESOLVE_NO_SYMLINKS | abi.RESOLVE_NO_MAGICLINKS,
)


class Replica:
    """What is to be attached for one mount of the spec.

    mount: the `spec.model.Mount`.  clone: a detached clone of the master, owned by whoever
    made this.  attributes: `MOUNT_ATTR_*` it gets beside the master's.  device: of the master.
    """

    __slots__ = ("attributes", "clone", "device", "mount")

    def __init__(self, mount, clone, attributes, device):
        self.mount = mount
        self.clone = clone
        self.attributes = attributes
        self.device = device

    @property
    def origin(self):
        return f"mounts[{self.mount.index}]"


def attach(replicas, mounts, rootfs, container, owner):
    """Attach replicas in a container's mount namespace, in the spec's order.

    replicas: list of `Replica`.  mounts: the spec's.  rootfs: its path.  container: its
    `pod_record.Container`.  owner: (uid, gid), the container's root, of mountpoints that are made.
    MountError of the first that fails; the container's mounts are its runtime's to undo.
    """
    namespace = _mount_namespace(container)
    try:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            _be_the_child(replicas, mounts, rootfs, namespace, owner, parent, writer)
        os.close(writer)
        try:
            report = syscalls.read_all(reader)
        finally:
            os.close(reader)
            status = os.waitpid(child, 0)[1]
    finally:
        os.close(namespace)
    if report:
        raise MountError(*marshal.loads(report))
    if status:
        raise MountError(replicas[0].origin, "attach", replicas[0].mount.destination, (
            f"took more than {DEADLINE} s: a file system on the way doesn't answer"
            if status == SIGALRM else f"the process that attaches it ended with {status}"
        ))


def _mount_namespace(container):
    """Return a descriptor of a container's mount namespace, which may not be our own.

    That its process still is the one it was says that what was read of it before was its own.
    """
    path = f"/proc/{container.pid}/ns/mnt"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise MountError("state/pid", "open", path, "", error.errno,
                         "is the container's process gone?") from error
    if start_of(container.pid) != container.start:
        os.close(fd)
        raise MountError("state/pid", "open", path, "the container's process is gone")
    if os.path.samestat(os.fstat(fd), os.stat("/proc/self/ns/mnt")):
        os.close(fd)
        raise MountError("linux.namespaces", "", "mount", "the container shares the host's mount "
                         "namespace: a pod's volume would be mounted on the host")
    return fd


def _be_the_child(replicas, mounts, rootfs, namespace, owner, parent, writer):
    try:
        syscalls.prctl(_PR_SET_PDEATHSIG, SIGKILL)
        alarm(DEADLINE)
        if os.getppid() != parent:
            os._exit(1)
        step = _Step("", "setns", f"the mount namespace of {rootfs}")
        try:
            syscalls.setns(namespace, abi.CLONE_NEWNS)
            step.now("root.path", "open", rootfs)
            root = os.open(rootfs, abi.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            for replica in replicas:
                _attach_one(replica, root, mounts, owner, step)
        except SandboxError as error:
            fields = (error.origin, error.operation, error.target, error.text, error.errno,
                      error.hint)
            os.write(writer, marshal.dumps(fields))
        except OSError as error:
            os.write(writer, marshal.dumps(step.fields(error)))
        os._exit(0)
    finally:
        # An exception that isn't foreseen: the parent's clean-up is not for the child to run.
        os._exit(1)


class _Step:
    """What is being done, for errors."""

    __slots__ = ("operation", "origin", "target")

    def __init__(self, origin, operation, target):
        self.now(origin, operation, target)

    def now(self, origin, operation, target):
        self.origin = origin
        self.operation = operation
        self.target = target

    def fields(self, error):
        call = getattr(error, "call", "") or self.operation
        number = error.errno or 0
        text = error.strerror or str(error)
        return (self.origin, call, self.target, text, number, hint_for(call, number))


def _attach_one(replica, root, mounts, owner, step):
    """Attach one replica on what the runtime mounted, and carry over what is mounted inside."""
    destination = replica.mount.destination
    path = os.fsencode(destination)
    step.now(replica.origin, "openat2", destination)
    covered = resolve.open_in_root(root, path, resolve.DIRECTORY)
    if not syscalls.mount_id(covered)[1]:
        raise MountError(replica.origin, "", destination, "the runtime has mounted nothing there "
                         "yet: a pod's volume can't be put in its place")
    if syscalls.filesystem_type(covered) == abi.PROC_SUPER_MAGIC:
        # What the runtime writes there afterwards has to reach the kernel (runc CVE-2019-16884).
        raise MountError(replica.origin, "openat2", destination,
                         "a symlink on the path leads into procfs", ELOOP)
    step.now(replica.origin, "list the mounts below", destination)
    inside = _inside(covered, root, mounts)
    # It is hidden from now on.  Shared, it would let the replica appear elsewhere, for good.
    step.now(replica.origin, "mount_setattr", destination)
    syscalls.mount_setattr(covered, propagation=abi.MS_PRIVATE)
    syscalls.mount_setattr(replica.clone, replica.attributes, _atime(replica.attributes),
                           abi.MS_PRIVATE)
    step.now(replica.origin, "move_mount", destination)
    syscalls.move_mount(replica.clone, covered)
    points = _mountpoints(replica, inside, owner, step)
    for (mount, fd, _relative), point in zip(inside, points, strict=True):
        step.now(f"mounts[{mount.index}]", "move_mount", mount.destination)
        syscalls.move_mount(fd, point)
    step.now(replica.origin, "openat2", destination)
    found = resolve.open_in_root(root, path, resolve.DIRECTORY)
    if os.fstat(found).st_dev != replica.device:
        raise MountError(replica.origin, "", destination, "the path leads elsewhere now: somebody "
                         "changed it meanwhile")
    for fd in (covered, found, *points, *[each[1] for each in inside]):
        os.close(fd)


def _atime(attributes):
    return abi.MOUNT_ATTR__ATIME if attributes & abi.MOUNT_ATTR__ATIME else 0


def _inside(covered, root, mounts):
    """Return (mount, descriptor, path from there) of the spec's mounts below a directory.

    Of the topmost ones: what is mounted inside of them goes with them.  What a recursive bind
    brought along isn't the spec's, and is hidden with it.
    """
    records = submounts.below(covered)
    if not records:
        return []
    by_number = {record.old_id: record for record in records}
    chosen = {}
    for mount in mounts:
        fd = resolve.find_in_root(root, os.fsencode(mount.destination), resolve.ANY)
        if fd is None:
            continue
        number, is_root = syscalls.mount_id(fd, abi.STATX_MNT_ID)
        if is_root and number in by_number and number not in chosen:
            chosen[number] = (mount, fd, by_number[number].mountpoint)
        else:
            os.close(fd)
    for number in list(chosen):
        above = by_number.get(by_number[number].old_parent_id)
        while above is not None:
            if above.old_id in chosen:
                os.close(chosen.pop(number)[1])
                break
            above = by_number.get(above.old_parent_id)
    return list(chosen.values())


def _mountpoints(replica, inside, owner, step):
    """Return descriptors of the mountpoints in a replica for what is mounted inside, made first."""
    if not inside:
        return []
    points = []
    # The volume may be read-only in this container, or in all: its mountpoints are made anyway.
    # Only now, since kernels before 6.15 clone no mount that isn't attached.
    step.now(replica.origin, "open_tree", replica.mount.destination)
    twin = syscalls.open_tree(replica.clone, b"", _CLONE)
    syscalls.mount_setattr(twin, 0, abi.MOUNT_ATTR_RDONLY)
    maker = Maker(twin, owner)
    for mount, fd, relative in inside:
        step.now(f"mounts[{mount.index}]", "make the mountpoint", mount.destination)
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            os.close(maker.real_directory(relative))
        else:
            above = relative.rpartition(b"/")[0]
            if above:
                os.close(maker.real_directory(above))
            os.close(maker.file(relative))
        step.now(f"mounts[{mount.index}]", "openat2", mount.destination)
        points.append(resolve.open_in_root(replica.clone, relative, _REAL))
    os.close(twin)
    return points
