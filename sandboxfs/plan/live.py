"""What a runtime has mounted below a rootfs, read once: the facts that a hook plans from."""

import _stat as stat
import errno

from sandboxfs.errors import HookError, MountError
from sandboxfs.kernel import abi, mounttable, resolve, submounts
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import mount_id, read_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sandboxfs.kernel.mountinfo import MountRecord


class Live:
    """The mounts at and below a rootfs.

    path: of the rootfs (str).  root: the `MountRecord` of the mount that the path leads to.
    records: of all mounts below it, parents first, hidden ones among them; mountpoints are
    absolute, seen from the rootfs.  places: dict from the index of an entry of `mounts` to the
    id of the mount that its destination leads to, for the entries that were asked for.  is_runc:
    whether the runtime is a runc, which does some things later than others.
    """

    __slots__ = ("is_runc", "path", "places", "records", "root")

    def __init__(self, path, root, records, places):
        self.path = path
        self.root = root
        self.records = records
        self.places = places
        self.is_runc = False

    def is_made_by_runtime(self) -> bool:
        """Return whether the rootfs is a root of ours already: a bind of one keeps its source."""
        return is_made_by_runtime(self.root)


def is_made_by_runtime(record: "MountRecord") -> bool:
    """Return whether a mount (a `MountRecord`) is the overlay of the runtime in front."""
    if record.type != b"overlay":
        return False
    from sandboxfs.plan.operations import MADE_BY_RUNTIME

    # A directory of such a root, bound, has the source as well, and may be another image.
    return record.source == MADE_BY_RUNTIME and record.root == b"/"


def rootfs_of(spec):
    """Return the path of a spec's rootfs (str, absolute)."""
    path = spec.root_path
    if path is None:
        raise HookError(spec.root_origin, text="config.json has no root: nothing to build")
    return path if os.path.isabs(path) else os.path.join(spec.bundle, path)


def read(spec, mounts=()):
    """Return the `Live` of a spec's rootfs in the caller's mount namespace.

    mounts: the entries of `spec.mounts` whose places are wanted.  MountError where there is no
    such directory; HookError where the runtime hasn't mounted anything, as in every other
    mount namespace than the container's.
    """
    path = rootfs_of(spec)
    if not any(namespace.type == "mount" for namespace in spec.namespaces):
        raise HookError("linux.namespaces", "", "", "the container has no mount namespace: its "
                        "root would be laid over the host's")
    try:
        here = os.open(path, abi.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise MountError(spec.root_origin, "open", path, "", error.errno) from error
    try:
        if not stat.S_ISDIR(os.fstat(here).st_mode):
            raise MountError(spec.root_origin, "open", path, "", errno.ENOTDIR)
        return _read(spec, path, here, mounts)
    except OSError as error:
        if isinstance(error, MountError):
            raise
        call = getattr(error, "call", "read the mount table")
        raise MountError(spec.root_origin, call, path, "", error.errno) from error
    finally:
        os.close(here)


def _read(spec, path, here, mounts):
    number, is_root = mount_id(here)
    records = submounts.below(here) if is_root else ()
    if not is_root or (spec.mounts and not records):
        what = "has no mounts below it" if is_root else "isn't a mount"
        raise HookError(spec.root_origin, "", path, f"{what} in this mount namespace",
                        hint="register this hook as createContainer: no other one runs where the "
                        "runtime has made the container's mounts")
    for record in records:
        record.mountpoint = b"/" + record.mountpoint
    root = mounttable.record(number)
    root.mountpoint = b"/"
    by_number = {}
    for record in records:
        by_number[record.id] = by_number[record.old_id] = record.id
    places = {}
    for mount in mounts:
        place = by_number.get(_mount_at(here, mount))
        if place is not None:
            places[mount.index] = place
    found = Live(path, root, records, places)
    process = spec.process
    if spec.root_readonly and process is not None and process.terminal:
        found.is_runc = _parent_is_runc()
    return found


def _parent_is_runc() -> bool:
    """Return whether a runc has started this process, by the name that it gives itself."""
    try:
        # The program's name, in parentheses, may hold anything.
        fields = read_file(b"/proc/self/stat").rpartition(b")")[2].split()
        return read_file(b"/proc/" + fields[1] + b"/comm").startswith(b"runc:[")
    except OSError:
        return False


def _mount_at(here, mount):
    """Return the id of the mount whose root a destination leads to, or None."""
    fd = resolve.find_in_root(here, os.fsencode(mount.destination))
    if fd is None:
        return None
    try:
        number, is_root = mount_id(fd)
    finally:
        os.close(fd)
    return number if is_root else None
