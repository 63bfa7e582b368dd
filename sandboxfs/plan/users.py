"""What few user namespaces need: one to join, and one that the root is built outside of."""

from sandboxfs.errors import MountError
from sandboxfs.kernel import system as os


def refuse_user_sysctls(spec):
    """Settings are those of the user namespace of who opens them: here the host's."""
    for name in spec.sysctl:
        if name.startswith(("user.", "user/")):
            raise MountError(f"linux.sysctl.{name}", "write", name,
                             "would be set on the host: the root is built from outside")


def mappings_of(path):
    """Return the (uid, gid) maps of the user namespace at `path`, each as (inside, host, size).

    They are read by a child that joins it, since no file but that of a process has them.
    Both are empty where it can't be joined: whoever needs to join it says why.
    """
    from sandboxfs.kernel import abi
    from sandboxfs.kernel.syscalls import setns

    reader, writer = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        try:
            setns(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), abi.CLONE_NEWUSER)
            for name in ("uid_map", "gid_map"):
                map = os.open(f"/proc/self/{name}", os.O_RDONLY)
                os.write(writer, b" ".join(os.read(map, 65536).split()) + b"\n")
        finally:
            os._exit(0)
    os.close(writer)
    text = b""
    while part := os.read(reader, 65536):
        text += part
    os.close(reader)
    os.waitpid(child, 0)
    lines = text.splitlines()
    return tuple(_threes(lines[at]) if len(lines) > at else [] for at in (0, 1))


def _threes(line):
    numbers = [int(number) for number in line.split()]
    return list(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))
