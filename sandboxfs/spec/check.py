"""The checks of the hot path: exactly what is read of a document, as model objects.

Two passes.  `read` checks shapes (types, ranges, words), one value at a time, and says the
same as ``specs/schema/config.schema.json``; a property test holds the two together.
`relate` checks rules between values, which no schema can say.  Both raise the first
`SpecError`, or, given a list `problems`, collect one for every entry and go on.
"""

from sandboxfs.errors import SpecError
from sandboxfs.spec import annotations as _annotations
from sandboxfs.spec.model import Device, IdMapping, Mount, Namespace, Process, Spec

LARGEST_PATH = 4095  # PATH_MAX counts the terminating NUL
LARGEST_NAME = 255
LARGEST_ID = 2**32 - 2  # 2**32 - 1 is (uid_t) -1: "leave as it is"
LARGEST_HOSTNAME = 64  # __NEW_UTS_LEN
MOST_MAPPINGS = 340  # user_namespaces(7): since Linux 4.15
UNLIMITED = 2**64 - 1

NAMESPACES = ("mount", "pid", "network", "uts", "ipc", "user", "cgroup", "time")
PROPAGATIONS = (
    "private", "rprivate", "shared", "rshared", "slave", "rslave", "unbindable", "runbindable",
)
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

_ABSENT = object()


def spec(document, bundle=None, name="config.json"):
    """Return the `Spec` of a parsed document; raise the first `SpecError` found."""
    found = read(document, bundle, name=name)
    relate(found)
    return found


def collect(document, bundle=None, name="config.json"):
    """Return every `SpecError` of a parsed document, at most one an entry and rule."""
    problems = []
    found = read(document, bundle, problems, name)
    relate(found, problems)
    return problems


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


# -- values -----------------------------------------------------------------------------


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


def _fault(pointer, value, text):
    raise SpecError(pointer, "", "" if value is _ABSENT else shown(value), text)


def _missing(pointer):
    raise SpecError(pointer, text="is missing")


def _keys(owner, kind, pointer):
    """Refuse a key that differs from a known one in case only."""
    known = KNOWN[kind]
    if known.issuperset(owner):
        return
    # casefold, as Go's decoder folds: U+017F is an s, U+212A a k.
    folded = {key.casefold(): key for key in known}
    for key in owner:
        if key not in known and key.casefold() in folded:
            _fault(
                f"{pointer}/{escaped(key)}", _ABSENT,
                f"is another spelling of {folded[key.casefold()]}",
            )


def _require_object(value, kind, pointer):
    if type(value) is not dict:
        _fault(pointer, value, "an object is allowed")
    if kind is not None:
        _keys(value, kind, pointer)
    return value


def _object(owner, key, kind, pointer):
    """Return owner[key], which has to be an object of `kind`, or None."""
    value = owner.get(key, _ABSENT)
    if value is _ABSENT:
        return None
    return _require_object(value, kind, f"{pointer}/{key}")


def _array(owner, key, pointer):
    value = owner.get(key, _ABSENT)
    if value is _ABSENT:
        return ()
    if type(value) is not list:
        _fault(f"{pointer}/{key}", value, "an array is allowed")
    return value


def _text(owner, key, pointer, default=None):
    """Return owner[key], which has to be a string without NUL."""
    value = owner.get(key, _ABSENT)
    if value is _ABSENT:
        return default
    if type(value) is not str:
        _fault(f"{pointer}/{key}", value, "a string is allowed")
    if "\0" in value:
        _fault(f"{pointer}/{key}", value, "holds a NUL")
    return value


def _strings(owner, key, pointer, what):
    """Return the array owner[key] of strings, each accepted by `what` (a message or None)."""
    values = _array(owner, key, pointer)
    for index, value in enumerate(values):
        if type(value) is not str:
            _fault(f"{pointer}/{key}/{index}", value, "a string is allowed")
        if "\0" in value:
            _fault(f"{pointer}/{key}/{index}", value, "holds a NUL")
        if what is not None:
            wrong = what(value)
            if wrong:
                _fault(f"{pointer}/{key}/{index}", value, wrong)
    return list(values)


