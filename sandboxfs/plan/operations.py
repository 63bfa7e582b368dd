"""The operations of a plan: plain data, one class a kind of work.

Every operation knows its `origin` (``mounts[3]``, ``linux.maskedPaths[0]``, ``default``).
Where the answer can only be seen by descriptor or by trying, the operation carries the
rule and the build evaluates it; `rule` then is the sentence the plan prints.
"""

from sandboxfs.kernel import system as os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sandboxfs.kernel.mountinfo import MountRecord

# The source of the overlay that the runtime in front lays over a rootfs: hooks leave it alone.
MADE_BY_RUNTIME = b"sandboxfs-runtime"


class Operation:
    """The base: `name` is what the plan prints and the JSON's `operation`."""

    __slots__ = ("origin",)
    name = ""
    origin: "str"

    def fields(self):
        """Return the operation's own fields as (name, value) pairs, origin first."""
        return [
            (field, getattr(self, field))
            for kind in reversed(type(self).__mro__)
            for field in getattr(kind, "__slots__", ())
        ]


class Lower(Operation):
    """One lower layer, first in the plan is topmost.

    path: str or bytes, absolute, of a directory or an image file (EROFS, squashfs).
    submounts: what lies mounted below it is part of the view, each with an overlay; without,
    it is the lower's own mount alone (what a runtime has mounted there is carried over).
    """

    __slots__ = ("path", "submounts")
    name = "lower"

    def __init__(self, origin, path, submounts):
        self.origin = origin
        self.path = path
        self.submounts = submounts


class Overlay(Operation):
    """Join the lowers with an upper.

    upper: None for the root's private tmpfs, else the directory under which upper and work
    are made, named `label`, kept afterwards if `keep`.  size: the tmpfs's ``size=`` or None.
    userxattr: the overlay keeps its marks in user.* (user namespaces).  source: what the mount
    table has as its source.
    """

    __slots__ = ("keep", "label", "size", "source", "upper", "userxattr")
    name = "overlay"

    def __init__(self, origin, upper, size, keep, label, userxattr):
        self.origin = origin
        self.upper = upper
        self.size = size
        self.keep = keep
        self.label = label
        self.userxattr = userxattr
        self.source = "overlay"


class PlainRoot(Operation):
    """The rootfs itself, cloned (``overlay=none``).

    submounts: with what is mounted below it.
    """

    __slots__ = ("path", "submounts")
    name = "rootfs"

    def __init__(self, origin, path, submounts=True):
        self.origin = origin
        self.path = path
        self.submounts = submounts


class MountOperation(Operation):
    """What all mounts share.

    destination: str as the spec has it.  attributes, cleared: `MOUNT_ATTR_*` to set and to
    clear.  propagation: a `MS_SHARED`… number or 0 for private, with propagation_recursive.
    kind: ``"directory"`` or ``"file"`` where it is known, None where the source decides.
    nested: later destinations that lie below this one, as paths relative to it.
    no_follow: mount on a symlink itself (`dest-nofollow`).
    """

    __slots__ = (
        "attributes", "cleared", "destination", "nested", "no_follow", "propagation",
        "propagation_recursive",
    )

    def __init__(self, origin, destination):
        self.origin = origin
        self.destination = destination
        self.attributes = 0
        self.cleared = 0
        self.propagation = 0
        self.propagation_recursive = False
        self.nested = ()
        self.no_follow = False


