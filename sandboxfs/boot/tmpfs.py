"""From the initramfs to a tmpfs: the same files, on a mount that is like any other.

Every file is moved, so that at no time much more memory is in use than the tree itself takes.
What is needed is measured before; what goes wrong all the same is taken back.
"""

# What an error after the first file would have to import could be under way itself.
import encodings.ascii
import encodings.latin_1  # noqa: F401
import errno
import os
import signal
import traceback  # noqa: F401
from contextlib import contextmanager

from sandboxfs.boot import kept, place, switch
from sandboxfs.boot.content import CHUNK, Torn
from sandboxfs.boot.copy import measure, move_tree
from sandboxfs.boot.progress import Progress, mebibytes
from sandboxfs.boot.stage import staged
from sandboxfs.errors import BootError
from sandboxfs.kernel import abi, fscontext
from sandboxfs.kernel.syscalls import open_tree

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# What must not end us between two files.  SIGIO says that somebody waits for a file we hold.
_SIGNALS = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGIO}
# For the pieces on their way, page tables, and the kernel's own accounts.
_MARGIN = 2 * CHUNK
_UNMOUNT = "unmount them: their files would be moved away"


def to_tmpfs(
    init=switch.DEFAULT, arguments=(), *, size=None, force=False, warn=switch.say
):
    """Move the initramfs's files to a tmpfs, make that the root, and become INIT.  Never returns.

    init: str, a path.  arguments: strings, without the program's name.  size: a value for
    tmpfs's ``size=`` (``"512M"``, ``"80%"``), None for the kernel's default, half of the memory.
    force: even if this is not process 1.  warn: called with one line for each mount that doesn't
    come along.  With the witness in the environment only INIT is executed.

    BootError: everything is as it was before (unless it says that files are in two places).
    """
    if switch.witnessed():
        switch.execute(init, list(arguments))
    switch.check_first_process(force)
    found = place.look()
    switch.check_initramfs(found)
    _check_unused(found, warn)
    with _tree() as tree:
        # Among its own files: mounts come along later than INIT is looked for.
        switch.check_init(tree, init)
        need = measure(tree)
        tmpfs = _new_tmpfs(size, need)
    try:
        _check_memory(need)
        with staged(tmpfs) as stage:
            _move(tmpfs, stage, need, size)
            try:
                switch.enter(stage, init, list(arguments), delete=True, warn=warn)
            except BaseException:
                if _is_still_root(found):
                    _take_back(stage)
                raise
    finally:
        os.close(tmpfs)


def _check_unused(found, warn):
    """Refuse where another mount shows files of the initramfs: it would lose them."""
    root = os.open("/", _DIRECTORY)
    try:
        spared = kept.identities(root, found, (), warn)
    except BootError as error:  # all of it is
        error.hint = _UNMOUNT
        raise
    finally:
        os.close(root)
    if not spared:
        return
    users = [
        os.fsdecode(record.mountpoint) for record in found.records
        if record.id != found.root.id
        and (record.device == found.root.device or record.type == b"overlay")
    ]
    raise BootError(
        "", "switch-root", "/",
        f"files of the initramfs are shown by other mounts too: {', '.join(users)}",
        hint=_UNMOUNT,
    )


@contextmanager
def _tree():
    """Give a readable descriptor of the initramfs without what is mounted on it.

    So nothing can be crossed, and what a mount covers is seen.
    """
    clone = open_tree(abi.AT_FDCWD, b"/", abi.OPEN_TREE_CLONE)
    try:
        tree = os.open(".", _DIRECTORY, dir_fd=clone)
    finally:
        os.close(clone)
    try:
        yield tree
    finally:
        os.close(tree)


# -- is there room? ------------------------------------------------------------------------


