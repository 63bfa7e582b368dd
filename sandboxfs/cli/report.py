"""Errors and warnings on standard error: one line each, or one JSON object (--log-format)."""

import errno
import os
import sys

from sandboxfs.errors import SandboxError, SpecError

INTERNAL = 125


def option(arguments, name):
    """Return the last value of ``--name VALUE`` among our own options, or None.

    Read by hand: an error may have come up before the command line was understood.
    """
    value = None
    for index, argument in enumerate(arguments):
        if argument == "--":
            break
        if argument == name and index + 1 < len(arguments):
            value = arguments[index + 1]
        elif argument.startswith(name + "="):
            value = argument[len(name) + 1:]
    return value


def _own(arguments):
    """Return the arguments up to ``--``."""
    return arguments[: arguments.index("--")] if "--" in arguments else arguments


def failure(error, arguments):
    """Write `error` as the command line asks, and return the exit status."""
    as_json = option(arguments, "--log-format") == "json"
    if "--debug" in _own(arguments):
        _traceback(error)
    if isinstance(error, SpecError):
        found = error.problems
    elif isinstance(error, SandboxError):
        found = [error]
    elif isinstance(error, OSError):
        target = "" if error.filename is None else os.fsdecode(error.filename)
        operation = getattr(error, "call", "")
        found = [SandboxError("", operation, target, "", error.errno or 0)]
    else:
        found = [SandboxError(
            "", "", "", f"internal error: {type(error).__name__}: {error}",
            hint=None if "--debug" in _own(arguments) else "--debug shows where it came from",
        )]
    write("".join(_json(one) if as_json else _lines(one) for one in found))
    return getattr(error, "exit_status", INTERNAL)


def warning(text, as_json=False):
    """Write one warning."""
    if as_json:
        from json import dumps

        write(dumps({"level": "warning", "message": text}) + "\n")
    else:
        write(f"sandboxfs: warning: {text}\n")


def write(text):
    """Write to standard error; one that is closed or broken is nobody's loss."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        pass


def _lines(error):
    lines = f"sandboxfs: {error.line()}\n"
    return lines + f"  hint: {error.hint}\n" if error.hint else lines


def _json(error):
    from json import dumps

    return dumps({
        "level": "error", "message": error.line(), "origin": error.origin,
        "operation": error.operation, "target": os.fsdecode(error.target), "text": error.text,
        "errno": errno.errorcode.get(error.errno) if error.errno else None, "hint": error.hint,
        "status": error.exit_status,
    }) + "\n"


def _traceback(error):
    from traceback import format_exception

    write("".join(format_exception(error)))
    trace = getattr(error, "trace", "")
    if trace:
        write(f"in the child: {trace}\n")
