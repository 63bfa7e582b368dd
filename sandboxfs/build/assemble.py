"""The container's side of a build: from a plan and its materials to a root.

It runs in the container's namespaces and touches nothing but the tree it builds.  Every
operation is one function, here or in the file of its kind; a rule that an operation carries is
evaluated and its outcome recorded, none is invented.
"""

import _stat as stat
import errno

from sandboxfs.build import engine as engines
from sandboxfs.build.compiled import compile_once, target_of
from sandboxfs.build.failure import worded
from sandboxfs.build.gather import gather
from sandboxfs.build.root import Root
from sandboxfs.build.siblings import Siblings
from sandboxfs.errors import MountError
from sandboxfs.kernel import abi, fscontext
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import (
    fchmodat2,
    fchownat,
    fewer_descriptors,
    flags_of,
    has_threads,
    more_descriptors,
    mount_id,
    mount_setattr,
    move_mount,
    open_tree,
    syscall,
)
from sandboxfs.plan import operations as kinds

_RDONLY = abi.MOUNT_ATTR_RDONLY
INHERITED = (
    abi.MOUNT_ATTR_NOSUID | abi.MOUNT_ATTR_NODEV | abi.MOUNT_ATTR_NOEXEC
    | abi.MOUNT_ATTR_NOSYMFOLLOW
)
_OVERLAY_SETTINGS = [
    # Marks that an untrusted layer could carry must not redirect lookups.
    fscontext.string(b"redirect_dir", b"nofollow"),
    fscontext.string(b"metacopy", b"off"),
]


def build(plan):
    """Gather and assemble in one process; returns the `Root`.

    Raises MountError.  With the attached engine the caller's mount namespace is used as the
    staging place: call it in a namespace of your own there.
    """
    try:
        return _build(plan)
    except MountError as error:
        if error.errno != errno.EMFILE:
            raise
        # Each mount takes several.
        limit = _asked(more_descriptors, "prlimit", "RLIMIT_NOFILE")
        if limit is None:
            raise
    try:
        return _build(plan)
    finally:
        _asked(fewer_descriptors, "prlimit", "RLIMIT_NOFILE", limit)


def _build(plan):
    compiled = compile_once(plan)
    if compiled.usual is not None:
        if compiled.build is None:
            from sandboxfs.build.usual import build as at_once

            compiled.build = at_once
        root = compiled.build(plan)
        if root is not None:
            return root
    alone = not _asked(has_threads, "unshare", "CLONE_THREAD")
    materials = gather(plan)
    # The umask is the whole process's: it is cleared only where no other thread can notice.
    umask = os.umask(0) if alone else None
    try:
        return assemble(plan, materials, umask_is_clear=umask is not None)
    except BaseException:
        materials.close()
        materials.cleanup(failed=True)
        raise
    finally:
        if umask is not None:
            os.umask(umask)


def _asked(function, call, target, *arguments):
    try:
        return function(*arguments)
    except OSError as error:
        raise MountError("build", call, target, "", error.errno) from error


def prepare(plan, materials, umask_is_clear=False):
    """Return what `assemble` can know of its work before the fork, or None; does nothing yet.

    A page that a child writes to is copied first: what is made here isn't made there.
    """
    if plan.engine == "attached":
        return None
    return _Assembly(plan, materials, -1, None, umask_is_clear, engines.Detached)


def assemble(plan, materials, user_namespace=-1, owner=None, umask_is_clear=False, prepared=None,
             place=None):
    """Return the `Root` that a plan describes; takes over the materials.

    user_namespace: descriptor of the container's, for `idmap` without mappings, borrowed.
    owner: (uid, gid) of what is made, by default the plan's container root.
    umask_is_clear: the process's umask is 0, so that modes needn't be set twice.  prepared: what
    `prepare` made of these materials.  place: where the root will be attached, as
    `engine.AttachedOver` needs it, for a mount namespace that isn't the container's own.  Raises
    MountError; what was built until then is gone when it does.
    """
    arguments = (plan, materials, user_namespace, owner, umask_is_clear)
    detached, attached = (engines.Detached, engines.Attached) if plan.live is None else (
        engines.DetachedOver, engines.AttachedOver)
    if place is not None:
        attached = engines.AttachedOver
    if plan.engine != "attached":
        try:
            if prepared is None:
                prepared = _Assembly(*arguments, detached, place)
            prepared.user_namespace = user_namespace
            return prepared.run()
        except MountError as error:
            if plan.engine == "detached" or not _detached_is_missing(error):
                raise
        # What was taken into the first try is lost with it: open it again, in this
        # namespace, since an older kernel clones nothing across namespaces.
        materials.close()
        if materials.upper is not None:
            materials.upper.empty()
        again = gather(plan, materials.upper)
        again.upper_is_ours = materials.upper_is_ours
        arguments = (plan, again, *arguments[2:])
    return _Assembly(*arguments, attached, place).run()


