"""Writing a registration and taking it away again: what was written, and nothing else.

Beside the registration lies a list of its files with their digests, as sha256sum writes it
(``sha256sum -c`` reads it).  A file that isn't as the list says was changed by somebody, and
neither overwritten nor removed.  While files are being replaced the list holds what they were
and what they will be, so that an installation that was cut off is taken up by the next.

Files of others that hold an entry of ours (`edits`) are listed with what they held before: if
nobody has changed them since, they become that again, byte for byte.
"""

import errno
import hashlib
import os
import stat
from base64 import b64decode, b64encode
from glob import escape, glob

from sandboxfs.engines import edits
from sandboxfs.errors import SandboxError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_TITLE = "# Written by `sandboxfs install`, removed by `sandboxfs uninstall`."
_MADE = "# made "
_EDITED = "# edited "
_ENGINE_CONFIG = "# engine-config "


class Registration:
    """What one registration is made of.

    manifest: path of the list of what was written.  files: path → (bytes, mode), in the order of
    writing: what others name comes first.  edits: path of a file of others → what is added to it,
    after our files are there.  engine_config: where the engine's configuration is, if not in its
    usual place; None.  notes: lines for the operator about what is left to do.
    """

    __slots__ = ("edits", "engine_config", "files", "manifest", "notes")

    def __init__(self, manifest: str) -> None:
        self.manifest = manifest
        self.engine_config: str | None = None
        self.files: dict[str, tuple[bytes, int]] = {}
        self.edits: dict[str, edits.Block | edits.Key] = {}
        self.notes: list[str] = []


class Edited:
    """One change of a file of others.

    digest: of the content with it.  original: the content without it, None if there was no file.
    added: what `edits.revert` takes out.
    """

    __slots__ = ("added", "digest", "kind", "original")

    def __init__(self, kind: str, digest: str, original: "bytes | None", added: bytes) -> None:
        self.kind = kind
        self.digest = digest
        self.original = original
        self.added = added

    def line(self, path: str) -> str:
        original = "-" if self.original is None else f"={b64encode(self.original).decode()}"
        added = b64encode(self.added).decode()
        return f"{_EDITED}{self.kind} {self.digest} {original} {added} {path}"

    @staticmethod
    def parsed(line: str) -> "tuple[str, Edited]":
        kind, digest, original, added, path = line[len(_EDITED):].split(" ", 4)
        content = None if original == "-" else b64decode(original[1:])
        return path, Edited(kind, digest, content, b64decode(added))


