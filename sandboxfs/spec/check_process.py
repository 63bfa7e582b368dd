"""What the hot path checks of `process`."""

from sandboxfs.errors import SpecError
from sandboxfs.spec.model import Process
from sandboxfs.spec.values import (
    KNOWN,
    LARGEST_ID,
    array,
    checked,
    each,
    fault,
    flag,
    integer,
    missing,
    object_of,
    require_object,
    strings,
    word,
    wrong_absolute_path,
)

UNLIMITED = 2**64 - 1
RLIMITS = tuple(
    "RLIMIT_" + name
    for name in (
        "AS", "CORE", "CPU", "DATA", "FSIZE", "LOCKS", "MEMLOCK", "MSGQUEUE", "NICE",
        "NOFILE", "NPROC", "RSS", "RTPRIO", "RTTIME", "SIGPENDING", "STACK",
    )
)
# In the order of their numbers (linux/capability.h).
CAPABILITIES = tuple(
    "CAP_" + name
    for name in (
        "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID",
        "SETUID", "SETPCAP", "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST",
        "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO",
        "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
        "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE",
        "AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM",
        "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF", "CHECKPOINT_RESTORE",
    )
)
_CAPABILITIES = frozenset(CAPABILITIES)
# Links of /proc/PID to what a process has open or stands in.
_PROC_LINKS = frozenset(("fd", "cwd", "root", "exe", "map_files", "ns"))


def read(document, found, problems):
    """Read `process` into the `Spec` `found`."""
    pointer = "/process"
    entry = object_of(document, "process", "process", "")
    if entry is None:
        return
    process = found.process = Process()
    process.args = strings(entry, "args", pointer, None)
    if "args" in entry and not process.args:
        fault("/process/args", entry["args"], "at least one argument is needed")
    process.env = strings(entry, "env", pointer, wrong_variable)
    process.terminal = flag(entry, "terminal", pointer)
    process.no_new_privileges = flag(entry, "noNewPrivileges", pointer)
    process.oom_score_adj = integer(entry, "oomScoreAdj", pointer, -1000, 1000)
    size = object_of(entry, "consoleSize", "consoleSize", pointer)
    if size is not None:
        process.console_size = _console_size(size)
    user = object_of(entry, "user", "user", pointer)
    if user is not None:
        _user(user, process)
    sets = object_of(entry, "capabilities", "capabilities", pointer)
    if sets is not None:
        process.capabilities = {
            key: strings(sets, key, "/process/capabilities", wrong_capability)
            for key in sets if key in KNOWN["capabilities"]
        }
    process.rlimits = each(
        array(entry, "rlimits", pointer), "/process/rlimits", _rlimit, problems
    )
    cwd = checked(entry, "cwd", pointer, wrong_cwd)
    if cwd is None:
        missing("/process/cwd")
    process.cwd = cwd


def _console_size(size):
    # struct winsize holds unsigned shorts.
    height = integer(size, "height", "/process/consoleSize", 0, 65535)
    width = integer(size, "width", "/process/consoleSize", 0, 65535)
    if height is None or width is None:
        missing("/process/consoleSize/" + ("height" if height is None else "width"))
    return height, width


def _user(user, process):
    pointer = "/process/user"
    process.uid = integer(user, "uid", pointer, 0, LARGEST_ID, 0)
    process.gid = integer(user, "gid", pointer, 0, LARGEST_ID, 0)
    process.umask = integer(user, "umask", pointer, 0, 0o777)
    groups = array(user, "additionalGids", pointer)
    for index, group in enumerate(groups):
        if type(group) is not int or not 0 <= group <= LARGEST_ID:
            fault(
                f"{pointer}/additionalGids/{index}", group,
                f"a whole number from 0 to {LARGEST_ID} is allowed",
            )
    process.additional_gids = list(groups)


def _rlimit(entry, index, pointer):
    require_object(entry, "rlimit", pointer)
    name = word(entry, "type", pointer, RLIMITS)
    soft = integer(entry, "soft", pointer, 0, UNLIMITED)
    hard = integer(entry, "hard", pointer, 0, UNLIMITED)
    if soft is None or hard is None:
        missing(f"{pointer}/" + ("soft" if soft is None else "hard"))
    return name, soft, hard


def wrong_cwd(value):
    """As `wrong_absolute_path`; links of procfs that lead out of the root are refused.

    ``/proc/self/fd/7`` as cwd was a way to the host through a leaked descriptor
    (CVE-2024-21626).
    """
    wrong = wrong_absolute_path(value)
    if wrong:
        return wrong
    way = []
    for part in value.split("/"):
        if part == "..":
            del way[-1:]
        elif part and part != ".":
            way.append(part)
        # Looked at on the way, not at the end: after a link `..` is somewhere else.
        if way == ["dev", "fd"] or (way[:1] == ["proc"] and way[-1] in _PROC_LINKS):
            return "a link to what a process has open is no working directory"
    return None


def wrong_variable(value):
    """Say that a string is no NAME=VALUE, or return None."""
    return None if value.find("=") > 0 else "NAME=VALUE is allowed"


def wrong_capability(value):
    """Say that a capability has no such name, or return None."""
    return None if value in _CAPABILITIES else "is no capability (capabilities(7))"


def rules(found):
    """Yield a `SpecError` for every rule between values that a `Spec` breaks."""
    seen = set()
    for index, (name, soft, hard) in enumerate(found.process.rlimits if found.process else ()):
        if name in seen:
            yield SpecError(f"/process/rlimits/{index}/type", "", f'"{name}"', "stands twice")
        seen.add(name)
        if soft > hard:
            yield SpecError(
                f"/process/rlimits/{index}/soft", "", str(soft), f"is more than hard, {hard}"
            )