def _integer(owner, key, pointer, low, high, default=None):
    value = owner.get(key, _ABSENT)
    if value is _ABSENT:
        return default
    # bool is an int to Python, 1.0 is none to the specification.
    if type(value) is not int or not low <= value <= high:
        _fault(f"{pointer}/{key}", value, f"a whole number from {low} to {high} is allowed")
    return value


def _flag(owner, key, pointer):
    value = owner.get(key, False)
    if value is not True and value is not False:
        _fault(f"{pointer}/{key}", value, "true or false is allowed")
    return value


def _word(owner, key, pointer, words):
    value = owner.get(key, _ABSENT)
    if type(value) is not str or value not in words:
        if value is _ABSENT:
            _missing(f"{pointer}/{key}")
        _fault(f"{pointer}/{key}", value, "allowed: " + ", ".join(words))
    return value


def _checked(owner, key, pointer, what, default=None):
    """Return owner[key], a string accepted by `what`, which returns a complaint or None."""
    value = _text(owner, key, pointer, default)
    if value is not None:
        wrong = what(value)
        if wrong:
            _fault(f"{pointer}/{key}", value, wrong)
    return value


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


def wrong_namespace_path(value):
    """As `wrong_absolute_path`; an empty one stands for a new namespace, as in Go."""
    return wrong_absolute_path(value) if value else None


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


_PROC_LINKS = frozenset(("fd", "cwd", "root", "exe", "map_files", "ns"))


def wrong_hostname(value):
    """Say that a host name is longer than the kernel takes, or return None."""
    if len(value.encode("utf-8", "surrogateescape")) > LARGEST_HOSTNAME:
        return f"is longer than {LARGEST_HOSTNAME} bytes"
    return None


def wrong_option(value):
    """Say that an option is empty, or return None."""
    return None if value else "an empty option is not allowed"


def wrong_variable(value):
    """Say that a string is no NAME=VALUE, or return None."""
    return None if value.find("=") > 0 else "NAME=VALUE is allowed"


def wrong_capability(value):
    """Say that a capability has no such name, or return None."""
    return None if value in _CAPABILITIES else "is no capability (capabilities(7))"


def wrong_interface(value):
    """Say what keeps a string from being a network interface's name, or return None.

    dev_valid_name() of the kernel; `%` would make it a pattern there.
    """
    if not 0 < len(value.encode("utf-8", "surrogateescape")) <= 15:
        return "a name of 1 to 15 bytes is allowed"
    if value in (".", "..") or any(c in "/:%" or c.isspace() for c in value):
        return "is no name of a network interface"
    return None


def _each(items, pointer, read_one, problems):
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


# -- shapes -----------------------------------------------------------------------------


def read(document, bundle=None, problems=None, name="config.json"):
    """Return the `Spec` of a parsed document by its shapes alone."""
    found = Spec()
    found.document = document
    if type(document) is not dict:
        error = SpecError(name, "", shown(document), "an object is allowed")
        if problems is None:
            raise error
        problems.append(error)
        return found
    linux = document.get("linux", {})
    for part in _PARTS if type(linux) is dict else _PARTS_OF_ALL:
        try:
            part(document, found, problems)
        except SpecError as error:
            if problems is None:
                raise
            problems.append(error)
    _read_annotations(document, found, bundle, problems)
    return found


def _read_top(document, found, problems):
    found.hostname = _checked(document, "hostname", "", wrong_hostname) or None
    found.domainname = _checked(document, "domainname", "", wrong_hostname) or None
    _keys(document, "", "")
    version = _text(document, "ociVersion", "")
    if version is None:
        _missing("/ociVersion")
    if version[:2] not in ("0.", "1."):
        found.warnings.append(f"ociVersion {shown(version)}: only 1.x is known")


