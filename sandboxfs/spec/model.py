"""The parts of an OCI runtime spec that sandboxfs reads, as plain objects.

Nothing here interprets anything: a field holds what the document says, with the spec's
defaults filled in.  Pointers (`/mounts/3`) say where a value came from.
"""

from sandboxfs.errors import SpecError


class Mount:
    """One entry of `mounts` (config.md, "Mounts").

    options: tuple of the words as written; mostly the same object for the same words.
    """

    __slots__ = (
        "destination", "gid_mappings", "index", "options", "source", "type", "uid_mappings",
    )

    def __init__(self, index, destination, type, source, options, uid_mappings, gid_mappings):
        self.index = index
        self.destination = destination
        self.type = type
        self.source = source
        self.options = options
        self.uid_mappings = uid_mappings
        self.gid_mappings = gid_mappings


class IdMapping:
    """One range of `uidMappings` or `gidMappings` (config-linux.md, "User namespace mappings")."""

    __slots__ = ("container_id", "host_id", "size")

    def __init__(self, container_id, host_id, size):
        self.container_id = container_id
        self.host_id = host_id
        self.size = size


class Namespace:
    """One entry of `linux.namespaces`: its type (``"mount"``) and path, or None for a new one."""

    __slots__ = ("index", "path", "type")

    def __init__(self, index, type, path):
        self.index = index
        self.type = type
        self.path = path


class Device:
    """One entry of `linux.devices`; `mode` is an int or None, `uid` and `gid` ints or None."""

    __slots__ = ("gid", "index", "major", "minor", "mode", "path", "type", "uid")

    def __init__(self, index, path, type, major, minor, mode, uid, gid):
        self.index = index
        self.path = path
        self.type = type
        self.major = major
        self.minor = minor
        self.mode = mode
        self.uid = uid
        self.gid = gid


class Process:
    """`process` (config.md, "Process").

    args and env: lists of str.  rlimits: list of (name, soft, hard), -1 meaning unlimited
    is written as the document has it (an unsigned 64 bit number).  capabilities: dict from
    set name (``"bounding"``) to a list of ``CAP_…`` names, or None when the document has no
    `capabilities`.  console_size: (height, width) or None.  umask, oom_score_adj: int or None.
    """

    __slots__ = (
        "additional_gids", "args", "capabilities", "console_size", "cwd", "env", "gid",
        "no_new_privileges", "oom_score_adj", "rlimits", "terminal", "uid", "umask",
    )

    def __init__(self):
        self.args = []
        self.env = []
        self.cwd = "/"
        self.terminal = False
        self.console_size = None
        self.uid = 0
        self.gid = 0
        self.additional_gids = []
        self.umask = None
        self.capabilities = None
        self.no_new_privileges = False
        self.rlimits = []
        self.oom_score_adj = None


class Spec:
    """A loaded config.json.

    bundle: absolute path of the bundle, or None.  document: the parsed JSON.  root_path:
    `root.path` as written; root_origin: where it was given, ``--rootfs`` on a command line.
    overrides: `Overrides` (annotations of ``dev.sandboxfs.``; the command line
    writes its own on top).  hints: list of `spec.annotations.Hint`.  not_applied: pointers of
    parts that belong to a runtime and that `run` does not apply (``/linux/seccomp``).
    memory_limit: bytes or None.
    """

    __slots__ = (
        "annotations", "bundle", "cgroups_path", "devices", "document", "domainname",
        "gid_mappings", "hints", "hostname", "masked_paths", "memory_limit", "mount_label",
        "mounts", "namespaces", "net_devices", "not_applied", "overrides", "process",
        "readonly_paths", "root_origin", "root_path", "root_readonly", "rootfs_propagation",
        "source_name", "sysctl", "time_offsets", "uid_mappings", "warnings",
    )

    def __init__(self):
        self.bundle = None
        self.source_name = "config.json"
        self.document = {}
        self.root_path = None
        self.root_origin = "root.path"
        self.root_readonly = False
        self.mounts = []
        self.process = None
        self.hostname = None
        self.domainname = None
        self.annotations = {}
        self.overrides = Overrides()
        self.hints = []
        self.namespaces = []
        self.uid_mappings = []
        self.gid_mappings = []
        self.devices = []
        self.masked_paths = []
        self.readonly_paths = []
        self.rootfs_propagation = None
        self.mount_label = None
        self.sysctl = {}
        self.time_offsets = {}
        self.net_devices = {}
        self.memory_limit = None
        self.cgroups_path = None
        self.not_applied = []
        self.warnings = []


class Overrides:
    """What annotations or the command line ask for beyond the document; None is unset.

    overlay: ``"tmpfs"``, ``"none"`` or ``"dir"``, the last with overlay_path (absolute) and
    overlay_keep.  overlay_size: a value for tmpfs's ``size=``.  overlay_binds: bool.
    tmp: ``"auto"``, ``"tmpfs"``, ``"keep"``.  engine: ``"auto"``, ``"detached"``,
    ``"attached"``.  lowers: absolute paths, topmost first; they lie below `root.path`.
    origins: where each key was set (``{"overlay": "--overlay"}``); `lower` has a list.
    """

    __slots__ = (
        "engine", "lowers", "origins", "overlay", "overlay_binds", "overlay_keep",
        "overlay_path", "overlay_size", "tmp",
    )

    def __init__(self):
        self.overlay = None
        self.overlay_path = None
        self.overlay_keep = False
        self.overlay_size = None
        self.overlay_binds = None
        self.tmp = None
        self.engine = None
        self.lowers = []
        self.origins = {}

    def set(self, key, value, origin, error=SpecError, base=None):
        """Set a key from its text: see `spec.annotations.override`."""
        from sandboxfs.spec import annotations

        annotations.override(self, key, value, origin, error, base)

    def merge(self, stronger):
        """Take over all that `stronger` sets; its lowers replace ours."""
        if stronger.overlay is not None:
            self.overlay = stronger.overlay
            self.overlay_path = stronger.overlay_path
            self.overlay_keep = stronger.overlay_keep
        for field in ("overlay_size", "overlay_binds", "tmp", "engine"):
            if getattr(stronger, field) is not None:
                setattr(self, field, getattr(stronger, field))
        if stronger.lowers:
            self.lowers = list(stronger.lowers)
        self.origins.update(stronger.origins)
