"""The steps that every switch of the machine's root has in common.

    check_first_process(force)      pid 1, or asked for all the same
    check_initramfs()               before anything is deleted
    check_init(root, init)          before anything is done
    enter(root, init, arguments)    mounts move, the root is switched, the old one emptied, exec

Up to the switch itself every step can be taken back, and is when a later one fails.

Sources: pivot_root(2), Documentation/filesystems/ramfs-rootfs-initramfs.rst, switch_root(8).
"""

import errno
import os
import stat
import sys

from sandboxfs.boot import deletion, kept, place
from sandboxfs.boot.init import DEFAULT, WITNESS, check_init, execute, witnessed
from sandboxfs.errors import BootError
from sandboxfs.kernel import abi, fscontext
from sandboxfs.kernel.resolve import open_in_root
from sandboxfs.kernel.syscalls import (
    mount_id,
    mount_setattr,
    move_mount,
    move_mount_path,
    pivot_root,
    umount2,
)
from sandboxfs.process import payload

__all__ = [
    "DEFAULT", "WITNESS", "check_first_process", "check_init", "check_initramfs", "enter",
    "execute", "is_initramfs", "say", "witnessed",
]

# PROC_PID_INIT_INO of include/linux/proc_ns.h.
_FIRST_PID_NAMESPACE = 0xEFFFFFFC
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


def say(text):
    """Write a warning to standard error: where `enter` ends, nobody could return it."""
    if sys.stderr is not None:
        try:
            sys.stderr.write(f"sandboxfs: warning: {text}\n")
            sys.stderr.flush()
        except OSError:
            pass


def check_first_process(force=False):
    """Raise `BootError` unless this is process 1, whose exec becomes the init, or `force`."""
    if force:
        return
    who = f"{os.getpid()}" if os.getpid() != 1 else _nested_namespace()
    if who is not None:
        raise BootError(
            "", "switch-root", "", f"not process 1, but {who}: INIT would be no init",
            hint="exec it from the first process, or --force",
        )


def _nested_namespace():
    """Return what process 1 of another pid namespace than the machine's is, or None."""
    try:
        # A procfs of our own: nobody may have put another one on /proc, or none is there yet.
        proc = fscontext.create(b"proc", [fscontext.string(b"subset", b"pid")], 0)
    except OSError:
        return None  # who may not mount anything gets no further anyway
    try:
        number = os.stat("self/ns/pid", dir_fd=proc).st_ino
    finally:
        os.close(proc)
    return None if number == _FIRST_PID_NAMESPACE else "the first of a pid namespace of its own"


def is_initramfs():
    """Return whether this process's root is the machine's initramfs (`place`)."""
    return place.look().is_initramfs


def check_initramfs(found=None):
    """Raise `BootError` unless the root is the machine's initramfs: it would be deleted.

    found: a `Place` that was looked up already.
    """
    found = found or place.look()
    if found.is_initramfs:
        return
    root = found.root
    if root is None:
        is_what = "a directory that this process was chrooted into"
    else:
        source = os.fsdecode(root.source)
        is_what = f"{os.fsdecode(root.type)} ({source})"
        if root.type in (place.ROOTFS, b"tmpfs", b"ramfs") and not found.is_bottom:
            is_what += ", mounted over the bottom of the mount namespace"
    raise BootError(
        "", "switch-root", "/", f"the root is no initramfs but {is_what}; nothing was deleted",
        hint="--keep switches without deleting the old root's content",
    )


def enter(new_root, init, arguments, *, delete, preserve=(), move=True, warn=say):
    """Make `new_root` the root of this machine and become INIT.  Returns never.

    new_root: a path, or the descriptor of a mount, attached or detached; it stays the caller's
    (a detached one can't be attached again after a failure: that is the kernel's rule).
    init: str, looked up in the new root with the mounts that moved there, and before they move
    where `new_root` is a path (who gives a descriptor has done that).  arguments: list of str,
    without the program's name.
    delete: empty the old root, which must be an initramfs, but for what is mounted and the paths
    in `preserve`.  move: take the mounts of the old root along for which the new one has a place.
    warn: called with one line for each thing that stays behind.

    BootError: with everything as it was before, unless its text says that the root was switched
    already.
    """
    new, opened = _opened(new_root)
    old = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    switch = None
    try:
        found = place.look()
        switch = _Switch(new, old, found, warn, new_root if opened else _path_of(new))
        if delete:
            check_initramfs(found)
        switch.check()
        if opened:
            check_init(new, init)
        spared = set()
        if delete:
            spared = kept.identities(old, found, preserve, warn)
        _change(switch, init, move)
        if delete:
            _empty(old, spared, warn)
        switch.leave()
    finally:
        os.close(old)
        if switch is not None:
            switch.close()
        if opened:
            os.close(new)
    execute(init, arguments)


