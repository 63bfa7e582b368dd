"""A root inside an initramfs, which pivot_root can't leave before Linux 7.0.

The initramfs's own mount is the bottom of the mount namespace and can't be unmounted.  What is
mounted on it can, and the new root is moved on top of what is left.  Mounted on the bottom's own
root directory, it is where `..` ends and what joining the namespace leads to.  Only unmounting or
moving it uncovers the bare initramfs again, which takes CAP_SYS_ADMIN in this namespace, and is
locked in a copy for another user namespace.

Sources: pivot_root(2), follow_dotdot() and choose_mountpoint() of fs/namei.c, mount_namespaces(7).
"""

import errno

from sandboxfs.kernel import abi, mountinfo
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import mount_id, move_mount, move_mount_path, umount2


def cover(root, number):
    """Put the tree of `root` (a `Root`) on top of the bottom mount, and enter it.

    number: of the bottom mount in mountinfo.  Raises OSError.
    """
    unmount_all_on(number)
    if root.engine.layers > 1:
        # It stands on the staging tmpfs, which can go once the root stands elsewhere.
        aside = any_directory()
        move_mount(root.fd, aside)
        os.close(aside)
        os.fchdir(root.engine.scratch)
        umount2(b".", abi.MNT_DETACH)
        move_mount_path(root.fd, abi.AT_FDCWD, b"/")
    os.fchdir(root.fd)
    os.chroot(b".")


def bottom():
    """Return mountinfo's number of our root if it is the bottom of the namespace, else None."""
    slash = os.open(b"/", abi.O_PATH | os.O_CLOEXEC)
    try:
        number, is_root = mount_id(slash, abi.STATX_MNT_ID)
    finally:
        os.close(slash)
    own = [each for each in mountinfo.of_process() if each.id == number]
    return number if is_root and own and own[0].parent_id == number else None


def unmount_all_on(number):
    """Detach the mounts that lie on the root mount, but for what covers it as a whole.

    Another namespace's copies of them stay: these became slaves.  In a user namespace they are
    locked (EINVAL); there they stay where they are, below the new root.
    """
    records = mountinfo.of_process()
    # Newest first: one may hide another.
    for each in sorted(records, key=lambda each: -each.id):
        if each.parent_id == number and each.mountpoint != b"/":
            try:
                umount2(each.mountpoint, abi.MNT_DETACH | abi.UMOUNT_NOFOLLOW)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOENT):
                    raise


def any_directory():
    """Return a descriptor of some directory of the root: a place for a mount, for a moment."""
    for name in os.listdir(b"/"):
        try:
            return os.open(b"/" + name, abi.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except NotADirectoryError:
            continue
    raise OSError(errno.ENOENT, "the root has no directory to move a mount to")
