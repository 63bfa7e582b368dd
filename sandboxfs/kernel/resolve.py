"""Paths inside a root: resolved once, by the kernel, into descriptors.

The root is `/` for every component: symlinks, absolute ones too, and `..` never leave it
(openat2(2), RESOLVE_IN_ROOT), and magic links of procfs are refused.
"""

import errno
from time import monotonic

from sandboxfs.kernel import abi
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import (
    OpenHow,
    fail,
    get_errno,
    openat2,
    syscall,
)

_SYS_openat2 = abi.SYS_openat2
_PATH = abi.O_PATH | os.O_CLOEXEC
_IN_ROOT = abi.RESOLVE_IN_ROOT | abi.RESOLVE_NO_MAGICLINKS

ANY = OpenHow(_PATH, 0, _IN_ROOT)
ANY_NO_FOLLOW = OpenHow(_PATH | os.O_NOFOLLOW, 0, _IN_ROOT)
DIRECTORY = OpenHow(_PATH | os.O_DIRECTORY, 0, _IN_ROOT)
# Without O_NOFOLLOW: a last symlink then is ELOOP, and not ENOTDIR, which says little.
REAL_DIRECTORY = OpenHow(_PATH | os.O_DIRECTORY, 0, _IN_ROOT | abi.RESOLVE_NO_SYMLINKS)
# And in no other mount than the root's own.
DIRECTORY_OF_THE_ROOT = OpenHow(
    _PATH | os.O_DIRECTORY, 0, _IN_ROOT | abi.RESOLVE_NO_SYMLINKS | abi.RESOLVE_NO_XDEV)
ANY_NO_LINKS = OpenHow(_PATH, 0, _IN_ROOT | abi.RESOLVE_NO_SYMLINKS)
READ = OpenHow(os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, 0, _IN_ROOT)

# Under a rename attack openat2 answers EAGAIN now and then; so does a busy host, briefly.
RETRY_SECONDS = 5.0
LONGEST_LINK_CHAIN = 40  # MAXSYMLINKS

DIRECTORY_MODE = 0o755
FILE_MODE = 0o644


# These two are called for every path of a build: they ask at once, without a function between.


def open_in_root(root, path, how=ANY):
    """Return a descriptor of `path` (bytes) inside the directory `root`."""
    fd = syscall(_SYS_openat2, root, path, how, 24)
    if fd >= 0:
        return fd
    if get_errno() == errno.EAGAIN:
        return _retried(root, path, how)
    return fail("openat2")


def find_in_root(root, path, how=ANY):
    """Return a descriptor of `path` inside the directory `root`, or None where there is none."""
    fd = syscall(_SYS_openat2, root, path, how, 24)
    if fd >= 0:
        return fd
    number = get_errno()
    if number in (errno.ENOENT, errno.ENOTDIR):
        return None
    if number == errno.EAGAIN:
        try:
            return _retried(root, path, how)
        except (FileNotFoundError, NotADirectoryError):
            return None
    return fail("openat2")


def _retried(root, path, how):
    deadline = monotonic() + RETRY_SECONDS
    while True:
        try:
            return openat2(root, path, how)
        except BlockingIOError:
            if monotonic() > deadline:
                raise
