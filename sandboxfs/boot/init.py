"""The program that goes on after the switch: found before anything is done, executed last.

Once the old root is empty nobody can repair a wrong INIT: the kernel panics when pid 1 ends.
So everything that execve(2) would look at is looked at in the new root beforehand.

Sources: execve(2), elf(5).
"""

import errno
import os
import signal
import stat
import sys

from sandboxfs.errors import BootError
from sandboxfs.kernel import resolve
from sandboxfs.process.program import interpreter_of

DEFAULT = "/sbin/init"
WITNESS = "SANDBOXFS_SWITCHED"
# The kernel follows five interpreters.
_LONGEST_CHAIN = 6
_MACHINE = slice(18, 20)
# What one kernel can execute, 64 and 32 bits, by e_machine: x86, ARM, POWER.
_FAMILIES = ({3, 62}, {40, 183}, {20, 21})


def check_init(root_fd, init):
    """Raise `BootError` unless `init` (str or bytes) can be executed inside the root `root_fd`.

    root_fd: a descriptor of the root's directory.  Symlinks are followed inside it, and what a
    script or a dynamically linked program names as its interpreter is checked like itself.
    """
    path = os.fsencode(init)
    what = "INIT"
    for _link in range(_LONGEST_CHAIN):
        path = _checked(root_fd, path, what, init)
        if path is None:
            return
        what = "INIT's interpreter"
    raise _failure(what, path, errno.ELOOP, "interpreters of interpreters, deeper than exec goes")


def _checked(root, path, what, init):
    """Check one file of the chain; returns the interpreter that it names (bytes), or None."""
    try:
        fd = resolve.open_in_root(root, path, resolve.READ)
    except OSError as error:
        hint = None
        if error.errno == errno.ENOENT and what != "INIT":
            hint = f"{os.fsdecode(init)} is there; the interpreter or loader it names is not"
        raise _failure(what, path, error.errno, "", hint) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise _failure(what, path, errno.EACCES, "not a file")
        if not status.st_mode & 0o111:
            raise _failure(what, path, errno.EACCES, "not executable", "chmod +x")
        if os.fstatvfs(fd).f_flag & os.ST_NOEXEC:
            raise _failure(what, path, errno.EACCES, "lies on a mount with noexec")
        head = os.pread(fd, 64, 0)
        if not head.startswith((b"#!", b"\x7fELF")):
            raise _failure(what, path, errno.ENOEXEC, "neither a program nor a script with #!")
        if head.startswith(b"\x7fELF") and not _ours(head):
            raise _failure(what, path, errno.ENOEXEC, "a program for another kind of machine")
        interpreter = interpreter_of(fd)
        if interpreter is None and head.startswith(b"#!"):
            raise _failure(what, path, errno.ENOEXEC, "names no interpreter after #!")
        return interpreter
    finally:
        os.close(fd)


def _ours(head):
    """Return whether this machine executes such an ELF header, as far as our own tells."""
    try:
        with open(sys.executable, "rb") as file:
            own = file.read(64)
    except OSError:
        return True  # exec will tell
    if not own.startswith(b"\x7fELF") or own[5] != head[5]:
        return own[5:6] == head[5:6]
    little = own[5] == 1
    mine, its = (
        int.from_bytes(each[_MACHINE], "little" if little else "big") for each in (own, head)
    )
    return mine == its or any({mine, its} <= family for family in _FAMILIES)


def _failure(what, path, number, text, hint=None):
    return BootError(what, "find", path, text, number or 0, hint)


def witnessed():
    """Return whether a switch has happened already: its witness is in the environment."""
    return bool(os.environ.get(WITNESS))


def execute(init, arguments):
    """Become INIT, with the witness in its environment.  Returns never; BootError if it fails.

    init: str, a path in the root that this process has now.  arguments: list of str, without
    the program's own name.
    """
    environment = dict(os.environ)
    environment[WITNESS] = "1"
    # Python ignores these two; exec would hand that on.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execve(init, [init, *arguments], environment)
    except OSError as error:
        raise BootError("INIT", "execve", init, "", error.errno or 0) from error
