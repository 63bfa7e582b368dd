"""The operator's file: who may have written it, and what may stand in it.

Imported only where there is a file.
"""

import _stat as stat
import errno

from sandboxfs.errors import PolicyError, shown
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import read_file
from sandboxfs.policy import ANNOTATIONS, LOG_LEVELS, Policy, in_bytes, simple
from sandboxfs.spec.annotations import size

LARGEST_FILE = 64 << 10
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def read(found, path):
    """Return the `Policy` of the file that `found` (an O_PATH descriptor) stands for.

    path: its name, for messages and for the directory that holds it.  `PolicyError`: it can't
    be read, others could have written it, or it is wrong.
    """
    try:
        _check_owner(os.fstat(found), path)
        _check_directory(path)
        # A descriptor of a regular file: nothing blocks, and nobody exchanges it any more.
        raw = _read(os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise unreadable(path, "read", error) from None
    if len(raw) > LARGEST_FILE:
        raise PolicyError(path, text=f"is larger than {LARGEST_FILE >> 10} KiB")
    return parse(raw, path)


def _read(fd):
    """Return the content of a regular file, or a little more than may be; closes `fd`."""
    parts, total = [], 0
    try:
        while total <= LARGEST_FILE:
            part = os.read(fd, LARGEST_FILE + 1 - total)
            if not part:
                break
            parts.append(part)
            total += len(part)
    finally:
        os.close(fd)
    return b"".join(parts)


def unreadable(path, operation, error):
    """Return the `PolicyError` of an OSError: the file is meant to be there, and it isn't."""
    hint = None
    if error.errno in (errno.EACCES, errno.EPERM):
        hint = ("hooks of containers with a user namespace run as its root: "
                "the file and every directory above it have to be open to all for reading")
    return PolicyError(path, operation, errno=error.errno, hint=hint)


# -- whose file it is -------------------------------------------------------------------


def _check_owner(status, path):
    if not stat.S_ISREG(status.st_mode):
        raise PolicyError(path, text="is not a regular file")
    if not _trusted(status.st_uid):
        raise PolicyError(path, text=f"belongs to user {status.st_uid}, not to root")
    if status.st_mode & _WRITABLE_BY_OTHERS:
        raise PolicyError(path, text=f"is writable by others (mode {status.st_mode & 0o7777:04o})",
                          hint=f"chmod go-w {shown(path)}")


def _check_directory(path):
    """Whoever may write the directory could exchange the file, or have put it there."""
    directory = os.path.dirname(os.path.abspath(path))
    status = os.stat(directory)
    sticky = status.st_mode & stat.S_ISVTX
    if not _trusted(status.st_uid) or (status.st_mode & _WRITABLE_BY_OTHERS and not sticky):
        raise PolicyError(path, text=f"others may write its directory {shown(directory)}")


def _trusted(uid):
    """Return whether `uid` is root, ourselves, or, in a user namespace, who owns the host's /.

    There the host's root is nobody we have a number for: it is seen as the overflow id, as is
    every other user of the host (user_namespaces(7)).  createRuntime, outside of it, tells them
    apart, and reads the same file before.
    """
    if uid in (0, os.geteuid()):
        return True
    if uid != int(read_file(b"/proc/sys/fs/overflowuid")):
        return False
    ranges = read_file(b"/proc/self/uid_map").splitlines()
    root_is_mapped = any(line.split()[1] == b"0" for line in ranges)
    return not root_is_mapped and os.stat("/").st_uid == uid


# -- what it says -----------------------------------------------------------------------


def parse(raw, path):
    """Return the `Policy` that the bytes `raw` describe; `PolicyError` with every problem."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise PolicyError(f"{path}:{line}", text=f"is no UTF-8: {error.reason}") from None
    tables = simple.tables(text)
    if tables is None:
        from sandboxfs.policy import faults

        tables = faults.tables(text, path)
    policy = Policy()
    policy.path = path
    given = {}
    problems = list(_unknown(tables))
    for key, (setter, allowed) in _KEYS.items():
        table, _, name = key.partition(".")
        if not isinstance(tables.get(table), dict) or name not in tables[table]:
            continue
        try:
            setter(policy, tables[table][name])
        except ValueError as fault:
            problems.append((key, tables[table][name], str(fault) or f"allowed: {allowed}"))
        else:
            given[key] = tables[table][name]
    policy.given = frozenset(given)
    problems += _contradictions(policy, given)
    if problems:
        from sandboxfs.policy import faults

        raise faults.error(text, path, problems)
    return policy


def _unknown(tables):
    """Yield (key, value, text) for what no policy has."""
    known = {key.partition(".")[0] for key in _KEYS}
    for table, content in tables.items():
        if table not in known:
            yield (table,), content, "unknown; known tables: " + ", ".join(sorted(known))
        elif not isinstance(content, dict):
            yield (table,), content, f"has to be a table: [{table}]"
        else:
            names = [key.partition(".")[2] for key in _KEYS if key.startswith(table + ".")]
            for name, value in content.items():
                if name not in names:
                    yield (table, name), value, f"unknown; [{table}] has " + ", ".join(names)


def _contradictions(policy, given):
    """Yield what is wrong between two keys; fit the defaults to the caps."""
    if policy.hint_cap is not None and in_bytes(policy.hint_size) > policy.hint_cap:
        if "hints.size" in given:
            yield "hints.size", given["hints.size"], f"is above hints.cap, {policy.hint_cap_text}"
        else:
            policy.hint_size = policy.hint_cap_text
    if policy.overlay_size is not None and policy.overlay_cap is not None \
            and in_bytes(policy.overlay_size) > policy.overlay_cap:
        yield ("overlay.size", given["overlay.size"],
               f"is above overlay.cap, {policy.overlay_cap_text}")


def _overlay_mode(policy, value):
    policy.overlay = _one_of(("tmpfs", "none"), value)


def _overlay_size(policy, value):
    policy.overlay_size = size(_string(value))


def _overlay_cap(policy, value):
    policy.overlay_cap_text = _size(value)


def _hint_size(policy, value):
    policy.hint_size = _size(value)


def _hint_cap(policy, value):
    policy.hint_cap_text = _size(value)


def _honour(policy, value):
    if type(value) is not list:
        raise ValueError
    for name in value:
        _one_of(ANNOTATIONS, name)
    policy.annotations = tuple(name for name in ANNOTATIONS if name in value)


def _host_paths(policy, value):
    if type(value) is not bool:
        raise ValueError
    policy.host_paths = value


def _log_file(policy, value):
    if not _string(value).startswith("/") or "\0" in value or value.endswith("/"):
        raise ValueError
    policy.log_path = value


def _log_level(policy, value):
    policy.log_level = _one_of(LOG_LEVELS, value)


def _string(value):
    if type(value) is not str:
        raise ValueError("has to be a string, in quotes")
    return value


def _size(value):
    size(_string(value))
    return value


def _one_of(words, value):
    if value not in words:
        raise ValueError
    return value


_SIZES = 'a size as "256M", "1G" or "25%"'
# key → (what takes its value over, what is allowed).
_KEYS = {
    "overlay.mode": (_overlay_mode, '"tmpfs", "none"'),
    "overlay.size": (_overlay_size, _SIZES),
    "overlay.cap": (_overlay_cap, _SIZES),
    "hints.size": (_hint_size, _SIZES),
    "hints.cap": (_hint_cap, _SIZES),
    "annotations.honour": (_honour, "a list of " + ", ".join(f'"{name}"' for name in ANNOTATIONS)),
    "annotations.host-paths": (_host_paths, "true, false"),
    "log.file": (_log_file, "an absolute path"),
    "log.level": (_log_level, ", ".join(f'"{level}"' for level in LOG_LEVELS)),
}