def _change(switch, init, move):
    """Make the new root this process's, or leave everything as it was."""
    import_path = (sys.path[:], sys.meta_path[:], sys.path_hooks[:])
    try:
        switch.prepare(move)
        check_init(switch.new, init)  # what moved may have covered it
        # From here on an import would load code of the new root.
        payload.seal_interpreter()
        switch.take_place()
    except BaseException:
        sys.path[:], sys.meta_path[:], sys.path_hooks[:] = import_path
        switch.undo()
        raise


def _opened(new_root):
    """Return (descriptor, whether it is ours to close)."""
    if isinstance(new_root, int):
        return new_root, False
    try:
        return os.open(new_root, _DIRECTORY), True
    except OSError as error:
        raise BootError("NEWROOT", "open", new_root, "", error.errno or 0) from error


def _empty(old, spared, warn):
    left = deletion.delete_below(old, spared)
    for path, number in left[:10]:
        warn(f"not deleted: /{path}: {errno.errorcode.get(number, number)}")
    if len(left) > 10:
        warn(f"not deleted: {len(left) - 10} more")


class _Move:
    """A mount of the old root that moves along.

    fd: its root.  target: what it goes onto, in the new root.  path: where it is (bytes).
    waits: the new root lies in it, so it can follow only once that has moved.
    """

    __slots__ = ("fd", "moved", "path", "target", "waits")

    def __init__(self, path, fd, target):
        self.path = path
        self.fd = fd
        self.target = target
        self.moved = self.waits = False


