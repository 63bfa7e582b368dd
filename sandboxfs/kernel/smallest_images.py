"""The smallest images there are, to try whether this kernel mounts them, and loop devices."""

import os
from _struct import Struct
from errno import EINVAL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_EROFS_SUPERBLOCK = Struct("<IIIBBHQQIIII16s16sIHHHBBIQB23x")
_EROFS_INODE = Struct("<HHHHIIIIHHI")
_EROFS_ENTRY = Struct("<QHBB")
_SQUASHFS_SUPERBLOCK = Struct("<IIIIIHHHHHHQQQQQQQQ")
_SQUASHFS_DIRECTORY = Struct("<HHHHIIIIHHI")
_NO_TABLE = 0xFFFFFFFFFFFFFFFF


def erofs_image():
    """Return the bytes of an EROFS image with an empty root (fs/erofs/erofs_fs.h)."""
    number = (1024 + _EROFS_SUPERBLOCK.size) // 32
    superblock = _EROFS_SUPERBLOCK.pack(
        0xE0F5E1E2, 0, 0, 12, 0, number, 1, 0, 0, 1, 0, 0, b"", b"", 0, 0, 0, 0, 0, 0, 0, 0, 0
    )
    directory = 2
    entries = (
        _EROFS_ENTRY.pack(number, 24, directory, 0) + _EROFS_ENTRY.pack(number, 25, directory, 0)
        + b"..."
    )
    # Compact, its data inline behind it.
    inode = _EROFS_INODE.pack(4, 0, 0o40755, 2, len(entries), 0, 0, 1, 0, 0, 0)
    return (b"\0" * 1024 + superblock + inode + entries).ljust(4096, b"\0")


def squashfs_image():
    """Return the bytes of a squashfs 4.0 image with an empty root, nothing compressed."""
    inodes = 96
    directory = _SQUASHFS_DIRECTORY.pack(1, 0o755, 0, 0, 0, 1, 0, 2, 3, 0, 2)
    block = _metadata(directory)
    ids = inodes + len(block)
    block += _metadata(b"\0" * 4)
    id_table = inodes + len(block)
    block += ids.to_bytes(8, "little")
    superblock = _SQUASHFS_SUPERBLOCK.pack(
        0x73717368, 1, 0, 131072, 0, 1, 17, 0, 1, 4, 0, 0, inodes + len(block), id_table,
        _NO_TABLE, inodes, ids, _NO_TABLE, _NO_TABLE,
    )
    return (superblock + block).ljust(4096, b"\0")


def _metadata(content):
    return (len(content) | 0x8000).to_bytes(2, "little") + content


def image_files(content: bytes) -> "Iterator[tuple[int, str]]":
    """Yield (descriptor, directory) of files without a name that hold `content`.

    Each is of another file system: what a kernel takes from one it may refuse from another, such as
    a tmpfs.  The descriptor is closed when the next one is asked for.  OSError: there is none.
    """
    failure = OSError(EINVAL, "no directory for a file")
    seen = set()
    for directory in _directories():
        try:
            image = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            failure = error
            continue
        try:
            device = os.fstat(image).st_dev
            if device not in seen:
                seen.add(device)
                os.write(image, content)
                yield image, directory
        finally:
            os.close(image)
    if not seen:
        failure.call = "open O_TMPFILE"
        raise failure


def _directories() -> "Iterator[str]":
    yield from ("/var/tmp", "/tmp", ".")
    from sandboxfs.kernel import mounttable

    for record in mounttable.read():
        # On a disk: to try other mounts may mean to wait for a server.
        if record.source.startswith(b"/dev/") and record.mountpoint:
            yield os.fsdecode(record.mountpoint)


LOOP_CTL_GET_FREE = 0x4C82
LOOP_CONFIGURE = 0x4C0A
_LOOP_CONFIGURATION_SIZE = 304
_LOOP_FLAGS = Struct("=I56xI")
_LO_FLAGS_READ_ONLY_AUTOCLEAR = 5


def loop_device(image):
    """Return (descriptor, path) of a loop device on `image` that clears itself when closed."""
    import fcntl

    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        path = b"/dev/loop%d" % fcntl.ioctl(control, LOOP_CTL_GET_FREE)
    finally:
        os.close(control)
    device = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    configuration = bytearray(_LOOP_CONFIGURATION_SIZE)
    _LOOP_FLAGS.pack_into(configuration, 0, image, _LO_FLAGS_READ_ONLY_AUTOCLEAR)
    try:
        fcntl.ioctl(device, LOOP_CONFIGURE, bytes(configuration))
    except OSError as error:
        os.close(device)
        error.call = "ioctl LOOP_CONFIGURE"
        raise
    return device, path
