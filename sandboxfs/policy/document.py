"""The operator's file: who may have written it, what may stand in it, and in which line it doesn't.

Imported only where there is a file: TOML's parser takes longer to import than a root to build.
"""

import errno
import os
import stat
import tomllib

from sandboxfs.errors import PolicyError, shown
from sandboxfs.policy import ANNOTATIONS, LOG_LEVELS, Policy, in_bytes
from sandboxfs.spec.annotations import size

LARGEST_FILE = 64 << 10
# Finding a line means parsing again, several times.
MOST_FAULTS = 20
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
        with open(os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC), "rb") as file:
            raw = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise unreadable(path, "read", error) from None
    if len(raw) > LARGEST_FILE:
        raise PolicyError(path, text=f"is larger than {LARGEST_FILE >> 10} KiB")
    return parse(raw, path)


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
    with open("/proc/sys/fs/overflowuid", "rb") as file:
        overflow = int(file.read())
    if uid != overflow:
        return False
    with open("/proc/self/uid_map", "rb") as file:
        root_is_mapped = any(line.split()[1] == b"0" for line in file)
    return not root_is_mapped and os.stat("/").st_uid == overflow


# -- what it says -----------------------------------------------------------------------


def parse(raw, path):
    """Return the `Policy` that the bytes `raw` describe; `PolicyError` with every problem."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise PolicyError(f"{path}:{line}", text=f"is no UTF-8: {error.reason}") from None
    try:
        tables = tomllib.loads(text)
    except ValueError as error:
        raise _syntax(text, path, error) from None
    except RecursionError:
        raise PolicyError(path, text="is nested too deeply to be read") from None
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
        raise _error(text, path, problems)
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


# -- in which line ----------------------------------------------------------------------


def _error(text, path, problems):
    """Return the `PolicyError` of problems (key, value, text), in the order of their lines."""
    errors = []
    for key, value, problem in problems[:MOST_FAULTS]:
        keys = key if isinstance(key, tuple) else tuple(key.split("."))
        shown_value = "" if isinstance(value, dict) else f"{_toml(value)}: "
        line = line_of(text, keys)
        name = shown(".".join(keys))
        errors.append((line, PolicyError(f"{path}:{line}", text=f"{name}: {shown_value}{problem}")))
    errors.sort(key=lambda entry: entry[0])
    first = errors[0][1]
    return PolicyError(first.origin, text=first.text, problems=[error for _, error in errors])


def _toml(value):
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{shown(value)}"' if isinstance(value, str) else shown(str(value))


def _syntax(text, path, error):
    """Return the `PolicyError` of what isn't TOML.

    The parser names the place in its message only (a field of its own came with Python 3.14).
    """
    reason, found, place = str(error).rpartition(" (at ")
    line = len(_lines(text))
    if not found:
        # Not from the grammar: a number of too many digits.
        reason = str(error)
        line = next(count for count in range(1, line + 1) if _parses(_lines(text)[:count]) is None)
    elif place.startswith("line "):
        line = int(place[len("line "):].partition(",")[0])
    return PolicyError(f"{path}:{line}", text=f"is no TOML: {reason[:1].lower()}{reason[1:]}")


def line_of(text, keys):
    """Return the number of the line of a TOML document in which the statement of `keys` begins.

    Parsed again, in beginnings of the document: the statement lies between the longest that is
    TOML and lacks the key and the shortest that has it.  So whatever way it is written (dotted,
    in an inline table, over several lines), the parser itself says where.
    """
    lines = _lines(text)
    lacking, having = 0, len(lines)
    while True:
        middle = next(
            (count for count in _from_the_middle(lacking, having) if _parses(lines[:count])), None
        )
        if middle is None:
            return lacking + 1
        if _has(tomllib.loads("\n".join(lines[:middle])), keys):
            having = middle
        else:
            lacking = middle


def _from_the_middle(low, high):
    """Yield the numbers between `low` and `high`, those in the middle first."""
    middle = (low + high) // 2
    yield from range(max(middle, low + 1), high)
    yield from range(middle - 1, low, -1)


def _lines(text):
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")


def _parses(lines):
    """Return whether `lines` are TOML; None if only a value is out of bounds."""
    try:
        tomllib.loads("\n".join(lines))
    except tomllib.TOMLDecodeError:
        return False
    except ValueError:
        return None
    return True


def _has(tables, keys):
    for key in keys:
        if not isinstance(tables, dict) or key not in tables:
            return False
        tables = tables[key]
    return True
