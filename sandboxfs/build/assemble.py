"""The container's side of a build: from a plan and its materials to a root.

It runs in the container's namespaces and touches nothing but the tree it builds.  Every
operation is one method; a rule that an operation carries is evaluated here and its outcome
recorded, none is invented.
"""

import errno
import stat

from sandboxfs.build import engine as engines
from sandboxfs.build.compiled import cleaned, compile_once, target_of
from sandboxfs.build.failure import worded
from sandboxfs.build.gather import device, gather, idmap
from sandboxfs.build.root import Root
from sandboxfs.errors import MountError
from sandboxfs.kernel import abi, fscontext, resolve
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import (
    fchmodat2,
    fchownat,
    fewer_descriptors,
    flags_of,
    more_descriptors,
    mount_id,
    mount_setattr,
    move_mount,
    open_tree,
)
from sandboxfs.plan import operations as kinds

_CLONE = abi.OPEN_TREE_CLONE | abi.AT_EMPTY_PATH
_RDONLY = abi.MOUNT_ATTR_RDONLY
_INHERITED = (
    abi.MOUNT_ATTR_NOSUID | abi.MOUNT_ATTR_NODEV | abi.MOUNT_ATTR_NOEXEC
    | abi.MOUNT_ATTR_NOSYMFOLLOW
)
_NO_ESCAPE = abi.MOUNT_ATTR_NOSUID | abi.MOUNT_ATTR_NODEV
_OVERLAY_SETTINGS = [
    fscontext.string(b"source", b"overlay"),
    # Marks that an untrusted layer could carry must not redirect lookups.
    fscontext.string(b"redirect_dir", b"nofollow"),
    fscontext.string(b"metacopy", b"off"),
]


def build(plan):
    """Gather and assemble in one process; returns the `Root`.

    Raises MountError.  With the attached engine the caller's mount namespace is used as the
    staging place: call it in a namespace of your own there.
    """
    limit = _limit(more_descriptors)
    try:
        materials = gather(plan)
    except BaseException:
        _limit(fewer_descriptors, limit)
        raise
    # The umask is the whole process's: it is cleared only where no other thread can notice.
    umask = os.umask(0) if _is_single_threaded() else None
    try:
        return assemble(plan, materials, umask_is_clear=umask is not None)
    except BaseException:
        materials.close()
        materials.cleanup()
        raise
    finally:
        if umask is not None:
            os.umask(umask)
        _limit(fewer_descriptors, limit)


def _limit(call, *arguments):
    try:
        return call(*arguments)
    except OSError as error:
        raise MountError("build", "prlimit", "RLIMIT_NOFILE", "", error.errno) from error


def _is_single_threaded():
    try:
        # One directory a thread, and the two links that every directory has.
        return os.stat("/proc/self/task").st_nlink == 3
    except OSError:
        return False


def assemble(plan, materials, user_namespace=-1, owner=None, umask_is_clear=False):
    """Return the `Root` that a plan describes; takes over the materials.

    user_namespace: descriptor of the container's, for `idmap` without mappings, borrowed.
    owner: (uid, gid) of what is made, by default the plan's container root.
    umask_is_clear: the process's umask is 0, so that modes needn't be set twice.  Raises
    MountError; what was built until then is gone when it does.
    """
    arguments = (plan, materials, user_namespace, owner, umask_is_clear)
    if plan.engine != "attached":
        try:
            return _Assembly(*arguments, engines.Detached).run()
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
    return _Assembly(*arguments, engines.Attached).run()


def _detached_is_missing(error):
    """Whether an error means that this kernel builds no detached trees: found by trying."""
    # EOPNOTSUPP: overlayfs takes no descriptors (before 6.13).
    if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EBADF, errno.EOPNOTSUPP):
        return False
    from sandboxfs.kernel.features import detached_trees

    return not detached_trees()


