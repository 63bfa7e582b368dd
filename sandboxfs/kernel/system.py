"""What the hot modules use of `os`, under its names and with its meanings.

`import os` alone costs a seventh of what a bare interpreter takes to start: it makes two dozen
abstract classes for its mapping of the environment.  Everything else of it is the built-in
module `posix`.  Hot modules say ``from sandboxfs.kernel import system as os``.
"""

import posix
import sys

# All by name: a copy of everything is five times as long, and its memory is touched for nothing.
from posix import (  # noqa: F401 - for others, as os has them
    MFD_CLOEXEC,
    O_APPEND,
    O_CLOEXEC,
    O_CREAT,
    O_DIRECTORY,
    O_EXCL,
    O_NOCTTY,
    O_NOFOLLOW,
    O_NONBLOCK,
    O_PATH,
    O_RDONLY,
    O_RDWR,
    O_TRUNC,
    O_WRONLY,
    SCHED_BATCH,
    SCHED_OTHER,
    ST_NOATIME,
    ST_NODEV,
    ST_NODIRATIME,
    ST_NOEXEC,
    ST_NOSUID,
    ST_RDONLY,
    WIFSTOPPED,
    WNOHANG,
    WUNTRACED,
    _exit,
    chdir,
    chmod,
    chown,
    chroot,
    close,
    closerange,
    dup,
    dup2,
    execve,
    fchdir,
    fchmod,
    fork,
    fstat,
    fstatvfs,
    ftruncate,
    get_inheritable,
    getcwd,
    getcwdb,
    getegid,
    geteuid,
    getpid,
    getppid,
    getxattr,
    kill,
    listdir,
    listxattr,
    lstat,
    major,
    makedev,
    memfd_create,
    minor,
    mkdir,
    mknod,
    open,  # noqa: A004
    pidfd_open,
    pipe,
    pipe2,
    pread,
    pwrite,
    read,
    readlink,
    rename,
    rmdir,
    sched_getaffinity,
    sched_getscheduler,
    sched_param,
    sched_setaffinity,
    sched_setscheduler,
    set_blocking,
    setegid,
    seteuid,
    setgroups,
    setresgid,
    setresuid,
    setsid,
    setxattr,
    stat,
    strerror,
    symlink,
    sysconf,
    umask,
    uname,
    unlink,
    utime,
    waitpid,
    waitstatus_to_exitcode,
    write,
)

devnull = "/dev/null"
_ENCODING = sys.getfilesystemencoding()
_ERRORS = sys.getfilesystemencodeerrors()


def fsencode(name):
    """Return a path (str, bytes or path-like) as bytes."""
    name = posix.fspath(name)
    return name.encode(_ENCODING, _ERRORS) if isinstance(name, str) else name


def fsdecode(name):
    """Return a path (str, bytes or path-like) as str."""
    name = posix.fspath(name)
    return name.decode(_ENCODING, _ERRORS) if isinstance(name, bytes) else name


def _marks(name):
    return ("/", ".") if isinstance(name, str) else (b"/", b".")


class path:  # noqa: N801 - the name of a module in os
    """The functions of `os.path` that are used, for str and bytes."""

    @staticmethod
    def isabs(name):
        return posix.fspath(name)[:1] in ("/", b"/")

    @staticmethod
    def join(first, *others):
        result = posix.fspath(first)
        slash, _dot = _marks(result)
        for other in others:
            other = posix.fspath(other)
            if other.startswith(slash):
                result = other
            elif not result or result.endswith(slash):
                result += other
            else:
                result += slash + other
        return result

    @staticmethod
    def normpath(name):
        name = posix.fspath(name)
        slash, dot = _marks(name)
        parents = dot + dot
        kept = []
        for part in name.split(slash):
            if part == parents and kept and kept[-1] != parents:
                kept.pop()
            elif part not in (slash[:0], dot) and (part != parents or name[:1] != slash):
                kept.append(part)
        # POSIX lets exactly two slashes at the start mean something of their own.
        start = slash * (2 if name[:2] == slash * 2 and name[2:3] != slash else 1)
        return (start if name[:1] == slash else slash[:0]) + slash.join(kept) or dot

    @staticmethod
    def abspath(name):
        name = posix.fspath(name)
        if not path.isabs(name):
            here = posix.getcwd() if isinstance(name, str) else posix.getcwdb()
            name = path.join(here, name)
        return path.normpath(name)

    @staticmethod
    def dirname(name):
        name = posix.fspath(name)
        slash, _dot = _marks(name)
        head = name[:name.rfind(slash) + 1]
        return head.rstrip(slash) or head

    @staticmethod
    def exists(name):
        try:
            posix.stat(name)
        except (OSError, ValueError):
            return False
        return True

    @staticmethod
    def lexists(name):
        try:
            posix.lstat(name)
        except (OSError, ValueError):
            return False
        return True

    @staticmethod
    def samestat(one, other):
        return (one.st_ino, one.st_dev) == (other.st_ino, other.st_dev)
