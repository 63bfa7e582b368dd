"""One value of a document at a time: its type, its range, its words; where it stands.

A reader takes the object that owns the value, its key and the object's JSON pointer (RFC 6901),
and returns the value, or what stands for a missing one; a fault is a `SpecError`.  A function
``wrong_*`` says what is wrong with a string, or returns None.
"""

from sandboxfs.errors import SpecError

LARGEST_PATH = 4095  # PATH_MAX counts the terminating NUL
LARGEST_NAME = 255
LARGEST_ID = 2**32 - 2  # 2**32 - 1 is (uid_t) -1: "leave as it is"

# Every key the specification knows at the positions we read, read or not: another spelling
# of one of them is taken for it by some runtimes and not by others, so it is refused.
KNOWN = {
    "": frozenset((
        "ociVersion", "root", "process", "hostname", "domainname", "mounts", "annotations",
        "hooks", "linux", "solaris", "windows", "vm", "zos", "freebsd",
    )),
    "root": frozenset(("path", "readonly")),
    "process": frozenset((
        "terminal", "consoleSize", "user", "args", "commandLine", "env", "cwd",
        "capabilities", "rlimits", "noNewPrivileges", "apparmorProfile", "oomScoreAdj",
        "scheduler", "selinuxLabel", "ioPriority", "execCPUAffinity",
    )),
    "user": frozenset(("uid", "gid", "umask", "additionalGids", "username")),
    "consoleSize": frozenset(("height", "width")),
    "capabilities": frozenset(
        ("bounding", "effective", "inheritable", "permitted", "ambient")
    ),
    "rlimit": frozenset(("type", "soft", "hard")),
    "mount": frozenset(
        ("destination", "type", "source", "options", "uidMappings", "gidMappings")
    ),
    "mapping": frozenset(("containerID", "hostID", "size")),
    "linux": frozenset((
        "devices", "uidMappings", "gidMappings", "namespaces", "resources", "cgroupsPath",
        "rootfsPropagation", "seccomp", "sysctl", "maskedPaths", "readonlyPaths",
        "mountLabel", "intelRdt", "personality", "timeOffsets", "netDevices", "memoryPolicy",
    )),
    "namespace": frozenset(("type", "path")),
    "device": frozenset(("type", "path", "major", "minor", "fileMode", "uid", "gid")),
    "resources": frozenset((
        "devices", "pids", "blockIO", "cpu", "hugepageLimits", "memory", "network", "rdma",
        "unified",
    )),
    "memory": frozenset((
        "limit", "reservation", "swap", "kernel", "kernelTCP", "swappiness",
        "disableOOMKiller", "useHierarchy", "checkBeforeUpdate",
    )),
    "timeOffset": frozenset(("secs", "nanosecs")),
    "netDevice": frozenset(("name",)),
}

# Stands for a value that is missing: None is JSON's null.
ABSENT = object()


# -- words about values -------------------------------------------------------------------


def escaped(key):
    """Return `key` as one part of a JSON pointer (RFC 6901)."""
    return key.replace("~", "~0").replace("/", "~1")


def shown(value):
    """Return a JSON value as an error quotes it: one line, containers by their kind only."""
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f'"{value[:200]}"'
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "an array"
    if isinstance(value, int) and value.bit_length() > 256:
        return "a huge number"
    return repr(value)


def fault(pointer, value, text):
    """Raise the `SpecError` of a value (`ABSENT`: not to be quoted)."""
    raise SpecError(pointer, "", "" if value is ABSENT else shown(value), text)


def missing(pointer):
    """Raise the `SpecError` of a value that isn't there."""
    raise SpecError(pointer, text="is missing")


# -- readers ------------------------------------------------------------------------------


def known_keys(owner, kind, pointer):
    """Refuse a key that differs from a known one in case only."""
    known = KNOWN[kind]
    if known.issuperset(owner):
        return
    # casefold, as Go's decoder folds: U+017F is an s, U+212A a k.
    folded = {key.casefold(): key for key in known}
    for key in owner:
        if key not in known and key.casefold() in folded:
            fault(
                f"{pointer}/{escaped(key)}", ABSENT,
                f"is another spelling of {folded[key.casefold()]}",
            )


def require_object(value, kind, pointer):
    """Return `value`, an object of `kind` (a key of `KNOWN`, None for any)."""
    if type(value) is not dict:
        fault(pointer, value, "an object is allowed")
    if kind is not None:
        known_keys(value, kind, pointer)
    return value


def object_of(owner, key, kind, pointer):
    """Return owner[key], which has to be an object of `kind`, or None."""
    value = owner.get(key, ABSENT)
    if value is ABSENT:
        return None
    return require_object(value, kind, f"{pointer}/{key}")


def array(owner, key, pointer):
    """Return the array owner[key], empty where it is missing."""
    value = owner.get(key, ABSENT)
    if value is ABSENT:
        return ()
    if type(value) is not list:
        fault(f"{pointer}/{key}", value, "an array is allowed")
    return value