def _read_root(document, found, problems):
    root = _object(document, "root", "root", "")
    if root is None:
        return
    found.root_path = _checked(root, "path", "/root", wrong_path)
    if found.root_path is None:
        _missing("/root/path")
    found.root_readonly = _flag(root, "readonly", "/root")


def _read_mounts(document, found, problems):
    found.mounts = _each(_array(document, "mounts", ""), "/mounts", _mount, problems)


def _mount(entry, index, pointer):
    _require_object(entry, "mount", pointer)
    destination = _checked(entry, "destination", pointer, wrong_inner_path)
    if destination is None:
        _missing(f"{pointer}/destination")
    # An empty source or type is Go's way of leaving it out.
    source = _checked(entry, "source", pointer, wrong_length) or None
    uids = _mappings(entry, "uidMappings", pointer)
    gids = _mappings(entry, "gidMappings", pointer)
    if bool(uids) != bool(gids):
        _fault(
            f"{pointer}/{'gidMappings' if uids else 'uidMappings'}", _ABSENT,
            "is missing: uidMappings and gidMappings come together, or neither",
        )
    return Mount(
        index, destination, _text(entry, "type", pointer) or None, source,
        _strings(entry, "options", pointer, wrong_option), uids, gids,
    )


def _mappings(owner, key, pointer):
    entries = _array(owner, key, pointer)
    if len(entries) > MOST_MAPPINGS:
        _fault(f"{pointer}/{key}", _ABSENT, f"at most {MOST_MAPPINGS} entries are allowed")
    return [
        _mapping(entry, f"{pointer}/{key}/{index}") for index, entry in enumerate(entries)
    ]


def _mapping(entry, pointer):
    _require_object(entry, "mapping", pointer)
    for key in ("containerID", "hostID", "size"):
        if key not in entry:
            _missing(f"{pointer}/{key}")
    return IdMapping(
        _integer(entry, "containerID", pointer, 0, LARGEST_ID),
        _integer(entry, "hostID", pointer, 0, LARGEST_ID),
        _integer(entry, "size", pointer, 1, 2**32 - 1),
    )


def _read_process(document, found, problems):
    pointer = "/process"
    entry = _object(document, "process", "process", "")
    if entry is None:
        return
    process = found.process = Process()
    process.args = _strings(entry, "args", pointer, None)
    if "args" in entry and not process.args:
        _fault("/process/args", entry["args"], "at least one argument is needed")
    process.env = _strings(entry, "env", pointer, wrong_variable)
    process.terminal = _flag(entry, "terminal", pointer)
    process.no_new_privileges = _flag(entry, "noNewPrivileges", pointer)
    process.oom_score_adj = _integer(entry, "oomScoreAdj", pointer, -1000, 1000)
    size = _object(entry, "consoleSize", "consoleSize", pointer)
    if size is not None:
        process.console_size = _console_size(size)
    user = _object(entry, "user", "user", pointer)
    if user is not None:
        _user(user, process)
    sets = _object(entry, "capabilities", "capabilities", pointer)
    if sets is not None:
        process.capabilities = {
            key: _strings(sets, key, "/process/capabilities", wrong_capability)
            for key in sets if key in KNOWN["capabilities"]
        }
    process.rlimits = _each(
        _array(entry, "rlimits", pointer), "/process/rlimits", _rlimit, problems
    )
    cwd = _checked(entry, "cwd", pointer, wrong_cwd)
    if cwd is None:
        _missing("/process/cwd")
    process.cwd = cwd


def _console_size(size):
    # struct winsize holds unsigned shorts.
    height = _integer(size, "height", "/process/consoleSize", 0, 65535)
    width = _integer(size, "width", "/process/consoleSize", 0, 65535)
    if height is None or width is None:
        _missing("/process/consoleSize/" + ("height" if height is None else "width"))
    return height, width


