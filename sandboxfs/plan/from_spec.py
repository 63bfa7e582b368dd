"""From a spec to a plan: every decision is taken here, nothing is done.

The rules are those of the OCI runtime specification (config.md, config-linux.md); where it is
silent, docs and ARCHITECTURE.md say what was decided.
"""


from sandboxfs.errors import SpecError
from sandboxfs.kernel import abi
from sandboxfs.kernel import system as os
from sandboxfs.plan import survey
from sandboxfs.plan.base import RootPlanner, cleaned
from sandboxfs.plan.operations import (
    Bind,
    Cgroup,
    Console,
    Directory,
    Filesystem,
    Mask,
    Node,
    Pivot,
    Plan,
    ReadonlyPath,
    Seal,
    Symlink,
)
from sandboxfs.spec import options as option_words
from sandboxfs.spec.model import Namespace
from sandboxfs.spec.values import are_clean, enclosed

# config-linux.md, "Default Devices".
DEFAULT_DEVICES = (
    ("/dev/null", 1, 3), ("/dev/zero", 1, 5), ("/dev/full", 1, 7),
    ("/dev/random", 1, 8), ("/dev/urandom", 1, 9), ("/dev/tty", 5, 0),
)
# runtime-linux.md, "Dev symbolic links".
DEVICE_SYMLINKS = (
    ("/dev/fd", "/proc/self/fd", None), ("/dev/stdin", "/proc/self/fd/0", None),
    ("/dev/stdout", "/proc/self/fd/1", None), ("/dev/stderr", "/proc/self/fd/2", None),
    ("/dev/ptmx", "pts/ptmx", None), ("/dev/core", "/proc/kcore", "/proc/kcore"),
)
# A superblock of their own device: `ro` has to reach it, so that nothing is replayed or written.
_WITHOUT_DEVICE = {
    "tmpfs", "ramfs", "proc", "sysfs", "devpts", "mqueue", "cgroup", "cgroup2", "devtmpfs",
    "debugfs", "tracefs", "securityfs", "configfs", "bpf", "hugetlbfs", "pstore", "fusectl",
    "overlay", "binfmt_misc", "efivarfs", "rpc_pipefs",
}
# Namespace whose owner alone may mount a fresh instance, and the host's path to bind instead.
_PSEUDO = {
    "proc": ("pid", "/proc"), "sysfs": ("network", "/sys"),
    "mqueue": ("ipc", "/dev/mqueue"), "cgroup2": ("cgroup", "/sys/fs/cgroup"),
}
_LABELLED = {"tmpfs", "ramfs", "devpts", "devtmpfs", "ext4", "xfs", "btrfs", "overlay", "hugetlbfs"}


def plan(spec, facts=None):
    """Return the `Plan` of a `Spec`.

    facts: a `survey.Facts`, by default those of this process.  Raises SpecError for what the
    document asks in contradiction, MountError for what this user can't have.
    """
    result = Plan(spec)
    result.engine = spec.overrides.engine or "auto"
    work = Planner(result, facts or survey.facts())
    work.namespaces()
    work.root()
    work.mounts()
    work.tmp()
    work.directory()
    work.devices()
    work.masks()
    work.finish()
    return result


