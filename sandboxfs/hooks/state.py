"""The state that a runtime writes to a hook's standard input (runtime.md, "State")."""

from sandboxfs.errors import HookError, SpecError
from sandboxfs.kernel import system as os

LARGEST_STATE = 16 << 20
# crun makes a container's directory of it, and so may overlay=dir=.
LONGEST_ID = 255


class State:
    """id, bundle, status: str; the bundle is absolute.  pid: int, 0 where the runtime gives none.

    annotations: dict.  In createContainer the pid is one of another pid namespace, or 0:
    nobody may use it there.
    """

    __slots__ = ("annotations", "bundle", "id", "pid", "status")

    def __init__(self, id, bundle, status="", pid=0, annotations=None):
        self.id = id
        self.bundle = bundle
        self.status = status
        self.pid = pid
        self.annotations = annotations or {}


def read(stdin):
    """Return the `State` on the descriptor `stdin`, which is read to its end.

    A runtime that can't write all of it takes that for a failure of the container (crun), so
    nothing else is done before.  HookError for what is no state.
    """
    return parse(_read_all(stdin))


def _read_all(stdin):
    parts, size = [], 0
    try:
        while part := os.read(stdin, 1 << 16):
            size += len(part)
            if size <= LARGEST_STATE:
                parts.append(part)
    except OSError as error:
        raise HookError("state", "read", "standard input", errno=error.errno,
                        hint="a runtime writes the container's state there") from error
    if size > LARGEST_STATE:
        raise _wrong(f"is larger than {LARGEST_STATE >> 20} MiB")
    return b"".join(parts)


def parse(raw):
    """Return the `State` of its JSON text (bytes)."""
    from sandboxfs.spec import load

    if not raw.strip():
        raise _wrong("nothing is on standard input", "a runtime writes the container's state there")
    try:
        document = load.parse(raw, "state")
    except SpecError as error:
        raise HookError(error.origin, error.operation, error.target, error.text) from None
    if type(document) is not dict:
        raise _wrong("a JSON object is expected")
    pid = document.get("pid")
    if pid is None:
        pid = 0  # runc's poststop leaves it out
    elif type(pid) is not int or pid < 0:
        raise _wrong("a process id is a number, 0 for none", pointer="/pid")
    identity, bundle = _identity(document), _text(document, "bundle")
    if not bundle.startswith("/"):
        raise _wrong("the bundle has to be an absolute path", pointer="/bundle", value=bundle)
    return State(identity, bundle, _text(document, "status", True), pid,
                 _annotations(document))


def _identity(document):
    found = _text(document, "id")
    if "/" in found or found in (".", "..") or len(os.fsencode(found)) > LONGEST_ID:
        raise _wrong("a container's id has no slash and at most 255 bytes", pointer="/id",
                     value=found)
    return found


def _text(document, key, optional=False):
    value = document.get(key)
    if value is None and optional:
        return ""
    if type(value) is not str or not value or "\0" in value:
        text = "is missing" if value is None else "a string is expected, not empty, without NUL"
        raise _wrong(text, pointer="/" + key)
    return value


def _annotations(document):
    value = document.get("annotations")
    if value is None:
        return {}
    if type(value) is not dict or any(type(each) is not str for each in value.values()):
        raise _wrong("an object of strings is expected", pointer="/annotations")
    return value


def _wrong(text, hint=None, pointer="", value=""):
    return HookError(f"state{pointer}", "", value, text, hint=hint)
