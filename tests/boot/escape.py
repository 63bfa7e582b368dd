"""Runs inside a container: every trick to see what lies outside of its root.

Prints one line for each: its name, and ``out`` if the file /host-marker of the machine was seen,
else ``in`` with what stopped it.  Arguments: names of the tricks to try; all by default.
"""

import os
import sys

sys.path[:0] = ["/sandboxfs"]

from sandboxfs.kernel import abi, syscalls  # noqa: E402

MARKER = "host-marker"
UP = "../" * 40


class Out(Exception):
    """The marker was seen."""


def look(*directories):
    """Raise `Out` if the marker can be seen from here."""
    for directory in ("/", ".", UP, f"/{UP}", *directories):
        if os.path.exists(os.path.join(directory, MARKER)):
            raise Out(directory)


def dots():
    look("/..", "/proc/..", "/tmp/../..")


def own_descriptors():
    for name in os.listdir("/proc/self/fd"):
        look(f"/proc/self/fd/{name}", f"/proc/self/fd/{name}/{UP}")


def other_processes():
    for name in os.listdir("/proc"):
        if name.isdigit():
            look(*(f"/proc/{name}/{link}/{UP}" for link in ("root", "cwd")), f"/proc/{name}/root")


def chroot_with_descriptor():
    slash = os.open("/", os.O_RDONLY)
    os.makedirs("/tmp/jail", exist_ok=True)
    os.chroot("/tmp/jail")
    os.fchdir(slash)
    climb()


def chroot_with_directory():
    os.makedirs("/tmp/jail", exist_ok=True)
    os.chdir("/")
    os.chroot("/tmp/jail")
    climb()


def climb():
    for _level in range(60):
        os.chdir("..")
    look()
    os.chroot(".")
    look()


def chroot_up():
    os.chroot("/..")
    look()
    os.chdir("/..")
    look()


def own_namespace():
    """A mount namespace's root is what lies topmost on its bottom."""
    join(os.open("/proc/self/ns/mnt", os.O_RDONLY))


def namespace_of_1():
    join(os.open("/proc/1/ns/mnt", os.O_RDONLY))


def join(namespace):
    syscalls.setns(namespace, abi.CLONE_NEWNS)
    look()


def unmount_root(path=b"/"):
    """As the documentation says it: without a root of its own, what is below is the root."""
    namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY)
    syscalls.umount2(path, abi.MNT_DETACH)
    look()
    join(namespace)


def unmount_up():
    unmount_root(b"/..")


def move_root():
    namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY)
    slash = os.open("/", os.O_PATH)
    syscalls.move_mount_path(slash, abi.AT_FDCWD, b"/tmp")
    look()
    join(namespace)


def user_namespace():
    """As root of a user namespace of its own, with a copy of the mounts."""
    syscalls.unshare(abi.CLONE_NEWUSER | abi.CLONE_NEWNS)
    for trick in (unmount_root, move_root, own_namespace):
        try:
            trick()
        except OSError:
            pass


def user_namespace_pivot():
    """The same, after a pivot to a root that it made itself."""
    syscalls.unshare(abi.CLONE_NEWUSER | abi.CLONE_NEWNS)
    from sandboxfs.kernel import fscontext

    proc = os.open("/proc", os.O_PATH)
    new = fscontext.create(b"tmpfs", [], 0)
    syscalls.move_mount_path(new, abi.AT_FDCWD, b"/tmp")
    os.fchdir(new)
    syscalls.pivot_root(b".", b".")
    syscalls.umount2(b".", abi.MNT_DETACH)
    look()
    for path in (b"/", b"/.."):
        try:
            syscalls.umount2(path, abi.MNT_DETACH)
        except OSError:
            continue
        look()
    fd = os.open("self/ns/mnt", os.O_RDONLY, dir_fd=proc)
    syscalls.setns(fd, abi.CLONE_NEWNS)
    look()


def mount_rootfs():
    """A second mount of the kernel's own root file system."""
    from sandboxfs.kernel import fscontext

    mount = fscontext.create(b"rootfs", [], 0)
    os.fchdir(mount)
    look()


TRICKS = (
    dots, own_descriptors, other_processes, chroot_with_descriptor, chroot_with_directory,
    chroot_up, own_namespace, namespace_of_1, mount_rootfs, user_namespace, user_namespace_pivot,
    unmount_up, move_root, unmount_root,
)


def below():
    """Return what there is of the machine's mounts, out there."""
    return {name: os.listdir(f"/{name}") for name in ("run", "proc", "sys") if
            os.path.isdir(f"/{name}")}


def attempt(trick):
    """Try one trick in a child of its own."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        trick()
        result = "in"
    except Out as seen:
        result = f"out ({seen}) {below()}"
    except OSError as error:
        result = f"in ({getattr(error, 'call', '')} {error.strerror})"
    print(trick.__name__, result, flush=True)
    os._exit(0)


for each in TRICKS:
    if each.__name__ in sys.argv[1:] or not sys.argv[1:]:
        attempt(each)
