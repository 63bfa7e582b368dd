"""The operator's word: what containers may ask for by annotation, and what they get unasked.

Whoever writes a pod writes its annotations; whoever runs the machine writes
``/etc/sandboxfs/config.toml``.  Only the hooks ask: `run` and `plan` are started by their user.

Without the file the defaults of `Policy` hold, and nothing but this module is loaded; the file
itself is read by `policy.document`.
"""

from errno import ENOENT

from sandboxfs.errors import SpecError
from sandboxfs.kernel import system as os
from sandboxfs.spec.values import escaped

FILE = "/etc/sandboxfs/config.toml"
LOG_FILE = "/run/sandboxfs/hook.log"
LOG_LEVELS = ("error", "warning", "info", "debug")
# What can be honoured: an annotation's name, or the part that a family begins with.
ANNOTATIONS = (
    "dev.sandboxfs.overlay", "dev.sandboxfs.overlay.size", "dev.sandboxfs.overlay.binds",
    "dev.sandboxfs.tmp", "dev.sandboxfs.engine", "dev.sandboxfs.lower", "dev.sandboxfs.pod",
    "dev.sandboxfs.mount", "dev.gvisor.spec.mount",
)
_FAMILIES = ("dev.sandboxfs.lower", "dev.sandboxfs.mount", "dev.gvisor.spec.mount")


