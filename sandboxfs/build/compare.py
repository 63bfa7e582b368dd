"""The finished tree, as the kernel shows it, against the plan.

Every mount operation is done again on paper, in order, on the real table: the mount that it
must have made is the one on the mount that its destination lay in at that time.  What is left
over is what nobody asked for.
"""

import os
import stat

from sandboxfs.build.expected import EVERY_FLAG, Form, bind_form, expected, words
from sandboxfs.errors import shown
from sandboxfs.kernel import abi, mounttable, resolve
from sandboxfs.plan import operations as kinds

_RDONLY = abi.MOUNT_ATTR_RDONLY
_ATIME = abi.MOUNT_ATTR__ATIME
_CGROUPS = (b"cgroup", b"cgroup2")
NULL_DEVICE = os.makedev(1, 3)
_NODE_KINDS = {"c": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO}


class _Node:
    """A mount that was recognised: its record, and what is recognised on it by mountpoint."""

    __slots__ = ("children", "expectation", "record")

    def __init__(self, record, expectation):
        self.record = record
        self.expectation = expectation
        self.children = {}


class Comparison:
    """One comparison of a plan with a table; `differences` and `notes` are lists of lines.

    records: of the mounts below and with the root, mountpoints as seen from it.  root: its
    descriptor, borrowed.  outcomes: see `expected`.  host: a `HostSide`, or None where the
    host's paths can't be seen.  submounts: the paths (bytes, absolute) below the lowers that
    get mounts of their own.
    """

    def __init__(self, plan, records, root, outcomes=(), host=None, submounts=()):
        self.plan = plan
        self.root = root
        self.outcomes = outcomes or ()
        self.host = host
        self.submounts = submounts
        self.differences = []
        self.notes = []
        self.records = mounttable.parents_first(records)
        self.by_number = {}
        self.on = {}
        for record in self.records:
            self.by_number[record.old_id] = record
            self.on[record.parent_id, record.mountpoint] = record
        self.nodes = {}
        self.top = None

    def run(self):
        """Compare; returns itself."""
        expectations = expected(self.plan, self.outcomes)
        if not self.find_root(expectations[0]):
            return self
        self.find_submounts()
        located = [(each, *self.locate(each)) for each in expectations[1:]]
        to_come = {}
        for expectation, path, there in located:
            counts = there and expectation.required is not None
            to_come[path] = to_come.get(path, 0) + counts
        for expectation, path, there in located:
            self.find(expectation, path, there, to_come)
            to_come[path] -= there and expectation.required is not None
        for operation in self.plan.operations:
            check = _CONTENT.get(type(operation))
            if check is not None:
                check(self, operation)
        self.left_over()
        self.add_notes()
        return self

    def differ(self, operation, target, text):
        self.differences.append(f"{operation.origin}: {shown(target)}: {text}")

    def recognise(self, record, expectation, parent):
        node = _Node(record, expectation)
        self.nodes[record.id] = node
        if parent is None:
            self.top = node
        else:
            parent.children[record.mountpoint] = node
        return node

    def find_root(self, expectation):
        record = self.by_number.get(mounttable.old_mount_id(self.root)[0])
        if record is None:
            self.differences.append("/: the root is in no mount of the table")
            return False
        self.recognise(record, expectation, None)
        self.check(expectation, record, None)
        return True

    def find_submounts(self):
        """Mounts below the lowers come first; the rules allow that one was left out."""
        for path in self.submounts:
            parent = self.at(path)
            record = self.on.get((parent.record.id, path))
            if record is not None:
                self.recognise(record, None, parent)
                self.check_submount(record)
        root = self.top.record
        is_overlay = type(self.top.expectation.operation) is kinds.Overlay
        if is_overlay and root.type == b"tmpfs" and not self.outcomes:
            self.find_skeleton(root)

    def find_skeleton(self, root):
        """The entries of a skeleton: mounts right on it that no operation is about."""
        destinations = {_cleaned(each.destination) for each in expected(self.plan)}
        for record in self.records:
            on_root = record.parent_id == root.id and record.id not in self.nodes
            covered = (record.id, record.mountpoint) in self.on
            if on_root and (covered or record.mountpoint not in destinations):
                self.recognise(record, None, self.top)
                self.check_submount(record)

    def check_submount(self, record):
        if record.type != b"overlay" and not record.attributes & _RDONLY:
            self.differences.append(
                f"root.path: {shown(record.mountpoint)}: {shown(record.type)} of the rootfs, "
                "mounted writable and without an overlay"
            )

    def at(self, path, to_come=None):
        """Return the recognised mount that the absolute, canonical `path` leads to by now.

        to_come: how many mounts operations have yet to make, by path; what a stack holds more
        than those came along with what it lies on (a recursive bind), and is recognised.
        """
        node = self.top
        prefix = b"/"
        for name in (None, *path.strip(b"/").split(b"/")):
            if name:
                prefix = prefix.rstrip(b"/") + b"/" + name
            while prefix in node.children:
                node = node.children[prefix]
            if to_come is not None and name:
                node = self.see_through(node, prefix, to_come.get(prefix, 0))
        return node

    def find(self, expectation, path, there, to_come):
        """Find the mount that an operation made, and check it.

        path, there: what `locate` says.  to_come: see `at`; this operation is counted.
        """
        operation, asked = expectation.operation, expectation.destination
        parent = self.at(path, to_come)
        record = self.on.get((parent.record.id, path))
        if record is None:
            parent, record = self.below_synthesised(parent, path)
        if record is None or record.id in self.nodes:
            if expectation.required or self.must_be_hidden(expectation, there):
                self.differ(operation, asked, "nothing is mounted there")
            return
        if expectation.required is None:
            if not _is_content(operation):
                self.differ(operation, asked, f"{shown(record.type)} is mounted there, and was "
                            "to be left alone")
            return
        self.recognise(record, expectation, parent)
        self.check(expectation, record, parent.record)

    def see_through(self, node, path, still_to_come):
        """Return the node on top at `path`, after recognising there what came along."""
        stack = []
        record = self.on.get((node.record.id, path))
        while record is not None and record.id not in self.nodes:
            stack.append(record)
            record = self.on.get((record.id, path))
        for record in stack[:max(0, len(stack) - still_to_come)]:
            if node.expectation is None or not self.came_along(record, node):
                break
            node = self.recognise(record, node.expectation, node)
        return node

    def must_be_hidden(self, expectation, there):
        """A path that exists and was to be masked or made read-only."""
        operation = expectation.operation
        return there and type(operation) in (kinds.Mask, kinds.ReadonlyPath) and (
            expectation.required is not None
        )

    def locate(self, expectation):
        """Return (canonical path of a destination, whether it exists).

        Where a mount is seen there, the kernel says its path.  Where none is, it can lie
        under a later mount, and only the words of the spec say where.
        """
        how = resolve.ANY if expectation.follow else resolve.ANY_NO_FOLLOW
        text = _cleaned(expectation.destination)
        try:
            fd = resolve.open_in_root(self.root, expectation.destination, how)
        except OSError:
            return text, False
        try:
            number, is_root = mounttable.old_mount_id(fd)
        finally:
            os.close(fd)
        record = self.by_number.get(number) if is_root else None
        if record is None or record is self.top.record:
            return text, True
        return record.mountpoint, True

    def below_synthesised(self, parent, path):
        """Look on the overlay that the build puts over a mount in which nothing can be made."""
        over = self.on.get((parent.record.id, parent.record.mountpoint))
        if over is None or over.id in self.nodes or not self.is_synthesised(over):
            return parent, None
        record = self.on.get((over.id, path))
        if record is None:
            return parent, None
        return self.recognise(over, None, parent), record

    def is_synthesised(self, record):
        """An overlay on top of a recognised mount, with the same flags."""
        under = self.nodes.get(record.parent_id)
        if under is None or record.type != b"overlay":
            return False
        same = not (record.attributes ^ under.record.attributes) & (EVERY_FLAG & ~_ATIME)
        told = not self.outcomes or any(kind == "synthesised" for _, kind, _ in self.outcomes)
        return same and told and record.mountpoint == under.record.mountpoint

    # -- one mount -------------------------------------------------------------------

    def check(self, expectation, record, parent):
        found = min((form.differences(record) for form in expectation.forms), key=len)
        allowed = expectation.propagation
        if parent is not None and parent.propagation & abi.MS_SHARED:
            # What is mounted on a shared mount becomes shared.
            allowed = {*allowed, abi.MS_SHARED}
        if record.propagation not in allowed:
            found.append(f"propagation {mounttable.propagation_of(record)} instead of "
                         + " or ".join(sorted(map(_propagation_name, allowed))))
        more = _MORE.get(type(expectation.operation))
        if more is not None:
            found += more(self, expectation.operation, record, parent)
        for text in found:
            self.differ(expectation.operation, expectation.destination, text)

    def check_filesystem(self, operation, record, _parent):
        found = []
        own = record.type.partition(b".")[0] == operation.type.encode()
        if operation.fallback_bind is None or not own:
            source = os.fsencode(operation.source)
            if own and record.source != source:
                found.append(f"source {shown(record.source)} instead of {shown(source)}")
        if own and operation.fallback_bind is None and record.root != b"/":
            found.append(f"shows {shown(record.root)} of its file system instead of all of it")
        if "ro" in operation.flags and record.superblock_options.split(b",")[0] != b"ro":
            found.append("the file system itself is writable")
        return found

    def check_bind(self, operation, record, _parent):
        if self.host is None or operation.overlay:
            return []
        source = self.host.source(operation)
        if source is None:
            self.note(operation, operation.source, "isn't there any more")
            return []
        synthesised = record.type == b"overlay" and operation.nested
        if source.identity != self.identity(operation) and not synthesised:
            self.note(operation, operation.source,
                      "is another file by now than the one that is bound")
            return []
        asked = bind_form(operation)
        kept = EVERY_FLAG & ~asked.mask
        if (record.attributes ^ source.attributes) & kept and not synthesised:
            wanted = source.attributes & kept | asked.attributes & asked.mask
            text = f"flags {words(record.attributes)} instead of {words(wanted)}"
            return [text + ", which keeps the source's"]
        return []

    def identity(self, operation):
        how = resolve.ANY_NO_FOLLOW if operation.no_follow else resolve.ANY
        try:
            fd = resolve.open_in_root(self.root, os.fsencode(operation.destination), how)
        except OSError:
            return None
        try:
            return identity_of(os.fstat(fd))
        finally:
            os.close(fd)

    def check_mask(self, operation, record, _parent):
        fd = self.opened(operation.path)
        if fd is None:
            return []
        try:
            status = os.fstat(fd)
            if not stat.S_ISDIR(status.st_mode):
                real = stat.S_ISCHR(status.st_mode) and status.st_rdev == NULL_DEVICE
                return [] if real else ["covered by something else than /dev/null"]
            if record.type != b"tmpfs":
                return [f"covered by {shown(record.type)} instead of an empty tmpfs"]
            found = []
            if record.superblock_options.split(b",")[0] != b"ro":
                found.append("the tmpfs that covers it is writable")
            content = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
            try:
                if os.listdir(content):
                    found.append("what covers it isn't empty")
            finally:
                os.close(content)
            return found
        finally:
            os.close(fd)

    def check_readonly_path(self, _operation, record, parent):
        kept = EVERY_FLAG & ~_RDONLY
        if record.device == parent.device and (record.attributes ^ parent.attributes) & kept:
            wanted = parent.attributes | _RDONLY
            return [f"flags {words(record.attributes)} instead of {words(wanted)}"]
        return []

    def check_node_bind(self, operation, _record, _parent):
        fd = self.opened(operation.path, resolve.ANY_NO_FOLLOW)
        if fd is None:
            return []
        try:
            return _device_differences(operation, os.fstat(fd))
        finally:
            os.close(fd)

    def opened(self, path, how=resolve.ANY):
        """Return an O_PATH descriptor of a path inside the root, or None if it isn't seen."""
        try:
            return resolve.open_in_root(self.root, os.fsencode(path), how)
        except OSError:
            return None

    # -- what is no mount ------------------------------------------------------------

    def content_node(self, operation):
        fd = self.opened(operation.path, resolve.ANY_NO_FOLLOW)
        if fd is None:
            self.differ(operation, operation.path, "missing")
            return
        try:
            status = os.fstat(fd)
        finally:
            os.close(fd)
        bound = any(node.expectation is not None and node.expectation.operation is operation
                    for node in self.nodes.values())
        if bound:
            return
        found = _device_differences(operation, status)
        made = self.outcomes and not self.decided(operation)
        if made and stat.S_IMODE(status.st_mode) != operation.mode:
            found.append(f"mode {stat.S_IMODE(status.st_mode):04o} instead of "
                         f"{operation.mode:04o}")
        for text in found:
            self.differ(operation, operation.path, text)

    def decided(self, operation):
        return [kind for each, kind, _detail in self.outcomes if each is operation]

    def content_symlink(self, operation):
        fd = self.opened(operation.path, resolve.ANY_NO_FOLLOW)
        if fd is None:
            if operation.only_if is None:
                self.differ(operation, operation.path, "missing")
            return
        try:
            target = None
            if stat.S_ISLNK(os.fstat(fd).st_mode):
                target = os.readlink(b"", dir_fd=fd)
        finally:
            os.close(fd)
        if target == os.fsencode(operation.target):
            return
        what = "no symlink" if target is None else f"a symlink to {shown(target)}"
        text = f"{what} instead of one to {operation.target}"
        if self.outcomes and "skipped" not in self.decided(operation):
            self.differ(operation, operation.path, text)
        else:
            self.note(operation, operation.path, text + ": allowed if it was there before")

    def content_directory(self, operation):
        fd = self.opened(operation.path, resolve.DIRECTORY)
        if fd is None:
            self.differ(operation, operation.path, "no directory is there")
        else:
            os.close(fd)

    # -- the rest --------------------------------------------------------------------

    def left_over(self):
        """Report mounts that no operation made, unless they came with one."""
        for record in self.records:
            if record.id in self.nodes:
                continue
            parent = self.nodes.get(record.parent_id)
            if parent is None:
                if record.old_parent_id not in self.by_number:
                    self.extra(record)
                continue  # on an extra mount: that one is reported
            if self.is_synthesised(record):
                self.recognise(record, None, parent)
            elif parent.expectation is not None and self.came_along(record, parent):
                # What lies on it came along as well.
                self.recognise(record, parent.expectation, parent)
            else:
                self.extra(record)

    def came_along(self, record, parent):
        expectation = parent.expectation
        operation = expectation.operation
        kind = type(operation)
        if kind is kinds.ReadonlyPath:
            return bool(record.attributes & _RDONLY)
        if kind is kinds.Cgroup:
            return record.type in _CGROUPS
        if kind is kinds.Filesystem:
            return operation.fallback_bind is not None and _matches(
                record, operation.tree_attributes, operation.tree_attributes)
        if kind is kinds.PlainRoot:
            return True
        if kind is not kinds.Bind or not operation.recursive:
            return False
        if not _matches(record, operation.tree_attributes,
                        operation.tree_attributes | operation.tree_cleared):
            self.differ(operation, record.mountpoint,
                        f"flags {words(record.attributes)} below a bind whose whole tree was "
                        f"to have {words(operation.tree_attributes)}")
        return self.is_below_source(operation, record)

    def is_below_source(self, operation, record):
        """Whether the host has a mount at that place below the source; True if unknown."""
        follows_host = operation.propagation in (abi.MS_SLAVE, abi.MS_SHARED)
        source = None if self.host is None or follows_host else self.host.source(operation)
        if source is None:
            return True
        start = self.node_of(operation).record.mountpoint.rstrip(b"/") + b"/"
        return record.mountpoint[len(start):] in source.below

    def node_of(self, operation):
        return next(node for node in self.nodes.values()
                    if node.expectation is not None and node.expectation.operation is operation)

    def extra(self, record):
        self.differences.append(
            f"not in the plan: {shown(record.mountpoint)}: {shown(record.type)} of "
            f"{shown(record.source) or 'no source'}, {words(record.attributes)}"
        )

    def note(self, operation, target, text):
        self.notes.append(f"{operation.origin}: {shown(target)}: {text}")

    def add_notes(self):
        """Say what of the tree the payload of a user namespace could change by itself."""
        user = self.plan.user
        if user is None:
            return
        if not user.outside:
            self.notes.append("the tree was built inside the container's user namespace: no flag "
                              "of a mount made there is locked against a payload that keeps "
                              "CAP_SYS_ADMIN in it")
            return
        for operation in self.plan.operations:
            namespace = _OWN.get(getattr(operation, "type", ""))
            if namespace is not None and self.plan.new_namespace(namespace):
                self.note(operation, operation.destination,
                          f"the payload's own {namespace} namespace lets it mount another "
                          f"{operation.type}, with flags of its choice")


