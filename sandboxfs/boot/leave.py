"""Leaving an initramfs for another root, and staying in it with a root that can be pivoted.

Sources: switch_root(8), pivot_root(2).
"""

import os

from sandboxfs.boot import place, switch
from sandboxfs.errors import BootError
from sandboxfs.kernel import abi
from sandboxfs.kernel.syscalls import open_tree


def switch_root(
    new_root, init=switch.DEFAULT, arguments=(), *, keep=False, preserve=(), force=False,
    warn=switch.say,
):
    """Leave the initramfs for the mount at `new_root` (a path) and become INIT.  Returns never.

    Every mount for which the new root has a place moves along.  The initramfs's content is
    deleted, unless `keep`; `preserve` are paths (str) in it that stay.  force: even if this is
    not process 1.  With the witness in the environment only INIT is executed.

    BootError, with everything as it was: the root is no initramfs (and not `keep`), NEWROOT is
    no mount point, INIT can't be executed there, …
    """
    if switch.witnessed():
        switch.execute(init, arguments)
    switch.check_first_process(force)
    switch.enter(
        new_root, init, arguments, delete=not keep, preserve=preserve, warn=warn
    )


def user_root(init=switch.DEFAULT, arguments=(), *, force=False, warn=switch.say):
    """Make pivot_root work in an initramfs, and become INIT.  Returns never.

    The initramfs's mount itself has no parent, which pivot_root(2) needs.  A second mount of it
    on top of the first has one, and everything else is as before: nothing is copied, all mounts
    come along.  Where the root has a parent already there is nothing to do but to become INIT.

    force: even if this is not process 1.  BootError, with everything as it was.
    """
    if switch.witnessed():
        switch.execute(init, arguments)
    switch.check_first_process(force)
    found = place.look()
    if found.root is None:
        raise BootError("--user-root", "switch-root", "/",
                        "this process was chrooted into a directory that is no mount")
    slash = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        switch.check_init(slash, init)
    finally:
        os.close(slash)
    if not found.is_bottom:
        warn("the root has a parent mount already: pivot_root works without --user-root")
        switch.execute(init, arguments)
    try:
        second = open_tree(abi.AT_FDCWD, b"/", abi.OPEN_TREE_CLONE)
    except OSError as error:
        raise BootError("--user-root", "open_tree", "/", "", error.errno or 0) from error
    try:
        switch.enter(second, init, arguments, delete=False, warn=warn)
    finally:
        os.close(second)
