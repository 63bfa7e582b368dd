"""The checks of the hot path: exactly what is read of a document, as model objects.

Two passes.  `read` checks shapes (types, ranges, words), one value at a time, and says the
same as ``specs/schema/config.schema.json``; a property test holds the two together.
`relate` checks rules between values, which no schema can say.  Both raise the first
`SpecError`, or, given a list `problems`, collect one for every entry and go on.

A module ``check_*`` has both for its part of the document, first the shapes, then the rules;
here are the document itself, `root`, and what holds all of it together.
"""

from sandboxfs.errors import SpecError
from sandboxfs.spec import check_linux, check_mounts, check_process, check_root
from sandboxfs.spec.model import Spec
from sandboxfs.spec.values import (
    checked,
    escaped,
    known_keys,
    missing,
    shown,
    text,
)

LARGEST_HOSTNAME = 64  # __NEW_UTS_LEN


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
    check_root.read_annotations(document, found, bundle, problems)
    return found


def _read_top(document, found, problems):
    found.hostname = checked(document, "hostname", "", wrong_hostname) or None
    found.domainname = checked(document, "domainname", "", wrong_hostname) or None
    known_keys(document, "", "")
    version = text(document, "ociVersion", "")
    if version is None:
        missing("/ociVersion")
    if version[:2] not in ("0.", "1."):
        found.warnings.append(f"ociVersion {shown(version)}: only 1.x is known")


def wrong_hostname(value):
    """Say that a host name is longer than the kernel takes, or return None."""
    if len(value.encode("utf-8", "surrogateescape")) > LARGEST_HOSTNAME:
        return f"is longer than {LARGEST_HOSTNAME} bytes"
    return None


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


_PARTS_OF_ALL = (
    _read_top, check_root.read, check_process.read, check_mounts.read, check_linux.read,
)
_PARTS = (*_PARTS_OF_ALL, *check_linux.PARTS, _read_not_applied)


# -- rules between values -----------------------------------------------------------------


def relate(found, problems=None):
    """Check the rules between the values of a `Spec` that was read."""
    for rule in _RULES:
        for error in rule(found):
            if problems is None:
                raise error
            problems.append(error)


_RULES = (
    check_linux.namespace_rules, check_linux.mapping_rules, check_mounts.rules,
    check_process.rules, check_linux.setting_rules,
)
