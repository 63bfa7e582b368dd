"""A plan as text for people and as JSON (``specs/schema/plan.schema.json``)."""

import json
import os

from sandboxfs.errors import shown
from sandboxfs.kernel import abi
from sandboxfs.plan import operations
from sandboxfs.spec.model import IdMapping

_ATTRIBUTES = (
    (abi.MOUNT_ATTR_RDONLY, "MOUNT_ATTR_RDONLY"), (abi.MOUNT_ATTR_NOSUID, "MOUNT_ATTR_NOSUID"),
    (abi.MOUNT_ATTR_NODEV, "MOUNT_ATTR_NODEV"), (abi.MOUNT_ATTR_NOEXEC, "MOUNT_ATTR_NOEXEC"),
    (abi.MOUNT_ATTR_NODIRATIME, "MOUNT_ATTR_NODIRATIME"),
    (abi.MOUNT_ATTR_NOSYMFOLLOW, "MOUNT_ATTR_NOSYMFOLLOW"),
)
_ATIME = {
    abi.MOUNT_ATTR_NOATIME: "MOUNT_ATTR_NOATIME",
    abi.MOUNT_ATTR_STRICTATIME: "MOUNT_ATTR_STRICTATIME",
    abi.MOUNT_ATTR__ATIME: "MOUNT_ATTR__ATIME",
}
_PROPAGATION = {
    abi.MS_SHARED: "shared", abi.MS_SLAVE: "slave", abi.MS_PRIVATE: "private",
    abi.MS_UNBINDABLE: "unbindable",
}
_ATTRIBUTE_FIELDS = ("attributes", "cleared", "tree_attributes", "tree_cleared")
_WORDS = {
    "MOUNT_ATTR_RDONLY": "ro", "MOUNT_ATTR_NOSUID": "nosuid", "MOUNT_ATTR_NODEV": "nodev",
    "MOUNT_ATTR_NOEXEC": "noexec", "MOUNT_ATTR_NODIRATIME": "nodiratime",
    "MOUNT_ATTR_NOSYMFOLLOW": "nosymfollow", "MOUNT_ATTR_NOATIME": "noatime",
    "MOUNT_ATTR_STRICTATIME": "strictatime",
}
# What `cleared` means in words; the atime field as a whole is only half of a change.
_CLEARED_WORDS = {
    "MOUNT_ATTR_RDONLY": "rw", "MOUNT_ATTR_NOSUID": "suid", "MOUNT_ATTR_NODEV": "dev",
    "MOUNT_ATTR_NOEXEC": "exec", "MOUNT_ATTR_NODIRATIME": "diratime",
    "MOUNT_ATTR_NOSYMFOLLOW": "symfollow", "MOUNT_ATTR__ATIME": "relatime",
}


def attribute_names(number):
    """Return the names of the `MOUNT_ATTR_*` bits of a number."""
    names = [name for bit, name in _ATTRIBUTES if number & bit]
    atime = number & abi.MOUNT_ATTR__ATIME
    if atime:
        names.append(_ATIME.get(atime, hex(atime)))
    return names


def to_json(plan):
    """Return a plan as an indented JSON text with sorted keys of a fixed order."""
    return json.dumps(to_dict(plan), indent=2, ensure_ascii=True) + "\n"


def to_dict(plan):
    """Return a plan as plain dicts and lists."""
    return {
        "engine": plan.engine,
        "namespaces": [
            {"type": entry.type, "path": entry.path} for entry in plan.namespaces
        ],
        "user": _user(plan.user),
        "operations": [_operation(operation) for operation in plan.operations],
        "notes": [{"origin": note.origin, "text": note.text} for note in plan.notes],
        "warnings": list(plan.warnings),
    }


def _user(user):
    if user is None:
        return None
    return {
        "path": user.path,
        "outside": user.outside,
        "uid_mappings": [_mapping(mapping) for mapping in user.uid_mappings],
        "gid_mappings": [_mapping(mapping) for mapping in user.gid_mappings],
    }


def _mapping(mapping):
    return {
        "container_id": mapping.container_id, "host_id": mapping.host_id, "size": mapping.size,
    }


def _operation(operation):
    result = {"operation": operation.name}
    for field, value in operation.fields():
        if field in _ATTRIBUTE_FIELDS:
            value = attribute_names(value)
        elif field == "propagation":
            value = _propagation(value)
        result[field] = _plain(value)
    return result


def _propagation(number):
    if not number:
        return None
    word = "+".join(word for bit, word in _PROPAGATION.items() if number & bit)
    return "r" + word if number & abi.MS_REC else word


def _plain(value):
    if isinstance(value, bytes):
        return os.fsdecode(value)
    if isinstance(value, IdMapping):
        return _mapping(value)
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value


def to_text(plan, marks=None):
    """Return a plan for people: a line an operation, then what is not done and why.

    marks: dict from operation to a remark on the machine as it is now.
    """
    lines = []
    for number, operation in enumerate(plan.operations, 1):
        text = _DESCRIBE[type(operation)](operation)
        remark = f"  ({marks[operation]})" if marks and operation in marks else ""
        lines.append(f"{number:3} {operation.name:<14} {text}{remark}  [{operation.origin}]")
    if plan.namespaces:
        lines.append(f"namespaces: {_namespaces(plan)}")
    if plan.notes:
        lines.append("not done, or otherwise than asked:")
        lines.extend(f"  {shown(note.origin)}: {note.text}" for note in plan.notes)
    lines.extend(f"warning: {warning}" for warning in plan.warnings)
    return "\n".join(lines) + "\n"


