"""Writing a registration and taking it away again: what was written, and nothing else.

Beside the registration lies a list of its files with their digests, as sha256sum writes it
(``sha256sum -c`` reads it).  A file that isn't as the list says was changed by somebody, and
neither overwritten nor removed.  While files are being replaced the list holds what they were
and what they will be, so that an installation that was cut off is taken up by the next.
"""

import errno
import hashlib
import os
import stat

from sandboxfs.errors import SandboxError
from sandboxfs.hooks.registration import manifest_path

_TITLE = "# Written by `sandboxfs hooks install`, removed by `sandboxfs hooks uninstall`."
_MADE = "# made "


class _Manifest:
    """The list: digests (path → set of what may stand there) and made (directories)."""

    __slots__ = ("digests", "made", "path")

    def __init__(self, path):
        self.path = path
        self.digests = {}
        self.made = []
        text = _read(path)
        for line in (text or b"").decode("utf-8", "surrogateescape").splitlines():
            if line.startswith(_MADE):
                self.made.append(line[len(_MADE):])
            elif line and not line.startswith("#"):
                digest, _, name = line.partition("  ")
                self.digests.setdefault(name, set()).add(digest)

    def save(self):
        lines = [_TITLE, *(_MADE + directory for directory in self.made)]
        for name, digests in self.digests.items():
            lines += [f"{digest}  {name}" for digest in sorted(digests)]
        _write(self.path, ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape"), 0o644)


def install(registration):
    """Write the files of a `Registration`; returns path → ``"written"`` or ``"unchanged"``.

    Doing it again changes nothing; doing it with other content replaces what was written.
    `SandboxError`: a file is somebody else's, was changed, or can't be written.
    """
    manifest = _Manifest(registration.manifest)
    old = dict(manifest.digests)
    wanted = {path: {_digest(content)} for path, (content, _mode) in registration.files.items()}
    _refuse_changed({path: old.get(path, set()) for path in {**wanted, **old}}, wanted)
    outcome = {path: "unchanged" if _is_there(path, *entry) else "written"
               for path, entry in registration.files.items()}
    if "written" in outcome.values() or old != wanted:
        for path in (*registration.files, manifest.path):
            _make_directories(os.path.dirname(path), manifest)
        manifest.digests = {path: old.get(path, set()) | wanted.get(path, set())
                            for path in {**old, **wanted}}
        manifest.save()
        for path, (content, mode) in registration.files.items():
            if outcome[path] == "written":
                _write(path, content, mode)
        for path in old.keys() - wanted.keys():
            _unlink(path)
        manifest.digests = wanted
        manifest.save()
    return outcome


def uninstall(kind, directory):
    """Remove what `install` wrote to `directory`; returns the paths removed, none if nothing was.

    `SandboxError`: a file was changed since; nothing is removed then.
    """
    manifest = _Manifest(manifest_path(kind, directory))
    _refuse_changed(manifest.digests)
    # The launcher was written first, for those that name it; it goes last.
    removed = [path for path in reversed(manifest.digests) if _unlink(path)]
    _unlink(manifest.path)
    for path in reversed(manifest.made):
        try:
            os.rmdir(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            # Others have put something in it: it is theirs as well.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
                raise _failure("rmdir", path, error) from error
    return removed


def _refuse_changed(digests, wanted=None):
    """Raise if a file holds neither what the list says nor what is to be written anyway."""
    for path, allowed in digests.items():
        content = _read(path)
        if content is None:
            continue
        digest = _digest(content)
        if digest not in allowed and digest not in (wanted or {}).get(path, ()):
            text = "was changed since it was written" if allowed else "is there and isn't ours"
            raise SandboxError("", "", path, f"{text}; nothing was touched",
                               hint="remove the file, or put back what it held")


def _is_there(path, content, mode):
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return False
    return stat.S_IMODE(status.st_mode) == mode and _read(path) == content


def _read(path):
    """Return the bytes of the regular file at `path`, None if there is nothing."""
    try:
        # O_NONBLOCK: a FIFO at the path must not hang us.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise SandboxError("", "read", path, "is not a regular file", errno.EINVAL)
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        if isinstance(error, SandboxError):
            raise
        raise _failure("read", path, error) from error


def _write(path, content, mode):
    """Write a file atomically, with this very mode."""
    temporary = f"{path}.{os.getpid()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(temporary, flags, 0o600), "wb") as file:
            try:
                file.write(content)
                os.fchmod(file.fileno(), mode)
                file.flush()
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
    except OSError as error:
        raise _failure("write", path, error) from error


def _make_directories(directory, manifest):
    """Make what is missing of `directory`, open to all whatever the umask, and note it."""
    missing = []
    while not os.path.isdir(directory):
        missing.append(directory)
        directory = os.path.dirname(directory)
    for path in reversed(missing):
        try:
            os.mkdir(path)
            os.chmod(path, 0o755)
        except OSError as error:
            raise _failure("mkdir", path, error) from error
        manifest.made.append(path)


def _unlink(path):
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _failure("unlink", path, error) from error
    return True


def _failure(operation, path, error):
    hint = None
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "--dest DIR puts everything into a directory of yours"
    return SandboxError("", operation, path, errno=error.errno or 0, hint=hint)


def _digest(content):
    return hashlib.sha256(content).hexdigest()


# -- who can start it, and who can change it ----------------------------------------------


def findings(paths):
    """Yield, in words, what is wrong with the ways to `paths` (files or directories).

    In a container with a user namespace the hook is started by the mapped root, for whom the
    host's files are somebody else's: whatever isn't open to all is closed to it.  And whoever
    can write what we start can do whatever we can.
    """
    needed = {}
    for path in map(os.path.realpath, paths):
        needed[path] = stat.S_IROTH | (stat.S_IXOTH if os.path.isdir(path) else 0)
        while path != os.path.dirname(path):
            path = os.path.dirname(path)
            needed[path] = needed.get(path, 0) | stat.S_IXOTH
    for path in sorted(needed):
        yield from _finding(path, needed[path])


def _finding(path, needed):
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return
    mode = stat.S_IMODE(status.st_mode)
    # To the root of a user's own containers the user's files are open.
    ours = status.st_uid == os.geteuid() != 0
    if mode & needed != needed and not ours:
        yield (f"{path} (mode {mode:04o}) is closed to others: the hooks of containers with a user "
               "namespace can't start")
    sticky = stat.S_ISDIR(status.st_mode) and mode & stat.S_ISVTX
    if mode & stat.S_IWOTH and not sticky:
        yield f"{path} (mode {mode:04o}) is writable by everybody: what it holds is run as you"
    if status.st_uid not in (0, os.geteuid()):
        yield f"{path} belongs to user {status.st_uid}: what it holds is run as you"
