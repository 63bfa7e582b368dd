"""What may not be deleted of an initramfs although it lies on it.

Besides the paths that are asked for: what is mounted elsewhere too (a bind of one of its
directories shows the same files), and the layers of overlays.
"""

import errno
import os
import stat

from sandboxfs.boot.deletion import identity
from sandboxfs.errors import BootError
from sandboxfs.kernel import mountinfo
from sandboxfs.kernel.resolve import LONGEST_LINK_CHAIN

_LAYERS = (b"lowerdir", b"lowerdir+", b"datadir+", b"upperdir", b"workdir")


def identities(old, found, preserve, warn):
    """Return the identities (`deletion.identity`) that a deletion of the root `old` spares.

    old: a descriptor of the root.  found: its `Place`.  preserve: paths inside it.
    BootError: a path isn't there, or the whole of it is in use elsewhere.
    """
    spared = set()
    for path in preserve:
        _add_path(spared, old, path)
    device = os.fstat(old).st_dev
    for record in found.records:
        if record.id == found.root.id:
            continue
        if record.device == found.root.device:
            if record.root == b"/":
                raise _in_use(f"{os.fsdecode(record.mountpoint)} shows the same files")
            shown = _add_shown(spared, record.mountpoint, device)
            _add_used(spared, record.root, device, None if shown else warn, record.mountpoint)
        elif record.type == b"overlay":
            for layer in _layers(record.superblock_options):
                _add_used(spared, layer, device, warn, record.mountpoint)
    return spared


def _in_use(why):
    return BootError(
        "", "switch-root", "/", f"the old root's files are still in use: {why}",
        hint="--keep leaves them all",
    )


def _add_path(spared, old, path):
    """Add a path inside the root and the symlinks on its way.

    Each is resolved in the root; its parents stay anyhow, since they aren't empty.
    """
    pending = [name for name in reversed(os.fspath(path).split("/")) if name not in ("", ".")]
    if not pending:
        raise BootError("--preserve", "", path, "is the whole of the old root",
                        hint="--keep leaves it all")
    here = os.dup(old)
    links = 0
    try:
        while pending:
            name = pending.pop()
            status = os.stat(name, dir_fd=here, follow_symlinks=False)
            if stat.S_ISLNK(status.st_mode):
                spared.add(identity(status))
                links += 1
                if links > LONGEST_LINK_CHAIN:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                target = os.readlink(name, dir_fd=here)
                pending += [part for part in reversed(target.split("/")) if part not in ("", ".")]
                if target.startswith("/"):
                    os.close(here)
                    here = os.dup(old)
            elif pending:
                following = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=here)
                os.close(here)
                here = following
            else:
                spared.add(identity(status))
    except OSError as error:
        raise BootError("--preserve", "find", path, "", error.errno or 0) from error
    finally:
        os.close(here)


def _add_shown(spared, mountpoint, device):
    """Add what a mount of the old root's file system shows; whether its path leads there.

    By the mount: another one may lie on the place that it shows, and move away before anything
    is deleted.
    """
    try:
        status = os.lstat(mountpoint)
    except OSError:
        return False
    if status.st_dev == device:
        spared.add(identity(status))
    return status.st_dev == device


def _add_used(spared, path, device, warn, user):
    """Add what a mount at `user` shows of the old root; path: bytes, from its root.

    warn: called where nothing is there, or None.
    """
    try:
        status = os.lstat(path)
    except OSError:
        if path.startswith(b"/") and warn is not None:
            warn(f"{os.fsdecode(user)} may use {os.fsdecode(path)} of the old root, "
                 "which isn't there to be kept")
        return
    if status.st_dev != device:
        return
    if path.strip(b"/") == b"":
        raise _in_use(f"a layer of {os.fsdecode(user)}")
    spared.add(identity(status))


def _layers(options):
    """Return the directories (bytes) that an overlay's options name."""
    found = []
    for option in options.split(b","):
        key, _, value = option.partition(b"=")
        value = mountinfo.unescape(value)
        if key == b"lowerdir":
            found += _lower_directories(value)
        elif key in _LAYERS:
            found.append(value)
    return found


def _lower_directories(value):
    r"""Return the directories of ``lowerdir=``: between colons, ``\:`` and ``\\`` escaped.

    A double colon stands before directories of data only.
    """
    parts = [b""]
    escaped = False
    for number in value:
        byte = bytes((number,))
        if escaped or byte not in (b":", b"\\"):
            parts[-1] += byte
            escaped = False
        elif byte == b"\\":
            escaped = True
        else:
            parts.append(b"")
    return [part for part in parts if part]
