"""``sandboxfs pod``: the volumes that pods share, and what is left of pods that are gone."""

import json
import sys

from sandboxfs.cli.tree import printable
from sandboxfs.errors import UsageError
from sandboxfs.hooks import pods

INTERMIXED = True  # `pod delete --force POD`


def add_arguments(parser):
    """Add this command's arguments to an argparse parser."""
    parser.add_argument("action", choices=("list", "show", "delete"),
                        help="list all pods, show one, or delete one: mounts, memory and record")
    parser.add_argument("pod", nargs="?", metavar="POD", help="a pod's id, or its name in the list")
    parser.add_argument("--force", action="store_true",
                        help="delete although containers of it live")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(arguments):
    """Do it; returns 0.  UsageError, StateError or MountError."""
    action, pod = arguments.action, arguments.pod
    if action == "list":
        if pod is not None:
            raise UsageError("", "pod list", pod, "takes no pod", hint="sandboxfs pod show POD")
    elif pod is None:
        raise UsageError("", "pod " + action, "", "which pod?", hint="sandboxfs pod list")
    if arguments.force and action != "delete":
        raise UsageError("--force", "pod " + action, "", "is for delete")
    if action == "delete":
        pods.delete(pod, arguments.force)
    elif action == "show":
        _show(pods.show(pod), arguments.json)
    else:
        _list(pods.all_pods(), arguments.json)
    return 0


def _list(found, as_json):
    if as_json:
        _print_json([as_data(seen) for seen in found])
        return
    if not found:
        print("no pods")
        return
    rows = [("POD", "STATE", "CONTAINERS", "VOLUMES", "USED")]
    for seen in found:
        record = seen.record
        if record is None:
            rows.append((seen.key, "damaged", "?", "?", "?"))
            continue
        used = [seen.mounted[each.name][0] for each in record.masters if each.name in seen.mounted]
        rows.append((
            seen.key, "stale" if seen.stale else "living",
            f"{len(seen.living)}/{len(record.containers)}",
            printable(",".join(each.name for each in record.masters).encode()),
            size(sum(used)) if used else "-",
        ))
    _print_table(rows)


def _show(seen, as_json):
    if as_json:
        _print_json(as_data(seen))
        return
    record = seen.record
    if record is None:
        print(f"pod {seen.id}: damaged: {seen.fault}")
        return
    kind = "named by dev.sandboxfs.pod" if record.named else "a runtime's sandbox"
    print(f"pod {seen.id} ({kind}): {'stale' if seen.stale else 'living'}")
    rows = [("VOLUME", "SOURCE", "OPTIONS", "USED", "SIZE")]
    for master in record.masters:
        used, total = seen.mounted.get(master.name, (None, None))
        rows.append((printable(master.name.encode()), printable(master.source.encode()),
                     ",".join(master.options), "-" if used is None else size(used),
                     "not mounted here" if total is None else size(total)))
    _print_table(rows)
    containers = [("CONTAINER", "PID", "STATE")]
    for container in record.containers:
        state = "living" if container.id in seen.living else "gone"
        containers.append((printable(container.id.encode()), str(container.pid), state))
    _print_table(containers)


def as_data(seen):
    """Return a pod (`pods.Seen`) as a dict for JSON.

    `used` and `size` of a volume are bytes, null where it isn't mounted in our mount namespace.
    """
    record = seen.record
    data = {"id": seen.id, "name": seen.key, "stale": seen.stale, "fault": seen.fault or None}
    if record is None:
        return data | {"boot": None, "volumes": [], "containers": []}
    volumes = []
    for master in record.masters:
        used, total = seen.mounted.get(master.name, (None, None))
        volumes.append({"hint": master.name, "source": master.source, "options": master.options,
                        "used": used, "size": total})
    containers = [
        {"id": each.id, "pid": each.pid, "living": each.id in seen.living}
        for each in record.containers
    ]
    return data | {"boot": record.boot, "volumes": volumes, "containers": containers}


def size(number):
    """Return bytes as a short text: ``64M``, ``1.5K``."""
    power = min(max(number.bit_length() - 1, 0) // 10, 4)
    return f"{number / 1024 ** power:.1f}".removesuffix(".0") + ("", "K", "M", "G", "T")[power]


def _print_table(rows):
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width)
                        for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_json(value):
    json.dump(value, sys.stdout, indent=2)
    print()
