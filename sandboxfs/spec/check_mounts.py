"""What the hot path checks of `mounts`."""

from sandboxfs.errors import SpecError
from sandboxfs.spec.check_linux import id_mappings
from sandboxfs.spec.model import Mount
from sandboxfs.spec.values import (
    ABSENT,
    LARGEST_NAME,
    are_clean,
    array,
    checked,
    clean,
    each,
    enclosed,
    fault,
    missing,
    require_object,
    shown,
    strings,
    text,
    wrong_inner_path,
    wrong_length,
)

# What lxcfs and checkpointing put there; runc's list (validProcMounts).
_PROC_FILES = frozenset((
    "/proc/cpuinfo", "/proc/diskstats", "/proc/meminfo", "/proc/stat", "/proc/swaps",
    "/proc/uptime", "/proc/loadavg", "/proc/slabinfo", "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/crypto/fips_enabled",
))


# The keys of nearly all entries, in the order in which Go writes them.
_USUAL = ("destination", "type", "source", "options")
_MISSING = ("", "", "", ())


def read(document, found, problems):
    """Read `mounts` into the `Spec` `found`."""
    entries = array(document, "mounts", "")
    found.mounts = _all_at_once(entries) or each(entries, "/mounts", _mount, problems)


def _all_at_once(entries):
    """Return what `_mount` would of all entries, or None: one has a fault, or is unusual.

    A long list is looked at key by key, not entry by entry: most of it is alike.
    """
    if set(map(type, entries)) != {dict}:
        return None
    shapes = set(map(tuple, entries))
    columns: list
    if shapes == {_USUAL}:
        columns = [*zip(*map(dict.values, entries), strict=True)]
    elif all(map(frozenset(_USUAL).issuperset, shapes)):
        columns = [
            [entry.get(key, missing) for entry in entries]
            for key, missing in zip(_USUAL, _MISSING, strict=True)
        ]
    else:
        return None
    destinations, types, sources, options = columns
    if {*map(type, destinations), *map(type, types), *map(type, sources)} != {str}:
        return None
    options = _words(options)
    if options is None or _is_wrong(destinations, types, sources):
        return None
    return [
        Mount(index, destination, type or None, source or None, words, (), ())
        for index, (destination, type, source, words)
        in enumerate(zip(destinations, types, sources, options, strict=True))
    ]


def _words(lists):
    """Return lists of options as tuples, the same one for the same words; None: a fault."""
    if not {list, tuple}.issuperset(map(type, lists)):
        return None
    known: dict = {}
    share = known.setdefault
    try:
        found = [share(words, words) for words in map(tuple, lists)]
    except TypeError:
        return None  # a word that is an array or an object
    for words in known:
        if words and (set(map(type, words)) != {str} or any(map(wrong_option, words))
                      or "\0" in "".join(words)):
            return None
    return found


def _is_wrong(destinations, types, sources):
    """Whether a string of these columns has a fault."""
    kinds = set(types)
    places, others = enclosed(destinations), enclosed((*kinds, *sources))
    if (places.count("\0") != len(destinations) + 1
            or others.count("\0") != len(kinds) + len(sources) + 1):
        return True  # a NUL in one of them
    if _may_be_long(sources, others) and any(map(wrong_length, sources)):
        return True
    return (_may_be_long(destinations, places) or not are_clean(places)) and any(
        map(wrong_inner_path, destinations)
    )


def _may_be_long(paths, joined):
    """Whether one of these paths needs a look at its length in bytes, or at a component's."""
    return max(map(len, paths)) > LARGEST_NAME or not joined.isascii()


def _mount(entry, index, pointer):
    require_object(entry, "mount", pointer)
    destination = checked(entry, "destination", pointer, wrong_inner_path)
    if destination is None:
        missing(f"{pointer}/destination")
    # An empty source or type is Go's way of leaving it out.
    source = checked(entry, "source", pointer, wrong_length) or None
    uids = id_mappings(entry, "uidMappings", pointer)
    gids = id_mappings(entry, "gidMappings", pointer)
    if bool(uids) != bool(gids):
        fault(
            f"{pointer}/{'gidMappings' if uids else 'uidMappings'}", ABSENT,
            "is missing: uidMappings and gidMappings come together, or neither",
        )
    return Mount(
        index, destination, text(entry, "type", pointer) or None, source,
        tuple(strings(entry, "options", pointer, wrong_option)), uids, gids,
    )


def wrong_option(value):
    """Say that an option is empty, or return None."""
    return None if value else "an empty option is not allowed"


def is_bind(mount):
    """Return whether a `Mount` is a bind: by its options, or by its type (runc's habit)."""
    return mount.type == "bind" or "bind" in mount.options or "rbind" in mount.options


def rules(found):
    """Yield a `SpecError` for every rule between values that a `Spec` breaks, and warn."""
    unusual = [
        mount for mount in found.mounts
        if mount.source is None or "proc" in mount.destination or mount.destination[0] != "/"
    ]
    for mount in unusual:
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