def _new_tmpfs(size, need):
    """Return a detached tmpfs with room for the tree; BootError says how much that is."""
    settings = [fscontext.string(b"source", b"root"), fscontext.string(b"mode", b"0755")]
    if size is not None:
        settings.append(fscontext.string(b"size", size.encode()))
    tmpfs = _created(settings)
    room = os.fstatvfs(tmpfs)
    if room.f_ffree < need.names:
        # By default one inode for two pages of memory; the initramfs had no limit.
        os.close(tmpfs)
        inodes = b"%d" % (room.f_files + need.names)
        tmpfs = _created([*settings, fscontext.string(b"nr_inodes", inodes)])
        room = os.fstatvfs(tmpfs)
    if room.f_bfree * room.f_frsize < need.size:
        os.close(tmpfs)
        raise _too_small(size, need.size, room.f_blocks * room.f_frsize)
    return tmpfs


def _created(settings):
    try:
        return fscontext.create(b"tmpfs", settings, 0)
    except OSError as error:
        log = getattr(error, "log", "")
        text = f"{os.strerror(error.errno or 0)}: the kernel says: {log}" if log else ""
        raise BootError(
            "", getattr(error, "call", "fsmount"), "tmpfs", text, error.errno or 0
        ) from error


def _too_small(size, needed, limit, what_now="nothing was moved"):
    return BootError(
        "--size" if size is not None else "", "switch-root", "--to-tmpfs",
        f"the files take {needed} bytes ({mebibytes(needed)} MiB), and the tmpfs may hold "
        f"{limit}; {what_now}",
        errno.ENOSPC,
        hint=f"--size {-(-needed // (1 << 20)) + 1}M, or more for what is written later",
    )


def _check_memory(need):
    """Refuse where the moving itself would run out of memory: the kernel kills processes then."""
    needed = need.busy + _MARGIN
    available = _available_memory()
    if available < needed:
        raise BootError(
            "", "switch-root", "--to-tmpfs",
            f"moving {mebibytes(need.size)} MiB takes {mebibytes(needed)} MiB of memory besides "
            f"(of which {mebibytes(need.busy)} for files in use), and {mebibytes(available)} MiB "
            f"are available; nothing was moved",
            errno.ENOMEM,
        )


def _available_memory():
    """Return the bytes of memory that can be had, from procfs or, without it, what is free."""
    try:
        with open("/proc/meminfo", "rb") as table:
            for line in table:
                if line.startswith(b"MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not mounted yet
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# -- moving --------------------------------------------------------------------------------


def _move(tmpfs, stage, need, size):
    """Move all files; BootError when they are back where they were, or in two places."""
    progress = Progress("moving to a tmpfs:", need.size)
    target = os.open(stage, _DIRECTORY)
    try:
        with _undisturbed(), _tree() as tree:
            move_tree(tree, target, (stage[1:],), progress.advance)
        progress.end()
    except Torn as error:
        raise _torn(error, stage) from error
    except OSError as error:
        raise _moved_back(error, tmpfs, size) from error
    finally:
        os.close(target)


@contextmanager
def _undisturbed():
    """Have signals wait."""
    handler = signal.signal(signal.SIGIO, signal.SIG_IGN)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGIO, handler)


def _moved_back(error, tmpfs, size):
    if error.errno == errno.ENOSPC:
        # There is more than was measured: somebody writes.
        with _tree() as tree:
            needed = measure(tree).size
        room = os.fstatvfs(tmpfs)
        limit = room.f_blocks * room.f_frsize
        if needed > limit:
            return _too_small(
                size, needed, limit, "there came more meanwhile, and all is back in its place"
            )
    return BootError(
        "", "switch-root", "--to-tmpfs",
        f"{os.strerror(error.errno or 0)}; all files are back in their places", error.errno or 0,
    )


def _torn(error, stage):
    return BootError(
        "", "switch-root", "--to-tmpfs",
        f"{error.strerror}; no file is lost, but those that couldn't be moved back are in {stage}",
        error.errno or 0,
    )


def _is_still_root(found):
    here = place.look().root
    return here is not None and here.id == found.root.id


def _take_back(stage):
    """Move everything back after the switch itself has failed."""
    source = os.open(stage, _DIRECTORY)
    try:
        with _undisturbed(), _tree() as tree:
            move_tree(source, tree)
    except OSError as error:
        raise _torn(error if isinstance(error, Torn) else Torn(error, error), stage) from error
    finally:
        os.close(source)