def _detached_is_missing(error):
    """Whether an error means that this kernel builds no detached trees: found by trying."""
    # EOPNOTSUPP: overlayfs takes no descriptors (before 6.13).
    if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EBADF, errno.EOPNOTSUPP):
        return False
    from sandboxfs.kernel.features import detached_trees

    return not detached_trees()


class _Assembly:
    """One build: the tree so far, and what has to be remembered of it."""

    def __init__(self, plan, materials, user_namespace, owner, umask_is_clear, engine, place=None):
        self.plan = plan
        compiled = compile_once(plan)
        self.compiled = compiled.fields
        self.calls = None
        if (engine is engines.Detached and umask_is_clear and owner is None and plan.live is None
                and place is None and makes_as_root()):
            self.calls = take_calls(plan, materials)
        if self.calls is not None:
            self.is_usual = self.calls.overlay is not None and is_usual(materials)
        self.links_followed = False
        self.done = 0
        self.umask_is_clear = umask_is_clear
        self.tmp_target = -1
        self.materials = materials
        self.user_namespace = user_namespace
        self.descriptors = []
        if owner is None and plan.user is not None and plan.user.outside and plan.user.root_uid:
            owner = (plan.user.root_uid, plan.user.root_gid)
        self.owner = owner
        self.make_engine = engine
        self.engine = None
        self.place = place
        self.root = -1
        self.known_maker = None
        self.sealed = False
        self.seal = compiled.sealed
        self.attached = []
        self.outcomes = []
        self.hiding_tmpfs = self.hiding_null = -1
        self.console = (-1, -1)
        self.dev = {}
        self.userxattr = False

    @property
    def maker(self):
        """The `Maker` of the root's mountpoints, made when first needed."""
        if self.known_maker is None:
            from sandboxfs.kernel.maker import Maker

            self.known_maker = Maker(self.root, self.owner, self.writable)
        return self.known_maker

    def own(self, fd):
        self.descriptors.append(fd)
        return fd

    def run(self):
        """Do every operation, in order; returns the `Root`."""
        try:
            if self.calls is None:
                for operation in self.plan.operations:
                    self.do(operation)
            else:
                self.do_prepared(self.calls)
        except BaseException:
            try:
                if self.engine is not None:
                    self.engine.abandon()
            finally:
                while self.descriptors:
                    os.close(self.descriptors.pop())
            raise
        root = Root(self.plan, self.engine, self.root, self.descriptors, self.outcomes)
        root.console_master, root.console_slave = self.console
        root.materials = self.materials
        root.place = self.place
        return root

    def do(self, operation):
        """Do one operation, whatever it takes."""
        try:
            _STEPS[type(operation)](self, operation)
        except OSError as error:
            raise worded(error, operation, target_of(operation)) from error

    def do_prepared(self, calls):
        """Do every operation by its prepared calls, and the long way where one fails."""
        self.outcomes += calls.ahead_outcomes
        calls.outcomes = self.outcomes
        try:
            self.do_root(calls)
            if self.engine.scratch >= 0:
                calls.stage_null(self.engine.scratch)
            entries = iter(calls.entries)
            for slot, call, arguments in entries:
                result = call(*arguments)
                if result < 0:
                    rest = entries.__length_hint__()
                    count = calls.skipped(call, arguments)
                    entries.__setstate__(
                        self.do_long(calls, rest, -1 - result) if count is None
                        else len(calls.entries) - rest + count
                    )
                elif slot is not None:
                    slot.value = result
            self.note_usual(calls, len(calls.steps))
        finally:
            self.descriptors += calls.take()
            self.plan.compiled.calls.append(calls)

    def do_long(self, calls, rest, attached):
        """Do an operation that its prepared calls couldn't do; returns where to go on.

        rest: the number of entries that come after the one that failed.  attached: of siblings,
        how many are.
        """
        calls.close_contexts()
        failed = len(calls.entries) - rest
        index = next(at for at, step in enumerate(calls.steps) if step[1] >= failed)
        calls.drop_mount(calls.steps[index])
        calls.leave_places()
        self.note_usual(calls, index)
        if calls.is_staged:
            self.hiding_null = calls.null.value
        # Whether it is attached by now or not, it can be cloned.
        if calls.hiding_tmpfs is not None and self.hiding_tmpfs < 0:
            self.hiding_tmpfs = calls.hiding_tmpfs.value
        while True:
            if calls.is_done_ahead(index):
                self.note_usual(calls, index + 1)
            else:
                self.done = index + 1
                self.do_step(calls, calls.steps[index][0], attached)
            attached = 0
            if not self.links_followed or self.done == len(calls.steps):
                break
            # Paths don't tell any more where they lead: nothing is known ahead.
            index += 1
        return calls.steps[index][1]

    def do_step(self, calls, step, attached):
        """Do the operation of a step, or of siblings those after the first that are attached."""
        if type(step) is not Siblings:
            self.do(step)
            return
        self.note_binds(calls, step.operations[:attached])
        for operation in step.operations[attached:]:
            self.do(operation)

    def note_binds(self, calls, operations):
        """Take note of the siblings that are attached."""
        self.outcomes += [(operation, "bind", "") for operation in operations]
        gathered = calls.gathered
        self.attached += [(gathered[operation], operation, False) for operation in operations]

    def note_usual(self, calls, end):
        """Take note of what the prepared calls did of the steps up to `end`."""
        for operation, _end, outcome, mount in calls.steps[self.done:end]:
            if type(operation) is Siblings:
                self.note_binds(calls, operation.operations)
            if outcome is not None:
                self.outcomes.append(outcome)
            if mount is not None:
                # A bind stays its source's: read-only, nothing is made in it through a twin.
                own = type(operation) is not kinds.Bind and operation not in calls.of_the_machine
                self.attached.append((mount.value, operation, own))
        self.done = end

    def do_root(self, calls):
        """Build the root by the prepared calls if it is the usual one."""
        usual = self.is_usual
        for slot, call, arguments in calls.overlay if usual else ():
            result = call(*arguments)
            if result < 0:
                usual = False
                break
            if slot is not None:
                slot.value = result
        if not usual:
            calls.close_contexts()
            calls.ready.clear()
            for operation in self.plan.operations:
                if type(operation) in _ROOT:
                    self.do(operation)
            calls.root.value = self.root
            return
        overlay = calls.joined
        self.start(overlay.size)
        self.engine.scratch, self.engine.uppers = calls.scratch.value, 1
        self.userxattr = overlay.userxattr
        self.adopt(self.own(calls.root.value))
        self.outcomes.append((overlay, "overlay", ""))

    # -- the root --------------------------------------------------------------------

    def start(self, size):
        if self.plan.live is not None:
            from sandboxfs.build import carry

            self.place = carry.Place(self.materials.rootfs, self.plan.live)
        if self.make_engine in (engines.DetachedOver, engines.AttachedOver):
            self.engine = self.make_engine(self.own, size, self.place)
        else:
            self.engine = self.make_engine(self.own, size)

    def lower(self, operation):
        """Gathered already; the overlay joins them."""

    def overlay(self, operation):
        self.start(operation.size)
        self.userxattr = operation.userxattr
        materials = self.materials
        top = materials.lowers[0]
        if top.skeleton is not None:
            root = top.skeleton.build(self)
            self.adopt(root)
            top.skeleton.fill(self, operation)
            return
        if materials.upper is not None:
            directory = self.engine.usable(materials.upper_mount)
            upper, work = self.engine.pair(directory, b"upper", b"work")
        else:
            upper, work = self.engine.upper_pair()
        try:
            copy_attributes(top, upper)
            # What the rootfs's own mount doesn't allow, a layer over it doesn't either.
            attributes = flags_of(top.fd) & INHERITED | (_RDONLY if self.seal else 0)
            lowers = [lower.fd for lower in materials.lowers]
            source = operation.source.encode()
            root = self.own(self.join(lowers, upper, work, attributes, source))
        finally:
            os.close(upper)
            os.close(work)
        self.adopt(root)
        self.outcomes.append((operation, "overlay", ""))
        if any(lower.submounts for lower in materials.lowers):
            from sandboxfs.build import view

            view.attach_submounts(self, operation, materials.lowers)

    def join(self, lowers, upper, work, attributes=0, source=b"overlay"):
        """Return a new overlay mount of lower clones and an upper, unattached, not owned."""
        settings = [fscontext.string(b"source", source), *_OVERLAY_SETTINGS,
                    *self.engine.overlay_settings(lowers, upper, work)]
        if self.userxattr:
            settings.append(fscontext.flag(b"userxattr"))
        try:
            return fscontext.create(b"overlay", settings, attributes)
        finally:
            self.engine.joined()

    def join_over(self, lower, status, attributes=0):
        """Return a new overlay of one lower clone and an upper of its own, not owned."""
        upper, work = self.engine.upper_pair()
        try:
            _copy_owner(status, upper)
            return self.join([lower], upper, work, attributes)
        finally:
            os.close(upper)
            os.close(work)

    def plain_root(self, operation):
        self.start(None)
        if not operation.submounts:
            root = self.materials.sources[operation]
            if self.seal:
                mount_setattr(root, _RDONLY)
            self.adopt(root)
            return
        # Nothing can be attached to a clone that was made in another mount namespace: anew.
        flags = abi.OPEN_TREE_CLONE | abi.AT_RECURSIVE
        root = self.own(open_tree(abi.AT_FDCWD, os.fsencode(operation.path), flags))
        if not os.path.samestat(os.fstat(root), os.fstat(self.materials.sources[operation])):
            raise MountError(operation.origin, "open_tree", operation.path,
                             "is another directory in the mount namespace of the container",
                             errno.ESTALE)
        mount_setattr(root, 0, 0, abi.MS_PRIVATE, True)
        if self.seal:
            mount_setattr(root, _RDONLY)
        self.adopt(root)
        self.outcomes.append((operation, "bind", ""))

    def adopt(self, root):
        self.root = root
        self.sealed = self.seal
        self.engine.adopt(root)

    # -- for every kind of work ------------------------------------------------------

    def carry(self, operation):
        from sandboxfs.build import carry

        carry.attach(self, operation)

    def set_aside(self, operation: kinds.SetAside) -> None:
        from sandboxfs.build import carry

        carry.set_aside(self, operation)

    def readonly_mount(self, operation: kinds.ReadonlyMount) -> None:
        from sandboxfs.build import carry

        carry.make_readonly(self, operation)

    def cgroup(self, operation):
        from sandboxfs.build import cgroups

        cgroups.mount(self, operation)

    def attach(self, mount, target, operation, own):
        if self.known_maker is not None and self.maker.linked:
            self.links_followed = True
            self.check_link(target, operation)
        move_mount(mount, target)
        if self.plan.live is not None:
            self.place.made(mount)
        self.attached.append((mount, operation, own))

    def check_link(self, target, operation):
        """Refuse a mount that a symlink has led into procfs (runc CVE-2019-16884)."""
        self.maker.linked = False
        number = mount_id(target)[0]
        for mount, step, _own in self.attached:
            if getattr(step, "type", None) == "proc" and mount_id(mount)[0] == number:
                raise MountError(operation.origin, "mountpoint", target_of(operation),
                                 "a symlink on the path leads into procfs", errno.ELOOP)

    def writable(self, here):
        """Return a writable way into the directory `here`, in which EROFS was met, or None."""
        from sandboxfs.build import writable

        return writable.way_into(self, here)

    def directory(self, operation):
        self.own(self.maker.directory(os.fsencode(operation.path)))

    def host_ids(self, uid, gid):
        user = self.plan.user
        if user is not None and user.outside and user.uid_mappings:
            return user.host_uid(uid), user.host_gid(gid)
        return uid, gid

    def make_console(self, operation):
        from sandboxfs.build import console

        self.console = console.make(self, operation)

    def seal_root(self, operation):
        """Close again what was opened for mountpoints: the last operation but the pivot."""
        if not self.sealed:
            mount_setattr(self.root, _RDONLY)
            self.sealed = True

    def nothing(self, operation):
        """The pivot is the caller's."""