def load(path=None):
    """Return the `Policy` of the operator's file at `path` (str), by default `FILE`.

    Where there is no default file, that is the policy of no file; a file that was named has to
    be there, and so has one that a link stands for.  `PolicyError`: a file that can't be read,
    isn't safely the operator's, or is wrong, with its line.
    """
    name = path or FILE
    try:
        found = os.open(name, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        if path is None and error.errno == ENOENT and not _leads_nowhere(name):
            return Policy()
        from sandboxfs.policy import document

        raise document.unreadable(name, "open", error) from None
    try:
        from sandboxfs.policy import document

        return document.read(found, name)
    finally:
        os.close(found)


def _leads_nowhere(path):
    """Return whether somebody meant a file to be there: a link without a target isn't nothing."""
    return os.path.lexists(path) or (
        os.path.lexists(os.path.dirname(path)) and not os.path.exists(os.path.dirname(path)))


class Policy:
    """What the operator decided; a new one holds the defaults.

    overlay: ``"tmpfs"`` or ``"none"``, for containers that don't say.  overlay_size: the size of
    their upper, as tmpfs takes it, or None for the plan's own rule.  overlay_cap: the largest
    that may be asked for.  hint_size: the size of a volume whose hint has none.  hint_cap: the
    largest a hint may have.  annotations: those of `ANNOTATIONS` that are honoured.  host_paths:
    whether an annotation may name a path of the host.  log_path, log_level: where the hooks log,
    and from which of `LOG_LEVELS` on.  path: the file this was read from, or None.  given: the
    keys it sets (``"overlay.mode"``).

    The caps are texts (``"1G"``, ``"50%"``) or None; in bytes they are `hint_cap` and
    `overlay_cap`.
    """

    __slots__ = (
        "annotations", "given", "hint_cap_text", "hint_size", "host_paths", "log_level",
        "log_path", "overlay", "overlay_cap_text", "overlay_size", "path",
    )

    def __init__(self):
        self.path = None
        self.given = frozenset()
        self.overlay = "tmpfs"
        self.overlay_size = None
        self.overlay_cap_text = None
        # What the kernel gives a tmpfs of which nobody says how large it is (tmpfs(5)).
        self.hint_size = "50%"
        self.hint_cap_text = "50%"
        self.annotations = ANNOTATIONS
        self.host_paths = False
        self.log_path = LOG_FILE
        self.log_level = "info"

    @property
    def hint_cap(self):
        """The largest size of a shared volume, in bytes, or None."""
        return in_bytes(self.hint_cap_text)

    @property
    def overlay_cap(self):
        """The largest size of an upper, in bytes, or None."""
        return in_bytes(self.overlay_cap_text)

    def apply(self, spec):
        """Change `spec` (`spec.model.Spec`) to what the operator allows, and fill in defaults.

        Annotations that aren't honoured are taken out, each with a warning in `spec.warnings`.
        `SpecError`, with all problems: a host path in an annotation, a size above its cap.
        """
        self._take_out(spec)
        problems = []
        if not self.host_paths:
            problems += self._host_paths(spec.overrides)
        problems += self._overlay(spec)
        for hint in spec.hints:
            if hint.type == "tmpfs" and hint.share != "shared":
                problems += self._hint(spec, hint)
        if problems:
            first = problems[0]
            raise SpecError(first.origin, "", first.target, first.text, first.hint, problems)

    def _take_out(self, spec):
        """Read the annotations again without those that aren't honoured, if there are any."""
        kept = {}
        for name, value in spec.annotations.items():
            key = family(name)
            if key is None or key in self.annotations:
                kept[name] = value
            else:
                source = self._source("annotations.honour")
                spec.warnings.append(f"annotation {name}: not honoured, by {source}")
        if len(kept) != len(spec.annotations):
            from sandboxfs.spec import annotations

            spec.annotations = kept
            spec.overrides = annotations.overrides(kept, spec.bundle)
            spec.hints = annotations.hints(kept)

    def _host_paths(self, overrides):
        """Yield an error for every path of the host that `overrides` name."""
        named = list(zip(overrides.origins.get("lower", ()), overrides.lowers, strict=True))
        if overrides.overlay == "dir":
            named.insert(0, (overrides.origins["overlay"], overrides.overlay_path))
        for origin, path in named:
            yield SpecError(
                origin, "", path, "a path of the host, which annotations may not name here",
                hint=f"annotations.host-paths = true in {self.path or FILE} allows it",
            )

    def _overlay(self, spec):
        """Fill in mode and size of the overlay; yield an error for a size above the cap."""
        overrides, cap = spec.overrides, self.overlay_cap
        if overrides.overlay is None:
            overrides.overlay = self.overlay
            overrides.origins["overlay"] = self._source("overlay.mode")
        if overrides.overlay != "tmpfs":
            return
        if overrides.overlay_size is None:
            size = self.overlay_size
            if size is None and cap is not None:
                # The plan would take half of the memory limit.
                half = max(spec.memory_limit or 0, 0) // 2
                size = None if 0 < half <= cap else str(cap)
            if size is not None:
                overrides.overlay_size = size
                overrides.origins["overlay.size"] = self._source("overlay.size")
        elif cap is not None and in_bytes(overrides.overlay_size) > cap:
            yield self._above(overrides.origins["overlay.size"], overrides.overlay_size,
                              "an overlay", "overlay.cap", self.overlay_cap_text)

    def _hint(self, spec, hint):
        """Give `hint` a size if it has none; yield an error if it is above the cap."""
        sizes = [word[len("size="):] for word in hint.options if word.startswith("size=")]
        if not sizes:
            from sandboxfs.spec import annotations

            hint.options.append(f"size={annotations.size(self.hint_size)}")
            return
        cap = self.hint_cap
        if cap is not None and in_bytes(sizes[-1]) > cap:
            yield self._above(_options_pointer(spec, hint), sizes[-1],
                              f"the volume of hint {hint.name}", "hints.cap", self.hint_cap_text)

    def _above(self, origin, size, what, key, cap):
        return SpecError(
            origin, "", f"size={size}",
            f"{what} of {_shown(size)} is above the cap of {_shown(cap)}",
            hint=f"the cap is {self._source(key)}",
        )

    def _source(self, key):
        """Return where the value of `key` (``"overlay.mode"``) comes from, in words."""
        if self.path is None:
            return f"the default policy (there is no {FILE})"
        where = f"{self.path}: {key}"
        return where if key in self.given else f"a default, {where} is not set"


def family(name):
    """Return the member of `ANNOTATIONS` that annotation `name` belongs to, or None."""
    if name in ANNOTATIONS:
        return name
    for prefix in _FAMILIES:
        if name.startswith(prefix + "."):
            return prefix
    return None


def in_bytes(size):
    """Return a size (``"1G"``, ``"50%"`` of memory, None) in bytes, as tmpfs reckons it.

    A percentage is one of all memory, whatever a container's limit is (mm/shmem.c, Opt_size).
    """
    if size is None:
        return None
    from sandboxfs.spec import annotations

    size = annotations.size(size)
    if size.endswith("%"):
        pages = os.sysconf("SC_PHYS_PAGES") * int(size[:-1]) // 100
        return pages * os.sysconf("SC_PAGE_SIZE")
    return int(size)


def _shown(size):
    """Return a size in words: ``1G``, ``50% (4294967296 bytes)``."""
    if size.endswith("%"):
        return f"{size} of memory ({_shown(str(in_bytes(size)))})"
    number = in_bytes(size)
    for unit, factor in (("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if number % factor == 0:
            return f"{number // factor}{unit}"
    return f"{number} bytes"


def _options_pointer(spec, hint):
    """Return the pointer of the annotation that holds the options of `hint`."""
    from sandboxfs.spec import annotations

    for prefix in annotations.HINT_PREFIXES:
        name = f"{prefix}{hint.name}.options"
        if name in spec.annotations:
            return f"/annotations/{escaped(name)}"
    return hint.origin
