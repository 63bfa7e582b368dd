"""Whether something is mounted below a directory, asked from inside of it by a child.

listmount(2) lists what can be reached from the root of who asks, so that no path has to tell: paths
change while somebody renames what is above.  A program whose process isn't ours alone can't have
another root for a moment.  So a child of vfork(2)'s kind has one: it shares our memory and nothing
else, and makes calls of the C library with no Python between them.  Unlike `vfork.Child` it doesn't
mind threads; nobody is told of its end or reaps it by accident, and signals wait meanwhile.

Sources: clone(2), chroot(2), makecontext(3), Documentation/filesystems/mount_api.rst.
"""

import sys
from _ctypes import set_errno
from _signal import SIG_BLOCK, SIG_SETMASK, pthread_sigmask, valid_signals

from sandboxfs.kernel import abi, syscalls, vfork
from sandboxfs.kernel import system as os
from sandboxfs.kernel.foreign import byref, c_uint64, get_errno

# CLONE_VM and CLONE_VFORK, with no signal at its end.
_FLAGS = 0x100 | 0x4000
_WALL = 0x40000000  # __WALL: only who asks for such children waits for them (waitpid(2))
# The calls, the end, and the child's first stack.
_MOST_CALLS = 5
_SIZE = vfork.GUARD + (_MOST_CALLS + 1) * (vfork.SMALL_STACK + vfork.CONTEXT)
# Memory for it that nobody is using: touching new pages would take as long as the child.
_free: list[int] = []
_clone, _setcontext, _makecontext = [
    vfork.locked(name) for name in ("clone", "setcontext", "makecontext")]
_fchdir, _chroot, _syscall, _exit = [
    vfork.locked(name) for name in ("fchdir", "chroot", "syscall", "_exit")]


def is_empty(descriptor):
    """Return whether no mount lies below a directory or on it; None where that can't be told."""
    if _makecontext is None or sys.maxsize >> 32 == 0:
        return None  # musl has no contexts
    found = c_uint64(0)
    request = syscalls.mount_request(abi.LSMT_ROOT)
    try:
        done = _calls(
            (_fchdir, descriptor),
            (_chroot, b"."),
            (_syscall, c_uint64(abi.SYS_listmount), request, byref(found), c_uint64(1),
             c_uint64(0)),
        )
    except OSError:
        return None
    # One that failed doesn't keep the next from being made: with our own root it finds ours.
    return found.value == 0 if done else None


def _calls(*wanted):
    """Make calls in a child; returns whether it ended and all succeeded.

    wanted: up to four (C function, argument…), made one after the other, whatever the one before
    returned, each of which sets errno where it fails.  OSError of mmap(2) or clone(2).
    """
    try:
        memory = _free.pop()
    except IndexError:
        memory = vfork.mapped(_SIZE)
    try:
        stack = memory + vfork.GUARD
        first = context = stack + (_MOST_CALLS + 1) * vfork.SMALL_STACK
        for function, *arguments in (*wanted, (_exit, 0)):
            following = context + vfork.CONTEXT
            vfork.prepare(context, stack, vfork.SMALL_STACK, following, function, *arguments)
            stack += vfork.SMALL_STACK
            context = following
        return _in_a_child(first, stack + vfork.SMALL_STACK)
    finally:
        _free.append(memory)


def _in_a_child(context, stack):
    """Go on with a context in a child, on `stack` at first; whether it ended and set no errno."""
    masked = pthread_sigmask(SIG_BLOCK, valid_signals())
    try:
        set_errno(0)
        pid = _clone(_setcontext, c_uint64(stack), _FLAGS, c_uint64(context))
        # Of the child's calls as well: errno lies in the memory that we share.
        number = get_errno()
        if pid < 0:
            raise OSError(number, os.strerror(number))
        status = os.waitpid(pid, _WALL)[1]
    finally:
        pthread_sigmask(SIG_SETMASK, masked)
    return number == 0 and status == 0