def _namespaces(plan):
    words = [
        entry.type if entry.path is None else f"{entry.type} ({shown(entry.path)})"
        for entry in plan.namespaces
    ]
    if plan.user is not None:
        where = "built from outside" if plan.user.outside else "built inside"
        maps = ", ".join(
            f"{mapping.container_id}→{mapping.host_id}+{mapping.size}"
            for mapping in plan.user.uid_mappings
        ) or shown(plan.user.path or "")
        words.append(f"user ({maps}; {where})")
    return ", ".join(words)


def _path(value):
    return shown(os.fsdecode(value))


def _flags(operation):
    words = [_WORDS.get(name, name) for name in attribute_names(operation.attributes)]
    words += [
        _CLEARED_WORDS[name] for name in attribute_names(operation.cleared)
        if not (name == "MOUNT_ATTR__ATIME" and operation.attributes & abi.MOUNT_ATTR__ATIME)
    ]
    words += ["r" + _WORDS.get(name, name)
              for name in attribute_names(getattr(operation, "tree_attributes", 0))]
    words += list(getattr(operation, "flags", ()))
    words += [key if value is None else f"{key}={value}"
              for key, value in getattr(operation, "data", ())]
    if operation.propagation:
        word = _propagation(operation.propagation)
        words.append("r" + word if operation.propagation_recursive else word)
    return "  " + ",".join(shown(word) for word in words) if words else ""


def _lower(operation):
    below = ("; what is mounted below it gets overlays of its own" if operation.submounts
             else "; its own mount alone")
    return f"{_path(operation.path)}, read-only{below}"


def _overlay(operation):
    if operation.upper is None:
        size = f"size={operation.size}" if operation.size else "the kernel's default size"
        text = f"upper on a private tmpfs, {size}"
    else:
        kept = "kept" if operation.keep else "removed afterwards"
        text = f"upper under {_path(operation.upper)}, {kept}"
    return text + (", userxattr" if operation.userxattr else "")


def _filesystem(operation):
    text = f"{operation.type} on {shown(operation.destination)}{_flags(operation)}"
    if operation.mode_from_mountpoint:
        text += "; mode: of the mountpoint if it exists, else 1777"
    if operation.copy_up:
        text += "; filled with what is there"
    if operation.fallback_bind:
        text += f"; if the kernel refuses: a bind of {operation.fallback_bind}"
    return text


def _bind(operation):
    arrow = "(tree) on" if operation.recursive else "on"
    text = f"{_path(operation.source)} {arrow} {shown(operation.destination)}{_flags(operation)}"
    if operation.idmap:
        text += "; ids mapped"
    if operation.overlay:
        text += "; writes go to an overlay"
    if operation.nested:
        text += "; an overlay over it if a mountpoint is missing in it"
    return text


def _cgroup(operation):
    how = "fresh" if operation.new_namespace else "the container's own cgroup, bound"
    return f"cgroup on {shown(operation.destination)}{_flags(operation)}; {how}"


def _replica(operation):
    return (f"{shown(operation.source)} on {shown(operation.destination)}{_flags(operation)}; "
            f"hint {operation.hint} of pod {shown(operation.pod)}, made by the hook")


def _carry(operation):
    text = f"{shown(operation.type)} at {shown(operation.destination)}{_flags(operation)}"
    if operation.overlay:
        text += "; writes go to an overlay"
    count = len(operation.below)
    if count:
        text += f"; with {count} mount{'s' * (count > 1)} below it"
    return text


def _root(operation):
    return _path(operation.path) + ("" if operation.submounts else ", its own mount alone")


def _node(operation):
    how = "the host's node, bound" if operation.by_bind else f"mode {operation.mode:04o}"
    return f"{shown(operation.path)} {operation.type} {operation.major}:{operation.minor} {how}"


def _symlink(operation):
    rule = f" if {operation.only_if} exists" if operation.only_if else ""
    return f"{operation.path} → {operation.target}{rule}; left alone where the path exists"


def _tmp(operation):
    if operation.always:
        return "tmpfs on /tmp  nosuid,nodev,mode=1777"
    return "tmpfs on /tmp  nosuid,nodev,mode=1777, if /tmp is missing or an empty directory"


def _pivot(operation):
    word = _propagation(operation.propagation)
    return "attach, pivot_root, detach the old root" + (f"; then {word}" if word else "")


def _attach(operation):
    shared = ", shared as that is" if operation.propagation else ""
    return f"over {_path(operation.path)}{shared}; verified there"


_DESCRIBE = {
    operations.Lower: _lower,
    operations.Overlay: _overlay,
    operations.PlainRoot: _root,
    operations.Filesystem: _filesystem,
    operations.Bind: _bind,
    operations.Cover: lambda step: f"{shown(step.source)}; writes go to an overlay",
    operations.Cgroup: _cgroup,
    operations.Replica: _replica,
    operations.Carry: _carry,
    operations.SetAside: lambda step: f"{shown(step.destination)}, made anew",
    operations.ReadonlyMount: lambda step: shown(step.path),
    operations.Directory: lambda step: f"{shown(step.path)}, made if missing",
    operations.Node: _node,
    operations.Symlink: _symlink,
    operations.Console: lambda step: "the pty of the terminal on /dev/console",
    operations.Tmp: _tmp,
    operations.Mask: lambda step: f"{shown(step.path)}, if it exists",
    operations.ReadonlyPath: lambda step: f"{shown(step.path)}, if it exists",
    operations.Seal: lambda step: "the root becomes read-only",
    operations.Pivot: _pivot,
    operations.Attach: _attach,
}
