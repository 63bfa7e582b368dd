"""EROFS and squashfs images as lowers.

EROFS mounts a file as it is (Linux 6.12); a loop device is the fallback, and the way for
squashfs.  The loop device clears itself when the mount is gone (loop(4), LO_FLAGS_AUTOCLEAR).
"""

import ctypes
import errno
import fcntl
import os

from sandboxfs.errors import MountError
from sandboxfs.kernel import abi, fscontext

_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LO_FLAGS_READ_ONLY = 1
_LO_FLAGS_AUTOCLEAR = 4
_ATTEMPTS = 64

_EROFS_MAGIC = b"\xe2\xe1\xf5\xe0"
_SQUASHFS_MAGIC = b"hsqs"


class _LoopInfo(ctypes.Structure):
    _fields_ = (
        ("numbers", ctypes.c_uint64 * 5), ("lo_number", ctypes.c_uint32),
        ("lo_encrypt", ctypes.c_uint32 * 2), ("lo_flags", ctypes.c_uint32),
        ("lo_file_name", ctypes.c_char * 64), ("lo_crypt_name", ctypes.c_char * 64),
        ("lo_encrypt_key", ctypes.c_char * 32), ("lo_init", ctypes.c_uint64 * 2),
    )


class _LoopConfig(ctypes.Structure):
    _fields_ = (
        ("fd", ctypes.c_uint32), ("block_size", ctypes.c_uint32), ("info", _LoopInfo),
        ("reserved", ctypes.c_uint64 * 8),
    )


def mount(file, operation):
    """Return a detached read-only mount of an image file (its O_PATH descriptor).

    Raises MountError for a file that is no image, OSError with the kernel's log otherwise.
    """
    # The very file that was looked at: what its path leads to by now may be a device.
    image = os.open(b"/proc/self/fd/%d" % file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return mount_opened(image, operation.origin, operation.path)
    finally:
        os.close(image)


def mount_opened(image, origin, path):
    """As `mount`, of an image file that is open for reading; procfs isn't needed.

    origin, path: what a MountError says of it.
    """
    type = _type_of(image)
    if type is None:
        raise MountError(origin, "open", path, "neither a directory nor an EROFS or squashfs image")
    if type == b"erofs":
        try:
            return _mounted(type, b"/proc/self/fd/%d" % image)
        except OSError as error:
            # ENOTBLK: this kernel mounts no files; EINVAL: not from this file system; ENOENT:
            # there is no procfs to name it by.
            if error.errno not in (
                errno.ENOTBLK, errno.EINVAL, errno.ENOTDIR, errno.ENOENT,
            ):
                raise
    return _through_loop(type, image)


def mount_device(image, device, origin):
    """As `mount_opened`, of a block device: `image` is open for reading, `device` its path."""
    type = _type_of(image)
    if type is None:
        raise MountError(origin, "open", device, "no EROFS or squashfs image is on this device")
    return _mounted(type, os.fsencode(device))


def _type_of(image):
    if os.pread(image, 4, 1024) == _EROFS_MAGIC:
        return b"erofs"
    if os.pread(image, 4, 0) == _SQUASHFS_MAGIC:
        return b"squashfs"
    return None


def _mounted(type, source):
    settings = [fscontext.string(b"source", source), fscontext.flag(b"ro")]
    return fscontext.create(type, settings, abi.MOUNT_ATTR_RDONLY)


def _through_loop(type, image):
    loop, path = _loop_device(image)
    try:
        return _mounted(type, path)
    finally:
        # The mount holds the device from here on; without a mount this clears it.
        os.close(loop)


def _loop_device(image):
    """Return (descriptor, path) of a loop device over the image, read-only, self-clearing."""
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    config = _LoopConfig(fd=image)
    config.info.lo_flags = _LO_FLAGS_READ_ONLY | _LO_FLAGS_AUTOCLEAR
    try:
        for _attempt in range(_ATTEMPTS):
            number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
            path = b"/dev/loop%d" % number
            loop = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.ioctl(loop, _LOOP_CONFIGURE, config)
            except OSError as error:
                os.close(loop)
                if error.errno != errno.EBUSY:  # somebody else took it in between
                    raise
            else:
                return loop, path
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, "no free loop device could be had")
