"""The harness of the table of behaviours: cases, and the process that runs each.

A behaviour is a function of the engine's name that builds something and asserts; it uses the
standard library and sandboxfs only, since it also runs in a guest that has no pytest
(tests/guest).  `run_case` gives it a process and a mount namespace of its own, with a scratch
directory on a tmpfs of its own as the current directory.

    @behaviour
    def a_name_that_is_a_sentence(engine):
        ...
        assert os.listdir(...) == [...], "what should have been"
"""

import errno
import os
import select
import signal
import tempfile
import time
import traceback

from sandboxfs.kernel import abi, fscontext, syscalls
from tests.kernel import behaviours_tools

DETACHED, ATTACHED = "detached", "attached"
ENGINES = (DETACHED, ATTACHED)
CASE_SECONDS = 60

SKIPPED = "skipped: needs "

_behaviours = {}


class Unavailable(Exception):
    """Raised by a behaviour where the kernel lacks what it is about.

    capability: the name of a probe of `tests.support.capabilities`; why: what is missing.
    """

    def __init__(self, capability, why):
        super().__init__(capability, why)
        self.capability = capability
        self.why = why


class Case:
    """A behaviour on an engine; `str()` identifies it: ``"name[engine]"``.

    way: one of `behaviours_tools.WAYS`.
    """

    __slots__ = ("engine", "function", "name", "way")

    def __init__(self, name, engine, function, way=""):
        self.name = name
        self.engine = engine
        self.function = function
        self.way = way

    def __str__(self):
        return f"{self.name}[{self.engine}{', '[:2 * bool(self.way)]}{self.way}]"


def behaviour(function):
    """Add a function of one argument, the engine's name, to the table."""
    name = function.__name__
    if name in _behaviours:
        raise ValueError(f"two behaviours are named {name}")
    _behaviours[name] = function
    return function


def cases(engines=ENGINES):
    """Return all cases on the given engines, in the order of the table."""
    ways = [(engine, "") for engine in engines]
    if DETACHED in engines:
        ways += [(DETACHED, way) for way in behaviours_tools.WAYS[1:]]
    return [
        Case(name, engine, function, way)
        for name, function in _behaviours.items()
        for engine, way in ways
    ]


def run_case(case, seconds=CASE_SECONDS):
    """Run a case in a private mount namespace; return None, or what went wrong as text.

    The text starts with `SKIPPED` where the case raised `Unavailable`.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    directory = tempfile.mkdtemp(prefix=f"sandboxfs-behaviour-{worker}-")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _run_in_child(case, directory, writer)
    os.close(writer)
    try:
        return _result(child, reader, time.monotonic() + seconds)
    finally:
        os.close(reader)
        os.rmdir(directory)


def _run_in_child(case, directory, writer):
    """Run the case and send what it raised, if anything; doesn't return."""
    status = 1
    try:
        _enter_private_namespace(directory)
        behaviours_tools.way = case.way
        case.function(case.engine)
        status = 0
    except Unavailable as missing:
        os.write(writer, f"{SKIPPED}{missing.capability}: {missing.why}".encode())
    except BaseException:  # noqa: BLE001  # whatever it is, it travels as text
        os.write(writer, traceback.format_exc().encode(errors="replace")[-60000:])
    os._exit(status)


def _result(child, reader, deadline):
    text = b""
    while select.select([reader], [], [], max(0, deadline - time.monotonic()))[0]:
        piece = os.read(reader, 65536)
        if not piece:
            break
        text += piece
    else:
        os.kill(child, signal.SIGKILL)
        text += b"no end in time"
    _pid, status = os.waitpid(child, 0)
    if status == 0 and not text:
        return None
    return text.decode(errors="replace") or f"ended with wait status {status:#x}, without a word"


def _enter_private_namespace(directory):
    syscalls.unshare(abi.CLONE_NEWNS)
    root = syscalls.open_tree(abi.AT_FDCWD, b"/", 0)
    syscalls.mount_setattr(root, propagation=abi.MS_PRIVATE, recursive=True)
    os.close(root)
    scratch = fscontext.create(b"tmpfs", [fscontext.string(b"mode", b"755")], 0)
    syscalls.move_mount_path(scratch, abi.AT_FDCWD, os.fsencode(directory))
    os.close(scratch)
    os.chdir(directory)


# -- helpers for behaviours ----------------------------------------------------------------


def open_path(path):
    """Return an O_PATH descriptor of `path`."""
    return os.open(path, os.O_PATH | os.O_CLOEXEC)


def error_name(action, *arguments):
    """Return the name of the errno with which `action(*arguments)` fails, or None."""
    try:
        action(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
    return None


def detached_works():
    """Return whether this kernel attaches a mount onto a detached one (6.15)."""
    outer = fscontext.create(b"tmpfs", [], 0)
    inner = fscontext.create(b"tmpfs", [], 0)
    try:
        return error_name(syscalls.move_mount, inner, outer) is None
    finally:
        os.close(inner)
        os.close(outer)


def engines_here():
    """Return the engines that this kernel can run."""
    return ENGINES if detached_works() else (ATTACHED,)
