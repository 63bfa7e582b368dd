"""From a spec and what a runtime has mounted already to a plan: the hook's decisions.

The runtime has made every mount of the spec below the rootfs.  The new root is an overlay of
the rootfs onto which these mounts are carried over, cloned from where they are: their flags,
their nesting and what the runtime has put there by itself (devices, masks, a console) stay as
they are.  What an annotation changes is made anew: volumes, overlays over binds, /tmp.
"""

from sandboxfs.errors import HookError, SpecError
from sandboxfs.kernel import abi, mounttable
from sandboxfs.kernel import system as os
from sandboxfs.plan import survey
from sandboxfs.plan.operations import (
    Attach,
    Carry,
    Directory,
    Lower,
    Note,
    Overlay,
    PlainRoot,
    Plan,
    ReadonlyPath,
    Seal,
    Tmp,
)
from sandboxfs.spec.annotations import REPLICA_SOURCE

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

        Clones of them would show the rootfs, and a remount would make it writable.
        """
        root = self.live.root
        base = root.root.rstrip(b"/")
        for record in self.on.get(root.id, ()):
            if (record.device == root.device and record.root == base + record.mountpoint
                    and record.attributes & _RDONLY and self.origin(record) == "runtime"):
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
                if not record.attributes & _RDONLY:
                    self.changed[record.id] = None
                pending += [each for each in self.on.get(record.id, ())
                            if self.origin(each) == "runtime"]

    # -- the mounts ------------------------------------------------------------------

    def mounts(self):
        self.alone = set()
        for record in self.live.records:
            if record.id in self.parents and record.id in self.changed:
                # A recursive clone would hold what is replaced.
                parent = self.parents[record.id]
                while parent in self.parents and parent not in self.alone:
                    self.alone.add(parent)
                    parent = self.parents[parent]
        pending = self.on.get(self.live.root.id, [])[::-1]
        while pending:
            record = pending.pop()
            if self.place(record):
                pending += self.on.get(record.id, [])[::-1]

    def place(self, record):
        """Add what becomes of one mount; returns whether those on it come by themselves."""
        if record.id in self.changed:
            operation = self.changed[record.id]
            if operation is None:
                operation = Carry(self.origin(record), record)
                operation.overlay = True
                operation.propagation = 0
                # The ids are mapped below the overlay.
                operation.attributes &= ~abi.MOUNT_ATTR_IDMAP
            self.add(operation)
            return True
        operation = Carry(self.origin(record), record)
        self.add(operation)
        whole = [record]
        if record.id not in self.alone:
            whole += self.tree(record)
            operation.below = tuple([os.fsdecode(each.mountpoint) for each in whole[1:]])
            operation.recursive = bool(operation.below)
        operation.unbindable = tuple([
            os.fsdecode(each.mountpoint) for each in whole
            if each.propagation & abi.MS_UNBINDABLE and each.id in self.parents
        ])
        if record.id not in self.alone:
            return False
        if record.propagation & abi.MS_SHARED:
            raise HookError(
                operation.origin, "", operation.destination, "is a shared mount, and something "
                "below it is to be made anew: that would reach the host",
                hint="make the mount private, or leave the annotation of what lies below it out")
        return True

    def tree(self, record):
        """Yield all mounts below one, hidden ones among them."""
        pending = self.children.get(record.id, [])[::-1]
        while pending:
            child = pending.pop()
            yield child
            pending += self.children.get(child.id, [])[::-1]

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
        elif there is not None and mode == "auto":
            self.note("/tmp", f"left alone, {os.fsdecode(there)} is mounted inside")
        else:
            self.add(Tmp("/tmp", mode == "tmpfs"))

    def finish(self):
        spec = self.spec
        plain = type(self.plan.operations[0]) is PlainRoot
        process = self.plan.process
        if process is not None and process.cwd != "/" and not plain:
            # The runtime finds the root sealed when it looks for it.
            self.add(Directory("process.cwd", process.cwd))
        if spec.root_readonly and not plain:
            if self.is_left_to_the_runtime():
                self.note("root.readonly", "left to the runtime: it has yet to make /dev/console "
                          "in the root, and to seal it afterwards")
            else:
                self.add(Seal("root.readonly"))
        # runc gives the rootfs its propagation before the hook, crun after it.
        shared = self.live.root.propagation & abi.MS_SHARED
        self.add(Attach(spec.root_origin, self.live.path, shared))

    def is_left_to_the_runtime(self):
        """Runc makes the console after the hook, and then seals; crun has done both by now."""
        process = self.plan.process
        if process is None or not process.terminal or self.live.root.attributes & _RDONLY:
            return False
        return not any(record.mountpoint in (b"/dev", b"/dev/console")
                       for record in self.live.records)


def _cleaned(destination):
    path = os.path.normpath("/" + destination)
    return path[1:] if path.startswith("//") else path