def each(items, pointer, read_one, problems):
    """Return [read_one(item, index, pointer of it), …], keeping the faults apart."""
    found = []
    for index, item in enumerate(items):
        try:
            found.append(read_one(item, index, f"{pointer}/{index}"))
        except SpecError as error:
            if problems is None:
                raise
            problems.append(error)
    return found


def text(owner, key, pointer, default=None):
    """Return owner[key], which has to be a string without NUL."""
    value = owner.get(key, ABSENT)
    if value is ABSENT:
        return default
    if type(value) is not str:
        fault(f"{pointer}/{key}", value, "a string is allowed")
    if "\0" in value:
        fault(f"{pointer}/{key}", value, "holds a NUL")
    return value


def strings(owner, key, pointer, what):
    """Return the array owner[key] of strings, each accepted by `what` (a message or None)."""
    values = array(owner, key, pointer)
    if set(map(type, values)) == {str} and "\0" not in "".join(values) and (
            what is None or not any(map(what, values))):
        return list(values)
    for index, value in enumerate(values):
        if type(value) is not str:
            fault(f"{pointer}/{key}/{index}", value, "a string is allowed")
        if "\0" in value:
            fault(f"{pointer}/{key}/{index}", value, "holds a NUL")
        if what is not None:
            wrong = what(value)
            if wrong:
                fault(f"{pointer}/{key}/{index}", value, wrong)
    return list(values)


def string_map(values, pointer):
    """Return an object whose values are strings, as a dict."""
    for key, value in values.items():
        if type(value) is not str:
            fault(f"{pointer}/{escaped(key)}", value, "a string is allowed")
        if "\0" in value or "\0" in key:
            fault(f"{pointer}/{escaped(key)}", value, "holds a NUL")
    return dict(values)


def integer(owner, key, pointer, low, high, default=None):
    """Return owner[key], a whole number from low to high."""
    value = owner.get(key, ABSENT)
    if value is ABSENT:
        return default
    # bool is an int to Python, 1.0 is none to the specification.
    if type(value) is not int or not low <= value <= high:
        fault(f"{pointer}/{key}", value, f"a whole number from {low} to {high} is allowed")
    return value


def flag(owner, key, pointer):
    """Return owner[key], true or false, False where it is missing."""
    value = owner.get(key, False)
    if value is not True and value is not False:
        fault(f"{pointer}/{key}", value, "true or false is allowed")
    return value


def word(owner, key, pointer, words):
    """Return owner[key], one of `words`; it has to be there."""
    value = owner.get(key, ABSENT)
    if type(value) is not str or value not in words:
        if value is ABSENT:
            missing(f"{pointer}/{key}")
        fault(f"{pointer}/{key}", value, "allowed: " + ", ".join(words))
    return value


def checked(owner, key, pointer, what, default=None):
    """Return owner[key], a string accepted by `what`, which returns a complaint or None."""
    value = text(owner, key, pointer, default)
    if value is not None:
        wrong = what(value)
        if wrong:
            fault(f"{pointer}/{key}", value, wrong)
    return value


# -- paths --------------------------------------------------------------------------------


def clean(path):
    """Return `path` as an absolute path without `.`, `..` and doubled slashes."""
    parts = []
    for part in path.split("/"):
        if part == "..":
            if parts:
                parts.pop()
        elif part and part != ".":
            parts.append(part)
    return "/" + "/".join(parts)


def enclosed(paths):
    """Return paths as one string, a NUL before and after each: one look finds what is in any."""
    return "\0".join(("", *paths, ""))


def are_clean(enclosed):
    """Whether enclosed paths are all absolute, of nothing but names: `clean` changes none.

    The root itself has no name.  None may hold a NUL.
    """
    if (enclosed.count("\0/") != enclosed.count("\0") - 1 or "//" in enclosed
            or "/\0" in enclosed):
        return False
    return "/." not in enclosed or not (
        "/./" in enclosed or "/../" in enclosed or "/.\0" in enclosed or "/..\0" in enclosed
    )


def wrong_path(value):
    """Say what keeps a string from being a path, or return None."""
    if not value:
        return "an empty path is not allowed"
    # A character is four bytes at most: most paths need no second look.
    if len(value) > LARGEST_NAME // 4:
        return wrong_length(value)
    return None


def wrong_length(value):
    """Say that a path, which may be empty, is longer than the kernel takes, or return None."""
    written = value.encode("utf-8", "surrogateescape")
    if len(written) > LARGEST_PATH:
        return f"is longer than {LARGEST_PATH} bytes"
    if any(len(part) > LARGEST_NAME for part in written.split(b"/")):
        return f"has a component longer than {LARGEST_NAME} bytes"
    return None


def wrong_inner_path(value):
    """As `wrong_path`; the root itself is refused too."""
    wrong = wrong_path(value)
    if wrong is None and clean(value) == "/":
        wrong = "the root itself is not allowed"
    return wrong


def wrong_absolute_path(value):
    """As `wrong_path`; relative ones are refused too."""
    if value[:1] != "/":
        return "an absolute path is allowed"
    return wrong_path(value)


def wrong_absolute_inner_path(value):
    """As `wrong_inner_path`; relative ones are refused too."""
    if value[:1] != "/":
        return "an absolute path is allowed"
    return wrong_inner_path(value)
