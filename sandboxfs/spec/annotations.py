"""Annotations that steer sandboxfs: the overrides of ``dev.sandboxfs.`` and volume hints.

The command line has an option of the same meaning for each override and uses the same
parser; only the origin and the class of the error differ.
"""


from sandboxfs.errors import SpecError
from sandboxfs.kernel import system as os
from sandboxfs.spec.model import Overrides

PREFIX = "dev.sandboxfs."
# Which pod a container belongs to, where no runtime says it.
POD_KEY = "dev.sandboxfs.pod"
# Where runtimes say it: containerd's CRI plugin; CRI-O, and podman for pods of its own.
SANDBOX_KEYS = ("io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID")
HINT_PREFIXES = ("dev.gvisor.spec.mount.", "dev.sandboxfs.mount.")
# What a pod's volume has for a source, before the hint's name: so the hooks know it.
REPLICA_SOURCE = "sandboxfs:"

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
# The superblock's size is a loff_t: more can't be asked for, and the kernel's own parser
# wraps silently at 2**64.
_LARGEST_SIZE = (1 << 63) - 1

_SIZE_ALLOWED = "a size is a number of bytes, or one with K, M, G or T (1024), or 1% to 100%"


def size(text):
    """Return `text` as the value of tmpfs's ``size=``, or raise ValueError in words.

    Allowed: bytes, a number with K, M, G or T (powers of 1024, either case), or N% of
    memory.  Zero is refused, since tmpfs takes it for "no limit".
    """
    unit = text[-1:].upper()
    digits = text[:-1] if unit in _UNITS or unit == "%" else text
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 20:
        raise ValueError(_SIZE_ALLOWED)
    number = int(digits)
    if number == 0:
        raise ValueError("a size of 0 would mean no limit at all; " + _SIZE_ALLOWED)
    if unit == "%":
        if number > 100:
            raise ValueError("more than all memory; " + _SIZE_ALLOWED)
        return f"{number}%"
    number *= _UNITS.get(unit, 1)
    if number > _LARGEST_SIZE:
        raise ValueError("more than 2^63 - 1 bytes; " + _SIZE_ALLOWED)
    return str(number)


def overrides(annotations, base=None, warnings=None, problems=None):
    """Return the `Overrides` that `annotations` (dict) hold.

    base: the directory relative paths start from.  Several lowers are written as
    ``dev.sandboxfs.lower`` (topmost), then ``dev.sandboxfs.lower.1`` and so on, in the
    order of their numbers.  Unknown keys go to `warnings`.  Raises `SpecError`, or
    appends it to the list `problems`.
    """
    found = Overrides()
    lowers = []
    for name, value in annotations.items():
        if not name.startswith(PREFIX) or name == POD_KEY or name.startswith(HINT_PREFIXES):
            continue
        key = name[len(PREFIX):]
        if key == "lower" or key.startswith("lower."):
            lowers.append((key, value))
            continue
        if key not in _KEYS:
            if warnings is not None:
                warnings.append(f"annotation {name}: unknown, ignored")
            continue
        _collect(problems, override, found, key, value, _pointer(name), SpecError, base)
    for key, value in sorted(lowers, key=_lower_order):
        _collect(problems, override, found, key, value, _pointer(PREFIX + key), SpecError, base)
    return found


def override(overrides, key, value, origin, error=SpecError, base=None):
    """Set `key` (``"overlay.size"``) of `Overrides` from its text; raise `error` with `origin`.

    base: the directory a relative path starts from, the current one by default.
    ``lower`` may be set several times.
    """
    try:
        if key == "lower" or key.startswith("lower."):
            if _lower_order((key, value)) < 0:
                raise ValueError("several lowers are numbered: lower, lower.1, lower.2, …")
            overrides.lowers.append(_path(value, base))
            overrides.origins.setdefault("lower", []).append(origin)
            return
        _KEYS[key](overrides, value, base)
    except ValueError as fault:
        raise error(origin, "", f'"{value}"', str(fault)) from None
    overrides.origins[key] = origin


def _collect(problems, call, *arguments):
    """Call, and keep a `SpecError` in `problems` if that is a list."""
    try:
        call(*arguments)
    except SpecError as error:
        if problems is None:
            raise
        problems.append(error)


def _pointer(name):
    return "/annotations/" + name.replace("~", "~0").replace("/", "~1")