def _user(user, process):
    pointer = "/process/user"
    process.uid = _integer(user, "uid", pointer, 0, LARGEST_ID, 0)
    process.gid = _integer(user, "gid", pointer, 0, LARGEST_ID, 0)
    process.umask = _integer(user, "umask", pointer, 0, 0o777)
    groups = _array(user, "additionalGids", pointer)
    for index, group in enumerate(groups):
        if type(group) is not int or not 0 <= group <= LARGEST_ID:
            _fault(
                f"{pointer}/additionalGids/{index}", group,
                f"a whole number from 0 to {LARGEST_ID} is allowed",
            )
    process.additional_gids = list(groups)


def _rlimit(entry, index, pointer):
    _require_object(entry, "rlimit", pointer)
    name = _word(entry, "type", pointer, RLIMITS)
    soft = _integer(entry, "soft", pointer, 0, UNLIMITED)
    hard = _integer(entry, "hard", pointer, 0, UNLIMITED)
    if soft is None or hard is None:
        _missing(f"{pointer}/" + ("soft" if soft is None else "hard"))
    return name, soft, hard


def _read_linux(document, found, problems):
    linux = _object(document, "linux", "linux", "") or {}
    found.namespaces = _each(
        _array(linux, "namespaces", "/linux"), "/linux/namespaces", _namespace, problems
    )
    found.cgroups_path = _text(linux, "cgroupsPath", "/linux") or None
    found.mount_label = _text(linux, "mountLabel", "/linux") or None
    if "rootfsPropagation" in linux:
        found.rootfs_propagation = _word(linux, "rootfsPropagation", "/linux", PROPAGATIONS)


def _read_paths(document, found, problems):
    linux = document.get("linux", {})
    for key, field in (("maskedPaths", "masked_paths"), ("readonlyPaths", "readonly_paths")):
        if key in linux:
            setattr(found, field, _strings(linux, key, "/linux", wrong_absolute_inner_path))


def _read_mappings(document, found, problems):
    linux = document.get("linux", {})
    found.uid_mappings = _mappings(linux, "uidMappings", "/linux")
    found.gid_mappings = _mappings(linux, "gidMappings", "/linux")


def _namespace(entry, index, pointer):
    _require_object(entry, "namespace", pointer)
    kind = _word(entry, "type", pointer, NAMESPACES)
    path = _checked(entry, "path", pointer, wrong_namespace_path)
    return Namespace(index, kind, path or None)


def _read_devices(document, found, problems):
    found.devices = _each(
        _array(document.get("linux", {}), "devices", "/linux"), "/linux/devices", _device,
        problems,
    )


def _device(entry, index, pointer):
    _require_object(entry, "device", pointer)
    kind = _word(entry, "type", pointer, ("c", "b", "u", "p"))
    path = _checked(entry, "path", pointer, wrong_inner_path)
    if path is None:
        _missing(f"{pointer}/path")
    # A dev_t of the kernel: 12 bits of major, 20 of minor (linux/kdev_t.h).
    major = _integer(entry, "major", pointer, 0, (1 << 12) - 1)
    minor = _integer(entry, "minor", pointer, 0, (1 << 20) - 1)
    if kind != "p" and (major is None or minor is None):
        _missing(f"{pointer}/" + ("major" if major is None else "minor"))
    # Some engines write st_mode whole, with the bits of the type.
    mode = _integer(entry, "fileMode", pointer, 0, 0o177777)
    return Device(
        index, path, kind, major or 0, minor or 0, None if mode is None else mode & 0o7777,
        _integer(entry, "uid", pointer, 0, LARGEST_ID),
        _integer(entry, "gid", pointer, 0, LARGEST_ID),
    )


def _read_kernel(document, found, problems):
    linux = document.get("linux", {})
    values = _object(linux, "sysctl", None, "/linux")
    if values is not None:
        found.sysctl = _string_map(values, "/linux/sysctl")
    offsets = _object(linux, "timeOffsets", None, "/linux")
    if offsets is not None:
        found.time_offsets = {
            clock: _time_offset(clock, entry) for clock, entry in offsets.items()
        }
    devices = _object(linux, "netDevices", None, "/linux")
    if devices is not None:
        found.net_devices = {
            device: _net_device(device, entry) for device, entry in devices.items()
        }
    resources = _object(linux, "resources", "resources", "/linux")
    memory = _object(resources or {}, "memory", "memory", "/linux/resources")
    if memory is not None:
        limit = _integer(memory, "limit", "/linux/resources/memory", -(2**63), 2**63 - 1, -1)
        found.memory_limit = limit if limit > 0 else None


