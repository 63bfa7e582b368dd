"""From a spec and what a runtime has mounted already to a plan: the hook's decisions.

The runtime has made every mount of the spec below the rootfs.  The new root is an overlay of
the rootfs onto which these mounts are moved: their flags, their nesting and what the runtime has
put there by itself (devices, masks, a console) stay as they are, and what it still does to them
after the hook counts.  What an annotation changes is made anew: volumes, overlays over binds, /tmp.
"""

from sandboxfs.errors import HookError, SpecError
from sandboxfs.kernel import abi, mounttable
from sandboxfs.kernel import system as os
from sandboxfs.plan import survey
from sandboxfs.plan.operations import (
    Attach,
    Carry,
    Directory,
    Filesystem,
    Lower,
    Note,
    Overlay,
    PlainRoot,
    Plan,
    ReadonlyMount,
    ReadonlyPath,
    Seal,
    SetAside,
    Tmp,
)
from sandboxfs.spec.annotations import REPLICA_SOURCE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sandboxfs.kernel.mountinfo import MountRecord

_RDONLY = abi.MOUNT_ATTR_RDONLY


def wanted_places(spec):
    """Return the entries of `spec.mounts` whose places in the live table the plan depends on."""
    sources = {hint.source for hint in spec.hints if _is_volume(hint)}
    every_bind = bool(spec.overrides.overlay_binds)
    return [mount for mount in spec.mounts
            if mount.source in sources or (every_bind and _is_bind(mount))]


def plan(spec, live, facts=None, container_id=None):
    """Return the `Plan` of a `Spec` whose mounts are there already.

    live: a `plan.live.Live`, with the places of `wanted_places`.  facts: a `survey.Facts`, by
    default those of this process.  container_id: the name of ``overlay=dir=``'s directory.
    Raises SpecError for what the document asks in contradiction, HookError for what the
    runtime's mounts don't allow.
    """
    result = Plan(spec)
    result.live = live
    result.container_id = container_id
    result.engine = spec.overrides.engine or "auto"
    result.warnings.extend(spec.warnings)
    work = _Carrier(result, facts or survey.facts())
    work.root()
    work.changes()
    work.mounts()
    work.tmp()
    work.finish()
    return result


def changes_anything(plan: Plan) -> bool:
    """Return whether a plan makes anything else of the rootfs than what the runtime has made."""
    return type(plan.operations[0]) is not PlainRoot or any(
        type(step) in (Filesystem, Tmp) or (type(step) is Carry and step.overlay)
        for step in plan.operations
    )


def _is_volume(hint):
    return hint.type == "tmpfs" and hint.share != "shared"


def _is_bind(mount):
    return mount.type == "bind" or "bind" in mount.options or "rbind" in mount.options