class Planner(RootPlanner):
    """One pass over one spec; every method appends to the plan.

    is_shared: whether a mount is, so that what lies below it reaches its peers.
    """

    def __init__(self, result, facts):
        super().__init__(result, facts)
        self.propagating = []
        self.is_shared = False

    # -- who and where ---------------------------------------------------------------

    def namespaces(self):
        spec, result = self.spec, self.plan
        user = None
        for namespace in spec.namespaces:
            if namespace.type == "user":
                user = namespace
            else:
                result.namespaces.append(namespace)
        if not any(namespace.type == "mount" for namespace in result.namespaces):
            result.namespaces.append(Namespace(None, "mount", None))
            self.note("linux.namespaces", "mount: made although not listed, so that no mount "
                      "reaches the host")
        if user is not None:
            result.user = self.user_namespace(user)
        elif not self.facts.privileged:
            result.user = self.user_namespace(Namespace(None, "user", None))
            self.note("linux.namespaces", "user: made although not listed, since this user may "
                      "not mount without")
        if spec.time_offsets and not result.new_namespace("time"):
            raise SpecError("/linux/timeOffsets", "", "", "needs a new time namespace",
                            hint='add {"type": "time"} to linux.namespaces')
        if result.user is not None and result.user.outside:
            from sandboxfs.plan import users

            users.refuse_user_sysctls(spec)
        result.warnings.extend(spec.warnings)

    # -- mounts ----------------------------------------------------------------------

    def mounts(self):
        hints = {hint.source: hint for hint in self.spec.hints}
        mounts = self.spec.mounts
        paths = destinations = [mount.destination for mount in mounts]
        if not are_clean(enclosed(destinations)):
            paths = [cleaned(destination) for destination in destinations]
        add, by_destination = self.plan.operations.append, self.by_destination
        known, usual, before = {}, {}, len(self.plan.operations)
        for mount, path in zip(mounts, paths, strict=True):
            # Most of a long list are binds, and what their words come to was found once.
            words = usual.get(mount.options)
            source = mount.source
            if (words is not None and source and source[0] == "/" and not mount.uid_mappings
                    and path is mount.destination and path != "/"):
                by_destination[path] = operation = Bind(
                    f"mounts[{mount.index}]", path, source, words)
                add(operation)
                continue
            words = known.get(mount.options)
            if words is None:
                words = known[mount.options] = option_words.parse(
                    mount.options, f"/mounts/{mount.index}/options")
            self.any_mount(mount, path, words, hints)
            if self.is_shared or hints:
                usual.clear()
            elif self.is_usual_bind(words):
                usual[mount.options] = words
        self.nested(self.plan.operations[before:] + self.propagating)
        if hints:
            from sandboxfs.plan import volumes

            volumes.check_hints(self)

    def is_usual_bind(self, words):
        """Whether a bind with these words is what `bind` makes of an absolute source, no more."""
        return words.bind and not (
            words.data or words.copy_up or words.idmap or words.remount or words.warnings
            or words.no_effect or words.propagation == abi.MS_SHARED
            or self.overrides.overlay_binds
        )

    def any_mount(self, mount, path, words, hints):
        """Add one mount.  path: its destination, cleaned.  words: its `Options`."""
        origin = f"mounts[{mount.index}]"
        for warning in words.warnings:
            self.plan.warnings.append(f"{origin}: {warning}")
        for word in words.no_effect:
            self.note(origin, f"option {word}: no effect, the new mount API has no such flag")
        if words.remount:
            self.remount(mount, path, words)
            return
        operation = self.mount(mount, words, origin, hints.get(mount.source))
        operation.no_follow = words.destination_no_follow
        operation.propagation = words.propagation
        operation.propagation_recursive = words.propagation_recursive
        self.place(operation, path)

    def mount(self, mount, words, origin, hint):
        is_bind = words.bind or mount.type == "bind"
        if hint is not None and hint.type == "tmpfs" and hint.share != "shared":
            from sandboxfs.plan import volumes

            return volumes.hinted(self, mount, words, origin, hint)
        if is_bind:
            return self.bind(mount, words, origin)
        self.refuse_bind_words(mount, words)
        if mount.type == "cgroup":
            own = any(entry.type == "cgroup" for entry in self.plan.namespaces)
            operation = Cgroup(origin, mount.destination, own)
            operation.attributes, operation.cleared = self.own_attributes(words)
            return operation
        return self.filesystem(mount, words, origin)

    def refuse_bind_words(self, mount, words):
        pointer = f"/mounts/{mount.index}"
        if words.idmap or mount.uid_mappings or mount.gid_mappings:
            raise SpecError(pointer, "", mount.destination, "only a bind can be idmapped")
        if not mount.type:
            raise SpecError(pointer + "/type", "", "", "a mount that is no bind needs a type")
        if words.copy_up and mount.type != "tmpfs":
            raise SpecError(pointer + "/options", "", "tmpcopyup", "only a tmpfs can be filled")

    def own_attributes(self, words):
        """A new file system is one mount: the words for a tree mean it."""
        attributes = words.attributes & ~words.tree_cleared | words.tree_attributes
        return attributes, words.cleared & ~words.tree_attributes | words.tree_cleared

    def filesystem(self, mount, words, origin):
        operation = Filesystem(origin, mount.destination, mount.type, mount.source or mount.type)
        operation.attributes, operation.cleared = self.own_attributes(words)
        operation.data = list(words.data)
        operation.flags = list(words.superblock)
        operation.copy_up = words.copy_up
        operation.real_directory = mount.type in ("proc", "sysfs")
        keys = {key for key, _value in words.data}
        if mount.type == "tmpfs" and "mode" not in keys:
            operation.mode_from_mountpoint = True
        self.read_only_superblock(operation)
        self.map_owner(operation)
        self.fallback(operation)
        self.label(operation, keys)
        return operation

    def read_only_superblock(self, operation):
        """A file system on a device is read-only as a whole, so that no journal is replayed."""
        if operation.type not in _WITHOUT_DEVICE and operation.attributes & abi.MOUNT_ATTR_RDONLY:
            operation.flags.append("ro")

    def map_owner(self, operation):
        """uid= and gid= are the container's: from outside they need the host's numbers."""
        user = self.plan.user
        if user is None or not user.outside or operation.type not in ("tmpfs", "devpts"):
            return
        keys = set()
        for index, (key, value) in enumerate(operation.data):
            keys.add(key)
            if key in ("uid", "gid") and value and value.isdigit():
                mapped = (user.host_uid if key == "uid" else user.host_gid)(int(value))
                if mapped is None:
                    raise SpecError(operation.origin, "", f"{key}={value}",
                                    "the id isn't mapped in the container's user namespace")
                operation.data[index] = (key, str(mapped))
        if operation.type == "tmpfs":
            for key, root in (("uid", user.root_uid), ("gid", user.root_gid)):
                if key not in keys and root:
                    operation.data.append((key, str(root)))

    def fallback(self, operation):
        """Where the kernel may refuse a fresh instance, the host's own is bound instead."""
        namespace, path = _PSEUDO.get(operation.type, (None, None))
        if namespace is None or self.plan.new_namespace(namespace):
            return
        inside = self.plan.user is not None and not self.plan.user.outside
        if inside or not self.facts.initial_user_namespace or operation.type == "cgroup2":
            operation.fallback_bind = path
            operation.tree_attributes = operation.attributes
            operation.tree_cleared = operation.cleared

    def label(self, operation, keys):
        label = self.spec.mount_label
        if not label or keys.intersection(option_words.LABELS):
            return
        if not self.facts.selinux:
            return
        if operation.type in _LABELLED or operation.type == "mqueue":
            operation.label = label

    def bind(self, mount, words, origin):
        if mount.source is None:
            raise SpecError(f"/mounts/{mount.index}", "", mount.destination,
                            "a bind needs a source")
        self.refuse_data(mount, words)
        source = mount.source
        if not os.path.isabs(source):
            source = os.path.join(self.spec.bundle or os.getcwd(), source)
        operation = Bind(origin, mount.destination, source, words)
        operation.idmap, operation.idmap_recursive = self.idmap(mount, words)
        read_only = (operation.attributes | operation.tree_attributes) & abi.MOUNT_ATTR_RDONLY
        operation.overlay = bool(self.overrides.overlay_binds) and not read_only
        return operation

    def refuse_data(self, mount, words):
        for (key, _value), index in zip(words.data, words.pointers, strict=True):
            raise SpecError(f"/mounts/{mount.index}/options/{index}", "", mount.options[index],
                            f"no mount option {key!r} for a bind",
                            hint="a bind takes flags only; a file system's own options need a "
                            "mount of that type")
        if words.copy_up:
            raise SpecError(f"/mounts/{mount.index}/options", "", "tmpcopyup",
                            "only a tmpfs can be filled")

    def idmap(self, mount, words):
        if not words.idmap and not mount.uid_mappings:
            return None, False
        if mount.uid_mappings:
            return (mount.uid_mappings, mount.gid_mappings), words.idmap == "ridmap"
        if self.plan.user is None:
            raise SpecError(f"/mounts/{mount.index}/options", "", words.idmap,
                            "neither the mount nor the container has mappings",
                            hint="give the mount uidMappings and gidMappings, or the container "
                            "a user namespace")
        return "container", words.idmap == "ridmap"

    def remount(self, mount, path, words):
        """Fold the flags into the mount at the destination, before it is attached."""
        target = self.by_destination.get(path)
        if target is None:
            raise SpecError(f"/mounts/{mount.index}/destination", "", mount.destination,
                            "remount, but no earlier mount of this list has that destination")
        attributes, cleared = words.attributes, words.cleared
        if isinstance(target, Bind):
            self.refuse_data(mount, words)
            tree, tree_cleared = words.tree_attributes, words.tree_cleared
            target.tree_attributes = target.tree_attributes & ~tree_cleared | tree
            target.tree_cleared = target.tree_cleared & ~tree | tree_cleared
        else:
            attributes, cleared = self.own_attributes(words)
        target.attributes = target.attributes & ~cleared | attributes
        target.cleared = target.cleared & ~attributes | cleared
        if isinstance(target, Filesystem):
            target.data += words.data
            target.flags = [word for word in target.flags if word != "ro"] + words.superblock
            self.read_only_superblock(target)
        if words.propagation:
            self.is_shared = self.is_shared or words.propagation == abi.MS_SHARED
            target.propagation = words.propagation
            target.propagation_recursive = words.propagation_recursive
        self.note(f"mounts[{mount.index}]", f"remount: folded into {target.origin}")

    def place(self, operation, path):
        if path == "/":
            raise SpecError(pointer(operation.origin), "", operation.destination,
                            "the root itself can't be a mount's destination",
                            hint="root.path says what the root is")
        if not operation.destination.startswith("/"):
            self.note(operation.origin, f"destination {operation.destination}: relative, taken "
                      "from /")
        if self.is_shared and self.below_shared(path):
            self.propagating.append(operation)
            self.note(operation.origin, "lies below a shared bind: the mount reaches that bind's "
                      "peers at once, so it is made last")
        else:
            self.add(operation)
        self.is_shared = self.is_shared or operation.propagation == abi.MS_SHARED
        self.by_destination[path] = operation

    def below_shared(self, destination):
        path = destination
        while path != "/":
            path = os.path.dirname(path)
            above = self.by_destination.get(path)
            if above is not None and (
                above.propagation == abi.MS_SHARED or above in self.propagating
            ):
                return True
        return False

    def nested(self, placed):
        """Tell read-only mounts what later ones will need inside them."""
        by_destination = self.by_destination
        self.find_above({path[:path.rindex("/")] for path in by_destination})
        covering = self.above.intersection(by_destination)
        # Where nothing lies on something else, that is all there is to know.
        if len(by_destination) == len(placed) and not any(
            _may_be_read_only(by_destination[path]) for path in covering
        ):
            return
        paths = dict(zip(by_destination.values(), by_destination, strict=True))
        read_only = {}
        for operation in placed:
            path = destination = paths.get(operation) or cleaned(operation.destination)
            while path and read_only:
                path = path[:path.rindex("/")]
                if path in read_only:
                    read_only[path].nested += (destination[len(path) + 1:],)
                    break
            if _may_be_read_only(operation):
                read_only[destination] = operation

    # -- after the mounts ------------------------------------------------------------

    def directory(self):
        process = self.plan.process
        if process is not None and process.cwd != "/":
            self.add(Directory("process.cwd", process.cwd))

    def devices(self):
        over_dev = self.by_destination.get("/dev")
        if isinstance(over_dev, Bind):
            self.note("/dev", f"no default devices and links, {over_dev.origin} binds the host's")
            if self.spec.devices:
                self.note("linux.devices", "not made: /dev is the host's")
            return
        by_bind = self.plan.user is not None
        asked = {cleaned(device.path): device for device in self.spec.devices}
        for path, major, minor in DEFAULT_DEVICES:
            if path not in asked and path not in self.by_destination:
                self.add(Node("default", path, "c", major, minor, 0o666, 0, 0, by_bind))
        for device in self.spec.devices:
            kind = "c" if device.type == "u" else device.type
            mode = 0o666 if device.mode is None else device.mode & 0o7777
            self.add(Node(f"linux.devices[{device.index}]", device.path, kind, device.major,
                          device.minor, mode, device.uid or 0, device.gid or 0,
                          by_bind and kind != "p"))
        for path, target, only_if in DEVICE_SYMLINKS:
            if path not in self.by_destination and path not in asked:
                self.add(Symlink("default", path, target, only_if))
        if self.plan.process is not None and self.plan.process.terminal:
            self.add(Console("process.terminal", self.plan.process.console_size))

    def masks(self):
        for index, path in enumerate(self.spec.masked_paths):
            self.add(Mask(f"linux.maskedPaths[{index}]", path))
        for index, path in enumerate(self.spec.readonly_paths):
            self.add(ReadonlyPath(f"linux.readonlyPaths[{index}]", path))

    def finish(self):
        self.plan.operations += self.propagating
        if self.spec.root_readonly:
            self.add(Seal("root.readonly"))
        number = 0
        if self.spec.rootfs_propagation:
            number, recursive = option_words.propagation(self.spec.rootfs_propagation)
            if number in (abi.MS_PRIVATE, abi.MS_SLAVE):
                # Every mount of the root is private unless its own words say otherwise.
                self.note("linux.rootfsPropagation",
                          f"{self.spec.rootfs_propagation}: nothing to change, the root is "
                          "private and binds keep the words of their own")
                number = 0
            elif recursive:
                number |= abi.MS_REC
        self.add(Pivot("linux.rootfsPropagation" if number else "default", number))
        if self.spec.mount_label and not self.facts.selinux:
            self.plan.warnings.append(
                "linux.mountLabel: this kernel has no SELinux: no label is set"
            )


def _may_be_read_only(operation):
    """Whether a mount may be read-only, so that what is missing in it has to be known ahead."""
    attributes = operation.attributes | getattr(operation, "tree_attributes", 0)
    return type(operation) is Bind or attributes & abi.MOUNT_ATTR_RDONLY


def pointer(origin):
    """Return the JSON pointer of ``mounts[3]``."""
    return "/" + origin.replace("[", "/").replace("]", "").replace(".", "/")
