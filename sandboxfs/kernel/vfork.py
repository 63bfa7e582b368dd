"""A child that runs Python in our memory, and then executes a program or ends.

fork(2) copies what an interpreter has mapped, and every page that the child then writes to: that
takes longer than building a root.  This child is one of vfork(2)'s kind: it shares our memory, and
we stand still until it executes or ends.  So it may do whatever we might do, on a stack of its
own, and what it changes in Python objects we find changed; descriptors, directory, credentials and
namespaces are its own.

vfork(2) forbids to return from the function that called it, and Python can't execute anything
without leaving its own frames unfinished.  Hence two contexts: in the first one a Python function
runs to its end and says what comes next; the second one is that call, execve(2) or _exit(2), with
no Python in it.  If execve fails, the first context is next again.

A child that is killed amidst its Python function leaves our interpreter with frames of it and
perhaps without its lock.  All that we may do then is to end the same way, and `Child.start` does.
Only for processes that are ours alone.

Sources: vfork(2), clone(2), makecontext(3), getcontext(3), execve(2).
"""

import sys

from sandboxfs.kernel.foreign import (
    LockedFunction,
    byref,
    c_int,
    c_uint64,
)
from sandboxfs.kernel.syscalls import fail, libc, packed

# CLONE_VM, CLONE_VFORK, CLONE_PARENT_SETTID, and SIGCHLD at its end.
_FLAGS = 0x100 | 0x4000 | 0x100000 | 17
_PROT_READ_WRITE, _MAP_PRIVATE_ANONYMOUS_STACK = 0x3, 0x20022
# One mapping, touched only as far as it is used: a guard that can't be, the stack that Python runs
# on, then for each other context a stack, and all ucontext_t (968 bytes on x86-64, 4,560 on
# aarch64).
GUARD, _STACK, SMALL_STACK, CONTEXT = 1 << 16, 1 << 20, 1 << 14, 1 << 13
_SIZE = GUARD + _STACK + 4 * SMALL_STACK + 5 * CONTEXT

# Where in a bytes object its content begins, which a NUL follows (PyBytesObject).  Arrays would
# need a type for each length, and making a type takes longer than making a context.
_CONTENT = bytes.__basicsize__ - 1


def locked(name, restype=None):
    """Return a C function that keeps the interpreter's lock, or None where there is none."""
    try:
        function = libc.function(name, LockedFunction)
    except AttributeError:
        return None
    if restype is not None:
        function.restype = restype
    return function


_clone, _setcontext, _execve = locked("clone"), locked("setcontext"), locked("execve")
_getcontext, _makecontext = locked("getcontext"), locked("makecontext")
_swapcontext, _waitpid, _end = locked("swapcontext"), locked("waitpid"), locked("_exit")
_mmap = locked("mmap", c_uint64)
_errno_location = locked("__errno_location", c_uint64)
# A callback of ctypes would do, too, but costs libffi a page that is writable and executable, and
# before the first one it reads the whole mount table.
_call_python = locked("PyObject_CallNoArgs")
_mprotect, _munmap = locked("mprotect"), locked("munmap")
_thread_state = locked("PyThreadState_Get", c_uint64)
_set_thread_state = locked("PyThreadState_Swap", c_uint64)


def has_contexts():
    """Whether the C library has contexts, musl hasn't, of words as long as `prepare` has them."""
    return sys.maxsize >> 32 > 0 and _makecontext is not None


def is_possible():
    """Whether this interpreter, C library and machine can do it."""
    # From 3.14 on the interpreter takes another stack than the thread's own for an overflow.
    return sys.version_info < (3, 14) and has_contexts() and None not in (
        _call_python, _errno_location, _set_thread_state
    )


class Program:
    """What execve(2) gets besides the path: arguments (list of bytes), environment (dict)."""

    __slots__ = ("arguments", "environment", "kept")

    def __init__(self, arguments, environment):
        self.kept = []
        self.arguments = self._pointers(arguments)
        self.environment = self._pointers(
            [key + b"=" + value for key, value in environment.items()]
        )

    def _pointers(self, words):
        """Return the array of pointers to C strings, and NULL."""
        self.kept += words
        return packed(*[id(word) + _CONTENT for word in words], 0)