class _Switch:
    """One switch, with what it takes to undo it.

    new, old: descriptors, borrowed.  name: what errors call the new root.
    """

    def __init__(self, new, old, found, warn, name):
        self.name = name
        self.new = new
        self.old = old
        self.found = found
        self.warn = warn
        self.moves = []
        self.made_private = []
        self.record = found.of(new)
        self.new_was_shared = bool(
            self.record is not None and self.record.propagation & abi.MS_SHARED
        )
        self.directory = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.attached_by_us = False
        self.pivoted = False

    def check(self):
        """Raise `BootError` where the new root can't become one."""
        _, is_mount_root = mount_id(self.new)
        if not is_mount_root:
            raise BootError(
                "NEWROOT", "switch-root", self.name, "not a mount point",
                hint="a directory of the old root would go with it; mount something on it, or "
                "bind it on itself",
            )
        if not stat.S_ISDIR(os.fstat(self.new).st_mode):
            raise BootError("NEWROOT", "switch-root", self.name, "", errno.ENOTDIR)
        if self.found.root is None:
            raise BootError(
                "", "switch-root", "/", "this process was chrooted into a directory that is no "
                "mount, and couldn't leave it",
            )
        if self.record is not None and self.record.id == self.found.root.id:
            raise BootError("NEWROOT", "switch-root", "/", "is the root already")

    # -- what can be taken back --------------------------------------------------------------

    def prepare(self, move):
        """Put the new root where it can take over, and the old one's mounts into it."""
        self.make_private(self.found.root, self.old)
        if self.record is None:
            # Detached: nothing could be mounted in it before Linux 6.15.
            self.attach()
        else:
            self.make_private(self.record, self.new)
            parent = self.found.by_id(self.record.parent_id)
            if parent is not None and parent.id != self.found.root.id:
                self.make_private(parent)
        if move:
            self.collect()
            for each in self.moves:
                self.move(each)

    def make_private(self, record, fd=-1):
        """Nothing can be moved out of a shared mount, or pivoted: it would propagate.

        fd: a descriptor of the mount's root, or -1: it is opened by its path.
        """
        if not record.propagation & abi.MS_SHARED:
            return
        try:
            fd = os.dup(fd) if fd >= 0 else os.open(record.mountpoint, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return  # hidden; the move will say that it is shared
        if mount_id(fd, abi.STATX_MNT_ID) == (record.id, True):
            self.made_private.append(fd)
            mount_setattr(fd, propagation=abi.MS_PRIVATE)
        else:
            os.close(fd)

    def attach(self):
        """Mount the new root over the old one, which this process's lookups don't notice."""
        self.call("move_mount", move_mount_path, self.new, abi.AT_FDCWD, b"/")
        self.attached_by_us = True

    def collect(self):
        """Find the mounts that lie on the old root itself, and their places in the new one."""
        root = self.found.root.id
        taken = set()
        for record in self.found.records:
            path = record.mountpoint
            if record.parent_id != root or record.id == root or path == b"/":
                continue
            if self.record is not None and self.record.mountpoint == path:
                continue
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC) if os.path.lexists(path) else -1
            target = -1
            try:
                why = self.why_not_opened(record, fd)
                if why is None:
                    target = self.target(path)
                    why = self.why_not(fd, target, taken)
            except OSError as error:
                why = errno.errorcode.get(error.errno or 0, str(error))
            if why is None:
                self.moves.append(_Move(path, fd, target))
                continue
            for each in (fd, target):
                if each >= 0:
                    os.close(each)
            self.stays(path, why)

    def stays(self, path, why):
        """Say that a mount doesn't come along."""
        self.warn(f"{os.fsdecode(path)} stays behind: {why}")

    def why_not_opened(self, record, fd):
        """Return why the mount isn't what its path leads to, or None."""
        if fd < 0:
            return "its path leads nowhere"
        number, is_root = mount_id(fd, abi.STATX_MNT_ID)
        above = [each for each in self.found.records
                 if each.parent_id == record.id and each.mountpoint == record.mountpoint]
        if not is_root or (number != record.id and not above):
            return "another mount hides it"
        return None

    def target(self, path):
        """Return a descriptor of the same path in the new root, or -1 where it has none."""
        try:
            return open_in_root(self.new, path)
        except (FileNotFoundError, NotADirectoryError):
            return -1

    def why_not(self, fd, target, taken):
        """Return why a mount can't go onto `target`, or None."""
        if target < 0:
            return "the new root has no place for it"
        here, there = os.fstat(fd), os.fstat(target)
        if stat.S_ISDIR(here.st_mode) != stat.S_ISDIR(there.st_mode) or stat.S_ISLNK(there.st_mode):
            return "what the new root has there is of another kind"
        number, is_root = mount_id(target)
        if is_root:
            return "the new root has a mount of its own there"
        if (number, there.st_ino) in taken:
            return "another mount goes to the same place"
        taken.add((number, there.st_ino))
        return None

    def move(self, each):
        try:
            move_mount(each.fd, each.target)
            each.moved = True
        except OSError as error:
            each.waits = error.errno == errno.ELOOP
            if not each.waits:
                self.stays(each.path, f"move_mount: {os.strerror(error.errno or 0)}")

    def take_place(self):
        """Switch: pivot_root, or where that can't be, on top of the old root and chroot."""
        self.call("fchdir", os.fchdir, self.new)
        try:
            pivot_root(b".", b".")
        except OSError as error:
            if error.errno != errno.EINVAL or not self.found.is_bottom:
                raise BootError("NEWROOT", "pivot_root", self.name, "",
                                error.errno or 0) from error
        else:
            self.pivoted = True
            return
        if not self.attached_by_us:
            self.call("move_mount", move_mount_path, self.new, abi.AT_FDCWD, b"/")
        # Process 1 shares its root with the kernel's own threads until here: they follow.
        os.chroot(".")
        os.chdir("/")

    def undo(self):
        """Take back what was done, last first."""
        for each in reversed(self.moves):
            if each.moved:
                # What lies below a mount that is gone from there is the place it was on.
                place_of_it = open_in_root(self.old, each.path)
                try:
                    move_mount(each.fd, place_of_it)
                finally:
                    os.close(place_of_it)
        if self.attached_by_us:
            os.fchdir(self.new)
            umount2(b".", abi.MNT_DETACH)
        os.fchdir(self.directory)
        # Whom they had as peers elsewhere they have lost.
        for fd in self.made_private:
            mount_setattr(fd, propagation=abi.MS_SHARED)

    # -- afterwards --------------------------------------------------------------------------

    def leave(self):
        """Move what had to wait for the new root, and let go of the old one after a pivot."""
        for each in self.moves:
            if each.waits:
                self.move(each)
        if self.pivoted:
            umount2(b".", abi.MNT_DETACH)
            os.chdir("/")
        if self.new_was_shared:
            mount_setattr(self.new, propagation=abi.MS_SHARED)

    def close(self):
        """Close every descriptor."""
        os.close(self.directory)
        for fd in self.made_private:
            os.close(fd)
        for each in self.moves:
            os.close(each.fd)
            os.close(each.target)
        self.moves.clear()
        self.made_private.clear()

    def call(self, name, function, *arguments):
        try:
            function(*arguments)
        except OSError as error:
            raise BootError("NEWROOT", name, self.name, "", error.errno or 0) from error


def _path_of(fd):
    """Return the path of a descriptor for a message, without /proc where there is none."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return f"descriptor {fd}"
