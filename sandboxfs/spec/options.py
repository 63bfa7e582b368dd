"""The option words of a mount: one table, parsed into what the plan needs.

Source: config.md, "Linux mount options"; mount(8) for the meaning of each word.  Later words
win over earlier ones of the same group.
"""

from sandboxfs.errors import SpecError
from sandboxfs.kernel import abi

# word → (attributes to set, attributes to clear)
_ATTRIBUTES = {
    "ro": (abi.MOUNT_ATTR_RDONLY, 0),
    "rw": (0, abi.MOUNT_ATTR_RDONLY),
    "nosuid": (abi.MOUNT_ATTR_NOSUID, 0),
    "suid": (0, abi.MOUNT_ATTR_NOSUID),
    "nodev": (abi.MOUNT_ATTR_NODEV, 0),
    "dev": (0, abi.MOUNT_ATTR_NODEV),
    "noexec": (abi.MOUNT_ATTR_NOEXEC, 0),
    "exec": (0, abi.MOUNT_ATTR_NOEXEC),
    "nodiratime": (abi.MOUNT_ATTR_NODIRATIME, 0),
    "diratime": (0, abi.MOUNT_ATTR_NODIRATIME),
    "nosymfollow": (abi.MOUNT_ATTR_NOSYMFOLLOW, 0),
    "symfollow": (0, abi.MOUNT_ATTR_NOSYMFOLLOW),
}

# The atime words are one group: a number in the bits of MOUNT_ATTR__ATIME.
_ATIME = {
    "relatime": abi.MOUNT_ATTR_RELATIME,
    "noatime": abi.MOUNT_ATTR_NOATIME,
    "strictatime": abi.MOUNT_ATTR_STRICTATIME,
}
# A cleared word gives way to the kernel's default, relatime, if it was in force.
_ATIME_CLEARED = {"atime": "noatime", "norelatime": "relatime", "nostrictatime": "strictatime"}

_PROPAGATION = {
    "private": abi.MS_PRIVATE,
    "shared": abi.MS_SHARED,
    "slave": abi.MS_SLAVE,
    "unbindable": abi.MS_UNBINDABLE,
}
for _word in tuple(_PROPAGATION):
    _PROPAGATION["r" + _word] = _PROPAGATION[_word] | abi.MS_REC

# Superblock flags: fsconfig(2) takes these words as they are; a bind has none of its own.
_SUPERBLOCK = {
    "sync": "async", "dirsync": None, "lazytime": "nolazytime",
}
_SUPERBLOCK_CLEARED = {"async": "sync", "nolazytime": "lazytime"}

_NO_EFFECT = {"iversion", "noiversion", "silent", "loud"}
_MANDATORY_LOCKS = {"mand", "nomand"}
_FLAGS = {
    "tmpcopyup": "copy_up",
    "copy-symlink": "copy_symlink",
    "src-nofollow": "source_no_follow",
    "dest-nofollow": "destination_no_follow",
    "remount": "remount",
}

