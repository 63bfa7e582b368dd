"""The state directory: /run/sandboxfs, or that of a user without root, checked at every use.

It holds records that later processes of root believe, so nobody else may have had a hand in
it: every component is opened without following symlinks and looked at by descriptor.  What
is in it is reached through that descriptor, never by a path.
"""

import _stat as stat
import errno

from sandboxfs.errors import StateError
from sandboxfs.kernel import abi, syscalls
from sandboxfs.kernel import system as os

NAME = "sandboxfs"
LARGEST_FILE = 1 << 20
# What ids look like that a user namespace doesn't map (user_namespaces(7)).
OVERFLOW_UID = 65534

_WALK = abi.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC


def real_uid():
    """Return the user we are outside of our user namespace, as the namespace around it says."""
    uid = os.geteuid()
    for line in syscalls.read_file(b"/proc/self/uid_map").split(b"\n"):
        numbers = [int(field) for field in line.split()]
        if numbers and numbers[0] <= uid < numbers[0] + numbers[2]:
            return numbers[1] + uid - numbers[0]
    return uid


def place():
    """Return the path of the state directory of who asks (str); it may not be there.

    Root's is /run/sandboxfs.  A user's, and that of the user behind a rootless runtime, is
    below the session's directory (file-hierarchy(7), /run/user/UID): never taken from the
    environment, which isn't ours in a hook.
    """
    uid = real_uid()
    return f"/run/{NAME}" if uid == 0 else f"/run/user/{uid}/{NAME}"


def open_state(create, memory=False):
    """Return the state `Directory`, or None where there is none and `create` is false.

    create: make it, 0700; only itself, not what it lies in.  memory: it must lie on a tmpfs,
    so that nothing of it survives a reboot.  Raises StateError where anybody else could have
    put something into it or could look into it.
    """
    path = place()
    inside = real_uid() != os.geteuid()
    *above, last = path.strip("/").split("/")
    here = "/"
    fd = os.open("/", _WALK)
    try:
        for name in above:
            here = os.path.join(here, name)
            try:
                below = os.open(name, _WALK, dir_fd=fd)
            except FileNotFoundError:
                if not create:
                    return None
                raise _refused(here, "isn't there", errno.ENOENT, _session_hint(path)) from None
            except NotADirectoryError:
                raise _refused(here, "is no directory, or a symlink", errno.ENOTDIR) from None
            os.close(fd)
            fd = below
            _check_above(fd, here, inside)
        directory = _open_last(fd, last, path, create)
    except OSError as error:
        raise _refused(here, "", error.errno) from error
    finally:
        os.close(fd)
    if directory is not None and memory:
        _check_memory(directory)
    return directory


def _refused(path, text, number=0, hint=None):
    return StateError("", "open", path, text, number, hint)


def _session_hint(path):
    if not path.startswith("/run/user/"):
        return None
    return "a user's session directory is made at login; loginctl enable-linger keeps it"


def _check_above(fd, path, inside):
    """Nobody but root and ourselves may be able to exchange what lies in this directory."""
    status = os.fstat(fd)
    owners = (0, os.geteuid()) + ((OVERFLOW_UID,) if inside else ())
    if status.st_uid not in owners:
        raise _refused(path, f"belongs to user {status.st_uid}, who could exchange what is in it")
    if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
        raise _refused(path, f"has mode {stat.S_IMODE(status.st_mode):04o}: others could "
                       "exchange what is in it")


def _open_last(parent, name, path, create):
    made = False
    while True:
        try:
            fd = os.open(name, _OPEN, dir_fd=parent)
            break
        except FileNotFoundError:
            if not create:
                return None
        except NotADirectoryError:
            raise _refused(path, "is no directory, or a symlink", errno.ENOTDIR) from None
        except OSError as error:
            raise _refused(path, "", error.errno) from None
        made = _made(name, parent, path)
    try:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid():
            raise _refused(path, f"belongs to user {status.st_uid}, not to us: made by "
                           "somebody else", hint="remove it, after a look at what is in it")
        mode = stat.S_IMODE(status.st_mode)
        if made and mode != 0o700:
            os.fchmod(fd, 0o700)  # the umask took bits away; it is the whole process's
        elif mode & 0o077 or mode & 0o700 != 0o700:
            raise _refused(path, f"has mode {mode:04o}, 0700 is wanted",
                           hint=f"chmod 0700 {path}, after a look at what is in it")
    except BaseException:
        os.close(fd)
        raise
    return Directory(fd, path)


def _made(name, parent, path):
    try:
        os.mkdir(name, 0o700, dir_fd=parent)
    except FileExistsError:
        return False  # somebody was faster: looked at like any other
    except OSError as error:
        raise StateError("", "mkdir", path, "", error.errno) from None
    return True


def _check_memory(directory):
    if syscalls.filesystem_type(directory.fd) == abi.TMPFS_MAGIC:
        return
    path = directory.path
    directory.close()
    raise _refused(path, "doesn't lie on a tmpfs: records would outlive the mounts they tell of",
                   hint=f"mount a tmpfs on /run, or on {path} with mode=0700")


class Directory:
    """A directory of the state, held by a descriptor; a context manager.

    fd: owned.  path: str, for messages only.  Names are single components, chosen by us:
    nothing that somebody else wrote is ever one.
    """

    __slots__ = ("fd", "path")

    def __init__(self, fd, path):
        self.fd = fd
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        self.close()

    def close(self):
        """Close the descriptor; a second time is no fault."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def where(self, name):
        """Return the path of an entry, for messages."""
        return f"{self.path}/{name}"

    def directory(self, name, create=False):
        """Return the `Directory` below, or None where there is none and `create` is false."""
        while True:
            try:
                return Directory(os.open(name, _OPEN, dir_fd=self.fd), self.where(name))
            except FileNotFoundError:
                if not create:
                    return None
            except OSError as error:
                raise _refused(self.where(name), "", error.errno) from None
            _made(name, self.fd, self.where(name))

    def names(self):
        """Return the sorted names of what is in it."""
        return sorted(os.listdir(self.fd))

    def read(self, name):
        """Return the bytes of a regular file, or None where there is none; StateError."""
        try:
            fd = os.open(name, _READ, dir_fd=self.fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _refused(self.where(name), "", error.errno) from None
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise _refused(self.where(name), "is no regular file")
            if status.st_size > LARGEST_FILE:
                raise _refused(self.where(name), f"has {status.st_size} bytes: not ours")
            return syscalls.read_all(fd)
        finally:
            os.close(fd)

    def write(self, name, content):
        """Replace a file, 0600, all at once: whoever reads it finds the old bytes or the new.

        For the holder of the lock, since what is being written has one name.
        """
        new = name + ".new"
        try:
            fd = os.open(new, _WRITE, 0o600, dir_fd=self.fd)
            try:
                left = memoryview(content)
                while left:
                    left = left[os.write(fd, left):]
            finally:
                os.close(fd)
            os.rename(new, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except OSError as error:
            self.remove(new)
            raise StateError("", "write", self.where(name), "", error.errno) from error

    def remove(self, name):
        """Remove a file, if it is there."""
        try:
            os.unlink(name, dir_fd=self.fd)
        except FileNotFoundError:
            pass
