"""config.json as bytes → `Spec`: opened once, read once, parsed strictly.

The parser is the C scanner that `json` itself is built on, called directly: importing
`json` pulls in `re` and `enum` and costs as much as everything else `run` does.
"""

import errno

from sandboxfs.errors import MountError, SpecError
from sandboxfs.kernel import system as os

try:
    from _json import make_scanner
except ImportError:  # an interpreter without C accelerators
    make_scanner = None  # type: ignore[assignment,misc]

LARGEST_FILE = 16 << 20
_WHITESPACE = " \t\n\r"


def load(bundle=None, config=None, strict=False, text=None, brief=False):
    """Load the OCI runtime spec of `bundle`, or of the file `config`, and return a `Spec`.

    bundle: the bundle's directory, "." by default; relative paths of the document are
    relative to it.  config: a file to read instead of the bundle's ``config.json``.
    strict: validate against the whole JSON Schema even if nothing looks wrong.  text: the
    document itself, str or bytes; no file is read then.  brief: of a wrong document tell the
    first problem, without the time it takes to find all.

    Raises `SpecError` with every problem of the document, `MountError` where there is no
    document to read.
    """
    bundle = os.path.abspath(os.fsdecode(bundle if bundle is not None else "."))
    if text is None:
        name = os.fsdecode(config) if config is not None else "config.json"
        raw = read(bundle, config)
    else:
        name = "config.json"
        raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return from_document(parse(raw, name), bundle, strict, name, brief)


def from_document(document, bundle=None, strict=False, name="config.json", brief=False):
    """Return the `Spec` of a parsed document, or raise `SpecError` with every problem."""
    if strict:
        from sandboxfs.spec import schema

        problems = schema.problems(document, name)
        if problems:
            raise schema.error(problems)
    from sandboxfs.spec import check

    try:
        spec = check.spec(document, bundle, name)
    except SpecError as first:
        if brief:
            raise
        from sandboxfs.spec import schema

        raise schema.error(schema.problems(document, name) or [first]) from None
    spec.bundle = bundle
    spec.source_name = name
    return spec


# -- the file ---------------------------------------------------------------------------


