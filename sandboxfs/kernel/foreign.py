"""The part of ctypes that system calls need, without the rest.

`ctypes` itself is Python over the C module `_ctypes`; loading it takes a third of the time a
bare interpreter starts in, most of it for types nobody here uses.  The names and meanings are
those of `ctypes`, and objects of both can be mixed.
"""

# ruff: noqa: N801, SLF001 - the names and the base class are those of ctypes

import _ctypes
from _ctypes import byref, get_errno

__all__ = [
    "Libc", "LockedFunction", "QuickFunction", "byref", "c_char", "c_int", "c_uint64", "get_errno",
    "string_buffer",
]


class c_char(_ctypes._SimpleCData):
    _type_ = "c"


class c_int(_ctypes._SimpleCData):
    _type_ = "i"


class c_uint64(_ctypes._SimpleCData):
    _type_ = "Q"


class Function(_ctypes.CFuncPtr):
    """A C function; the interpreter's lock is released while it runs."""

    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
    _restype_ = c_int


class LockedFunction(_ctypes.CFuncPtr):
    """A C function that keeps the interpreter's lock (`ctypes.PyDLL`)."""

    _flags_ = (
        _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO | _ctypes.FUNCFLAG_PYTHONAPI
    )
    _restype_ = c_int


class QuickFunction(_ctypes.CFuncPtr):
    """A C function that keeps the interpreter's lock, and of which `get_errno` knows nothing."""

    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_PYTHONAPI


class Libc:
    """The C library this process runs with."""

    def __init__(self):
        self._handle = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]  # None: what is loaded

    def function(self, name, kind=Function):
        """Return the function `name`, an int its result; AttributeError where there is none."""
        return kind((name, self))


def string_buffer(size):
    """Return a buffer of `size` bytes that the kernel may write to."""
    return (c_char * size)()