class Filesystem(MountOperation):
    """A new file system instance.

    flags: superblock flag words (``"ro"``, ``"sync"``).  data: list of (key, value or None).
    copy_up: `tmpcopyup`.  mode_from_mountpoint: a tmpfs without ``mode=``.
    real_directory: proc and sysfs, only on a real directory reached without a symlink.
    fallback_bind: bind this path recursively where the kernel refuses a fresh instance
    (sysfs without its network namespace, mqueue, cgroup2), or None.
    label: SELinux ``context=`` or, for mqueue, the xattr; None for none.
    """

    __slots__ = (
        "copy_up", "data", "fallback_bind", "flags", "label", "mode_from_mountpoint",
        "real_directory", "source", "tree_attributes", "tree_cleared", "type",
    )
    name = "mount"

    def __init__(self, origin, destination, type, source):
        super().__init__(origin, destination)
        self.type = type
        self.source = source
        self.flags = []
        self.data = []
        self.copy_up = False
        self.mode_from_mountpoint = False
        self.real_directory = False
        self.fallback_bind = None
        self.label = None
        self.tree_attributes = 0
        self.tree_cleared = 0


class Bind(MountOperation):
    """A bind of `source` (absolute str), with what is mounted below it if `recursive`.

    tree_attributes, tree_cleared: for the whole tree (``rro``).  idmap: None, or
    ``"container"`` for the container's user namespace, or (uid mappings, gid mappings) as
    lists of `spec.model.IdMapping`; idmap_recursive: for the whole tree.  overlay: writes go
    to an overlay of its own (``overlay.binds``).  copy_symlink: a symlink as source is
    made anew at the destination.  source_no_follow: bind the link itself.
    """

    __slots__ = (
        "copy_symlink", "idmap", "idmap_recursive", "overlay", "recursive", "source",
        "source_no_follow", "tree_attributes", "tree_cleared",
    )
    name = "bind"

    def __init__(self, origin, destination, source, words, overlay=False):
        """origin: also the index in `mounts`.  words: the `spec.options.Options` asked for."""
        self.origin = origin
        self.destination = destination
        self.attributes = words.attributes
        self.cleared = words.cleared
        self.propagation = words.propagation
        self.propagation_recursive = words.propagation_recursive
        self.nested = ()
        self.no_follow = words.destination_no_follow
        self.source = source
        self.recursive = words.recursive
        self.tree_attributes = words.tree_attributes
        self.tree_cleared = words.tree_cleared
        self.idmap = None
        self.idmap_recursive = False
        self.overlay = overlay
        self.copy_symlink = words.copy_symlink
        self.source_no_follow = words.source_no_follow


class Cover(Bind):
    """An overlay over a bind's source, for a runtime that makes the bind by itself.

    The flags of the bind are the runtime's work; only `recursive` is used here.
    """

    __slots__ = ()
    name = "cover"

    def __init__(self, origin, destination, source, words):
        super().__init__(origin, destination, source, words, overlay=True)
        self.attributes = self.cleared = self.tree_attributes = self.tree_cleared = 0
        self.propagation = 0
        self.propagation_recursive = False


class Cgroup(MountOperation):
    """`type: cgroup`: cgroup2, or one mount a controller on cgroup v1 and hybrid hosts.

    new_namespace: the container is in a cgroup namespace of its own (new or joined).
    """

    __slots__ = ("new_namespace",)
    name = "cgroup"

    def __init__(self, origin, destination, new_namespace):
        super().__init__(origin, destination)
        self.new_namespace = new_namespace


class Replica(MountOperation):
    """A pod's shared volume: this container's mount of the pod's one tmpfs.

    hint: the hint's name.  pod: the pod's id.  options: the master's option words.  source:
    the mount's source as written, which the hint matched.
    """

    __slots__ = ("hint", "options", "pod", "source")
    name = "replica"

    def __init__(self, origin, destination, source, hint, pod, options):
        super().__init__(origin, destination)
        self.source = source
        self.hint = hint
        self.pod = pod
        self.options = options


