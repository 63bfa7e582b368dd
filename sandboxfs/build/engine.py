"""The two ways to hold a tree while it is built.

*detached* (Linux 6.15 and later): nothing is attached anywhere until the last call.
*attached* (5.12 and later): the tree grows on a tmpfs mounted on top of `/` of a mount
namespace of our own.  No path leads to that tmpfs, since lookups start below it, and the
namespace takes it away when it ends.

In a mount namespace that is a runtime's both attach the root over the rootfs (`DetachedOver`,
`AttachedOver`) as soon as it is there: a mount that is attached can't be moved into a detached
tree.  There it will stay, and nothing else is touched.
"""


from sandboxfs.kernel import abi, fscontext
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import (
    mount_setattr,
    move_mount,
    move_mount_path,
    open_tree,
    umount2,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxfs.build.carry import Place

_CLONE = abi.OPEN_TREE_CLONE | abi.AT_EMPTY_PATH


def make_slave():
    """Have nothing that is mounted or unmounted here reach the namespace this one copies.

    Without it the detachment of the old root would take the host's mounts with it.
    """
    slash = os.open(b"/", abi.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        mount_setattr(slash, 0, 0, abi.MS_SLAVE, True)
    finally:
        os.close(slash)


class Detached:
    """Descriptors only.

    scratch: the private tmpfs that holds every upper of this root, made when first needed.
    """

    name = "detached"
    # What lies on the new root after pivot_root(".", "."): the old root.
    layers = 1

    def __init__(self, own, size):
        self.own = own
        self.size = size
        self.scratch = -1
        self.uppers = 0

    def tmpfs(self):
        """Return the descriptor of the private tmpfs."""
        if self.scratch < 0:
            settings = [fscontext.string(b"mode", b"0700")]
            if self.size:
                settings.append(fscontext.string(b"size", self.size.encode()))
            # No nodev: device nodes of the root live here; the mount itself is never seen.
            self.scratch = self.own(fscontext.create(b"tmpfs", settings, 0))
        return self.scratch

    def upper_pair(self):
        """Make an upper and a work directory on the tmpfs.

        Returns their descriptors, the caller's to close.
        """
        tmpfs = self.tmpfs()
        number = self.uppers
        self.uppers += 1
        return self.pair(tmpfs, b"upper%d" % number, b"work%d" % number)

    def pair(self, directory, upper, work):
        """Make two directories; returns their descriptors, the caller's to close."""
        os.mkdir(upper, 0o755, dir_fd=directory)
        os.mkdir(work, 0o700, dir_fd=directory)
        flags = abi.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        first = os.open(upper, flags, dir_fd=directory)
        try:
            return first, os.open(work, flags, dir_fd=directory)
        except BaseException:
            os.close(first)
            raise

    def overlay_settings(self, lowers, upper, work):
        """Return the settings of an overlay's layers, first lower topmost."""
        settings = [fscontext.descriptor(b"lowerdir+", lower) for lower in lowers]
        settings.append(fscontext.descriptor(b"upperdir", upper))
        settings.append(fscontext.descriptor(b"workdir", work))
        return settings

    def usable(self, mount):
        """Make an unattached clone one that overlayfs takes as an upper; returns it."""
        return mount

    def joined(self):
        """An overlay was made (or not): its layers needn't be reachable any more."""

    def adopt(self, root):
        """Take the finished root mount into the tree that is being built."""

    def abandon(self):
        """The build failed: leave nothing that closing descriptors doesn't take away."""

    def lay_over(self, root, place):
        """Attach the finished root on a place, as `build.carry.Place`, in one call."""
        place.make_private()
        move_mount(root, place.fd)

    def present(self, root):
        """Make the root a mount of this namespace, on top of its `/`, and of no other one."""
        make_slave()
        move_mount_path(root, abi.AT_FDCWD, b"/")

    def leave_behind(self):
        """Attach the private tmpfs in the old root, which lies on the new one and is to go.

        Closing a mount that is attached nowhere unmounts it, and for each unmounting the kernel
        waits for all processors.  So it goes with the others; overlayfs has a clone of its own.
        """
        if self.scratch >= 0:
            try:
                move_mount_path(self.scratch, abi.AT_FDCWD, b"../proc")
            except OSError:
                return  # no /proc there, or too many mounts: it is closed then


class Attached(Detached):
    """The same operations on a staging tmpfs of this mount namespace, which is ours alone."""

    name = "attached"
    # On the old root the staging tmpfs.
    layers = 2

    def __init__(self, own, size):
        super().__init__(own, size)
        self.mounted = 0
        make_slave()
        move_mount_path(self.tmpfs(), abi.AT_FDCWD, b"/")

    def overlay_settings(self, lowers, upper, work):
        # No descriptors and no detached lower before 6.13: attached, and named by procfs.
        names = b":".join(self.stage(lower) for lower in lowers)
        return [
            fscontext.string(b"lowerdir", names),
            fscontext.string(b"upperdir", b"/proc/self/fd/%d" % upper),
            fscontext.string(b"workdir", b"/proc/self/fd/%d" % work),
        ]

    def stage(self, mount):
        """Attach a mount on a directory of its own on the staging tmpfs; returns its path."""
        name = b"mount%d" % self.mounted
        self.mounted += 1
        os.mkdir(name, 0o700, dir_fd=self.scratch)
        move_mount_path(mount, self.scratch, name)
        return b"/proc/self/fd/%d" % mount

    def usable(self, mount):
        self.stage(mount)
        return mount

    def adopt(self, root):
        self.stage(root)

    def present(self, root):
        """It has been one from the start."""

    def leave_behind(self):
        """It lies on the old root."""


class DetachedOver(Detached):
    """The same operations in a runtime's mount namespace, over the rootfs (a `build.carry.Place`).

    Until the root is there, nothing is attached.
    """

    def __init__(self, own: "Callable[[int], int]", size: "str | None", place: "Place") -> None:
        # Not Attached's, which stages on `/` and changes all propagation.
        Detached.__init__(self, own, size)
        self.place = place
        self.top = place.fd
        place.make_private()

    def adopt(self, root: int) -> None:
        move_mount(root, self.place.fd)
        self.top = root

    def abandon(self) -> None:
        try:
            if self.top != self.place.fd:
                # Nothing can be moved away from a shared mount.
                mount_setattr(self.top, 0, 0, abi.MS_PRIVATE)
            self.place.put_back()
        finally:
            if self.top != self.place.fd:
                detach(self.top)
                self.top = self.place.fd
            self.place.restore()

    def lay_over(self, root: int, place: "Place") -> None:
        """It lies there."""


class AttachedOver(DetachedOver, Attached):
    """The same where overlay layers have to be attached while an overlay is made of them.

    They are then, on a tmpfs over the rootfs, which is detached again at once.
    """

    def __init__(self, own: "Callable[[int], int]", size: "str | None", place: "Place") -> None:
        super().__init__(own, size, place)
        self.mounted = 0
        self.is_staged = False
        self.layers_staged = []

    def tmpfs(self):
        """Return the private tmpfs, attached on top."""
        scratch = super().tmpfs()
        if not self.is_staged:
            move_mount(scratch, self.top)
            self.is_staged = True
        return scratch

    def stage(self, mount):
        self.tmpfs()
        self.layers_staged.append(mount)
        return super().stage(mount)

    def joined(self):
        if not self.is_staged:
            return
        # What was detached can't be attached again: a clone of it can.  That holds for the tmpfs
        # and for layers, which are bound as they are where overlayfs refuses them.
        again = self.own(open_tree(self.scratch, b"", _CLONE))
        while self.layers_staged:
            layer = self.layers_staged.pop()
            clone = open_tree(layer, b"", _CLONE)
            os.dup2(clone, layer, False)
            os.close(clone)
        self._unstage()
        self.scratch = again

    def _unstage(self):
        detach(self.scratch)
        self.is_staged = False

    def abandon(self) -> None:
        try:
            self.unstage()
        finally:
            super().abandon()

    def lay_over(self, root: int, place: "Place") -> None:
        self.unstage()

    def unstage(self) -> None:
        """Leave nothing on the root but what belongs there."""
        if self.is_staged:
            self._unstage()


def detach(mount):
    """Unmount a mount (a descriptor) of this namespace with everything on it.

    Private first: unmounting what lies on a shared mount would reach its peers, the mounts that
    this one's were cloned from among them.  By procfs, which names an overlay's layers as well.
    """
    mount_setattr(mount, 0, 0, abi.MS_PRIVATE, True)
    umount2(b"/proc/self/fd/%d" % mount, abi.MNT_DETACH)
