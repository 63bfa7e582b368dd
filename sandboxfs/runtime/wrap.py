"""The program that stands in front of a runtime, as bytes: the front with its settings.

The front (front.c) was compiled when the package was built.  Its settings are the runtime's path
and what starts our Python: nothing of the caller's environment or directory decides what runs.
"""

import os
import subprocess

from sandboxfs import archive
from sandboxfs.cli import launcher
from sandboxfs.errors import SandboxError, UsageError

_PLACE = b"sandboxfs front, settings:\n"
_SIZE = 20480  # front.c has it, too
KINDS = ("runc", "crun")
# What `--version` prints first.
# A package that is gone is told as everything else is: engines read the log alone.
_GONE = r"""
import posix
text = ascii(f"sandboxfs: runtime: import: {error}")[1:-1].replace("\\", "/").replace('"', "'")
words = sys.argv[5:]
logs = [word[6:] for word in words if word.startswith("--log=")]
logs += [value for word, value in zip(words, words[1:]) if word == "--log"]
posix.write(2, f"{text}\n".encode())
how = posix.O_WRONLY | posix.O_APPEND | posix.O_CREAT | posix.O_NONBLOCK | posix.O_NOCTTY
for log in logs[:1]:
    entry = f'{{"level": "error", "msg": "{text}"}}\n'
    posix.write(posix.open(log, how, 0o600), entry.encode())
posix._exit(125)
"""
_VERSIONS = {b"runc version": "runc", b"crun version": "crun"}


def content(runtime: str, config: "str | None" = None) -> bytes:
    """Return the program (bytes, to be installed with mode 0755) in front of a runtime.

    runtime: the absolute path of the real runtime.  config: the operator's file, None for the
    default one.  UsageError: the runtime can't be used.  SandboxError: the package has no front.
    """
    for path in (runtime, config or "/"):
        if not os.path.isabs(path) or "\0" in path:
            raise UsageError("runtime", "wrap", path, "an absolute path is expected")
    interpreter = launcher.interpreter()
    settings = [runtime, interpreter, _code(interpreter), kind_of(runtime), config or ""]
    text = b"".join(os.fsencode(each) + b"\0" for each in settings)
    front = _front()
    at = front.index(_PLACE) + len(_PLACE)
    if len(text) > _SIZE - len(_PLACE):
        raise UsageError("runtime", "wrap", runtime, "the paths are too long for the program")
    return front[:at] + text + front[at + len(text):]


def is_front(program: bytes) -> bool:
    """Return whether the bytes are those of a program that `content` has made."""
    return _PLACE in program


def runtime_of(program: bytes) -> str:
    """Return the path of the runtime that a program of `content`'s stands in front of."""
    start = program.index(_PLACE) + len(_PLACE)
    return os.fsdecode(program[start:program.index(b"\0", start)])


def kind_of(runtime: str) -> str:
    """Return whose command line a runtime has: ``"runc"``, ``"crun"``, or ``"other"``.

    UsageError: it can't be executed, or is a program of ours itself.
    """
    try:
        with open(runtime, "rb") as file:
            if is_front(file.read()):
                raise UsageError("runtime", "wrap", runtime, "is a program in front of a runtime "
                                 "itself", hint="name the real runtime")
        done = subprocess.run([runtime, "--version"], capture_output=True, check=False,
                              stdin=subprocess.DEVNULL)
    except OSError as error:
        raise UsageError("runtime", "execve", runtime, error.strerror or "",
                         error.errno or 0) from error
    return next((kind for start, kind in _VERSIONS.items() if done.stdout.startswith(start)),
                "other")


def _code(interpreter: str) -> str:
    """Return what the interpreter executes (``-c``); the arguments after it are `main`'s."""
    directories = launcher.import_path(interpreter)
    lines = (
        f"import gc, marshal, sys; gc.disable(); sys.path[:] = {directories!a}",
        *archive.start_lines("runtime"),
        "try: from sandboxfs.runtime.main import main",
        # Compiled where it is needed alone.
        f"except ImportError as error: exec({_GONE!r})",
        "main()",
    )
    return "\n".join(lines)


def _front() -> bytes:
    path = os.path.join(os.path.dirname(os.path.realpath(__file__)), "front")
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise SandboxError("runtime", "read", path, "", error.errno or 0, "the package was "
                           "installed without its program in C: install it again with a compiler "
                           "at hand") from error
