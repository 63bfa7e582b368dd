"""Whether a runtime enters the rootfs by a descriptor that it opened before its hooks.

runc does from 1.3.6 on (1.4.2 doesn't): it makes the mount of the rootfs that it saw then the
container's root, past whatever a hook has laid over it since, and the mount table shows the
latter.  Such a runtime is known by what it holds, not by its version.
"""

from sandboxfs.errors import HookError
from sandboxfs.kernel import abi, mountinfo
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import mount_id, read_file
from sandboxfs.plan import live

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sandboxfs.spec.model import Spec


def check(pid: int, spec: "Spec") -> None:
    """Raise HookError if the process `pid`, runc's in the container, holds the rootfs's mount.

    Not where that is a root of the runtime in front already.  Called on the host's side.
    """
    path = live.rootfs_of(spec)
    if _is_told_not_to_pivot():
        raise _refusal(path, "runc --no-pivot enters the directory that it stood in before the "
                       "hooks, past any root that they lay over it; crun --no-pivot works")
    try:
        process = b"%d" % pid
        number = _mount_there(process, path)
        record = next((each for each in mountinfo.of_process(process) if each.id == number), None)
        if record is not None and live.is_made_by_runtime(record):
            return
        held = number in _mounts_held(process)
    except OSError as error:
        raise _refusal(path, "nobody can tell whether this runc enters the root that a hook makes",
                       error.errno) from error
    if held:
        raise _refusal(path, "this runc enters the directory that it opened before the hooks, "
                       "past any root that they lay over it")


def _refusal(path: str, text: str, number: "int | None" = 0) -> HookError:
    return HookError(
        "createRuntime", "", path, text, number,
        hint="use sandboxfs-runtime in front of it: sandboxfs install --for ENGINE; "
        "who asks for nothing, with dev.sandboxfs.overlay=none, starts")


def _is_told_not_to_pivot() -> bool:
    """Return whether the runtime that started this hook on the host's side has --no-pivot."""
    # The program's name, in parentheses, may hold anything.
    parent = read_file("/proc/self/stat").rpartition(b")")[2].split()[1]
    words = read_file(b"/proc/" + parent + b"/cmdline").split(b"\0")
    return any(word.lstrip(b"-").partition(b"=")[0] == b"no-pivot" and word[:1] == b"-"
               and not word.endswith(b"=false") for word in words)


def _mount_there(process: bytes, path: str) -> int:
    """Return mountinfo's number of the mount that a path leads to in the process's namespace."""
    here = os.open(path, abi.O_PATH | os.O_CLOEXEC)
    try:
        real = os.readlink(b"/proc/self/fd/%d" % here)
    finally:
        os.close(here)
    there = os.open(b"/proc/" + process + b"/root" + real, abi.O_PATH | os.O_CLOEXEC)
    try:
        return mount_id(there, abi.STATX_MNT_ID)[0]
    finally:
        os.close(there)


def _mounts_held(process: bytes) -> "set[int]":
    """Return the numbers of the mounts that a process has descriptors of."""
    directory, found = b"/proc/" + process + b"/fdinfo/", set()
    for name in os.listdir(directory):
        try:
            text = read_file(directory + name)
        except FileNotFoundError:
            continue  # closed since
        found |= {int(line[7:]) for line in text.split(b"\n") if line.startswith(b"mnt_id:")}
    return found