class Carry(MountOperation):
    """A mount that a runtime made below the rootfs, moved into the new root.

    The mount itself, not a clone: what the runtime does later by a descriptor that it has of it
    still counts.  With it comes everything mounted below it, hidden mounts among them; `below`
    has the destinations of these.

    mount: its id in the live table, by which it is known again.  destination: its canonical
    path from the rootfs.  attributes, propagation: what it has and keeps.  type, source: of its
    file system.  split: something below it is made anew.  aside: the destination of the
    `SetAside` that it lies on, or None.  unbindable: where it can't be moved, those of them,
    itself included, that no clone would hold as they are: they are bindable for that moment, and
    become unbindable in the new root.  overlay: a clone of it alone, and writes go to an overlay
    over that (``overlay.binds``).
    """

    __slots__ = (
        "aside", "below", "mount", "overlay", "source", "split", "type", "unbindable",
    )
    name = "carry"

    def __init__(self, origin, record):
        super().__init__(origin, os.fsdecode(record.mountpoint))
        self.mount = record.id
        self.type = os.fsdecode(record.type)
        self.source = os.fsdecode(record.source)
        self.attributes = record.attributes
        self.propagation = record.propagation
        self.split = False
        self.aside = None
        self.below = ()
        self.unbindable = ()
        self.overlay = False


class SetAside(Operation):
    """Take a mount out of what was moved into the new root: it is made anew in its place.

    destination, mount: as of a `Carry`.  over: the destination of what it came with; what is set
    aside is kept where that was before, below the new root, and goes with the old one.
    """

    __slots__ = ("destination", "mount", "over")
    name = "set aside"

    def __init__(self, origin: str, record: "MountRecord", over: str) -> None:
        self.origin = origin
        self.destination = os.fsdecode(record.mountpoint)
        self.mount = record.id
        self.over = over


class ReadonlyMount(Operation):
    """Make a mount read-only that a runtime leaves writable until after its hooks."""

    __slots__ = ("mount", "path")
    name = "read-only mount"

    def __init__(self, origin: str, record: "MountRecord") -> None:
        self.origin = origin
        self.path = os.fsdecode(record.mountpoint)
        self.mount = record.id


class Directory(Operation):
    """A directory that must exist (`process.cwd`), made 0755 if missing."""

    __slots__ = ("path",)
    name = "directory"

    def __init__(self, origin, path):
        self.origin = origin
        self.path = path


class Node(Operation):
    """A device node or FIFO: type ``c b p``, numbers, mode and owner.

    by_bind: bind the host's node instead of mknod (user namespaces); mknod that the kernel
    refuses with EPERM falls back to it.
    """

    __slots__ = ("by_bind", "gid", "major", "minor", "mode", "path", "type", "uid")
    name = "device"

    def __init__(self, origin, path, type, major, minor, mode, uid, gid, by_bind):
        self.origin = origin
        self.path = path
        self.type = type
        self.major = major
        self.minor = minor
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.by_bind = by_bind


class Symlink(Operation):
    """A symlink of /dev; left alone where the path exists.  only_if: a host path, or None."""

    __slots__ = ("only_if", "path", "target")
    name = "symlink"

    def __init__(self, origin, path, target, only_if=None):
        self.origin = origin
        self.path = path
        self.target = target
        self.only_if = only_if


class Console(Operation):
    """The pty of `process.terminal`, bound on /dev/console."""

    __slots__ = ("size",)
    name = "console"
    path = "/dev/console"

    def __init__(self, origin, size):
        self.origin = origin
        self.size = size


class Tmp(Operation):
    """/tmp.  always: whatever is there (``tmp=tmpfs``); else only where nothing is hidden."""

    __slots__ = ("always",)
    name = "tmp"

    def __init__(self, origin, always):
        self.origin = origin
        self.always = always


class Mask(Operation):
    """Hide a path: /dev/null over a file, an empty read-only tmpfs over a directory."""

    __slots__ = ("path",)
    name = "mask"

    def __init__(self, origin, path):
        self.origin = origin
        self.path = path


class ReadonlyPath(Operation):
    """Bind a path on itself, read-only."""

    __slots__ = ("path",)
    name = "read-only path"

    def __init__(self, origin, path):
        self.origin = origin
        self.path = path