def _lower_order(entry):
    """Return the place of ``lower`` (0) or ``lower.N`` (N); -1 for any other key."""
    number = entry[0][len("lower."):]
    if not number:
        return 0 if entry[0] == "lower" else -1
    if not (number.isascii() and number.isdigit()) or number[0] == "0" or len(number) > 4:
        return -1
    return int(number)


def _path(text, base):
    if not text or "\0" in text:
        raise ValueError("a path is expected")
    return os.path.normpath(os.path.join(base or os.getcwd(), text))


def _word(value, words):
    if value not in words:
        raise ValueError("allowed: " + ", ".join(words))
    return value


def _set_overlay(overrides, value, base):
    path = None
    keep = False
    if value.startswith("dir="):
        path = value[len("dir="):]
        # A path may hold colons: only this one ending means something.
        if path.endswith(":keep"):
            path = path[: -len(":keep")]
            keep = True
        path = _path(path, base)
        value = "dir"
    elif value not in ("tmpfs", "none"):
        raise ValueError("allowed: tmpfs, none, dir=PATH, dir=PATH:keep")
    overrides.overlay = value
    overrides.overlay_path = path
    overrides.overlay_keep = keep


def _set_overlay_size(overrides, value, base):
    overrides.overlay_size = size(value)


def _set_overlay_binds(overrides, value, base):
    overrides.overlay_binds = _word(value, ("true", "false")) == "true"


def _set_tmp(overrides, value, base):
    overrides.tmp = _word(value, ("auto", "tmpfs", "keep"))


def _set_engine(overrides, value, base):
    overrides.engine = _word(value, ("auto", "detached", "attached"))


_KEYS = {
    "engine": _set_engine,
    "overlay": _set_overlay,
    "overlay.binds": _set_overlay_binds,
    "overlay.size": _set_overlay_size,
    "tmp": _set_tmp,
}


# -- pods -------------------------------------------------------------------------------

_POD_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-"
_LONGEST_POD_ID = 128


class Pod:
    """Which pod a container is in.

    id: as the runtime or the annotation says.  named: by ``dev.sandboxfs.pod``, not by a
    runtime; such a pod never is one of a runtime's, whatever its name.  key: what nothing
    else is called, safe as the name of a directory.
    """

    __slots__ = ("id", "named")

    def __init__(self, id, named):
        self.id = id
        self.named = named

    @property
    def key(self):
        return f"{'named' if self.named else 'sandbox'}-{self.id}"


def pod(annotations):
    """Return the `Pod` that `annotations` say a container is in, or None.

    Only the runtime's own word decides what is shared with whom.  A runtime sets its own key
    last, but passes those of others on from whoever wrote the pod: two that differ are refused.
    """
    said = [(key, annotations[key]) for key in SANDBOX_KEYS if annotations.get(key)]
    for key, value in said[1:]:
        if value != said[0][1]:
            raise SpecError(_pointer(key), "", f'"{value}"', f'differs from {said[0][0]}, "'
                            f'{said[0][1]}": whose pod this is can\'t be told')
    named = not said
    if named and annotations.get(POD_KEY):
        said = [(POD_KEY, annotations[POD_KEY])]
    if not said:
        return None
    key, value = said[0]
    if len(value) > _LONGEST_POD_ID or value.strip(_POD_LETTERS):
        raise SpecError(_pointer(key), "", f'"{value}"', "a pod's id has letters, digits, "
                        f"dots, hyphens and underscores only, at most {_LONGEST_POD_ID}")
    return Pod(value, named)


# -- hints ------------------------------------------------------------------------------


class Hint:
    """A volume that a pod's containers share, as annotations describe it.

    name: the NAME of the annotations.  source: matches a mount's `source`, exactly.
    type: ``"tmpfs"`` or ``"bind"``.  share: ``"container"``, ``"pod"`` or ``"shared"``.
    options: what the master is mounted with, checked words (``"size=1048576"``, ``"ro"``);
    nosuid and nodev are always set beside them.  origin: pointer of its first annotation.
    """

    __slots__ = ("name", "options", "origin", "share", "source", "type")

    def __init__(self, name, origin):
        self.name = name
        self.origin = origin
        self.source = None
        self.type = None
        self.share = None
        self.options = []