LABELS = ("context", "fscontext", "defcontext", "rootcontext")
_NUMBERS = ("size", "nr_inodes", "nr_blocks", "min_size")
_SUFFIXES = {"k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}


class Options:
    """The parsed words of one mount.

    attributes, cleared: `MOUNT_ATTR_*` of the mount itself; tree_attributes, tree_cleared:
    of everything under it.  propagation: MS_* number, or 0 without a word;
    propagation_recursive.  bind, recursive: `bind`/`rbind`.  superblock: list of flag words.
    data: list of (key, value or None), the file system's own.  idmap: ``"idmap"``,
    ``"ridmap"`` or None.  no_effect: words that change nothing here.
    """

    __slots__ = (
        "atime", "attributes", "bind", "cleared", "copy_symlink", "copy_up", "data",
        "destination_no_follow", "idmap", "no_effect", "pointers", "propagation",
        "propagation_recursive", "recursive", "remount", "source_no_follow", "superblock",
        "tree_attributes", "tree_cleared", "warnings",
    )

    def __init__(self):
        self.attributes = self.cleared = 0
        self.tree_attributes = self.tree_cleared = 0
        self.atime = None
        self.propagation = 0
        self.propagation_recursive = False
        self.bind = self.recursive = False
        self.superblock = []
        self.data = []
        self.pointers = []
        self.idmap = None
        self.copy_up = self.copy_symlink = self.remount = False
        self.source_no_follow = self.destination_no_follow = False
        self.no_effect = []
        self.warnings = []


def parse(words, pointer="/options"):
    """Return the `Options` of a list of words.

    pointer: JSON pointer of the list, for errors.  Raises SpecError for a word that can't
    be: several values in one word, a number out of range, an empty key.
    """
    options = Options()
    for index, word in enumerate(words):
        pair = _ATTRIBUTES.get(word)
        if pair is not None:
            options.attributes = options.attributes & ~pair[1] | pair[0]
            options.cleared = options.cleared & ~pair[0] | pair[1]
        elif word == "bind":
            options.bind = True
        elif word == "rbind":
            options.bind = options.recursive = True
        elif "=" in word or not _other_word(options, word):
            options.data.append(_data(word, f"{pointer}/{index}"))
            options.pointers.append(index)
    if options.atime is not None:
        options.attributes |= options.atime
        options.cleared |= abi.MOUNT_ATTR__ATIME
    return options


def _other_word(options, word):
    """Apply the rarer words; False: it is the file system's own."""
    if word in _PROPAGATION:
        number = _PROPAGATION[word]
        options.propagation = number & ~abi.MS_REC
        options.propagation_recursive = bool(number & abi.MS_REC)
    elif word in _ATIME:
        options.atime = _ATIME[word]
    elif word in _ATIME_CLEARED:
        if options.atime in (None, _ATIME[_ATIME_CLEARED[word]]):
            options.atime = abi.MOUNT_ATTR_RELATIME
    elif word in _FLAGS:
        setattr(options, _FLAGS[word], True)
    elif word in ("idmap", "ridmap"):
        options.idmap = word
    elif word in _SUPERBLOCK:
        options.superblock.append(word)
    elif word in _SUPERBLOCK_CLEARED:
        if _SUPERBLOCK_CLEARED[word] in options.superblock:
            options.superblock.remove(_SUPERBLOCK_CLEARED[word])
    elif word in _NO_EFFECT:
        options.no_effect.append(word)
    elif word in _MANDATORY_LOCKS:
        options.no_effect.append(word)
        options.warnings.append(f"{word}: mandatory locks are gone from Linux; no effect")
    elif word[:1] == "r" and word != "relatime" and _recursive_word(options, word[1:]):
        pass
    else:
        return word == "defaults"
    return True


def _recursive_word(options, word):
    """Apply ``rro`` and its kin (`word` without its r); False: no such word."""
    pair = _ATTRIBUTES.get(word)
    if pair is None:
        if word not in _ATIME and word not in _ATIME_CLEARED:
            return False
        # mount_setattr(2): changing the atime mode needs the whole field cleared.
        options.tree_attributes &= ~abi.MOUNT_ATTR__ATIME
        options.tree_attributes |= _ATIME.get(word, abi.MOUNT_ATTR_RELATIME)
        options.tree_cleared |= abi.MOUNT_ATTR__ATIME
        return True
    options.tree_attributes = options.tree_attributes & ~pair[1] | pair[0]
    options.tree_cleared = options.tree_cleared & ~pair[0] | pair[1]
    return True


def _data(word, pointer):
    """Return (key, value or None) of a word that is the file system's own."""
    key, equals, value = word.partition("=")
    if not key:
        raise SpecError(pointer, "", word, "a mount option needs a name")
    if "," in word and key not in LABELS:
        raise SpecError(
            pointer, "", word, "one option a word: only context= and its kin may hold a comma"
        )
    if key in _NUMBERS:
        check_number(value, pointer, word)
    return key, value if equals else None


def check_number(value, pointer, word):
    """Raise SpecError unless `value` is a number the kernel can hold (suffixes k…e, ``%``)."""
    digits, shift = value, 0
    if value[-1:] == "%":
        digits = value[:-1]
    elif value[-1:].lower() in _SUFFIXES:
        digits, shift = value[:-1], _SUFFIXES[value[-1:].lower()]
    if not (digits.isascii() and digits.isdigit()):
        raise SpecError(pointer, "", word, "a number is wanted, with k, m, g, t or % after it")
    if len(digits) > 20 or int(digits) << shift >= 1 << 63:
        raise SpecError(pointer, "", word, "the number is larger than the kernel can hold")


def propagation(word):
    """Return (MS_* number, recursive) of `rootfsPropagation`'s word."""
    number = _PROPAGATION[word]
    return number & ~abi.MS_REC, bool(number & abi.MS_REC)


def within(words, master):
    """Return the attributes of a mount of a shared file system, or None if it would be looser.

    words: the mount's own `Options`.  master: those that the shared one is mounted with.  What
    the mount doesn't say it has from the master, nosuid and nodev always; what it does say may
    be stricter, never the opposite.
    """
    field = abi.MOUNT_ATTR__ATIME
    attributes = words.attributes & ~words.tree_cleared | words.tree_attributes
    cleared = words.cleared & ~words.tree_attributes | words.tree_cleared
    given = master.attributes | abi.MOUNT_ATTR_NOSUID | abi.MOUNT_ATTR_NODEV
    if given & cleared & ~field:
        return None
    if given & field and cleared & field and attributes & field != given & field:
        return None  # another atime word than the master's noatime
    return attributes | given


_KEPT = (
    ("nosuid", abi.MOUNT_ATTR_NOSUID), ("nodev", abi.MOUNT_ATTR_NODEV),
    ("noexec", abi.MOUNT_ATTR_NOEXEC), ("noatime", abi.MOUNT_ATTR_NOATIME),
)


def refuse_lost_flags(mount, words, attributes):
    """Raise SpecError for a read-only tmpfs that is made a volume and doesn't say a flag it has.

    mount: the `Mount`.  words: its `Options`.  attributes: the volume's.  Such a mount runc
    remounts after all hooks, by its path and with the flags of these words alone (its
    finalizeRootfs): others would be gone.
    """
    if mount.type != "tmpfs" or words.bind or not words.attributes & abi.MOUNT_ATTR_RDONLY:
        return
    said = words.attributes | words.tree_attributes
    lost = [word for word, flag in _KEPT if attributes & flag & ~said]
    if lost:
        raise SpecError(
            f"/mounts/{mount.index}/options", "", f'"{",".join(mount.options)}"',
            f"a read-only tmpfs that a hint makes a volume has to say {', '.join(lost)}",
            hint="runc remounts it with these options alone; a bind keeps the flags it has")
