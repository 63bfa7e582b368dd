"""Whether something is mounted below a directory, asked from inside of it by a child.

listmount(2) lists what can be reached from the root of who asks, so that no path has to tell: paths
change while somebody renames what is above.  A program whose process isn't ours alone can't have
another root for a moment.  So a child of vfork(2)'s kind has one: it shares our memory and nothing
else, and makes calls of the C library with no Python between them.  Unlike `vfork.Child` it doesn't
mind threads; nobody is told of its end or reaps it by accident, and signals wait meanwhile.

Sources: clone(2), waitpid(2), chroot(2), makecontext(3), pid_namespaces(7).
"""

from _ctypes import set_errno
from _signal import SIG_BLOCK, SIG_SETMASK, pthread_sigmask, valid_signals

from sandboxfs.kernel import abi, syscalls, vfork
from sandboxfs.kernel import system as os
from sandboxfs.kernel.foreign import byref, c_int, c_uint64, get_errno

# CLONE_VM and CLONE_VFORK, with no signal at its end.
_FLAGS = 0x100 | 0x4000
# __WCLONE and __WNOTHREAD: of this thread's children those whose end is told by no signal.
_OURS = 0x80000000 | 0x20000000
_clone, _setcontext, _swapcontext, _waitpid = [
    vfork.locked(name) for name in ("clone", "setcontext", "swapcontext", "waitpid")]
_fchdir, _chroot, _syscall, _exit = [
    vfork.locked(name) for name in ("fchdir", "chroot", "syscall", "_exit")]
# What the child does, three calls and its end; the two of ours; the child's first stack, and where
# we go on.
_MOST_CONTEXTS = 7
_SIZE = vfork.GUARD + _MOST_CONTEXTS * (vfork.SMALL_STACK + vfork.CONTEXT)
# Memory for it that nobody is using: touching new pages would take as long as the child.
_free: list[int] = []


def is_empty(descriptor):
    """Return whether no mount lies below a directory or on it; None where that can't be told.

    descriptor: of a directory that isn't the root of a mount, and that lies in this mount
    namespace: of another one's, or of a tree that isn't attached, nothing is found from inside.
    """
    if not vfork.has_contexts() or not _is_of_our_pid_namespace():
        return None
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


def _is_of_our_pid_namespace():
    """Whether children live in our own pid namespace.

    Else the child would be its first process, and end it for those that follow.
    """
    try:
        return (os.readlink(b"/proc/thread-self/ns/pid")
                == os.readlink(b"/proc/thread-self/ns/pid_for_children"))
    except OSError:
        return False


def _calls(*wanted):
    """Make calls in a child; returns whether it ended and all succeeded.

    wanted: up to three (C function, argument…), made one after the other, whatever the one before
    returned, each of which sets errno where it fails.  OSError of mmap(2).
    """
    masked = pthread_sigmask(SIG_BLOCK, ())
    try:
        # Before any context is made: each has the mask of its making.
        pthread_sigmask(SIG_BLOCK, valid_signals())
        try:
            memory = _free.pop()
        except IndexError:
            memory = vfork.mapped(_SIZE)
        try:
            return _made(memory, (*wanted, (_exit, 0)))
        finally:
            _free.append(memory)
    finally:
        pthread_sigmask(SIG_SETMASK, masked)


def _made(memory, wanted):
    """Make the calls of `_calls` by contexts in `memory`."""
    stacks = [memory + vfork.GUARD + vfork.SMALL_STACK * at for at in range(_MOST_CONTEXTS)]
    first = stacks[-1] + vfork.SMALL_STACK
    contexts = [first + vfork.CONTEXT * at for at in range(_MOST_CONTEXTS)]
    status = c_int(-1)
    start, wait, here = contexts[-3:]
    for at, call in enumerate(wanted):
        vfork.prepare(contexts[at], stacks[at], vfork.SMALL_STACK, contexts[at + 1], *call)
    # Both in one call of Python's: no handler of a signal, which may raise, comes between them.
    vfork.prepare(start, stacks[-3], vfork.SMALL_STACK, wait, _clone, _setcontext,
                  c_uint64(stacks[-1] + vfork.SMALL_STACK), _FLAGS, c_uint64(contexts[0]))
    vfork.prepare(wait, stacks[-2], vfork.SMALL_STACK, here, _waitpid, -1, byref(status), _OURS)
    set_errno(0)
    _swapcontext(c_uint64(here), c_uint64(start))
    # Of the child's calls as well: errno lies in the memory that we share.
    return get_errno() == 0 and status.value == 0
