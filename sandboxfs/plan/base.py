"""What every plan decides of a root: its layers, its user namespace, its /tmp.

`from_spec` adds everything else that a spec asks for, `in_front` nothing.
"""

from sandboxfs.errors import SpecError
from sandboxfs.kernel import system as os
from sandboxfs.plan.operations import Lower, Note, Overlay, PlainRoot, Tmp, UserNamespace
from sandboxfs.spec.model import IdMapping
from sandboxfs.spec.values import are_clean, enclosed


def cleaned(destination):
    """Return a destination as an absolute path without ``.``, ``..`` and doubled slashes."""
    if are_clean(enclosed((destination,))):
        return destination
    path = os.path.normpath("/" + destination)
    return path[1:] if path.startswith("//") else path


class RootPlanner:
    """One pass over one spec; every method appends to the plan.

    by_destination: what is mounted last at a path.  above: all paths with a mount below them.
    """

    def __init__(self, result, facts):
        self.plan = result
        self.spec = result.spec
        self.facts = facts
        self.overrides = result.spec.overrides
        self.by_destination = {}
        self.above = set()

    def add(self, operation):
        self.plan.operations.append(operation)

    def note(self, origin, text):
        self.plan.notes.append(Note(origin, text))

    # -- who ---------------------------------------------------------------------------

    def user_namespace(self, namespace):
        spec, facts = self.spec, self.facts
        uids, gids = spec.uid_mappings, spec.gid_mappings
        if namespace.path is None and not uids:
            uids = self.default_mappings(facts.uid, facts.id_ranges[0])
        if namespace.path is None and not gids:
            gids = self.default_mappings(facts.gid, facts.id_ranges[1])
        if namespace.path is not None and not uids and not gids:
            from sandboxfs.plan import users

            uids, gids = (
                [IdMapping(*line) for line in lines]
                for lines in users.mappings_of(namespace.path)
            )
        return UserNamespace(namespace.path, uids, gids, facts.privileged)

    def default_mappings(self, own_id, ranges):
        """Root: the identity over all ids; others: their own id becomes 0."""
        if not self.facts.privileged:
            return [IdMapping(0, own_id, 1)]
        return [IdMapping(first, first, size) for first, size in ranges]

    # -- the root --------------------------------------------------------------------

    def root(self):
        spec, overrides = self.spec, self.overrides
        path, origin = spec.root_path, spec.root_origin
        if path is None:
            raise SpecError("/root", text="is missing", hint="--rootfs names one, too")
        if not os.path.isabs(path):
            path = os.path.join(spec.bundle or os.getcwd(), path)
        mode = overrides.overlay or "tmpfs"
        if mode == "none":
            if overrides.lowers:
                raise SpecError("overlay", "", "none", "further lowers need an overlay")
            self.add(PlainRoot(origin, path))
            self.note("overlay", "none: the rootfs itself; missing mountpoints are made in it")
            return
        self.add(Lower(origin, path, True))
        for index, lower in enumerate(overrides.lowers or ()):
            self.add(Lower(f"lower[{index}]", os.path.abspath(lower), True))
        self.add(self.overlay(mode))

    def overlay(self, mode):
        overrides, spec = self.overrides, self.spec
        upper, keep = None, False
        if mode == "dir":
            upper, keep = overrides.overlay_path, overrides.overlay_keep
        size = overrides.overlay_size
        if size is None and upper is None and spec.memory_limit and spec.memory_limit > 0:
            size = str(spec.memory_limit // 2)
            self.note("overlay.size", f"{size}: half of linux.resources.memory.limit")
        user = self.plan.user
        in_user_namespace = (
            not self.facts.initial_user_namespace or (user is not None and not user.outside)
        )
        return Overlay("overlay", upper, size, keep, self.plan.container_id, in_user_namespace)

    # -- /tmp --------------------------------------------------------------------------

    def find_above(self, directories):
        """Keep these paths and what is above them, the root left out."""
        for path in directories:
            while path and path not in self.above:
                self.above.add(path)
                path = path[:path.rindex("/")]

    def tmp(self):
        mode = self.overrides.tmp or "auto"
        explicit = self.by_destination.get("/tmp")
        inside = "/tmp" in self.above and next(
            path for path in self.by_destination if path.startswith("/tmp/")
        )
        if explicit is not None:
            self.note("/tmp", f"left alone, {explicit.origin} mounts it")
        elif mode == "keep":
            self.note("/tmp", "left alone, as tmp=keep asks")
        elif mode == "auto" and inside:
            self.note("/tmp", f"left alone, {inside} is mounted inside")
        else:
            self.add(Tmp("/tmp", mode == "tmpfs"))