class _Carrier:
    """One pass over one live table; every method appends to the plan."""

    def __init__(self, result, facts):
        self.plan = result
        self.spec = result.spec
        self.live = result.live
        self.facts = facts
        self.overrides = result.spec.overrides
        # Ids of mounts that aren't simply carried: to what is made instead, or None for an overlay.
        self.changed = {}
        self.origins = {}
        self.read_table()
        self.read_only = _read_only(result)

    def add(self, operation):
        self.plan.operations.append(operation)

    def note(self, origin, text):
        self.plan.notes.append(Note(origin, text))

    def read_table(self):
        """Say what lies on what: `children` of everything, `on` of what is seen only."""
        live = self.live
        hidden = mounttable.hidden([live.root, *live.records])
        self.by_id = {live.root.id: live.root}
        self.children = {}
        self.on = {}
        self.parents = {}
        for record in live.records:
            self.by_id[record.id] = record
            self.children.setdefault(record.parent_id, []).append(record)
            if record.id in hidden:
                continue
            # What is seen on top of a stack lies on what the stack lies on.
            parent = self.by_id[record.parent_id]
            while parent.id in hidden:
                parent = self.by_id[parent.parent_id]
            self.parents[record.id] = parent.id
            self.on.setdefault(parent.id, []).append(record)
        for mount in self.spec.mounts:
            self.origins[os.fsencode(_cleaned(mount.destination))] = f"mounts[{mount.index}]"

    # -- the root --------------------------------------------------------------------

    def root(self):
        spec, overrides = self.spec, self.overrides
        origin, path = spec.root_origin, self.live.path
        mode = overrides.overlay or "tmpfs"
        if mode == "none":
            if overrides.lowers:
                raise SpecError("overlay", "", "none", "further lowers need an overlay")
            self.add(PlainRoot(origin, path, False))
            self.note("overlay", "none: the rootfs itself, and what the runtime makes of it")
            return
        self.add(Lower(origin, path, False))
        for index, lower in enumerate(overrides.lowers or ()):
            self.add(Lower(f"lower[{index}]", lower, True))
        upper, keep, size = None, False, overrides.overlay_size
        if mode == "dir":
            upper, keep = overrides.overlay_path, overrides.overlay_keep
        elif size is None and spec.memory_limit and spec.memory_limit > 0:
            size = str(spec.memory_limit // 2)
            self.note("overlay.size", f"{size}: half of linux.resources.memory.limit")
        self.add(Overlay("overlay", upper, size, keep, self.plan.container_id,
                         not self.facts.initial_user_namespace))

    # -- what isn't simply carried ---------------------------------------------------

    def changes(self):
        hints = {hint.source: hint for hint in self.spec.hints if _is_volume(hint)}
        last = {_cleaned(mount.destination): mount for mount in self.spec.mounts}
        used = set()
        for mount in self.spec.mounts if hints else ():
            hint = hints.get(mount.source)
            if hint is None:
                continue
            used.add(hint.source)
            if last[_cleaned(mount.destination)] is not mount:
                self.note(f"mounts[{mount.index}]",
                          f"hint {hint.name}: a later mount hides this one")
                continue
            self.volume(mount, hint)
        for hint in self.spec.hints:
            if hint.source not in used:
                self.note(hint.origin, f"hint {hint.name}: " + (
                    f"no mount has source {hint.source}" if _is_volume(hint) else
                    f"{hint.type}, share={hint.share}: the mount is left as it is"))
        if self.overrides.overlay_binds:
            self.overlay_binds()
        if self.overrides.overlay != "none":
            self.readonly_paths()

    def readonly_paths(self):
        """Bind read-only paths of the root anew, which crun has made by now.

        Its binds show the rootfs itself, and the last ones become read-only after the hook.
        """
        root = self.live.root
        base = root.root.rstrip(b"/")
        for record in self.on.get(root.id, ()):
            if (record.device == root.device and record.root == base + record.mountpoint
                    and self.origin(record) == "runtime"):
                path = os.fsdecode(record.mountpoint)
                self.changed[record.id] = ReadonlyPath("linux.readonlyPaths", path)

    def volume(self, mount, hint):
        """A pod's volume is there already, by createRuntime; a container's own is made here."""
        from sandboxfs.plan import volumes
        from sandboxfs.spec import options as option_words

        origin = f"mounts[{mount.index}]"
        record = self.by_id.get(self.live.places.get(mount.index))
        if record is None or record is self.live.root:
            raise HookError(origin, "", mount.destination, "the runtime has mounted nothing there")
        if record.type == b"proc":
            raise HookError(origin, "", mount.destination,
                            "a symlink on the path leads into procfs")
        if hint.share == "pod" and volumes.pod(self.spec.annotations):
            if record.type == b"tmpfs" and record.source == os.fsencode(REPLICA_SOURCE + hint.name):
                return
            raise HookError(
                origin, "", mount.destination, f"the volume of hint {hint.name}, shared in the "
                "pod, isn't mounted there: createRuntime makes it",
                hint="register sandboxfs as createRuntime hook too (sandboxfs hooks install)")
        operation = volumes.volume(self.plan, self.facts, mount, origin, hint)
        words = option_words.parse(mount.options, f"/mounts/{mount.index}/options")
        option_words.refuse_lost_flags(mount, words, operation.attributes)
        operation.destination = os.fsdecode(record.mountpoint)
        self.changed[record.id] = operation

    def overlay_binds(self):
        """Every writable bind gets an overlay, and what is mounted below one with it."""
        for mount in self.spec.mounts:
            record = self.by_id.get(self.live.places.get(mount.index))
            if record is None or not _is_bind(mount) or record.id in self.changed:
                continue
            pending = [record]
            while pending:
                record = pending.pop()
                if not (record.attributes & _RDONLY or self.read_only.get(record.mountpoint)):
                    self.changed[record.id] = None
                pending += [each for each in self.on.get(record.id, ())
                            if self.origin(each) == "runtime"]

    # -- the mounts ------------------------------------------------------------------

    def mounts(self):
        # Ids of the mounts that are moved, of those with something below them that isn't, and of
        # what is made anew: to the destination of the `SetAside` that it lies on, or None.
        self.moved = set()
        self.split = set()
        self.aside = {}
        for number in self.changed:
            while number in self.parents:
                number = self.parents[number]
                self.split.add(number)
        pending = self.on.get(self.live.root.id, [])[::-1]
        while pending:
            record = pending.pop()
            if self.place(record):
                pending += self.on.get(record.id, [])[::-1]

    def place(self, record):
        """Add what becomes of one mount; returns whether those on it don't come by themselves."""
        parent = self.parents[record.id]
        if record.id in self.changed:
            self.make_anew(record, parent)
            return True
        self.moved.add(record.id)
        if parent not in self.moved:
            operation = Carry(self.origin(record), record)
            self.add(operation)
            operation.split = record.id in self.split
            operation.aside = self.aside.get(parent)
            tree = list(self.tree(record))
            operation.below = tuple([os.fsdecode(each.mountpoint) for each in tree])
            operation.unbindable = tuple([
                os.fsdecode(each.mountpoint) for each in (record, *tree)
                if each.propagation & abi.MS_UNBINDABLE and each.id in self.parents
            ])
        return True

    def make_anew(self, record: "MountRecord", parent: int) -> None:
        origin = self.origin(record)
        self.aside[record.id] = self.aside.get(parent)
        if parent in self.moved:
            below = self.by_id[record.parent_id]
            if below.propagation & abi.MS_SHARED:
                raise HookError(
                    origin, "", os.fsdecode(below.mountpoint), "is a shared mount, and something "
                    "below it is to be made anew: that would reach the host",
                    hint="make the mount private, or leave the annotation of what lies below it "
                    "out")
            self.add(SetAside(origin, record, os.fsdecode(self.by_id[parent].mountpoint)))
            self.aside[record.id] = os.fsdecode(record.mountpoint)
        operation = self.changed[record.id]
        if operation is None:
            operation = Carry(origin, record)
            operation.overlay = True
            operation.aside = self.aside[record.id]
            operation.propagation = 0
            # The ids are mapped below the overlay.
            operation.attributes &= ~abi.MOUNT_ATTR_IDMAP
        self.add(operation)

    def tree(self, record):
        """Yield what comes with a mount: all that is on it and isn't made anew, hidden or not."""
        pending = self.children.get(record.id, [])[::-1]
        while pending:
            child = pending.pop()
            if child.id not in self.changed:
                yield child
                pending += self.children.get(child.id, [])[::-1]

    def readonly(self) -> None:
        """Set what the spec has read-only and the runtime hasn't set yet: some do after the hook.

        By then a runtime that goes by descriptors or paths finds what was moved; this is in case
        it doesn't.
        """
        wanted, process = self.read_only, self.plan.process
        if process is not None and process.terminal and not any(
                record.mountpoint == b"/dev/console" for record in self.live.records):
            wanted.pop(b"/dev", None)  # runc has yet to make a console there, and seals it then
        for record in self.live.records:
            origin = wanted.get(record.mountpoint)
            if (origin and record.id in self.moved and not record.attributes & _RDONLY
                    and record.root != b"/null"):
                self.add(ReadonlyMount(origin, record))

    def origin(self, record):
        return self.origins.get(record.mountpoint, "runtime")

    # -- after the mounts ------------------------------------------------------------

    def tmp(self):
        mode = self.overrides.tmp or "auto"
        there = next((record.mountpoint for record in self.live.records
                      if record.mountpoint == b"/tmp" or record.mountpoint.startswith(b"/tmp/")
                      ), None)
        if there == b"/tmp":
            self.note("/tmp", "left alone, something is mounted there")
        elif mode == "keep":
            self.note("/tmp", "left alone, as tmp=keep asks")
        elif mode == "auto" and self.overrides.overlay == "none":
            self.note("/tmp", "left alone: with overlay=none only tmp=tmpfs asks for one")
        elif there is not None and mode == "auto":
            self.note("/tmp", f"left alone, {os.fsdecode(there)} is mounted inside")
        else:
            self.add(Tmp("/tmp", mode == "tmpfs"))

    def finish(self):
        spec = self.spec
        if changes_anything(self.plan):
            plain = type(self.plan.operations[0]) is PlainRoot
            process = self.plan.process
            if process is not None and process.cwd != "/" and (spec.root_readonly or not plain):
                # The runtime finds the root sealed when it looks for it.
                self.add(Directory("process.cwd", process.cwd))
            self.readonly()
            if spec.root_readonly and self.is_left_to_the_runtime():
                self.note("root.readonly", "left to the runtime: it has yet to make /dev/console "
                          "in the root, and to seal it afterwards")
            elif spec.root_readonly:
                self.add(Seal("root.readonly"))
        # runc gives the rootfs its propagation before the hook, crun after it.
        shared = self.live.root.propagation & abi.MS_SHARED
        self.add(Attach(spec.root_origin, self.live.path, shared))

    def is_left_to_the_runtime(self):
        """Runc makes the console after the hook, and then seals; crun does without, or has done it.

        Crun would seal what it has a descriptor of, the rootfs.
        """
        process = self.plan.process
        if process is None or not process.terminal or not self.live.is_runc:
            return False
        return not any(record.mountpoint in (b"/dev", b"/dev/console")
                       for record in self.live.records)


def _cleaned(destination):
    path = os.path.normpath("/" + destination)
    return path[1:] if path.startswith("//") else path


def _read_only(plan: Plan) -> "dict[bytes, str | None]":
    """Return what the spec has read-only: path (bytes) → origin, None for what it hasn't."""
    spec, found = plan.spec, {}
    for mount in spec.mounts:
        found[os.fsencode(_cleaned(mount.destination))] = (
            f"mounts[{mount.index}]" if _is_readonly(mount.options) else None)
    for name, paths in (("masked", spec.masked_paths), ("readonly", spec.readonly_paths)):
        for index, path in enumerate(paths):
            found[os.fsencode(_cleaned(path))] = f"linux.{name}Paths[{index}]"
    return found


def _is_readonly(options: "list[str]") -> bool:
    """Return what the last word of a mount's options says of it."""
    for word in reversed(options):
        if word in ("ro", "rro", "rw", "rrw"):
            return word in ("ro", "rro")
    return False