def _string_map(values, pointer):
    for key, value in values.items():
        if type(value) is not str:
            _fault(f"{pointer}/{escaped(key)}", value, "a string is allowed")
        if "\0" in value or "\0" in key:
            _fault(f"{pointer}/{escaped(key)}", value, "holds a NUL")
    return dict(values)


def _time_offset(clock, entry):
    pointer = f"/linux/timeOffsets/{escaped(clock)}"
    if clock not in ("monotonic", "boottime"):
        _fault(pointer, _ABSENT, "allowed: monotonic, boottime")
    _require_object(entry, "timeOffset", pointer)
    return (
        _integer(entry, "secs", pointer, -(2**63), 2**63 - 1, 0),
        _integer(entry, "nanosecs", pointer, 0, 10**9 - 1, 0),
    )


def _net_device(device, entry):
    pointer = f"/linux/netDevices/{escaped(device)}"
    wrong = wrong_interface(device)
    if wrong:
        _fault(pointer, _ABSENT, wrong)
    _require_object(entry, "netDevice", pointer)
    name = _text(entry, "name", pointer)
    wrong = wrong_interface(name) if name else None
    if wrong:
        _fault(f"{pointer}/name", name, wrong)
    return name or None


def _read_annotations(document, found, bundle, problems):
    found.overrides = _annotations.Overrides()
    try:
        values = _object(document, "annotations", None, "")
        if not values:
            return
        found.annotations = _string_map(values, "/annotations")
    except SpecError as error:
        if problems is None:
            raise
        problems.append(error)
        return
    found.overrides = _annotations.Overrides.from_annotations(
        values, bundle, found.warnings, problems
    )
    found.hints = _annotations.hints(values, found.warnings, problems)


def _read_not_applied(document, found, problems):
    """Name what a runtime would apply and `run` doesn't, if it has any effect."""
    process = _object_or_empty(document, "process")
    linux = _object_or_empty(document, "linux")
    resources = _object_or_empty(linux, "resources")
    named = found.not_applied
    if _limits(document.get("hooks")):
        named.append("/hooks")
    for key in ("apparmorProfile", "selinuxLabel", "ioPriority", "scheduler", "execCPUAffinity"):
        value = process.get(key)
        if value and value != "unconfined":
            named.append(f"/process/{key}")
    # cgroupsPath alone limits nothing: it names a place for the limits.
    for key in resources:
        if key == "devices":
            if _denies(resources[key]):
                named.append("/linux/resources/devices")
        elif _limits(resources[key]):
            named.append(f"/linux/resources/{escaped(key)}")
    for key in ("seccomp", "intelRdt", "personality", "memoryPolicy"):
        if linux.get(key):
            named.append(f"/linux/{key}")


def _object_or_empty(owner, key):
    """Return owner[key] if it is an object, else an empty one: its fault is told elsewhere."""
    value = owner.get(key)
    return value if type(value) is dict else {}


def _denies(rules):
    """Return whether device rules of cgroups forbid anything (all is allowed without)."""
    return type(rules) is not list or any(
        type(rule) is not dict or rule.get("allow") is not True for rule in rules
    )


def _limits(value):
    """Return whether a part of `linux.resources` limits anything; 0 and -1 are "unset"."""
    if type(value) is dict:
        return any(_limits(inner) for inner in value.values())
    if type(value) is list:
        return any(_limits(inner) for inner in value)
    return value not in (None, False, 0, -1, "")


