"""User namespaces that exist only for their mappings (idmapped mounts)."""

import os

from sandboxfs.kernel import abi
from sandboxfs.kernel.syscalls import unshare


def with_mappings(uid_mappings, gid_mappings):
    """Return a descriptor of a new user namespace with these mappings.

    Each mapping has container_id, host_id and size (user_namespaces(7)).  mount_setattr(2)
    maps ids of the file system, the "container" side, to those seen through the mount.
    Raises OSError; its `call` names the step.
    """
    ready, done = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        os.close(done[1])
        _hold(ready[1], done[0])
    os.close(ready[1])
    os.close(done[0])
    try:
        answer = os.read(ready[0], 16)
        if not answer.startswith(b"+"):
            error = OSError(int(answer or b"5"), os.strerror(int(answer or b"5")))
            error.call = "unshare"
            raise error
        # Its pid as procfs has it: /proc may be of another pid namespace than ours.
        shown = int(answer)
        write_map(shown, "uid_map", uid_mappings)
        write_map(shown, "gid_map", gid_mappings)
        return os.open(f"/proc/{shown}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(ready[0])
        os.close(done[1])
        os.waitpid(child, 0)


def _hold(ready, done):
    """The child: keep the namespace alive until the other end is closed."""
    try:
        unshare(abi.CLONE_NEWUSER)
        os.write(ready, b"+" + os.readlink(b"/proc/self"))
        os.read(done, 1)  # end of file, when the parent closes its end
    except OSError as error:
        os.write(ready, b"%d" % (error.errno or 5))
    finally:
        os._exit(0)


def write_map(pid, name, mappings):
    """Write all lines of a uid_map or gid_map, in one write as user_namespaces(7) wants."""
    lines = "".join(f"{m.container_id} {m.host_id} {m.size}\n" for m in mappings)
    write(f"/proc/{pid}/{name}", lines)


def write(path, text):
    """Write text to a file of procfs, at once; the `call` of an OSError names the file."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        error.call = f"write {path}"
        raise
    finally:
        os.close(fd)
