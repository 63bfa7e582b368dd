"""How a probe runs: in this process, in a forked child, or in a mount namespace of that child."""

import os
from _signal import SIGKILL
from errno import errorcode

from sandboxfs.kernel import abi, syscalls, usernamespace

LONGEST_PROBE = 10  # seconds
# What a detail starts with where there was no mount namespace to try something in.
NOT_TRIED = "not tried, no mount namespace"

_DIRECTORY = abi.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class Finding:
    """One answer: true or false, and `detail`, why not or how much (str, may be empty)."""

    __slots__ = ("detail", "found")

    def __init__(self, found, detail=""):
        self.found = found
        self.detail = detail

    def __bool__(self):
        return self.found

    def __repr__(self):
        return f"Finding({self.found}, {self.detail!r})"


def worded(error):
    """Return an OSError as a probe reports it: ``fsopen: ENODEV: No such device``."""
    call = getattr(error, "call", "") or error.filename or ""
    if isinstance(call, bytes):
        call = os.fsdecode(call)
    name = errorcode.get(error.errno, str(error.errno))
    text = f"{name}: {os.strerror(error.errno)}" if error.errno else str(error)
    log = getattr(error, "log", "")
    return ": ".join(part for part in (call, text, log) if part)


def tried(function, *arguments):
    """Return the `Finding` of a function that raises OSError where a thing can't be done.

    The detail of what can be done is what the function returns (str or None).
    """
    try:
        return Finding(True, function(*arguments) or "")
    except OSError as error:
        return Finding(False, worded(error))


def in_child(function, *arguments):
    """Return the `Finding` of `function` in a forked child, which may change as it likes."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _be_the_child(writer, function, arguments)
    os.close(writer)
    try:
        answer = _read(reader, child)
    finally:
        os.close(reader)
        os.waitpid(child, 0)
    if not answer:
        return Finding(False, "the probe was killed")
    return Finding(answer[:1] == b"+", answer[1:].decode("utf-8", "replace"))


def _read(reader, child):
    import select

    chunks = []
    while select.select([reader], [], [], LONGEST_PROBE)[0]:
        chunk = os.read(reader, 4096)
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)
    os.kill(child, SIGKILL)
    return b""


def _be_the_child(writer, function, arguments):
    try:
        finding = tried(function, *arguments)
        text = ("+" if finding else "-") + finding.detail
        os.write(writer, text.encode("utf-8", "surrogateescape"))
    finally:
        os._exit(0)


def apart(function, *arguments):
    """`in_child`, in a mount namespace of its own in which the child may mount."""
    return in_child(_entered, function, arguments)


def _entered(function, arguments):
    try:
        enter_mount_namespace()
    except OSError as error:
        error.call = f"{NOT_TRIED}: {getattr(error, 'call', error.filename)}"
        raise
    return function(*arguments)


def enter_mount_namespace():
    """Move this process into a mount namespace of its own; returns how (str).

    With a user namespace, its own id mapped to 0, where it may not have one otherwise.
    OSError of unshare(2) or of writing the maps.
    """
    how = "directly"
    try:
        syscalls.unshare(abi.CLONE_NEWNS)
    except PermissionError:
        enter_user_namespace()
        syscalls.unshare(abi.CLONE_NEWNS)
        how = "in a user namespace"
    return how


def attach_to_root(mount):
    """Attach a mount on /, seen by this process alone."""
    slash = os.open(b"/", _DIRECTORY)
    # Else it would reach the namespace that ours was copied from.  EINVAL in a chroot.
    syscalls.mount_setattr(slash, 0, 0, abi.MS_SLAVE, True)
    syscalls.move_mount_path(mount, abi.AT_FDCWD, b"/")
    os.close(slash)


def enter_user_namespace():
    """Move this process into a new user namespace in which it is root; its own id is mapped."""
    uid, gid = os.geteuid(), os.getegid()
    syscalls.unshare(abi.CLONE_NEWUSER)
    usernamespace.write("/proc/self/setgroups", "deny")
    usernamespace.write("/proc/self/uid_map", f"0 {uid} 1")
    usernamespace.write("/proc/self/gid_map", f"0 {gid} 1")