class Manifest:
    """The list: digests (path → set of what may stand there), edited, made (directories).

    engine_config: as `Registration` has it.
    """

    __slots__ = ("digests", "edited", "engine_config", "made", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self.digests: dict[str, set[str]] = {}
        self.edited: dict[str, list[Edited]] = {}
        self.made: list[str] = []
        self.engine_config: str | None = None
        text = read(path)
        for line in (text or b"").decode("utf-8", "surrogateescape").splitlines():
            if line.startswith(_MADE):
                self.made.append(line[len(_MADE):])
            elif line.startswith(_ENGINE_CONFIG):
                self.engine_config = line[len(_ENGINE_CONFIG):]
            elif line.startswith(_EDITED):
                name, edited = Edited.parsed(line)
                self.edited.setdefault(name, []).append(edited)
            elif line and not line.startswith("#"):
                digest, _, name = line.partition("  ")
                self.digests.setdefault(name, set()).add(digest)

    def save(self) -> None:
        """Write the list, closed to those to whom a file was closed that it holds a copy of."""
        lines = [_TITLE, *(_MADE + directory for directory in self.made)]
        if self.engine_config is not None:
            lines.append(_ENGINE_CONFIG + self.engine_config)
        mode = 0o644
        for name, changes in self.edited.items():
            lines += [edited.line(name) for edited in changes]
            mode &= _mode(name, mode)
        for name, digests in self.digests.items():
            lines += [f"{digest}  {name}" for digest in sorted(digests)]
        _write(self.path, ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape"), mode)

    def without_edit(self, path: str) -> "bytes | None":
        """Return what the file of others at `path` holds but for our entry, None for no file."""
        current = read(path)
        if current is None:
            return None
        changes = self.edited.get(path, [])
        for edited in changes:
            if _digest(current) == edited.digest:
                return edited.original
        for edited in changes:
            try:
                current = edits.revert(edited.kind, path, current, edited.added)
            except SandboxError:
                if edited is changes[-1]:
                    raise
        emptied = bool(changes) and changes[0].original is None and not current.strip()
        return None if emptied else current


def checked(path: str) -> str:
    """Return `path` made absolute; UsageError if no registration can hold it."""
    path = os.path.abspath(path)
    if not path.isprintable() or "\\" in path:
        raise UsageError("", "register", path, "no registration can hold this path")
    return path


def install(registration: Registration) -> dict[str, str]:
    """Write the files of a `Registration`; returns path → ``"written"`` or ``"unchanged"``.

    Doing it again changes nothing; doing it with other content replaces what was written: each
    file at once, so whoever starts a container meanwhile finds the old one or the new one.
    `SandboxError`: a file is somebody else's, was changed, or can't be written.
    """
    manifest = Manifest(registration.manifest)
    old = dict(manifest.digests)
    wanted = {path: {_digest(content)} for path, (content, _mode) in registration.files.items()}
    _refuse_changed({path: old.get(path, set()) for path in {**wanted, **old}}, wanted)
    contents, edited = _edits(registration, manifest)
    outcome = {path: "unchanged" if _is_there(path, *entry) else "written"
               for path, entry in registration.files.items()}
    outcome |= {path: "unchanged" if read(path) == contents[path] else "written"
                for path in contents}
    if "written" in outcome.values() or old != wanted or _lines(edited) != _lines(manifest.edited):
        _inherit(manifest)
        manifest.engine_config = registration.engine_config
        for path in (*registration.files, manifest.path, *contents):
            _make_directories(os.path.dirname(path), manifest)
        manifest.digests = {path: old.get(path, set()) | wanted.get(path, set())
                            for path in {**old, **wanted}}
        manifest.edited = {path: [*manifest.edited.get(path, ()), *edited.get(path, ())]
                           for path in {**manifest.edited, **edited}}
        manifest.save()
        for path, (content, mode) in registration.files.items():
            if outcome[path] == "written":
                _write(path, content, mode)
        for path, text in contents.items():
            if outcome[path] == "written":
                _replace(path, text)
        for path in old.keys() - wanted.keys():
            _unlink(path)
        manifest.digests = wanted
        manifest.edited = edited
        manifest.save()
    return outcome


def _lines(edited: "Mapping[str, Iterable[Edited]]") -> list[str]:
    return [each.line(path) for path, changes in edited.items() for each in changes]


def _inherit(manifest: Manifest) -> None:
    """Note directories that the registrations beside this one have made, and that it uses, too.

    So whichever is removed last takes them away.
    """
    directory = os.path.dirname(manifest.path)
    made = [each for beside in sorted(glob(os.path.join(escape(directory), "*.sha256")))
            for each in Manifest(beside).made if f"{directory}/".startswith(f"{each}/")]
    manifest.made = list(dict.fromkeys([*made, *manifest.made]))


def _edits(registration: Registration, manifest: Manifest) -> \
        "tuple[dict[str, bytes | None], dict[str, list[Edited]]]":
    """Return path → content that files of others will have, and path → how it is taken out."""
    contents: dict[str, bytes | None] = {}
    edited: dict[str, list[Edited]] = {}
    for path in {**manifest.edited, **registration.edits}:
        base = manifest.without_edit(path)
        contents[path] = base
        edit = registration.edits.get(path)
        if edit is not None:
            content, added = edit.apply(path, base)
            contents[path] = content
            edited[path] = [Edited(edit.kind, _digest(content), base, added)]
    return contents, edited


def uninstall(manifest: Manifest) -> list[str]:
    """Take back what `install` wrote; returns the paths removed or restored, none if nothing was.

    What names our files goes first, so that whoever reads it meanwhile finds all of it or nothing.
    `SandboxError`: a file was changed since; nothing is removed then.
    """
    _refuse_changed(manifest.digests)
    before = {path: manifest.without_edit(path) for path in manifest.edited}
    removed = [path for path, content in before.items() if _replace(path, content)]
    # The programs were written first, for those that name them; they go last.
    removed += [path for path in reversed(manifest.digests) if _unlink(path)]
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


def _refuse_changed(digests: "Mapping[str, Iterable[str]]",
                    wanted: "Mapping[str, Iterable[str]] | None" = None) -> None:
    """Raise if a file holds neither what the list says nor what is to be written anyway."""
    for path, allowed in digests.items():
        content = read(path)
        if content is None:
            continue
        digest = _digest(content)
        if digest not in allowed and digest not in (wanted or {}).get(path, ()):
            text = "was changed since it was written" if allowed else "is there and isn't ours"
            raise SandboxError("", "", path, f"{text}; nothing was touched",
                               hint="remove the file, or put back what it held")


def _is_there(path: str, content: bytes, mode: int) -> bool:
    return _mode(path, 0) == mode and read(path) == content


def _mode(path: str, default: int) -> int:
    try:
        return stat.S_IMODE(os.lstat(path).st_mode)
    except FileNotFoundError:
        return default


def read(path: str) -> "bytes | None":
    """Return the bytes of the regular file at `path`, None if there is nothing."""
    try:
        # O_NONBLOCK: a FIFO at the path must not hang us.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise SandboxError("", "read", path, "is not a regular file", errno.EINVAL)
        with open(fd, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _failure("read", path, error) from error


def _replace(path: str, content: "bytes | None") -> bool:
    """Give a file of others another content, None for no file; returns whether it had another."""
    current = read(path)
    if content == current:
        return False
    if content is None:
        return _unlink(path)
    owner = None
    if current is not None:
        status = os.lstat(path)
        owner = (status.st_uid, status.st_gid)
    _write(path, content, _mode(path, 0o644), owner)
    return True


def _write(path: str, content: bytes, mode: int, owner: "tuple[int, int] | None" = None) -> None:
    """Write a file atomically, with this very mode."""
    temporary = f"{path}.{os.getpid()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(temporary, flags, 0o600), "wb") as file:
            try:
                file.write(content)
                if owner is not None:
                    os.fchown(file.fileno(), *owner)
                os.fchmod(file.fileno(), mode)
                file.flush()
                # An engine without its configuration would be the price of a power cut.
                os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
    except OSError as error:
        raise _failure("write", path, error) from error


def _make_directories(directory: str, manifest: Manifest) -> None:
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


def _unlink(path: str) -> bool:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _failure("unlink", path, error) from error
    return True


def _failure(operation: str, path: str, error: OSError) -> SandboxError:
    hint = None
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "--dest DIR puts everything into a directory of yours"
    return SandboxError("", operation, path, errno=error.errno or 0, hint=hint)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