# File systems that whoever owns the namespace can mount anew.
_OWN = {"proc": "pid", "sysfs": "network", "mqueue": "ipc", "cgroup2": "cgroup"}

_MORE = {
    kinds.Filesystem: Comparison.check_filesystem, kinds.Bind: Comparison.check_bind,
    kinds.Mask: Comparison.check_mask, kinds.ReadonlyPath: Comparison.check_readonly_path,
    kinds.Node: Comparison.check_node_bind,
}
_CONTENT = {
    kinds.Node: Comparison.content_node, kinds.Symlink: Comparison.content_symlink,
    kinds.Directory: Comparison.content_directory,
}


def _cleaned(path):
    return os.path.normpath(b"/" + path.lstrip(b"/"))


def _is_content(operation):
    """Whether a mount at the operation's path may well be another operation's."""
    return type(operation) in (kinds.Mask, kinds.ReadonlyPath)


def _matches(record, attributes, mask):
    return not Form(None, attributes, mask).differences(record)


def _device_differences(operation, status):
    kind = stat.S_IFMT(status.st_mode)
    number = os.makedev(operation.major or 0, operation.minor or 0)
    if kind != _NODE_KINDS[operation.type] or (kind != stat.S_IFIFO and status.st_rdev != number):
        return [f"not the device {operation.type} {operation.major}:{operation.minor}"]
    return []


def identity_of(status):
    """Return what tells a file from all others at a time: (device, inode)."""
    return status.st_dev, status.st_ino


_PROPAGATION_NAMES = (
    (abi.MS_SHARED, "shared"), (abi.MS_SLAVE, "slave"), (abi.MS_UNBINDABLE, "unbindable"),
    (abi.MS_PRIVATE, "private"),
)


def _propagation_name(number):
    return "+".join(name for bit, name in _PROPAGATION_NAMES if number & bit)
