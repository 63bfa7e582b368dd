"""Who can start the programs that an engine was told of, and who can change them."""

import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def findings(paths: "Iterable[str]") -> "Iterator[str]":
    """Yield, in words, what is wrong with the ways to `paths` (files or directories).

    In a container with a user namespace a hook is started by the mapped root, for whom the
    host's files are somebody else's, and users start their own containers: whatever isn't open
    to all is closed to them.  And whoever can write what we start can do whatever we can.
    """
    needed: dict[str, int] = {}
    for path in map(os.path.realpath, paths):
        needed[path] = stat.S_IROTH | (stat.S_IXOTH if os.path.isdir(path) else 0)
        while path != os.path.dirname(path):
            path = os.path.dirname(path)
            needed[path] = needed.get(path, 0) | stat.S_IXOTH
    for path in sorted(needed):
        yield from _finding(path, needed[path])


def _finding(path: str, needed: int) -> "Iterator[str]":
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return
    mode = stat.S_IMODE(status.st_mode)
    # To the root of a user's own containers the user's files are open.
    ours = status.st_uid == os.geteuid() != 0
    if mode & needed != needed and not ours:
        yield (f"{path} (mode {mode:04o}) is closed to others: containers of users and those with "
               "a user namespace can't start")
    sticky = stat.S_ISDIR(status.st_mode) and mode & stat.S_ISVTX
    if mode & stat.S_IWOTH and not sticky:
        yield f"{path} (mode {mode:04o}) is writable by everybody: what it holds is run as you"
    if status.st_uid not in (0, os.geteuid()):
        yield f"{path} belongs to user {status.st_uid}: what it holds is run as you"
