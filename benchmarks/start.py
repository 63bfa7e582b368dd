"""What an interpreter costs before it does anything: where a start can be saved."""

from benchmarks import measure
from benchmarks.build import interpreter

ROUNDS = 60

OWN_BINDING = """
import _ctypes, os
class Long(_ctypes._SimpleCData): _type_ = "l"
class Function(_ctypes.CFuncPtr):
    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
    _restype_ = Long
syscall = Function(_ctypes.dlsym(_ctypes.dlopen(None, 0), "syscall"))
os._exit(0)
"""
LIBC = "import ctypes, os; libc = ctypes.CDLL(None, use_errno=True)\n"

CODE = {
    "pass": "pass",
    "os._exit": "import os; os._exit(0)",
    "_json, os._exit": "import _json, os; os._exit(0)",
    "_ctypes with its own binding of syscall(2), os._exit": OWN_BINDING,
    "ctypes, os._exit": LIBC + "os._exit(0)",
    "ctypes, fork, wait, os._exit": LIBC
    + "pid = os.fork()\nif pid == 0: os._exit(0)\nos.waitpid(pid, 0)\nos._exit(0)",
    "ctypes, fork with new namespaces, wait, os._exit": LIBC
    + "pid = os.fork()\nif pid == 0: libc.unshare(0x6c020000); os._exit(0)\n"
    "os.waitpid(pid, 0)\nos._exit(0)",
    "json": "import json",
}


def run(_directory, rounds=ROUNDS):
    """Measure; returns a `Report`."""
    report = measure.Report("start", "Interpreter start, python3 -I -S -B -c …")
    python = interpreter()
    contestants = {
        name: measure.Spawned([python, "-I", "-S", "-B", "-c", code])
        for name, code in CODE.items()
    }
    contestants["with site (-I -B), pass"] = measure.Spawned([python, "-I", "-B", "-c", "pass"])
    report.add(measure.interleaved(contestants, rounds))
    return report