def makes_as_root():
    """Whether what this process makes belongs to root, without a call more."""
    return os.geteuid() == os.getegid() == 0


def take_calls(plan, materials):
    """Return the prepared calls of a plan, for one build alone, or None: it takes the long way."""
    compiled = plan.compiled
    try:
        # Another thread may be building the same plan.
        calls = compiled.calls.pop()
    except IndexError:
        try:
            from sandboxfs.build.preparation import prepared
        except OSError:
            return None  # too few descriptors even for that: the long way says where they end
        calls = prepared(plan)
    calls.begin(materials)
    return calls


def is_usual(materials):
    """Whether the root is the overlay of one lower that an upper takes after by itself.

    A new directory of the upper belongs to root, has mode 0755 and neither label nor ACL.
    """
    top = materials.lowers[0]
    status = top.root
    return (
        len(materials.lowers) == 1 and top.skeleton is None and not top.submounts
        and materials.upper is None and status.st_mode == stat.S_IFDIR | 0o755
        and status.st_uid == 0 and status.st_gid == 0
        and not flags_of(top.fd) & INHERITED
        and has_no_attributes(top.fd)
    )


def has_no_attributes(fd):
    """Whether a directory has no extended attributes; False also where that can't be asked."""
    return syscall(abi.SYS_listxattrat, fd, b".", 0, None, 0) == 0


