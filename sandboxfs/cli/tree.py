"""``sandboxfs tree``: a mount namespace, drawn."""

import errno
import json
import os
import sys

from sandboxfs.errors import MountError, UsageError
from sandboxfs.kernel import mounttable

# Branch, last branch, and what stands under each of them.
BOXES = ("├─ ", "└─ ", "│  ", "   ")
ASCII = ("|- ", "`- ", "|  ", "   ")


def add_arguments(parser):
    """Add this command's arguments to an argparse parser."""
    parser.add_argument("--pid", type=int, help="a process whose mount namespace is drawn")
    parser.add_argument("--json", action="store_true", help="print a list of mounts as JSON")


def main(arguments):
    """Print the tree; returns 0.  UsageError or MountError for a process that can't be read."""
    if arguments.pid is not None and arguments.pid <= 0:
        raise UsageError("--pid", "", str(arguments.pid), "not the number of a process")
    records = _read(arguments.pid)
    if arguments.json:
        json.dump(as_data(records), sys.stdout, indent=2)
        print()
        return 0
    encoding = sys.stdout.encoding or "ascii"
    boxes = BOXES if encoding.lower().replace("-", "") == "utf8" else ASCII
    for line in draw(records, boxes):
        print(line.encode(encoding, "backslashreplace").decode(encoding))
    return 0


def _read(pid):
    try:
        return mounttable.read(pid)
    except OSError as error:
        text, hint = os.strerror(error.errno or 0), None
        if error.errno in (errno.ESRCH, errno.ENOENT):
            text = "no such process" if pid is not None else "no procfs is mounted at /proc"
        elif error.errno in (errno.EACCES, errno.EPERM):
            hint = "the mounts of another user's process are root's to see"
        raise MountError("--pid" if pid else "", "read the mounts of process",
                         str(pid or "self"), text, error.errno or 0, hint) from error


def draw(records, boxes=BOXES):
    """Return the lines of a table's tree: mountpoint, type, source, flags, propagation.

    records: `MountRecord`s, parents first.  Behind a type's source stands what of it is mounted
    (``/dev/sda1[/home]``) where that isn't its root; hidden mounts are marked.
    """
    hidden = mounttable.hidden(records)
    rows = []
    for record, branch in _walk(records, boxes):
        root = "" if record.root == b"/" else f"[{printable(record.root)}]"
        rows.append((
            branch + printable(record.mountpoint),
            printable(record.type),
            (printable(record.source) or "-") + root,
            ",".join(mounttable.words_of(record.attributes)),
            mounttable.propagation_of(record) + (" (hidden)" if record.id in hidden else ""),
        ))
    widths = [min(max(map(len, column)), 48) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _walk(records, boxes):
    """Give (record, the branches drawn before it), depth first, children in mount order."""
    branch, last, under, under_last = boxes
    numbers = {record.id for record in records}
    children = {}
    for record in records:
        parent = record.parent_id
        is_top = parent not in numbers or parent == record.id
        children.setdefault(None if is_top else parent, []).append(record)
    waiting = [(record, "", "") for record in reversed(children.get(None, ()))]
    while waiting:
        record, before, below = waiting.pop()
        yield record, before
        kin = children.get(record.id, ())
        for position, child in reversed(list(enumerate(kin, 1))):
            is_last = position == len(kin)
            waiting.append((
                child, below + (last if is_last else branch),
                below + (under_last if is_last else under),
            ))


def as_data(records):
    """Return the table as a list of dicts for JSON; bytes that are no UTF-8 as `os.fsdecode`."""
    hidden = mounttable.hidden(records)
    return [
        {
            "id": record.id,
            "parent_id": record.parent_id,
            "mountpoint": os.fsdecode(record.mountpoint),
            "type": os.fsdecode(record.type),
            "source": os.fsdecode(record.source),
            "root": os.fsdecode(record.root),
            "device": "{}:{}".format(*record.device),
            "flags": mounttable.words_of(record.attributes),
            "propagation": mounttable.propagation_of(record),
            "peer_group": record.peer_group,
            "master": record.master,
            "superblock_options": os.fsdecode(record.superblock_options),
            "hidden": record.id in hidden,
        }
        for record in records
    ]


def printable(value):
    """Return bytes as text for one line: what isn't printable is escaped, nothing is cut."""
    text = os.fsdecode(value)
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
