"""A system image as the root: immutable, or with a tmpfs over it, and memory where it writes.

The image is EROFS or squashfs, a file of the initramfs or a block device.  /tmp, /run and a
directory for single files (/ephemeral) are tmpfs; files of /etc that a running system writes
are redirected into the last one, by symlinks that the image has, or each by a bind of a copy.

What can be wrong is looked for in the image while it is attached nowhere.
"""

import os
import stat

from sandboxfs.boot import place, switch
from sandboxfs.boot.content import read_attributes
from sandboxfs.boot.stage import staged
from sandboxfs.build import copyup, images
from sandboxfs.build.failure import hint_for
from sandboxfs.errors import BootError, MountError, SandboxError
from sandboxfs.kernel import abi, fscontext, resolve
from sandboxfs.kernel.maker import Maker
from sandboxfs.kernel.syscalls import (
    mount_id,
    mount_setattr,
    move_mount,
    move_mount_path,
    open_tree,
    umount2,
)

EPHEMERAL = "/ephemeral"
EPHEMERAL_FILES = ("/etc/hosts", "/etc/machine-id", "/etc/resolv.conf")

_NODEV = abi.MOUNT_ATTR_NODEV
_NOEXEC = abi.MOUNT_ATTR_NOEXEC
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_PATH = os.O_PATH | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def from_image(
    image, init=switch.DEFAULT, arguments=(), *, overlay="none", ephemeral=None,
    ephemeral_files=(), force=False, warn=switch.say,
):
    """Make an EROFS or squashfs image the root, leave the initramfs, and become INIT.

    image: path of a file or block device.  init, arguments: as of `switch.enter`.
    overlay: ``"none"``: the image is the root, and nothing can be written to it; ``"tmpfs"``:
    what is written is kept in memory.  ephemeral: path in the image of the directory that gets
    a tmpfs for single files; None: /ephemeral, if the image has it.  ephemeral_files: more
    paths to redirect there than `EPHEMERAL_FILES`.  force: even if this is not process 1.
    warn: called with one line for what is left out.

    Never returns.  BootError, with everything as it was: no image, no such directory or file
    in it, INIT can't be executed there, the root is no initramfs, …
    """
    if switch.witnessed():
        switch.execute(init, list(arguments))
    switch.check_first_process(force)
    found = place.look()
    switch.check_initramfs(found)
    moving = {
        os.fsdecode(record.mountpoint) for record in found.records
        if record.parent_id == found.root.id and record.id != found.root.id
    }
    root = mount_image(image)
    try:
        switch.check_init(root, init)
        view = View(root, overlay, ephemeral, ephemeral_files, warn)
        view.check()
        new = view.with_overlay()
        try:
            with staged(new) as stage:
                _worded(view.furnish, stage, moving)
                switch.enter(stage, init, list(arguments), delete=True, warn=warn)
        finally:
            os.close(new)
    finally:
        os.close(root)


def mount_image(path):
    """Return a detached read-only mount of an image: a file, or a block device.  BootError."""
    path = os.fspath(path)
    try:
        image = os.open(path, _READ)
    except OSError as error:
        raise BootError("--image", "open", path, "", error.errno or 0) from error
    try:
        mode = os.fstat(image).st_mode
        if stat.S_ISBLK(mode):
            return images.mount_device(image, path, "--image")
        if not stat.S_ISREG(mode):
            raise BootError("--image", "open", path, "neither a file nor a block device")
        return images.mount_opened(image, "--image", path)
    except MountError:
        raise BootError("--image", "open", path, "no EROFS or squashfs image") from None
    except OSError as error:
        raise _failure("--image", path, error) from error
    finally:
        os.close(image)


def _failure(origin, path, error):
    call = getattr(error, "call", "") or "mount"
    number = error.errno or 0
    log = getattr(error, "log", "")
    hint = hint_for(call, number)
    if error.filename and os.fsdecode(error.filename).startswith("/dev/loop"):
        call, hint = f"open {os.fsdecode(error.filename)} for", (
            "a loop device is needed: load the module loop, and mount /dev "
            "(sandboxfs early-mounts)"
        )
    text = f"{os.strerror(number)}: the kernel says: {log}" if log else ""
    return BootError(origin, call, path, text, number, hint)


def _worded(function, *arguments):
    """Call a function; an OSError becomes a BootError."""
    try:
        function(*arguments)
    except SandboxError:
        raise
    except OSError as error:
        raise _failure("--image", os.fsdecode(error.filename or ""), error) from error


def _clean(path):
    return "/" + os.path.normpath("/" + os.fspath(path)).lstrip("/")