def read(bundle, config=None):
    """Return the bytes of a document; a FIFO, device or directory is never opened.

    bundle, config: as for `load`.  Raises MountError.
    """
    if config is not None:
        return _read_at(os.fsdecode(config), None, 0)
    try:
        directory = os.open(bundle, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise MountError("bundle", "open", bundle, errno=error.errno) from None
    try:
        # What a bundle holds is what it says: a link out of it is not its config.json.
        return _read_at("config.json", directory, os.O_NOFOLLOW)
    finally:
        os.close(directory)


def _read_at(name, directory, nofollow):
    """Read the regular file `name` below the descriptor `directory`."""
    try:
        found = os.open(name, os.O_PATH | os.O_CLOEXEC | nofollow, dir_fd=directory)
    except OSError as error:
        raise MountError("config.json", "open", name, errno=error.errno) from None
    try:
        _require_regular(os.fstat(found), name)
        opened = _reopen(found, name, directory, nofollow)
        try:
            return _read_all(opened, name)
        finally:
            os.close(opened)
    except OSError as error:
        if isinstance(error, MountError):
            raise
        raise MountError("config.json", "read", name, errno=error.errno) from None
    finally:
        os.close(found)


def _require_regular(status, name):
    kind = status.st_mode & 0o170000
    if kind == 0o100000:
        return
    if kind == 0o120000:
        raise MountError(
            "config.json", "open", name, "is a symbolic link", errno.ELOOP,
            hint="name the file it points to with --config",
        )
    if kind == 0o040000:
        raise MountError("config.json", "open", name, "is a directory", errno.EISDIR)
    raise MountError("config.json", "open", name, "is not a regular file", errno.EINVAL)


def _reopen(found, name, directory, nofollow):
    """Open the very file that `found` (O_PATH) stands for, for reading."""
    try:
        return os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        pass
    # No /proc (an initramfs): by name again, so that a FIFO put there meanwhile can't
    # hang us, and only the same inode counts.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | nofollow
    opened = os.open(name, flags, dir_fd=directory)
    before, after = os.fstat(found), os.fstat(opened)
    if (before.st_dev, before.st_ino) != (after.st_dev, after.st_ino):
        os.close(opened)
        raise MountError("config.json", "open", name, "was replaced while opening", errno.EAGAIN)
    return opened


def _read_all(opened, name):
    wanted = min(os.fstat(opened).st_size, LARGEST_FILE) + 1
    parts = []
    total = 0
    while total <= LARGEST_FILE:
        part = os.read(opened, wanted)
        if not part:
            return parts[0] if len(parts) == 1 else b"".join(parts)
        parts.append(part)
        total += len(part)
    raise _too_large(name)


def _too_large(name):
    return SpecError(name, text=f"is larger than {LARGEST_FILE >> 20} MiB, the most that is read")


# -- the text ---------------------------------------------------------------------------


class Suspect(ValueError):
    """Something the JSON grammar of Python lets pass and we don't: found again, slowly."""


def _pairs(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Suspect
    return found


def _constant(word):
    raise Suspect


class _Context:
    """What `make_scanner` reads its settings from."""

    strict = True
    object_hook = None
    parse_float = float
    parse_int = int
    memo = {}
    array_hook = None

    def __init__(self, object_pairs_hook, parse_constant):
        self.object_pairs_hook = object_pairs_hook
        self.parse_constant = parse_constant


def parse(raw, name="config.json"):
    """Return the JSON value of the bytes `raw`; raise `SpecError` for anything dubious.

    Refused beyond what the grammar refuses: a byte order mark, invalid UTF-8, anything
    after the value, NaN and Infinity, a key twice in one object, escapes of lone
    surrogates, nesting deeper than the interpreter's stack, more than 16 MiB.
    """
    if len(raw) > LARGEST_FILE:
        raise _too_large(name)
    if raw.startswith(b"\xef\xbb\xbf"):
        raise SpecError(name, text="begins with a byte order mark; plain UTF-8 is allowed")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise SpecError(name, text=f"byte {error.start} is no UTF-8: {error.reason}") from None
    try:
        document = scan(text, name, _pairs, _constant)
        if b"\\ud" in raw or b"\\uD" in raw:
            from sandboxfs.spec import suspect

            if suspect.lone_surrogates(document):
                raise Suspect
    except Suspect:
        from sandboxfs.spec import suspect

        raise suspect.explained(text, name) from None
    return document


def scan(text, name, pairs_hook, constant_hook):
    """Scan `text`, which has to hold one value and white space, with the given hooks."""
    start = 0 if text[:1] == "{" else len(text) - len(text.lstrip(_WHITESPACE))
    context = _Context(pairs_hook, constant_hook)
    try:
        try:
            document, end = _scanner(context)(text, start)
        except SystemError:
            # Before Python 3.13 the C scanner has its error's class from this module if it is
            # loaded, and fails without a word if it isn't: so it says it again.
            import json.decoder  # noqa: F401

            document, end = _scanner(context)(text, start)
    except StopIteration:
        raise SpecError(name, text="no JSON value in it" if start == len(text) else
                        f"{_position(text, start)}: a JSON object is expected") from None
    except RecursionError:
        raise SpecError(name, text="is nested too deeply to be read") from None
    except Suspect:
        raise
    except ValueError as error:
        # JSONDecodeError, or an integer beyond the interpreter's limit of digits.
        message = getattr(error, "msg", None)
        if message is None:
            raise SpecError(name, text="holds a number of too many digits") from None
        place = _position(text, getattr(error, "pos", 0))
        raise SpecError(name, text=f"{place}: {message}") from None
    if end != len(text) and text[end:].strip(_WHITESPACE):
        end = len(text) - len(text[end:].lstrip(_WHITESPACE))
        raise SpecError(name, text=f"{_position(text, end)}: nothing may follow the JSON value")
    return document


def _scanner(context):
    if make_scanner is not None:
        return make_scanner(context)
    import json

    return json.JSONDecoder(
        object_pairs_hook=context.object_pairs_hook, parse_constant=context.parse_constant
    ).scan_once


def _position(text, index):
    line = text.count("\n", 0, index) + 1
    return f"line {line} column {index - (text.rfind(chr(10), 0, index) + 1) + 1}"