_PARTS_OF_ALL = (_read_top, _read_root, _read_process, _read_mounts, _read_linux)
_PARTS = (
    *_PARTS_OF_ALL, _read_mappings, _read_devices, _read_paths, _read_kernel, _read_not_applied,
)


# -- rules between values -----------------------------------------------------------------


def relate(found, problems=None):
    """Check the rules between the values of a `Spec` that was read."""
    for rule in _RULES:
        for error in rule(found):
            if problems is None:
                raise error
            problems.append(error)


def _has(found, kind):
    return any(entry.type == kind for entry in found.namespaces)


def _namespace_rules(found):
    seen = set()
    for entry in found.namespaces:
        if entry.type in seen:
            yield SpecError(
                f"/linux/namespaces/{entry.index}/type", "", f'"{entry.type}"',
                "stands twice; a container has one namespace of a type",
            )
        seen.add(entry.type)
    # Without a namespace of its own the host's name would be changed.
    for key, value in (("hostname", found.hostname), ("domainname", found.domainname)):
        if value and "uts" not in seen:
            yield SpecError(f"/{key}", "", f'"{value}"', "needs a uts namespace")
    for entry in found.namespaces if found.time_offsets else ():
        if entry.type == "time" and entry.path:
            yield SpecError(
                "/linux/timeOffsets", text="can't be set on a time namespace that is joined"
            )
    if found.time_offsets and "time" not in seen:
        yield SpecError("/linux/timeOffsets", text="needs a time namespace")
    if found.net_devices and "network" not in seen:
        yield SpecError("/linux/netDevices", text="needs a network namespace")


def _mapping_rules(found):
    if (found.uid_mappings or found.gid_mappings) and not _has(found, "user"):
        key = "uidMappings" if found.uid_mappings else "gidMappings"
        yield SpecError(f"/linux/{key}", text="needs a user namespace")
    if bool(found.uid_mappings) != bool(found.gid_mappings):
        yield SpecError(
            "/linux/" + ("gidMappings" if found.uid_mappings else "uidMappings"),
            text="is missing: uidMappings and gidMappings come together, or neither",
        )
    for key, mappings in (
        ("/linux/uidMappings", found.uid_mappings), ("/linux/gidMappings", found.gid_mappings),
    ):
        if mappings:
            yield from _range_rules(mappings, key)
    for mount in found.mounts:
        if mount.uid_mappings:
            yield from _range_rules(mount.uid_mappings, f"/mounts/{mount.index}/uidMappings")
            yield from _range_rules(mount.gid_mappings, f"/mounts/{mount.index}/gidMappings")


def _range_rules(mappings, pointer):
    """user_namespaces(7): ranges stay below 2^32 - 1 and overlap on neither side."""
    for field, key in (("container_id", "containerID"), ("host_id", "hostID")):
        ranges = sorted(
            (getattr(mapping, field), mapping.size, index)
            for index, mapping in enumerate(mappings)
        )
        end = 0
        for first, size, index in ranges:
            if first + size > LARGEST_ID + 1:
                yield SpecError(
                    f"{pointer}/{index}", "", f"{key} {first}, size {size}",
                    f"the last id allowed is {LARGEST_ID}",
                )
            if first < end:
                yield SpecError(
                    f"{pointer}/{index}", "", f"{key} {first}, size {size}",
                    "overlaps with another range",
                )
            end = max(end, first + size)


# What lxcfs and checkpointing put there; runc's list (validProcMounts).
_PROC_FILES = frozenset((
    "/proc/cpuinfo", "/proc/diskstats", "/proc/meminfo", "/proc/stat", "/proc/swaps",
    "/proc/uptime", "/proc/loadavg", "/proc/slabinfo", "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/crypto/fips_enabled",
))


def is_bind(mount):
    """Return whether a `Mount` is a bind: by its options, or by its type (runc's habit)."""
    return mount.type == "bind" or "bind" in mount.options or "rbind" in mount.options


