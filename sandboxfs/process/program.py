"""Which file exec would run: never the interpreter that runs us (runc CVE-2019-5736).

Until exec, /proc/self/exe is our interpreter, a file of the host.  A payload made of it, by its
name, by ``#!/proc/self/exe`` or as the interpreter of an ELF file, would hold a way to write to
that file once nothing executes it any more.

Sources: execve(2), elf(5).
"""

import _stat as stat
import errno

from sandboxfs.errors import ProcessError
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import identity

_HEAD = 4096
_LONGEST_LINE = 256  # BINPRM_BUF_SIZE
_LONGEST_CHAIN = 6  # the kernel follows five
_PT_INTERP = 3
_LITTLE, _BIG = 1, 2
# ELF class → (size of an offset, e_phoff, e_phentsize, p_offset, p_filesz); e_phnum follows.
_ELF = {1: (4, 28, 42, 4, 16), 2: (8, 32, 54, 8, 32)}


class Guard:
    """Made before the pivot, by the caller's procfs: knows the interpreter that runs us.

    The same file by a mount of the container's (a bind of /usr) is the container's to execute.
    """

    __slots__ = ("identity",)

    def __init__(self):
        self.identity = identity(b"/proc/self/exe")

    def check(self, path):
        """Raise `ProcessError` if executing `path` (bytes) would execute our interpreter.

        What can't be opened or read passes: exec says why it can't be executed, and a payload's
        user who may not read it may not write to files of the host either.
        """
        for _link in range(_LONGEST_CHAIN):
            try:
                if self.is_own(path):
                    raise _refused(path)
                path = _interpreter(path)
            except OSError:
                return
            if path is None:
                return

    def is_own(self, path):
        # Without a descriptor: the payload's limit may leave none.
        return identity(path) == self.identity


def _refused(path):
    error = ProcessError(
        "process.args[0]", "execve", path, "is the interpreter that sandboxfs itself runs in",
        errno.EPERM, hint="it is a file of the host; name a program of the container's",
    )
    error.exit_status = 126
    return error


def _interpreter(path):
    """Return what the file names as its interpreter, or None."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        return None
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        return interpreter_of(fd)
    finally:
        os.close(fd)


def interpreter_of(fd):
    """Return what an open file (script or ELF) names as its interpreter (bytes), or None."""
    head = os.pread(fd, _HEAD, 0)
    if head.startswith(b"#!"):
        words = head[2:_LONGEST_LINE].split(b"\n")[0].split(b"\0")[0].split()
        return words[0] if words else None
    return _elf_interpreter(fd, head) if head.startswith(b"\x7fELF") else None


def _elf_interpreter(fd, head):
    if len(head) < 64 or head[4] not in _ELF or head[5] not in (_LITTLE, _BIG):
        return None

    def number(data, at, length):
        return int.from_bytes(data[at:at + length], "little" if head[5] == _LITTLE else "big")

    size, e_phoff, e_phentsize, p_offset, p_filesz = _ELF[head[4]]
    entry, count = number(head, e_phentsize, 2), number(head, e_phentsize + 2, 2)
    table = os.pread(fd, entry * count, number(head, e_phoff, size))
    for at in range(0, len(table), entry or 1):
        if number(table, at, 4) == _PT_INTERP:
            length = min(number(table, at + p_filesz, size), os.fstat(fd).st_size, _HEAD)
            return os.pread(fd, length, number(table, at + p_offset, size)).split(b"\0")[0]
    return None
