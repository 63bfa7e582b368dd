"""Whether a finished tree is what the plan says: the ways in, and what the host tells of it."""

import os
import stat

from sandboxfs.build.compare import Comparison, identity_of
from sandboxfs.kernel import (
    abi,
    mounttable,
    submount_records,  # noqa: F401 - inside a container `submounts` couldn't load it any more
    submounts,
)
from sandboxfs.kernel.syscalls import mount_id
from sandboxfs.plan import operations as kinds


class Source:
    """What the host has at a bind's source: identity, the mount's flags, mounts below (paths)."""

    __slots__ = ("attributes", "below", "identity")

    def __init__(self, attributes, below, identity):
        self.attributes = attributes
        self.below = below
        self.identity = identity


class HostSide:
    """The host's paths, for comparing a container from outside; asked when needed."""

    def __init__(self):
        self.attributes = {record.old_id: record.attributes for record in mounttable.read()}
        self.known = {}

    def source(self, operation):
        """Return the `Source` of a `Bind`, or None if it isn't there or isn't to be seen."""
        if operation not in self.known:
            self.known[operation] = self._source(operation)
        return self.known[operation]

    def _source(self, operation):
        no_follow = os.O_NOFOLLOW if operation.source_no_follow else 0
        try:
            fd = os.open(operation.source, abi.O_PATH | os.O_CLOEXEC | no_follow)
        except OSError:
            return None
        try:
            attributes = self.attributes.get(mounttable.old_mount_id(fd)[0])
            status = os.fstat(fd)
            if attributes is None:
                return None
            below = set()
            if stat.S_ISDIR(status.st_mode):
                below = {record.mountpoint for record in submounts.below(fd)}
            return Source(attributes, below, identity_of(status))
        finally:
            os.close(fd)

    def submounts(self, plan):
        """Return the absolute paths, in the container, of the mounts below the plan's lowers."""
        from sandboxfs.build import view

        paths = []
        for operation in plan.operations:
            if type(operation) is not kinds.Lower or not operation.submounts:
                continue
            here = os.open(operation.path, abi.O_PATH | os.O_CLOEXEC)
            try:
                if stat.S_ISDIR(os.fstat(here).st_mode):
                    for record, fd in view.visible(here, submounts.below(here)):
                        os.close(fd)
                        paths.append(b"/" + record.mountpoint)
            finally:
                os.close(here)
        return _once(paths)


def _once(paths):
    return list(dict.fromkeys(paths))


# -- the ways in ---------------------------------------------------------------------------


def verify(plan, records, root, outcomes=(), host=None, submounts=()):
    """Return the differences between a plan and a finished tree, a line each.

    The arguments are those of `Comparison`.
    """
    return Comparison(plan, records, root, outcomes, host, submounts).run().differences


def tree_of(root):
    """Return the records of the mount `root` (a descriptor) and all below, "/" its mountpoint."""
    number = mount_id(root)[0]
    below = submounts.below(root)
    for record in below:
        record.mountpoint = b"/" + record.mountpoint
    return [mounttable.record(number), *below]


def verify_root(root, pid=None):
    """Return the differences of a `build.root.Root` that was attached or pivoted into.

    pid: compare what that process sees instead.  OSError where the kernel doesn't tell the
    mounts (a tree that isn't attached).
    """
    submounts = []
    for lower in root.materials.lowers if root.materials is not None else ():
        submounts += [b"/" + each.path for each in lower.submounts]
        if lower.skeleton is not None:
            submounts += [b"/" + path for path, _status, _link, mount in lower.skeleton.entries
                          if mount is not None]
    submounts = _once(submounts)
    if pid is None:
        return verify(root.plan, tree_of(root.fd), root.fd, root.outcomes, None, submounts)
    fd = os.open(f"/proc/{pid}/root", abi.O_PATH | os.O_CLOEXEC)
    try:
        return verify(root.plan, mounttable.read(pid), fd, root.outcomes, None, submounts)
    finally:
        os.close(fd)


def verify_process(plan, pid):
    """Return the `Comparison` of a plan with the running process `pid`, from the host.

    OSError for a process that isn't there or not ours to look at.
    """
    records = mounttable.read(pid)
    host = HostSide()
    root = os.open(f"/proc/{pid}/root", abi.O_PATH | os.O_CLOEXEC)
    try:
        return Comparison(plan, records, root, (), host, host.submounts(plan)).run()
    finally:
        os.close(root)
