"""`make demo`: a small bundle, run, with what was built from what and what it cost.

The root is an overlay over a busybox tree and ends read-only; a bind below it is read-only,
too, and has mounts inside that its source has no directories for; a file is bound; there are
devices, masked and read-only paths, and a /tmp.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from tests.support.bundles import Bundle, bundle  # noqa: E402
from tests.support.mounts import MountRecord, flags_of, parsed  # noqa: E402
from tests.support.specs import Document  # noqa: E402
from tests.support.trees import differences, snapshot  # noqa: E402

SANDBOXFS = CHECKOUT / ".venv" / "bin" / "sandboxfs"
TABLE = "-- mountinfo --"

# What the container does.  Each line is shown with what came of it.
SCRIPT = r"""
say() { echo "  \$ $*"; sh -c "$*" 2>&1 | sed 's/^/      /'; }
say 'touch /etc/x'
say 'touch /data/x'
say 'echo kept > /data/cache/x && cat /data/cache/x'
say 'cat /etc/motd'
say 'echo scratch > /tmp/x && cat /tmp/x'
say 'ls -l /dev/null /dev/demo'
say 'ls -A /private | wc -l'
say 'touch /proc/sys/kernel/hostname'
say 'hostname; id -u'
echo '-- mountinfo --'
cat /proc/self/mountinfo
"""


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="demo-") as directory:
        made = make(Path(directory))
        before = {tree: snapshot(tree) for tree in (made.rootfs, made.path / "data")}

        title("What was asked for: config.json, the mounts and what it adds")
        show_config(made.document)

        title("What will be done, and why: sandboxfs plan")
        print(call("plan", "--bundle", made).stdout, end="")

        title("The container: sandboxfs run")
        done = call("run", "--timing", "--bundle", made)
        output, _, table = done.stdout.partition(TABLE + "\n")
        print(output, end="")

        title("The mount tree, as seen inside")
        draw(parsed(table))

        title("What it took: run --timing")
        print(done.stderr, end="")

        title("What the lower layer and the read-only bind's source know of it")
        for tree, old in before.items():
            changes = differences(old, snapshot(tree))
            print(f"  {tree.name}/: {len(old)} files compared:", *changes or ["nothing changed"])
            if changes:
                sys.exit(1)

    title("And over this machine's own root: sandboxfs run -- sh -c '...'")
    inside = "touch /etc/x && ls -l /etc/x"
    print(f"  inside   $ {inside}")
    print("          ", call("run", "--", "sh", "-c", inside).stdout.strip())
    print("  outside  $ ls /etc/x")
    print("           ", "it is there!" if Path("/etc/x").exists() else "no such file")


def make(directory: Path) -> Bundle:
    """Make the bundle: a busybox tree, a directory and a file to bind, and config.json."""
    made = bundle(directory, change)
    (made.rootfs / "private").mkdir()
    (made.rootfs / "private" / "key").write_text("secret\n", "utf-8")
    (made.path / "data").mkdir()
    (made.path / "data" / "readme").write_text("data of the host\n", "utf-8")
    (made.path / "motd").write_text("welcome to a bound file\n", "utf-8")
    return made


def change(document: Document) -> None:
    """Make containerd's default spec into the demo's."""
    document["process"]["args"] = ["/bin/sh", "-c", SCRIPT]
    document["hostname"] = "demo"
    document["root"]["readonly"] = True
    document["mounts"] += [
        # Neither /data in the root nor cache and a/deep/one in its source exist.
        {"destination": "/data", "source": "data", "options": ["rbind", "ro"]},
        {"destination": "/data/cache", "type": "tmpfs", "source": "tmpfs",
         "options": ["nosuid", "nodev", "size=1m"]},
        {"destination": "/data/a/deep/one", "type": "tmpfs", "source": "tmpfs",
         "options": ["ro"]},
        {"destination": "/etc/motd", "source": "motd", "options": ["bind", "ro"]},
    ]
    document["linux"]["devices"] = [
        {"path": "/dev/demo", "type": "c", "major": 1, "minor": 5, "fileMode": 0o600},
    ]
    document["linux"]["maskedPaths"].append("/private")
    document["linux"]["readonlyPaths"].append("/etc/group")


def show_config(document: Document) -> None:
    """Print the parts of the document that differ from containerd's default."""
    for key in ("root", "hostname"):
        print(f"  {key}: {json.dumps(document[key])}")
    for entry in document["mounts"][-4:]:
        print(f"  mount: {json.dumps(entry)}")
    print(f"  device: {json.dumps(document['linux']['devices'][0])}")
    print(f"  masked: {document['linux']['maskedPaths'][-1]}")
    print(f"  read-only: {document['linux']['readonlyPaths'][-1]}")


def call(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run sandboxfs; end the demo with its words if it fails."""
    command = [str(SANDBOXFS), *(str(getattr(each, "path", each)) for each in arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}{command} ended with {done.returncode}")
    return done


def draw(records: list[MountRecord]) -> None:
    """Print the mounts as a tree of mountpoints."""
    numbers = {record.id for record in records}
    children: dict[int, list[MountRecord]] = {}
    for record in records:
        parent = record.parent_id if record.parent_id in numbers else 0
        children.setdefault(parent, []).append(record)
    lines = []

    def visit(parent: int, depth: int) -> None:
        for record in children.get(parent, ()):
            place = "  " * depth + record.mountpoint.decode("utf-8", "replace")
            kind = record.type.decode("utf-8", "replace")
            lines.append((place, kind, ",".join(sorted(flags_of(record)))))
            visit(record.id, depth + 1)

    visit(0, 1)
    width = max(len(place) for place, _, _ in lines)
    for place, kind, flags in lines:
        print(f"{place:{width}}  {kind:8} {flags}")


def title(text: str) -> None:
    """Print a heading."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


if __name__ == "__main__":
    main()