def copy_attributes(lower, upper):
    """Give an upper the mode, owner, label and ACLs of the lower's root.

    What overlayfs shows as the merged directory's attributes are the upper's.
    """
    _copy_owner(lower.root, upper)
    here = f"/proc/self/fd/{lower.fd}"
    try:
        names = os.listxattr(here)
    except OSError as error:
        # No xattrs there, no procfs to ask through, or not for this user.
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOENT, errno.EACCES, errno.EPERM):
            raise
        return
    for name in names:
        if name == "security.selinux" or name.startswith("system.posix_acl"):
            os.setxattr(f"/proc/self/fd/{upper}", name, os.getxattr(here, name))


def _copy_owner(status, upper):
    try:
        if status.st_uid or status.st_gid:
            fchownat(upper, status.st_uid, status.st_gid)
    except OSError as error:
        # An id that isn't mapped in this user namespace can't be given away.
        if error.errno not in (errno.EINVAL, errno.EPERM):
            raise
    mode = stat.S_IMODE(status.st_mode)
    if mode != 0o755 or stat.S_IMODE(os.fstat(upper).st_mode) != 0o755:
        fchmodat2(upper, mode)


def _late(module, name):
    """Return a step of another file of this room, loaded when its prepared calls don't do."""

    def step(assembly, operation):
        room = __import__("sandboxfs.build", fromlist=(module,))
        getattr(getattr(room, module), name)(assembly, operation)

    return step


_STEPS = {
    kinds.Lower: _Assembly.lower, kinds.Overlay: _Assembly.overlay,
    kinds.PlainRoot: _Assembly.plain_root, kinds.Filesystem: _late("mounts", "filesystem"),
    kinds.Bind: _late("mounts", "bind"), kinds.Cover: _late("mounts", "cover"),
    kinds.Cgroup: _Assembly.cgroup,
    kinds.Tmp: _late("tmp", "tmp"), kinds.Directory: _Assembly.directory,
    kinds.Node: _late("devices", "node"), kinds.Symlink: _late("devices", "symlink"),
    kinds.Console: _Assembly.make_console, kinds.Mask: _late("masks", "mask"),
    kinds.ReadonlyPath: _late("masks", "readonly_path"), kinds.Carry: _Assembly.carry,
    kinds.SetAside: _Assembly.set_aside, kinds.ReadonlyMount: _Assembly.readonly_mount,
    kinds.Seal: _Assembly.seal_root, kinds.Pivot: _Assembly.nothing,
    kinds.Attach: _Assembly.nothing,
}
_ROOT = (kinds.Lower, kinds.Overlay, kinds.PlainRoot)
