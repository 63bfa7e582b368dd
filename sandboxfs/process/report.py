"""What children tell their parent: fields over a pipe, worded by the parent.

After the pivot nothing may be formatted with what would have to be loaded first.
"""

from sandboxfs.errors import MountError, ProcessError, SandboxError, SpecError, UsageError
from sandboxfs.kernel import system as os

FAILED = 125
_LONGEST_FIELD = 1024

_CLASSES = {kind.__name__: kind for kind in (MountError, ProcessError, SandboxError, UsageError)}


class Report:
    """The pipe on which children tell the parent; each message is a list of strings."""

    __slots__ = ("reader", "writer")

    def __init__(self):
        self.reader, self.writer = os.pipe2(os.O_CLOEXEC)

    def send(self, *fields):
        """Send one message; BrokenPipeError when the parent is gone."""
        text = "\0".join([field[:_LONGEST_FIELD].replace("\0", "") for field in fields])
        message = text.encode("utf-8", "surrogatepass")
        os.write(self.writer, len(message).to_bytes(4, "little") + message)

    def close_writer(self):
        """Close the children's end in the parent."""
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1

    def close(self):
        """Close both ends."""
        self.close_writer()
        os.close(self.reader)

    def receive(self):
        """Return the next message; [] when all writers are gone, or nothing is there to read."""
        head = self._read(4)
        if len(head) < 4:
            return []
        body = self._read(int.from_bytes(head, "little"))
        return body.decode("utf-8", "surrogatepass").split("\0")

    def _read(self, count):
        data = b""
        while len(data) < count:
            try:
                part = os.read(self.reader, count - len(data))
            except BlockingIOError:
                break
            if not part:
                break
            data += part
        return data

    def fail(self, error, step):
        """Send what went wrong.  step: (origin, operation, target) of what was being done."""
        origin, operation, target = step
        if isinstance(error, SpecError):
            error = error.problems[0]
        if isinstance(error, SandboxError):
            fields = (type(error).__name__, error.origin, error.operation, as_text(error.target),
                      error.text, str(error.errno), error.hint or "", str(error.exit_status))
        elif isinstance(error, OSError):
            operation = getattr(error, "call", None) or operation
            text = getattr(error, "log", "")
            fields = ("ProcessError", origin, operation, as_text(target), text,
                      str(error.errno or 0), "", str(FAILED))
        else:
            text = f"internal error: {type(error).__name__}: {error}"
            fields = ("SandboxError", origin, operation, as_text(target), text, "0", "",
                      str(FAILED))
        self.send("failure", *fields, _trace(error))


def as_text(value):
    """Return an error's target as str."""
    return value if isinstance(value, str) else os.fsdecode(value) if value else ""


def _trace(error):
    """Return where the error came from; `traceback` can't be imported in a container."""
    lines = []
    at = error.__traceback__
    while at is not None:
        code = at.tb_frame.f_code
        name = code.co_filename.rpartition("sandboxfs/")[2]
        lines.append(f"{name}:{at.tb_lineno} {code.co_name}")
        at = at.tb_next
    return ", ".join(lines)


def failure(fields):
    """Return the error of a ``failure`` message; `trace` holds where it came from."""
    kind, origin, operation, target, text, number, hint, status, trace = fields
    error = _CLASSES.get(kind, SandboxError)(
        origin, operation, target, text, int(number), hint or None
    )
    error.exit_status = int(status)
    error.trace = trace
    return error