class Seal(Operation):
    """`root.readonly`: the root ends read-only."""

    __slots__ = ()
    name = "seal"

    def __init__(self, origin):
        self.origin = origin


class Pivot(Operation):
    """Attach, pivot_root, detach the old root; then the root's propagation (MS_* number)."""

    __slots__ = ("propagation",)
    name = "pivot"

    def __init__(self, origin, propagation):
        self.origin = origin
        self.propagation = propagation


class Attach(Operation):
    """Attach the finished root over the rootfs, where a runtime will pivot into it by itself.

    propagation: `MS_SHARED` where the rootfs's mount is shared, else 0; what a runtime does
    after the pivot is the runtime's.
    """

    __slots__ = ("path", "propagation")
    name = "attach"

    def __init__(self, origin, path, propagation):
        self.origin = origin
        self.path = path
        self.propagation = propagation


class Note:
    """A decision that led to doing nothing, or otherwise than asked: printed with the plan."""

    __slots__ = ("origin", "text")

    def __init__(self, origin, text):
        self.origin = origin
        self.text = text


class UserNamespace:
    """The user namespace of the container.

    path: to join, or None for a new one.  uid_mappings, gid_mappings: lists of
    `spec.model.IdMapping`.  outside: the tree is built from outside by the host's root (so
    that its flags are locked); False: the builder itself is unprivileged and builds inside.
    root_uid, root_gid: the host's ids of the container's root.
    """

    __slots__ = ("gid_mappings", "outside", "path", "root_gid", "root_uid", "uid_mappings")

    def __init__(self, path, uid_mappings, gid_mappings, outside):
        self.path = path
        self.uid_mappings = uid_mappings
        self.gid_mappings = gid_mappings
        self.outside = outside
        self.root_uid = _host_id(uid_mappings, 0)
        self.root_gid = _host_id(gid_mappings, 0)

    def host_uid(self, uid):
        """Return the host's number of a container's uid, or None if it isn't mapped."""
        return _host_id(self.uid_mappings, uid)

    def host_gid(self, gid):
        """Return the host's number of a container's gid, or None if it isn't mapped."""
        return _host_id(self.gid_mappings, gid)


def _host_id(mappings, number):
    for mapping in mappings:
        offset = number - mapping.container_id
        if 0 <= offset < mapping.size:
            return mapping.host_id + offset
    return None


class Plan:
    """What will be done, as data: iterate it for the operations, in order.

    namespaces: list of `spec.model.Namespace` (``mount`` always among them; the user one is
    in `user`).  user: `UserNamespace` or None.  process: `spec.model.Process` or None.
    notes: list of `Note`.  warnings: list of str, one line each.  engine: ``"auto"``,
    ``"detached"``, ``"attached"``.  spec: the `Spec` it came from.  compiled: what the build
    encoded of it once, for the builds that follow; no part of the plan.  live: the
    `plan.live.Live` that a hook's plan was made from, else None.
    """

    __slots__ = (
        "compiled", "container_id", "engine", "live", "namespaces", "notes", "operations",
        "process", "spec", "user", "warnings",
    )

    def __init__(self, spec):
        self.spec = spec
        self.compiled = None
        self.live = None
        self.container_id = None
        self.engine = "auto"
        self.namespaces = []
        self.user = None
        self.process = spec.process
        self.operations = []
        self.notes = []
        self.warnings = []

    def __iter__(self):
        return iter(self.operations)

    def __len__(self):
        return len(self.operations)

    def new_namespace(self, type):
        """Return whether the container gets a new namespace of `type` (``"network"``)."""
        return any(entry.type == type and entry.path is None for entry in self.namespaces)

    def to_json(self):
        """Return the plan as a JSON text (``specs/schema/plan.json``)."""
        from sandboxfs.plan import show

        return show.to_json(self)

    def __str__(self):
        from sandboxfs.plan import show

        return show.to_text(self)
