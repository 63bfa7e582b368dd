"""The built root: owner of its descriptors, attached or pivoted into by one call."""

import errno

from sandboxfs.build.failure import hint_for
from sandboxfs.errors import MountError
from sandboxfs.kernel import abi
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import mount_setattr, move_mount_path, pivot_root, umount2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Root:
    """A root that was built; a context manager that drops what was not attached.

    fd: descriptor of the root mount.  plan, engine.  outcomes: list of (operation, kind,
    detail), how each rule was decided; kind is what was mounted (``"overlay"``, ``"bind"``,
    ``"tmpfs"``…) or ``"skipped"`` with the reason as detail.  console_master,
    console_slave: the pty of `process.terminal`, or -1.  covers: the pivot couldn't be one (an
    initramfs), and the old root lies below this one in the mount namespace.
    """

    def __init__(self, plan, engine, fd, descriptors, outcomes):
        self.plan = plan
        self.engine = engine
        self.fd = fd
        self.descriptors = descriptors
        self.outcomes = outcomes
        self.console_master = -1
        self.console_slave = -1
        self.materials: Any = None
        self.place: Any = None
        self.covers = False

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """Close every descriptor; a tree that was never attached is gone with them."""
        while self.descriptors:
            os.close(self.descriptors.pop())
        self.fd = -1
        if self.place is not None:
            self.place.close()
        if self.materials is not None:
            self.materials.close()

    def attach(self, path):
        """Attach the tree on `path` (str or bytes), in the caller's mount namespace.

        One move_mount(2): before it nothing was visible, after it everything is.  A last
        symlink is not followed.  Raises MountError.
        """
        try:
            # A slash at the end would have a last symlink followed.
            stripped = os.fsencode(path).rstrip(b"/") or b"/"
            move_mount_path(self.fd, abi.AT_FDCWD, stripped)
        except OSError as error:
            raise _failure("move_mount", path, error) from error

    def pivot(self, load=None):
        """Make the tree the root of this mount namespace and detach the old root.

        pivot_root(".", ".") of pivot_root(2), then the propagation that the plan asks for.
        The mount namespace must be the caller's own; its mounts become slaves first.  An
        initramfs can't be pivoted away before Linux 7.0: there the tree is moved on top of it,
        and this process's root changed to it (`covers`).

        load: called before that; who has shut imports off imports `build.initramfs` in it.
        """
        call = "move_mount"
        try:
            self.engine.present(self.fd)
            call = "fchdir"
            os.fchdir(self.fd)
            call = "pivot_root"
            try:
                pivot_root(b".", b".")
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.cover(error, load)
            else:
                self.engine.leave_behind()
                call = "umount2"
                for _layer in range(self.engine.layers):
                    umount2(b".", abi.MNT_DETACH)
            call = "chdir"
            os.chdir(b"/")
            self.propagate()
        except OSError as error:
            raise _failure(getattr(error, "call", call), "/", error) from error

    def cover(self, refusal, load):
        """Stand on top of the old root, if that is an initramfs; else raise the refusal."""
        if load is not None:
            load()
        from sandboxfs.build import initramfs

        bottom = initramfs.bottom()
        if bottom is None:
            raise refusal
        initramfs.cover(self, bottom)
        self.covers = True

    def propagate(self):
        """Apply `linux.rootfsPropagation`: shared and unbindable, after the pivot."""
        number = self.plan.operations[-1].propagation
        if number:
            recursive = bool(number & abi.MS_REC)
            fd = os.open(b"/", abi.O_PATH | os.O_CLOEXEC)
            try:
                mount_setattr(fd, 0, 0, number & ~abi.MS_REC, recursive)
            finally:
                os.close(fd)

    def verify(self, pid=None):
        """Return the differences between the plan and the kernel's mount table, as lines."""
        if self.plan.live is not None:
            from sandboxfs.build import carry

            return carry.differences(self, pid)
        from sandboxfs.build import verify

        return verify.verify_root(self, pid)


def _failure(call, path, error):
    hint = hint_for(call, error.errno)
    if call == "pivot_root" and error.errno == errno.EINVAL:
        hint = "the root is no mount (a chroot), or the mount that it lies on is shared"
    return MountError("pivot", call, path, os.strerror(error.errno), error.errno, hint)
