"""How a failure reaches whoever called the runtime.

Engines show a runtime's error from the file of ``--log`` alone, so it is written there in the form
of ``--log-format`` as well as to standard error.  The log of the hooks below /run is not written:
nothing of ours stays there.
"""

from sandboxfs.errors import SandboxError, one_line, printable
from sandboxfs.kernel import system as os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sandboxfs.runtime.request import Request

_INTERNAL = 125


def failure(error: BaseException, request: "Request") -> int:
    """Say what went wrong; returns the exit status."""
    _write(one_line(error, "runtime"), "error", request)
    # Engines take 1 for a failure of the runtime; ours say more, and none is 0.
    return error.exit_status if isinstance(error, SandboxError) else _INTERNAL


def warning(text: str, request: "Request") -> None:
    """Say what was left out."""
    _write(f"warning: {text}", "warning", request)


def _write(text: str, level: str, request: "Request") -> None:
    said = printable(f"sandboxfs: {text}")
    try:
        os.write(2, os.fsencode(said + "\n"))
    except OSError:
        pass  # nobody reads it; the log may be read
    if request.log is None:
        return
    # crun's form, with the other destinations journald: and syslog:.
    path = request.log.removeprefix("file:")
    if path.startswith(("journald:", "syslog:")):
        return
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    try:
        fd = os.open(path, flags, 0o600)
    except OSError as error:
        os.write(2, os.fsencode(f"sandboxfs: --log: open {path}: {error.strerror}\n"))
        return
    try:
        os.write(fd, _entry(said, level, request.log_format or "text").encode("utf-8", "replace"))
    finally:
        os.close(fd)


def _entry(text: str, level: str, format: str) -> str:
    """Return an entry as runc and crun write it."""
    import json
    from time import gmtime, strftime

    time = strftime("%Y-%m-%dT%H:%M:%SZ", gmtime())
    if format == "json":
        return json.dumps({"level": level, "msg": text, "time": time}) + "\n"
    return f'time="{time}" level={level} msg={json.dumps(text)}\n'