class _Assembly:
    """One build: the tree so far, and what has to be remembered of it."""

    def __init__(self, plan, materials, user_namespace, owner, umask_is_clear, engine):
        self.plan = plan
        self.compiled = compile_once(plan)
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
        self.root = -1
        self.maker = None
        self.sealed = False
        self.seal = any(type(step) is kinds.Seal for step in plan.operations)
        self.attached = []
        self.outcomes = []
        self.hiding_tmpfs = self.hiding_null = -1
        self.console = (-1, -1)
        self.dev = {}
        self.userxattr = False

    def own(self, fd):
        self.descriptors.append(fd)
        return fd

    def run(self):
        """Do every operation, in order; returns the `Root`."""
        try:
            for operation in self.plan.operations:
                try:
                    _STEPS[type(operation)](self, operation)
                except OSError as error:
                    raise worded(error, operation, target_of(operation)) from error
        except BaseException:
            while self.descriptors:
                os.close(self.descriptors.pop())
            raise
        root = Root(self.plan, self.engine, self.root, self.descriptors, self.outcomes)
        root.console_master, root.console_slave = self.console
        root.materials = self.materials
        return root

    # -- the root --------------------------------------------------------------------

    def start(self, size):
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
            attributes = flags_of(top.fd) & _INHERITED | (_RDONLY if self.seal else 0)
            lowers = [lower.fd for lower in materials.lowers]
            root = self.own(self.join(lowers, upper, work, attributes))
        finally:
            os.close(upper)
            os.close(work)
        self.adopt(root)
        self.outcomes.append((operation, "overlay", ""))
        if any(lower.submounts for lower in materials.lowers):
            from sandboxfs.build import view

            view.attach_submounts(self, operation, materials.lowers)

    def join(self, lowers, upper, work, attributes=0):
        """Return a new overlay mount of lower clones and an upper, unattached, not owned."""
        settings = _OVERLAY_SETTINGS + self.engine.overlay_settings(lowers, upper, work)
        if self.userxattr:
            settings.append(fscontext.flag(b"userxattr"))
        return fscontext.create(b"overlay", settings, attributes)

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
        self.maker = resolve.Maker(root, self.owner, self.writable)

    # -- mounts ----------------------------------------------------------------------

    def filesystem(self, operation):
        path = self.compiled[operation][0]
        made = self.maker.made
        try:
            if operation.real_directory:
                target = self.own(self.maker.real_directory(path))
            elif operation.no_follow:
                target = self.own(self.maker.link_itself(path, True))
            else:
                target = self.own(self.maker.directory(path))
        except NotADirectoryError as error:
            self.mismatch(error, operation, f"a {operation.type} needs a directory")
        mount, kind = self.instance(operation, target, self.maker.made != made)
        if operation.copy_up:
            from sandboxfs.build import copyup

            copyup.copy_up(self, target, mount, operation)
        if operation.propagation:
            mount_setattr(mount, 0, 0, operation.propagation, operation.propagation_recursive)
        self.attach(mount, target, operation, kind == "own")

    def instance(self, operation, target, made):
        """Return (mount, ``"own"`` or ``"bind"``): a fresh instance, else what it falls back to."""
        _path, type, settings = self.compiled[operation]
        attributes = operation.attributes
        if operation.mode_from_mountpoint:
            mode = 0o1777 if made else stat.S_IMODE(os.fstat(target).st_mode)
            settings = [*settings, fscontext.string(b"mode", b"%o" % mode)]
        if operation.copy_up:
            attributes &= ~_RDONLY
        try:
            mount = self.own(fscontext.create(type, settings, attributes))
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EBUSY, errno.EACCES):
                raise
            fallback = self.materials.sources.get(operation)
            if fallback is None:
                raise
            # The kernel refuses a fresh instance to whoever doesn't own the namespace.
            self.outcomes.append((operation, "bind", operation.fallback_bind))
            return fallback, "bind"
        if operation.label and operation.type == "mqueue":
            # It takes no context= but keeps a label of its own.
            os.setxattr(f"/proc/self/fd/{mount}", "security.selinux", operation.label.encode())
        self.outcomes.append((operation, operation.type, ""))
        return mount, "own"

    def bind(self, operation):
        source = self.materials.sources[operation]
        path = self.compiled[operation][0]
        if type(source) is bytes:  # copy-symlink
            self.copied_symlink(operation, source)
            return
        if operation.idmap == "container":
            idmap(source, self.user_namespace, operation.idmap_recursive)
        status = os.fstat(source)
        directory = stat.S_ISDIR(status.st_mode)
        if operation.no_follow:
            target = self.own(self.maker.link_itself(path, directory))
        else:
            target = self.bind_target(operation, path, directory)
        own = False
        if operation.overlay:
            source, own = self.overlay_bind(operation, source, status)
        elif operation.nested:
            source, own = self.prepared(operation, source, status)
        self.outcomes.append((operation, "overlay" if own else "bind", ""))
        self.attach(source, target, operation, own)
        if own and operation in self.materials.submounts:
            from sandboxfs.build import view

            view.lay_below(self, operation, source)

    def copied_symlink(self, operation, target):
        """Make a symlink anew; one of the same target may be there already."""
        def find(operation):
            parent, name = self.maker.parent(self.compiled[operation][0])
            return self.own(parent), name

        try:
            self.in_writable(operation, _symlink, target, find=find)
        except FileExistsError as error:
            parent, name = find(operation)
            there = os.stat(name, dir_fd=parent, follow_symlinks=False)
            if not stat.S_ISLNK(there.st_mode) or os.readlink(name, dir_fd=parent) != target:
                raise MountError(operation.origin, "symlink", operation.destination,
                                 "something else is there already", errno.EEXIST) from error
        self.outcomes.append((operation, "symlink", ""))

    def bind_target(self, operation, path, directory):
        maker = self.maker
        try:
            return self.own(maker.directory(path) if directory else maker.file(path))
        except (NotADirectoryError, IsADirectoryError) as error:
            kind = "a directory" if directory else "a file"
            self.mismatch(error, operation, f"the source {operation.source} is {kind}")

    def mismatch(self, error, operation, wanted):
        """Raise the error of a mountpoint that is of the wrong kind, naming both kinds."""
        path = os.fsencode(operation.destination)
        try:
            fd = self.own(resolve.open_in_root(self.root, path, resolve.ANY_NO_FOLLOW))
        except OSError:
            raise error from None  # something on the way there, not the mountpoint itself
        mode = os.fstat(fd).st_mode
        number, found = error.errno, "a directory" if stat.S_ISDIR(mode) else "a file"
        if stat.S_ISLNK(mode):
            found = f"a symlink to {os.fsdecode(os.readlink(b'', dir_fd=fd))}"
            if getattr(operation, "real_directory", False):
                number = errno.ELOOP
        text = f"{wanted}, and what exists at the destination is {found}"
        raise MountError(
            operation.origin, "mountpoint", operation.destination, text, number,
        ) from error

    def overlay_bind(self, operation, source, status):
        """Writes to this bind go to an upper of its own: (mount, is it our own).

        A file is copied.  Devices, sockets and FIFOs hold nothing that could be written; what
        overlayfs refuses is bound read-only.
        """
        if stat.S_ISREG(status.st_mode):
            from sandboxfs.build import copyup

            copy = copyup.file_on(self.engine, source, status, self.own)
            mount_setattr(copy, operation.attributes)
            return copy, True
        if stat.S_ISDIR(status.st_mode):
            from sandboxfs.build import view

            over = view.cover_bind(self, operation, source, status)
            if over is not None:
                return over, True
            self.outcomes.append((operation, "read-only bind", "overlayfs refuses it as a lower"))
        return source, False

    def prepared(self, operation, source, status):
        """A bind that later mounts need something in: (mount, is it our own).

        What is missing in one that was asked for read-only, or whose file system is, can't be
        made in the source: an overlay with a tmpfs upper is put over it.
        """
        if not stat.S_ISDIR(status.st_mode) or not os.fstatvfs(source).f_flag & os.ST_RDONLY:
            return source, False
        if not any(_missing(source, path) for path in operation.nested):
            return source, False
        from sandboxfs.build import view

        over = view.cover_bind(self, operation, source, status)
        if over is None:
            return source, False
        self.outcomes.append((operation, "synthesised", "a mountpoint is missing in it"))
        return over, True

    def cgroup(self, operation):
        from sandboxfs.build import cgroups

        cgroups.mount(self, operation)

    def attach(self, mount, target, operation, own):
        if self.maker.linked:
            self.check_link(target, operation)
        move_mount(mount, target)
        self.attached.append((mount, operation, own))

    def check_link(self, target, operation):
        """Refuse a mount that a symlink has led into procfs (runc CVE-2019-16884)."""
        self.maker.linked = False
        number = mount_id(target)[0]
        for mount, step, _own in self.attached:
            if getattr(step, "type", None) == "proc" and mount_id(mount)[0] == number:
                raise MountError(operation.origin, "mountpoint", target_of(operation),
                                 "a symlink on the path leads into procfs", errno.ELOOP)

    # -- read-only while building ----------------------------------------------------

    def writable(self, here):
        """Return a writable way into the directory `here`, in which EROFS was met.

        The root itself is unsealed.  A mount of our own is cloned and the clone made
        writable (the twin).  Anything else is not ours to write: an overlay is put over it
        and None returned, so that the path is walked again.
        """
        number, _ = mount_id(here)
        if number == mount_id(self.root)[0]:
            if not self.sealed:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            mount_setattr(self.root, 0, _RDONLY)
            self.sealed = False
            return here
        for mount, _operation, own in reversed(self.attached):
            if mount_id(mount)[0] == number:
                if own:
                    twin = open_tree(here, b"", _CLONE)
                    mount_setattr(twin, 0, _RDONLY)
                    if not os.fstatvfs(twin).f_flag & os.ST_RDONLY:
                        return twin
                    os.close(twin)  # the superblock itself is read-only
                break
        self.synthesise(here, number)
        return None

    def synthesise(self, here, number):
        """Put an overlay with a tmpfs upper over the mount that `here` lies in."""
        for mount, operation, _own in self.attached:
            above = os.open(b"..", abi.O_PATH | os.O_CLOEXEC, dir_fd=mount) if stat.S_ISDIR(
                os.fstat(mount).st_mode) else -1
            if above >= 0:
                inside = mount_id(above)[0] == number
                os.close(above)
                if inside:
                    raise MountError(operation.origin, "mountpoint", target_of(operation),
                                     "lies in a read-only mount in which a further mountpoint is "
                                     "missing and can't be made", errno.EROFS)
        top = self.own(os.dup(here))
        while not mount_id(top)[1]:
            top = self.own(os.open(b"..", abi.O_PATH | os.O_CLOEXEC, dir_fd=top))
        lower = self.own(open_tree(top, b"", _CLONE))
        mount_setattr(lower, _RDONLY, 0, abi.MS_PRIVATE)
        status = os.fstat(top)

        over = self.own(self.join_over(lower, status, flags_of(top) | _RDONLY))
        move_mount(over, top)
        self.attached.append((over, self.plan.operations[0], True))
        self.outcomes.append((None, "synthesised", ""))

    # -- after the mounts ------------------------------------------------------------

    def tmp(self, operation):
        why = None if operation.always else self.tmp_is_taken()
        if why is not None:
            self.outcomes.append((operation, "skipped", why))
            return
        if not operation.always and self.tmp_target >= 0:
            target = self.tmp_target
        else:
            target = self.own(self.maker.directory(b"/tmp"))
        mount = self.own(fscontext.create(
            b"tmpfs",
            [fscontext.string(b"source", b"tmpfs"), fscontext.string(b"mode", b"1777")],
            _NO_ESCAPE,
        ))
        self.attach(mount, target, operation, True)
        self.outcomes.append((operation, "tmpfs", ""))

    def tmp_is_taken(self):
        """Return why /tmp is left alone, or None."""
        fd = resolve.find_in_root(self.root, b"/tmp", resolve.ANY_NO_FOLLOW)
        if fd is None:
            return None
        self.own(fd)
        mode = os.fstat(fd).st_mode
        if stat.S_ISLNK(mode):
            return "a symlink"
        if not stat.S_ISDIR(mode):
            return "not a directory"
        if mount_id(fd)[1]:
            return "a mount is there"
        content = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
        try:
            if os.listdir(content):
                return "not empty"
        finally:
            os.close(content)
        self.tmp_target = fd
        return None

    def directory(self, operation):
        self.own(self.maker.directory(os.fsencode(operation.path)))

    def node(self, operation):
        if operation.by_bind:
            self.bind_node(operation, self.materials.sources[operation])
            return
        _path, head, name, mode, number = self.compiled[operation]
        kind = stat.S_IFMT(mode)
        parent = self.dev.get(head, _UNKNOWN)
        owner = self.host_ids(operation.uid, operation.gid)
        try:
            if parent[1] and owner == (0, 0):
                # A tmpfs of our own that nobody else has seen: the name stays what it is.
                os.mknod(name, mode, number, dir_fd=parent[0])
                if not self.umask_is_clear:
                    os.chmod(name, stat.S_IMODE(mode), dir_fd=parent[0])
                return
        except OSError:
            pass  # there already, or read-only: the long way knows what to do
        try:
            self.in_writable(operation, _make_node, mode, number, owner)
        except FileExistsError:
            self.check_existing(operation, kind, number)
        except PermissionError:
            fd = self.own(device(operation, os.fsencode(operation.path), operation.type,
                                 operation.major, operation.minor))
            self.bind_node(operation, fd)

    def host_ids(self, uid, gid):
        user = self.plan.user
        if user is not None and user.outside and user.uid_mappings:
            return user.host_uid(uid), user.host_gid(gid)
        return uid, gid

    def in_writable(self, operation, call, *arguments, find=None):
        """Call with (parent directory, name) of a path, by a writable way if it is read-only.

        find: returns these two for the operation; `device_directory` unless given.
        """
        while True:
            parent, name = (find or self.device_directory)(operation)
            try:
                return call(parent, name, *arguments)
            except OSError as error:
                if error.errno != errno.EROFS:
                    raise
            way = self.writable(parent)
            if way is None:
                self.dev.clear()  # the tree was changed: the paths lead elsewhere now
                continue
            try:
                return call(way, name, *arguments)
            finally:
                if way != parent:
                    os.close(way)

    def check_existing(self, operation, kind, number):
        parent, name = self.device_directory(operation)
        found = os.stat(name, dir_fd=parent, follow_symlinks=False)
        if not _is_node(found, kind, number):
            raise MountError(operation.origin, "mknod", operation.path,
                             "something else is there already", errno.EEXIST)
        self.outcomes.append((operation, "skipped", "it is there already"))

    def bind_node(self, operation, source):
        target = self.own(self.in_writable(operation, _make_file))
        self.attach(source, target, operation, False)
        self.outcomes.append((operation, "bind", ""))

    def device_directory(self, operation):
        """Return (descriptor of the parent, name).

        /dev that is no mount of ours must be a real directory: an image's symlink there
        could lead into a bind of the host (runc CVE-2026-41579).
        """
        _path, head, name, *_ = self.compiled[operation]
        found = self.dev.get(head)
        if found is None:
            found = self.dev[head] = self.device_parent(head)
        return found[0], name

    def device_parent(self, head):
        """Return (descriptor, whether it is the root of a file system that only we see)."""
        if not (head + b"/").startswith(b"/dev/"):
            return self.own(self.maker.directory(head or b"/")), False
        for mount, operation, own in reversed(self.attached):
            destination = cleaned(operation)
            if destination == head:
                return mount, own and getattr(operation, "type", "") == "tmpfs"
            if destination == b"/dev":
                # By the mount itself: the path to it may hold a link, and lie in a volume.
                inside = resolve.Maker(mount, self.owner, self.writable)
                return self.own(inside.real_directory(head[len(b"/dev/"):])), False
        return self.own(self.maker.real_directory(head)), False

    def symlink(self, operation):
        if operation.only_if is not None and not os.path.lexists(operation.only_if):
            self.outcomes.append((operation, "skipped", f"no {operation.only_if} here"))
            return
        _path, head, name, *_ = self.compiled[operation]
        parent = self.dev.get(head, _UNKNOWN)
        try:
            if parent[1]:
                os.symlink(operation.target, name, dir_fd=parent[0])
                return
        except OSError:
            pass  # there already, or read-only: the long way knows what to do
        try:
            self.in_writable(operation, _symlink, operation.target)
        except FileExistsError:
            self.outcomes.append((operation, "skipped", "it is there already"))

    def make_console(self, operation):
        from sandboxfs.build import console

        self.console = console.make(self, operation)

    def mask(self, operation):
        fd = self.existing(operation)
        if fd is None:
            return
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            self.hide_directory(fd)
        else:
            if self.hiding_null < 0:
                mount = self.hiding_null = self.materials.null
            else:
                mount = self.own(open_tree(self.hiding_null, b"", _CLONE))
            move_mount(mount, fd)

    def hide_directory(self, fd):
        if self.hiding_tmpfs < 0:
            mount = self.hiding_tmpfs = self.own(fscontext.create(
                b"tmpfs",
                [fscontext.string(b"nr_inodes", b"1"), fscontext.string(b"nr_blocks", b"1"),
                 fscontext.flag(b"ro")],
                _RDONLY | _NO_ESCAPE | abi.MOUNT_ATTR_NOEXEC,
            ))
        else:
            mount = self.own(open_tree(self.hiding_tmpfs, b"", _CLONE))
        move_mount(mount, fd)

    def existing(self, operation):
        """Return the descriptor of a path to be hidden or sealed, or None if it is missing."""
        fd = resolve.find_in_root(self.root, self.compiled[operation][0])
        if fd is None:
            self.outcomes.append((operation, "skipped", "missing"))
        else:
            self.descriptors.append(fd)
        return fd

    def readonly_path(self, operation):
        fd = self.existing(operation)
        if fd is None:
            return
        mount = self.own(open_tree(fd, b"", _CLONE | abi.AT_RECURSIVE))
        mount_setattr(mount, _RDONLY, 0, 0, True)
        move_mount(mount, fd)

    def seal_root(self, operation):
        """The plan's last operation but the pivot: what was opened for mountpoints is closed."""
        if not self.sealed:
            mount_setattr(self.root, _RDONLY)
            self.sealed = True

    def nothing(self, operation):
        """The pivot is the caller's."""


