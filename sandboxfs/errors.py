"""How sandboxfs speaks of what went wrong.

Every error that reaches a user is a `SandboxError`.  Its first line is
``ORIGIN: OPERATION TARGET: ERRNO-NAME: text`` where ORIGIN is ``mounts[3]`` for an
operation of the plan and a JSON pointer for a fault of the document; a hint, where there
is one, is a line of its own.
"""

from sandboxfs.kernel import system as os

LONGEST_VALUE = 80


def printable(text):
    """Return `text` as one line, with what can't be printed escaped."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in text
    )


def shown(value):
    """Return `value` as it may appear in one line of output: printable, and cut.

    Paths of the spec may hold newlines and bytes that are no UTF-8; these are escaped, so
    that an error stays one line whatever a document contains.
    """
    if isinstance(value, bytes):
        value = os.fsdecode(value)
    text = value if isinstance(value, str) else repr(value)
    text = printable(text)
    if len(text) > LONGEST_VALUE:
        text = text[:LONGEST_VALUE] + "…"
    return text


class SandboxError(Exception):
    """The base of all errors of sandboxfs.

    origin: where the operation was asked for (``mounts[3]``, ``/mounts/3/options/0``,
    ``--overlay-size``), may be empty.  operation: what was being done, a system call or a
    verb, may be empty.  target: the path or value as the user wrote it, may be empty.
    text: what is wrong, in words.  errno: the number or 0.  hint: what to do, or None.
    """

    exit_status = 125

    def __init__(self, origin="", operation="", target="", text="", errno=0, hint=None):
        super().__init__(origin, operation, target, text, errno, hint)
        self.origin = origin
        self.operation = operation
        self.target = target
        self.text = text
        self.errno = errno
        self.hint = hint

    def line(self):
        """Return the error as one line, without the program's name and the hint."""
        parts = []
        if self.origin:
            parts.append(self.origin)
        what = " ".join(
            part for part in (self.operation, shown(self.target) if self.target else "") if part
        )
        if what:
            parts.append(what)
        if self.errno:
            from errno import errorcode

            parts.append(errorcode.get(self.errno, str(self.errno)))
        parts.append(self.text or (os.strerror(self.errno) if self.errno else "failed"))
        return ": ".join(parts)

    def __str__(self):
        return self.line() if not self.hint else f"{self.line()}\n  hint: {self.hint}"


class UsageError(SandboxError):
    """Arguments on the command line that can't be used."""

    exit_status = 2


class SpecError(SandboxError):
    """The document itself is wrong; `problems` lists every fault as a `SandboxError`."""

    exit_status = 65

    def __init__(self, origin="", operation="", target="", text="", hint=None, problems=()):
        super().__init__(origin, operation, target, text, 0, hint)
        self.problems = list(problems) or [self]


class PolicyError(SpecError):
    """The operator's file is wrong, can't be read, or isn't safely the operator's."""

    def __init__(self, origin="", operation="", target="", text="", errno=0, hint=None,
                 problems=()):
        super().__init__(origin, operation, target, text, hint, problems)
        self.errno = errno


class MountError(SandboxError, OSError):
    """The machine couldn't do what a correct document asks; `errno` says why."""

    def __init__(self, origin="", operation="", target="", text="", errno=0, hint=None):
        SandboxError.__init__(self, origin, operation, target, text, errno, hint)


class ProcessError(SandboxError):
    """The payload couldn't be prepared or executed."""


class StateError(SandboxError):
    """What is kept under /run/sandboxfs can't be used, or doesn't allow what was asked."""


class BootError(SandboxError):
    """The machine's root can't be switched; nothing was changed, unless the text says so."""


class HookError(SandboxError):
    """A hook can't do its work: its input, or where it was started, isn't what it has to be."""


def one_line(error: BaseException, origin: str = "") -> str:
    """Return any error as one line, its hint and the number of further problems included.

    origin: of what is no `SandboxError` by itself.
    """
    if not isinstance(error, SandboxError):
        if isinstance(error, ImportError):
            # A package that is replaced or removed at this moment.
            error = SandboxError(origin, "import", error.name or "", str(error))
        elif isinstance(error, OSError):
            call = getattr(error, "call", "")
            error = SandboxError(origin, call, error.filename or "", "", error.errno or 0)
        else:
            return f"internal error: {type(error).__name__}: {error}".replace("\n", " ")
    more = len(getattr(error, "problems", ())) - 1
    return (f"{error.line()}" + (f" (and {more} more problems)" if more > 0 else "")
            + (f" ({error.hint})" if error.hint else ""))
