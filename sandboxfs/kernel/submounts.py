"""What is mounted below a directory: mostly nothing, and that is told without any record.

A table's records, and all that reads them, are loaded where something is.
"""

from errno import EACCES, EAGAIN, ENOENT, ENOSYS, EPERM

from sandboxfs.kernel import abi
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import listmount, mount_id, read_file

# From about here on a forked child costs less than printing the whole table.
MANY_MOUNTS = 500

# Whether this process is ours alone, so that nobody else can notice another root for a moment: no
# threads, no signal handlers.  Set by whoever owns the process: the command line, the warm process.
own_process = False
# How often a table is read that paths lead through, while somebody renames what is above.
_TIMES = 20


def below(descriptor, limit=None):
    """Return the records of all mounts below the directory `descriptor`, parents first.

    What a recursive clone of the directory would hold: hidden mounts too, and those mounted
    on the directory itself (a descriptor got before a mount stays under it).  `mountpoint` is
    relative to the directory, empty for one on it.  limit: stop at so many records.

    OSError: ENOENT for a directory of a detached tree or another mount namespace, EXDEV for
    one outside of the caller's root, of which neither interface gives paths; EAGAIN where
    directories above are renamed all the time.
    """
    number, is_mount_root = mount_id(descriptor)
    if is_mount_root:
        return _listed(descriptor, number, is_mount_root, limit)
    for _time in range(_TIMES):
        is_empty = _is_empty(descriptor, number)
        records = [] if is_empty else _listed(descriptor, number, is_mount_root, limit)
        # Paths tell of nothing while a directory above has another name.
        if records or is_empty is not False:
            return records
    raise OSError(EAGAIN, "directories above it are renamed while it is looked at")


def is_surely_bare(descriptor):
    """Whether nothing is mounted below a directory, told by no path: whoever renames what is above.

    False also where that can't be told.
    """
    number, is_mount_root = mount_id(descriptor)
    if not is_mount_root:
        return _is_empty(descriptor, number) is True
    try:
        return not listmount(number, limit=1)
    except OSError:
        return False


def _listed(descriptor, number, is_mount_root, limit):
    """Return the records below a directory, of those on the mount `number`."""
    try:
        ids = listmount(number, limit=limit if is_mount_root else None)
    except OSError as error:
        if error.errno == ENOSYS:
            from sandboxfs.kernel import submount_records

            return submount_records.by_mountinfo(descriptor, number, is_mount_root)[:limit]
        if error.errno != EPERM:
            raise
        # A mount whose root lies outside of our chroot may only be listed by the privileged.
        ids = listmount()
    if not ids or (not is_mount_root and len(ids) <= MANY_MOUNTS and _is_bare(descriptor)):
        return []
    from sandboxfs.kernel import submount_records

    return submount_records.of_listed(ids, descriptor, number, is_mount_root, limit)


def _is_empty(descriptor, number):
    """Whether nothing is mounted below a directory that lies in the mount `number`.

    As seen from inside of it, if anything is mounted below that mount; None: can't be told.
    """
    try:
        if not listmount(number, limit=1):
            return True
    except OSError:
        return None  # from inside of a detached tree, say, nothing of ours could be seen
    if own_process:
        return _is_empty_as_root(descriptor)
    from sandboxfs.kernel import inside

    return inside.is_empty(descriptor)


def _is_empty_as_root(descriptor):
    """Whether nothing is mounted below a directory, as seen from inside of it.

    The kernel lists what can be reached from a process's root: cheaper than any table by far, on
    a host with thousands of mounts.  None where this can't be asked for.
    """
    try:
        here = os.open(b".", abi.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (EACCES, ENOENT):
            raise
        return None  # there would be no way back
    try:
        os.chdir(b"/")
        try:
            return _nothing_seen_from(descriptor)
        finally:
            os.fchdir(here)
    finally:
        os.close(here)


def _nothing_seen_from(descriptor):
    """Whether listmount finds nothing with a directory as the root; the working directory is /."""
    try:
        os.chroot(b"/proc/self/fd/%d" % descriptor)
    except OSError as error:
        if error.errno not in (EPERM, EACCES, ENOENT):
            raise
        return None
    try:
        return not listmount(limit=1)
    except OSError as error:
        if error.errno not in (ENOSYS, EPERM):
            raise
        return None
    finally:
        try:
            os.chroot(b".")
        except OSError:
            _go_back()


def _go_back():
    """Change the root back, at the second try.

    With another one nothing may go on, least of all what can do without this answer.
    """
    try:
        os.chroot(b".")
    except OSError as error:
        raise RuntimeError(f"no way back to our own root: {error}") from error


def _is_bare(descriptor):
    """Return whether it is sure that no mount lies below a directory: mostly none does.

    One read of the shortest table there is (proc_pid_mountstats(5)), and no parsing.
    """
    path = os.readlink(b"/proc/self/fd/%d" % descriptor)
    # Where the path leads elsewhere (hidden, outside of our root) its words say nothing.
    if path == b"/" or not same_file(path, descriptor):
        return False
    try:
        table = read_file(b"/proc/self/mountstats")
    except PermissionError:  # after a change of ids without exec
        return False
    words = b" mounted on " + escape(path)
    return words + b"/" not in table and words + b" " not in table


def same_file(path, descriptor):
    """Return whether `path` leads to what `descriptor` refers to."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def escape(path):
    r"""Return `path` as mountinfo writes it: space, tab, newline and backslash in octal."""
    return (
        path.replace(b"\\", b"\\134").replace(b" ", b"\\040").replace(b"\t", b"\\011")
        .replace(b"\n", b"\\012")
    )