# No directory known yet: (descriptor, whether it is ours alone).
_UNKNOWN = (-1, False)


def _symlink(parent, name, target):
    os.symlink(target, name, dir_fd=parent)


def _make_node(parent, name, mode, number, owner):
    """Make a device node or FIFO with its mode and (uid, gid), whatever the umask is."""
    os.mknod(name, mode, number, dir_fd=parent)
    made = os.open(name, abi.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        status = os.fstat(made)
        # In a volume that others write to, the name may stand for something else by now.
        if not _is_node(status, stat.S_IFMT(mode), number):
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        if (status.st_uid, status.st_gid) != owner:
            fchownat(made, *owner)
        if status.st_mode != mode:
            fchmodat2(made, stat.S_IMODE(mode))
    finally:
        os.close(made)


def _is_node(status, kind, number):
    return stat.S_IFMT(status.st_mode) == kind and (
        kind == stat.S_IFIFO or status.st_rdev == number
    )


def _make_file(parent, name):
    """Open the file `name`, made if missing, by itself: ELOOP for a link."""
    try:
        os.mknod(name, resolve.FILE_MODE | stat.S_IFREG, dir_fd=parent)
    except FileExistsError:
        pass  # the image's own, or somebody was faster
    fd = os.open(name, abi.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    if stat.S_IFMT(os.fstat(fd).st_mode) in (stat.S_IFLNK, stat.S_IFDIR):
        os.close(fd)
        raise OSError(errno.EEXIST, "a symlink or a directory is where the device goes")
    return fd


def _missing(directory, path):
    try:
        os.close(resolve.open_in_root(directory, os.fsencode(path)))
    except (FileNotFoundError, NotADirectoryError):
        return True
    return False


def copy_attributes(lower, upper):
    """Give an upper the mode, owner, label and ACLs of the lower's root.

    What overlayfs shows as the merged directory's attributes are the upper's.
    """
    _copy_owner(lower.root, upper)
    here = f"/proc/self/fd/{lower.fd}"
    try:
        names = os.listxattr(here)
    except OSError:
        return  # no xattrs there, or no procfs to ask through
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


_STEPS = {
    kinds.Lower: _Assembly.lower, kinds.Overlay: _Assembly.overlay,
    kinds.PlainRoot: _Assembly.plain_root, kinds.Filesystem: _Assembly.filesystem,
    kinds.Bind: _Assembly.bind, kinds.Cgroup: _Assembly.cgroup, kinds.Tmp: _Assembly.tmp,
    kinds.Directory: _Assembly.directory, kinds.Node: _Assembly.node,
    kinds.Symlink: _Assembly.symlink, kinds.Console: _Assembly.make_console,
    kinds.Mask: _Assembly.mask, kinds.ReadonlyPath: _Assembly.readonly_path,
    kinds.Seal: _Assembly.seal_root, kinds.Pivot: _Assembly.nothing,
}