class View:
    """An image, and what is mounted on it.

    image: descriptor of its mount, borrowed.  The other arguments are those of `from_image`.
    """

    def __init__(self, image, overlay="none", ephemeral=None, ephemeral_files=(), warn=switch.say):
        self.image = image
        self.overlay = overlay
        self.ephemeral = None if ephemeral is None else _clean(ephemeral)
        self.asked = [_clean(path) for path in ephemeral_files]
        self.moving = frozenset()
        self.warn = warn

    # -- before anything is attached -----------------------------------------------------------

    def check(self):
        """Raise `BootError` for what the image doesn't have; find the ephemeral directory."""
        if self.ephemeral is None:
            if self._kind(EPHEMERAL) == stat.S_IFDIR:
                self.ephemeral = EPHEMERAL
        else:
            self._check_directory()
        for path in self.asked:
            if self.ephemeral is None:
                raise BootError(
                    "--ephemeral-file", "switch-root", path,
                    f"the image has no directory {EPHEMERAL} to redirect it to",
                    hint="--ephemeral DIR",
                )
            kind = self._kind(path, follow=False)
            if kind is None:
                raise BootError("--ephemeral-file", "find", path, "not in the image")
            if kind not in (stat.S_IFREG, stat.S_IFLNK):
                raise BootError("--ephemeral-file", "find", path, "not a file, nor a symlink")

    def _check_directory(self):
        kind = self._kind(self.ephemeral)
        for taken in ("/", "/run", "/tmp"):
            if self.ephemeral == taken or (
                taken != "/" and self.ephemeral.startswith(taken + "/")
            ):
                raise BootError("--ephemeral", "switch-root", self.ephemeral,
                                "the root, /run and /tmp have other uses",
                                hint="a directory of its own")
        if kind is None and self.overlay == "none":
            raise BootError("--ephemeral", "find", self.ephemeral, "not in the image")
        if kind not in (None, stat.S_IFDIR):
            raise BootError("--ephemeral", "find", self.ephemeral, "not a directory")

    def _kind(self, path, follow=True):
        """Return the type of a file of the image, or None where there is none."""
        how = resolve.ANY if follow else resolve.ANY_NO_FOLLOW
        fd = resolve.find_in_root(self.image, os.fsencode(path), how)
        if fd is None:
            return None
        try:
            return stat.S_IFMT(os.fstat(fd).st_mode)
        finally:
            os.close(fd)

    def with_overlay(self):
        """Return a descriptor of the root's mount: the image's own, or an overlay's over it."""
        if self.overlay == "none":
            return os.dup(self.image)
        tmpfs = fscontext.create(b"tmpfs", [fscontext.string(b"mode", b"0700")], 0)
        try:
            return self._overlay(tmpfs)
        except OSError as error:
            raise _failure("--overlay", "tmpfs", error) from error
        finally:
            os.close(tmpfs)

    def _overlay(self, tmpfs):
        for name in ("lower", "upper", "work"):
            os.mkdir(name, 0o755, dir_fd=tmpfs)
        status = os.fstat(self.image)
        os.chown("upper", status.st_uid, status.st_gid, dir_fd=tmpfs)
        os.chmod("upper", stat.S_IMODE(status.st_mode), dir_fd=tmpfs)
        # By path, which every kernel can; attached for that long, since no kernel before 6.15
        # takes a lower that isn't.  The overlay has clones of its own.
        came_from = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        settings = [
            fscontext.string(b"source", b"overlay"),
            fscontext.string(b"lowerdir", b"lower"),
            fscontext.string(b"upperdir", b"upper"),
            fscontext.string(b"workdir", b"work"),
            # Marks that an image could carry must not redirect lookups.
            fscontext.string(b"redirect_dir", b"nofollow"),
            fscontext.string(b"metacopy", b"off"),
        ]
        try:
            # On top of "/" no path leads to it.
            move_mount_path(tmpfs, abi.AT_FDCWD, b"/")
            os.fchdir(tmpfs)
            try:
                move_mount_path(self.image, abi.AT_FDCWD, b"lower")
                return fscontext.create(b"overlay", settings, 0)
            finally:
                umount2(b".", abi.MNT_DETACH)
        finally:
            os.fchdir(came_from)
            os.close(came_from)

    # -- once it is attached -------------------------------------------------------------------

    def furnish(self, stage, moving=()):
        """Mount what belongs on the root, which is attached at the path `stage`.

        moving: where mounts are that will be moved there later, and so aren't covered.
        OSError, BootError.
        """
        self.moving = frozenset(moving)
        root = os.open(stage, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for path, mode, attributes in self._memory():
                if path not in moving or path == self.ephemeral:
                    self._mount_tmpfs(root, path, mode, attributes)
            if self.ephemeral is not None:
                for path in dict.fromkeys((*EPHEMERAL_FILES, *self.asked)):
                    self._redirect(root, os.fsencode(path))
        finally:
            os.close(root)

    def _memory(self):
        yield "/run", b"0755", _NODEV | _NOEXEC
        if self.ephemeral is not None:
            yield self.ephemeral, b"0755", _NODEV
        yield "/tmp", b"1777", _NODEV | _NOEXEC

    def _mount_tmpfs(self, root, path, mode, attributes):
        try:
            target = Maker(root).directory(os.fsencode(path))
        except OSError as error:
            # Immutable, and without it.  What was asked for is known to be there.
            self.warn(f"no tmpfs on {path}: the image has no such directory "
                      f"({os.strerror(error.errno or 0)})")
            return
        settings = [fscontext.string(b"source", b"tmpfs"), fscontext.string(b"mode", mode)]
        try:
            mount = fscontext.create(b"tmpfs", settings, attributes)
            try:
                move_mount(mount, target)
            finally:
                os.close(mount)
        finally:
            os.close(target)

    # -- single files --------------------------------------------------------------------------

    def _redirect(self, root, path):
        """Have a file of the image lie in the ephemeral directory."""
        fd = resolve.find_in_root(root, path, resolve.ANY_NO_FOLLOW)
        if fd is None:
            return  # only what was asked for by name has to be there
        try:
            if stat.S_ISLNK(os.fstat(fd).st_mode):
                os.close(fd)
                fd = -1
                fd = self._behind_link(root, path)
            if fd < 0:
                return
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                self._cannot(path, "leads to what is no file")
            elif mount_id(fd)[0] == mount_id(root)[0]:
                self._bind_copy(root, path, fd)
        finally:
            if fd >= 0:
                os.close(fd)

    def _behind_link(self, root, path):
        """Return the file that a symlink leads to, or -1 where it is still to be written.

        The directories on the way there are made, if they are missing in memory.
        """
        here = path
        for _link in range(resolve.LONGEST_LINK_CHAIN):
            if self._will_move(here):
                return -1  # what is there now isn't what will be
            try:
                fd = resolve.find_in_root(root, here, resolve.ANY)
                if fd is not None:
                    return fd
                parent, name = Maker(root).parent(here)
            except OSError as error:  # EROFS: a directory that the image lacks; ELOOP
                self._cannot(path, f"{os.fsdecode(here)}: {os.strerror(error.errno or 0)}")
                return -1
            try:
                target = os.readlink(name, dir_fd=parent)
            except FileNotFoundError:
                if self.overlay == "none" and mount_id(parent)[0] == mount_id(root)[0]:
                    self._cannot(path, f"leads to {os.fsdecode(here)}, which isn't in the image")
                return -1
            finally:
                os.close(parent)
            here = os.path.join(os.path.dirname(here), target)
        raise AssertionError("find_in_root follows no more links")

    def _will_move(self, path):
        path = _clean(os.fsdecode(path))
        return any(path.startswith(f"{place}/") for place in self.moving - {self.ephemeral})

    def _cannot(self, path, why):
        """Refuse what was asked for by name, warn of the rest."""
        path = os.fsdecode(path)
        if path in self.asked:
            raise BootError("--ephemeral-file", "redirect", path, why)
        self.warn(f"{path} stays as it is in the image: {why}")

    def _bind_copy(self, root, path, fd):
        """Copy a file into the ephemeral directory, and bind the copy over it."""
        inside = os.fsencode(f"{self.ephemeral}/") + path.lstrip(b"/")
        parent, name = Maker(root).parent(inside)
        try:
            copy = os.open(name, _CREATE, 0o600, dir_fd=parent)
            try:
                self._fill(copy, root, path, os.fstat(fd))
            finally:
                os.close(copy)
            found = os.open(name, _PATH | os.O_NOFOLLOW, dir_fd=parent)
        finally:
            os.close(parent)
        try:
            bind = open_tree(found, b"", abi.OPEN_TREE_CLONE | abi.AT_EMPTY_PATH)
            try:
                mount_setattr(bind, propagation=abi.MS_PRIVATE)
                move_mount(bind, fd)
            finally:
                os.close(bind)
        finally:
            os.close(found)

    @staticmethod
    def _fill(copy, root, path, status):
        original = resolve.open_in_root(root, path, resolve.READ)
        try:
            copyup.copy_content(original, copy)
            os.fchown(copy, status.st_uid, status.st_gid)
            for key, value in read_attributes(original):
                # A tmpfs holds no user.* before Linux 6.6.
                if not key.startswith("user."):
                    os.setxattr(copy, key, value)
            os.fchmod(copy, stat.S_IMODE(status.st_mode))
            os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
        finally:
            os.close(original)