class Child:
    """The memory of one such child; can be started again once that one executes or has ended.

    step: a function that gets 0, and then the errno of each execve that failed, and returns
    what is next: an exit status (int), or (path as bytes, `Program`).  It must not raise.
    pid: a C int, its number in our pid namespace, for itself to know.  Raises OSError.
    """

    def __init__(self, step):
        self.step = step
        self.is_sound = True
        self.following = self.pid = None
        self.function = self._run
        self.errno = c_int.from_address(_errno_location())
        self.memory = 0
        self.memory = memory = mapped(_SIZE)
        self.stack = memory + GUARD
        # Of the start in the child, of what follows Python there, and our two.
        self.small_stacks = range(self.stack + _STACK, memory + _SIZE, SMALL_STACK)[:4]
        contexts = range(self.small_stacks[-1] + SMALL_STACK, memory + _SIZE, CONTEXT)
        self.python, self.call, self.clone, self.repair, self.here = contexts

    def close(self):
        """Unmap its memory."""
        if self.memory:
            unmap(self.memory, _SIZE)
            self.memory = 0

    def start(self, flags=0):
        """Start it in new namespaces (CLONE_NEW*); returns its pid when it has left our memory.

        Doesn't return if the child was ended amidst its function: then we are ended, too.
        """
        self.following = None
        self._prepare_python()
        self.pid = pid = c_int(0)
        start, _after, clone, repair = self.small_stacks
        prepare(self.clone, clone, SMALL_STACK, self.repair, _clone, _setcontext,
                c_uint64(start + SMALL_STACK), flags | _FLAGS, c_uint64(self.python), byref(pid))
        # A child that was killed in a system call had laid the interpreter's lock down.
        prepare(self.repair, repair, SMALL_STACK, self.here, _set_thread_state,
                c_uint64(_thread_state()))
        _swapcontext(c_uint64(self.here), c_uint64(self.clone))
        if not self.is_sound:
            self._end_like(pid)
        if not pid.value:
            fail("clone")
        return pid.value

    def _end_like(self, pid):
        """End this process as the child ended, with the status that a shell gives it."""
        status = c_int(0)
        _waitpid(pid, byref(status), 0)
        number = status.value & 0x7F
        _end(128 + number if number else status.value >> 8 & 0xFF)

    def _run(self):
        """Do one step, in the child."""
        number = self.errno.value  # before anything else changes it
        self.is_sound = False
        following = self.step(0 if self.following is None else number)
        self.following = following  # its memory has to stay
        # A context is used up by running: the end of its stack has been written over.
        self._prepare_python()
        what: tuple[object, ...] = _end, following
        if type(following) is not int:
            path, program = following
            what = _execve, path, program.arguments, program.environment
        prepare(self.call, self.small_stacks[1], SMALL_STACK, self.python, *what)
        self.is_sound = True

    def _prepare_python(self):
        prepare(self.python, self.stack, _STACK, self.call, _call_python,
                c_uint64(id(self.function)))


_Head = c_uint64 * 5


def prepare(context, stack, size, following, function, *arguments):
    """Make a context of here and now: a call on a stack, followed by another context.

    context, stack, following: addresses; function: a C function; arguments: of more than three
    the others lie on the stack, where an int leaves half of a word.
    """
    if _getcontext(c_uint64(context)) < 0:
        fail("getcontext")
    # ucontext_t begins with uc_flags, uc_link and stack_t: the stack's address, flags, size.
    head = _Head.from_address(context)
    head[1], head[2], head[4] = following, stack, size
    _makecontext(c_uint64(context), function, len(arguments), *arguments)


def mapped(size):
    """Return the address of new memory, of which the first `GUARD` bytes are a guard."""
    memory = _mmap(
        None, c_uint64(size), _PROT_READ_WRITE, _MAP_PRIVATE_ANONYMOUS_STACK, -1, None)
    if memory == (1 << 64) - 1:
        fail("mmap")
    if _mprotect(c_uint64(memory), c_uint64(GUARD), 0) < 0:
        unmap(memory, size)
        fail("mprotect")
    return memory


def unmap(memory, size):
    """Unmap what `mapped` returned."""
    _munmap(c_uint64(memory), c_uint64(size))
