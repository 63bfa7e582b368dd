"""Paths of the caller's, as the runtime behind us will follow them.

crun goes by the kernel.  Go joins paths as text, so for runc ``link/..`` is nothing at all, and its
working directory is what PWD says if that leads there.  A path that the two ways lead to different
places is refused.
"""

import posix

from sandboxfs.errors import HookError, MountError
from sandboxfs.kernel import abi
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import mount_id

_PATH = abi.O_PATH | os.O_CLOEXEC


def opened(path: str, origin: str) -> int:
    """Return a descriptor (O_PATH) of what a path leads to; MountError where there is nothing."""
    try:
        fd: int = os.open(path, _PATH)
    except OSError as error:
        raise MountError(origin, "open", path, "", error.errno or 0) from error
    return fd


def real(path: str, origin: str) -> str:
    """Return the path, without links, of what a path leads to; MountError where nothing is."""
    fd = opened(path, origin)
    try:
        found: str = os.fsdecode(os.readlink(f"/proc/self/fd/{fd}"))
        return found
    finally:
        os.close(fd)


def agreed(bundle: str, path: str, origin: str) -> str:
    """Return a path of the document as an absolute one; bundle: where a relative one starts.

    HookError where text and kernel would lead to different places.
    """
    texts: list[str] = [os.path.join(bundle, path)]
    # The front has marked each name of the caller's environment by a byte.
    directory = os.fsdecode(posix.environ.get(b"\1PWD", b""))
    if directory.startswith("/") and not os.path.isabs(path) and _is_same(directory, bundle):
        texts.append(os.path.join(directory, path))
    for text in texts:
        if ".." in text.split("/") and not _is_same(os.path.normpath(text), texts[0]):
            raise HookError(origin, "", path, "leads to one place as text, and to another one by "
                            "the links on its way: runtimes differ in which they take",
                            hint="write the path without ..")
    return texts[0]


def _is_same(one: str, other: str) -> bool:
    facts = []
    for path in (one, other):
        try:
            fd = os.open(path, _PATH)
        except OSError:
            return False
        status = os.fstat(fd)
        facts.append((status.st_dev, status.st_ino, mount_id(fd)[0]))
        os.close(fd)
    return facts[0] == facts[1]