_PROPAGATION = (
    "private", "rprivate", "shared", "rshared", "slave", "rslave", "unbindable", "runbindable",
)
# nosuid and nodev are set anyway, so saying them is no fault.
_MASTER_WORDS = ("ro", "rw", "noexec", "noatime", "nosuid", "nodev")
_MASTER_ALLOWED = "allowed: size=, mode=, uid=, gid=, ro, rw, noexec, noatime"


def hints(annotations, warnings=None, problems=None):
    """Return the list of `Hint` that `annotations` describe, in the order of the document.

    ``dev.gvisor.spec.mount.NAME.FIELD`` and ``dev.sandboxfs.mount.NAME.FIELD`` mean the
    same.  Raises `SpecError`, or appends it to the list `problems`; dropped propagation
    words go to `warnings`.
    """
    found = {}
    seen = {}
    for key, value in annotations.items():
        if key.startswith(HINT_PREFIXES):
            _collect(problems, _set_field, found, seen, key, value, warnings)
    sources = {}
    for hint in found.values():
        _collect(problems, _finish, hint, sources)
    return list(found.values())


def _set_field(found, seen, key, value, warnings):
    prefix = HINT_PREFIXES[0] if key.startswith(HINT_PREFIXES[0]) else HINT_PREFIXES[1]
    parts = key[len(prefix):].split(".")
    if len(parts) != 2 or not all(parts):
        raise SpecError(_pointer(key), text=f"a hint is written {prefix}NAME.FIELD")
    name, field = parts
    # The two prefixes mean the same: said by both, they have to agree.
    if seen.setdefault((name, field), (key, value))[1] != value:
        raise SpecError(
            _pointer(key), "", f'"{value}"', f"differs from {seen[name, field][0]}"
        )
    hint = found.get(name)
    if hint is None:
        hint = found[name] = Hint(name, _pointer(key))
    try:
        _FIELDS.get(field, _unknown_field)(hint, value, f"annotation {key}", warnings)
    except ValueError as fault:
        if field in ("source", "type", "share"):
            setattr(hint, field, "")  # wrong, but not missing
        raise SpecError(_pointer(key), "", f'"{value}"', str(fault)) from None


def _set_source(hint, value, where, warnings):
    if not value or "\0" in value:
        raise ValueError("a source is expected, as a mount's `source` has it")
    hint.source = value


def _set_type(hint, value, where, warnings):
    hint.type = _word(value, ("tmpfs", "bind"))


def _set_share(hint, value, where, warnings):
    hint.share = _word(value, ("container", "pod", "shared"))


def _set_options(hint, value, where, warnings):
    hint.options = []
    for word in value.split(",") if value else ():
        if word in _PROPAGATION:
            if warnings is not None:
                warnings.append(f"{where}: {word} is dropped, a shared volume has no propagation")
        else:
            hint.options.append(_master_option(word))


def _master_option(word):
    """Return one checked option of a master, or raise ValueError."""
    key, equals, value = word.partition("=")
    if not equals and word in _MASTER_WORDS:
        return word
    if equals and key == "size":
        return "size=" + size(value)
    if equals and key == "mode":
        if not 1 <= len(value) <= 5 or value.strip("01234567") or int(value, 8) > 0o7777:
            raise ValueError(f"{word}: a mode is octal, at most 7777")
        return word
    if equals and key in ("uid", "gid"):
        if not (value.isascii() and value.isdigit()) or len(value) > 10 or int(value) >= 2**32 - 1:
            raise ValueError(f"{word}: an id is a number below 4294967295")
        return word
    raise ValueError(f"{word or 'an empty word'}: {_MASTER_ALLOWED}")


def _ignore(hint, value, where, warnings):
    """Accept fields of gVisor that mean nothing here."""


def _unknown_field(hint, value, where, warnings):
    raise ValueError("unknown field; allowed: " + ", ".join(_FIELDS))


_FIELDS = {
    "source": _set_source,
    "type": _set_type,
    "share": _set_share,
    "options": _set_options,
    "lifecycle": _ignore,
    "directfs": _ignore,
}


def _finish(hint, sources):
    missing = [field for field in ("source", "type", "share") if getattr(hint, field) is None]
    if missing:
        raise SpecError(hint.origin, text=f"hint {hint.name} lacks " + ", ".join(missing))
    other = sources.setdefault(hint.source, hint)
    if hint.source and other is not hint:
        raise SpecError(
            hint.origin, "", f'"{hint.source}"',
            f"hints {other.name} and {hint.name} have the same source",
        )