def _mount_rules(found):
    for mount in found.mounts:
        bind = is_bind(mount)
        if bind and mount.source is None and "remount" not in mount.options:
            yield SpecError(f"/mounts/{mount.index}/source", text="is missing: a bind needs one")
        if "proc" in mount.destination:
            yield from _proc_rules(mount, bind)
        if mount.destination[0] != "/":
            found.warnings.append(
                f"mounts[{mount.index}]: destination {shown(mount.destination)} is relative, "
                "taken from / (deprecated by the specification)"
            )


def _proc_rules(mount, bind):
    """Over or inside /proc only procfs itself and the files that lxcfs emulates."""
    destination = clean(mount.destination)
    if destination == "/proc":
        if "remount" in mount.options or (not bind and mount.type == "proc"):
            return
        if bind and mount.source is not None and clean(mount.source) == "/proc":
            return
    elif not destination.startswith("/proc/") or destination in _PROC_FILES:
        return
    yield SpecError(
        f"/mounts/{mount.index}/destination", "", f'"{mount.destination}"',
        "over or inside /proc only proc itself is allowed, and the files "
        + ", ".join(sorted(path[len("/proc/"):] for path in _PROC_FILES)),
    )


def _rlimit_rules(found):
    seen = set()
    for index, (name, soft, hard) in enumerate(found.process.rlimits if found.process else ()):
        if name in seen:
            yield SpecError(f"/process/rlimits/{index}/type", "", f'"{name}"', "stands twice")
        seen.add(name)
        if soft > hard:
            yield SpecError(
                f"/process/rlimits/{index}/soft", "", str(soft), f"is more than hard, {hard}"
            )


# ipc_kern_table and mq_sysctl_table of the kernel: what an ipc namespace has of its own.
_IPC_SYSCTLS = frozenset(
    "kernel/" + name
    for name in (
        "auto_msgmni", "msg_next_id", "msgmax", "msgmnb", "msgmni", "sem", "sem_next_id",
        "shm_next_id", "shm_rmid_forced", "shmall", "shmmax", "shmmni",
    )
)


def sysctl_path(key):
    """Return the path below /proc/sys of a sysctl's name, or None if it is no name.

    As sysctl(8) has it: the first of `.` and `/` in it is the separator, the other one
    belongs to the names (``net/ipv4/conf/eth0.1/forwarding``).
    """
    dot, slash = key.find("."), key.find("/")
    if dot >= 0 and (slash < 0 or dot < slash):
        key = key.translate({ord("."): "/", ord("/"): "."})
    parts = key.split("/")
    if len(parts) < 2 or any(part in ("", ".", "..") for part in parts):
        return None
    return key


def _sysctl_rules(found):
    """Only what belongs to a namespace of the container's own can be set."""
    for key in found.sysctl:
        path = sysctl_path(key)
        wrong = _wrong_sysctl(found, path) if path else "is no name of a sysctl"
        if wrong:
            yield SpecError(f"/linux/sysctl/{escaped(key)}", text=wrong)


def _wrong_sysctl(found, path):
    if path in _IPC_SYSCTLS or path.startswith("fs/mqueue/"):
        kind = "ipc"
    elif path.startswith("net/"):
        kind = "network"
    elif path.startswith("user/"):
        kind = "user"
    elif path in ("kernel/hostname", "kernel/domainname"):
        kind = "uts"
        if getattr(found, path[len("kernel/"):]) is not None:
            return f"is set by /{path[len('kernel/'):]} already"
    else:
        return "belongs to no namespace: it would change the host"
    return None if _has(found, kind) else f"needs a namespace of type {kind}"


def _net_device_rules(found):
    seen = set()
    for device, name in found.net_devices.items():
        if (name or device) in seen:
            yield SpecError(
                f"/linux/netDevices/{escaped(device)}", "", f'"{name or device}"',
                "is the name of another device in the container already",
            )
        seen.add(name or device)


_RULES = (
    _namespace_rules, _mapping_rules, _mount_rules, _rlimit_rules, _sysctl_rules,
    _net_device_rules,
)
