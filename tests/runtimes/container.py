"""What a test wants to run, in no runtime's words, and what its payload says of where it is."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from sandboxfs.kernel import mountinfo, mounttable
from tests.support import containerd_spec, flags_of
from tests.support.mounts import MountRecord
from tests.support.specs import Document

# Where a container's root is mapped to, with all other ids behind it.
FIRST_ID = 300000
IDS = 65536

# What a payload sees, section by section; nothing of it writes.
PROBE = """
echo '== mounts'; cat /proc/self/mountinfo
echo '== nodes'; for each in / /* /dev/*; do
    stat -c '%n %F %a %u:%g %t:%T' $each; [ -L $each ] && readlink $each; done
echo '== masked'; for each in /proc/keys /proc/timer_list /proc/kcore /sys/firmware /proc/acpi; do
    [ -d $each ] && ls $each | head -n 1 || head -c 1 $each | wc -c; done 2>&1
echo '== sealed'; for each in \\
    /proc/sys/kernel/domainname /proc/sysrq-trigger /sys/kernel/profiling; do
    (echo x >$each) && echo written $each; done 2>&1
echo '== who'; id; pwd; cat /proc/self/uid_map; readlink /proc/self/exe
"""
# What a payload says before it waits for a line of ours.
END = "== end"
# What a payload may do to its root; `rootfs` must not notice.
WRITES = """
echo '== writes'
tried() { "$@" 2>/dev/null && echo done $1 || echo refused $1; }
put() { echo "$1" >$2; }
tried put changed /etc/passwd
tried mkdir -p /made/below
tried rm -f /etc/group
tried chmod 700 /root
tried ln -s nowhere /etc/link
tried touch -t 200001010000 /bin/busybox
tried mv -f /etc/moved /etc/away
cat /etc/passwd
"""
ALL_WRITTEN = [
    "done put", "done mkdir", "done rm", "done chmod", "done ln", "done touch", "done mv",
    "changed",
]
NONE_WRITTEN = [
    "refused put", "refused mkdir", "refused rm", "refused chmod", "refused ln", "refused touch",
    "refused mv", "root:x:0:0:root:/root:/bin/sh",
]


class Volume:
    """A bind of a directory or file of the host; `options` as runc has them."""

    def __init__(self, source: Path | str, destination: str, *options: str) -> None:
        self.source = str(source)
        self.destination = destination
        self.options = options

    def entry(self) -> Document:
        return {
            "destination": self.destination, "source": self.source, "type": "bind",
            "options": ["rbind", *self.options],
        }


class Memory:
    """A tmpfs of the spec."""

    def __init__(self, destination: str, *options: str, source: str = "tmpfs") -> None:
        self.source = source
        self.destination = destination
        self.options = options

    def entry(self) -> Document:
        return {
            "destination": self.destination, "source": self.source, "type": "tmpfs",
            "options": list(self.options),
        }


class Container:
    """One container: what every runtime can be told, and what only a document can say.

    script: of /bin/sh.  user: a user namespace, root at `FIRST_ID`.  change: alters the
    document, for runtimes that take one.  podman: further words for podman.
    """

    def __init__(
        self,
        script: str = "",
        *,
        readonly: bool = False,
        mounts: Iterable[Volume | Memory] = (),
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
        terminal: bool = False,
        user: bool = False,
        annotations: Mapping[str, str] | None = None,
        change: Callable[[Document], object] | None = None,
        podman: Iterable[str] = (),
    ) -> None:
        self.script = script
        self.readonly = readonly
        self.mounts = list(mounts)
        self.env = dict(env or {})
        self.cwd = cwd
        self.terminal = terminal
        self.user = user
        self.annotations = dict(annotations or {})
        self.change = change
        self.podman = list(podman)
        # Whether it stays until all that it printed has been read.
        self.waits = False

    def command(self) -> str:
        """Return the script as it is run."""
        if not self.waits:
            return self.script
        return f"{self.script}\nstatus=$?; echo '{END}'; read answer; exit $status"

    def document(self, rootfs: Path) -> Document:
        """Return config.json for the root at `rootfs`."""
        document = containerd_spec("/bin/sh", "-c", self.command())
        process, linux = document["process"], document["linux"]
        document["root"] = {"path": str(rootfs), "readonly": self.readonly}
        document["mounts"] += [mount.entry() for mount in self.mounts]
        process["env"] += [f"{name}={value}" for name, value in self.env.items()]
        process.update(cwd=self.cwd, terminal=self.terminal)
        if self.user:
            linux["namespaces"].append({"type": "user"})
            ids = [{"containerID": 0, "hostID": FIRST_ID, "size": IDS}]
            linux.update(uidMappings=ids, gidMappings=ids)
        if self.annotations:
            document["annotations"] = dict(self.annotations)
        if self.change is not None:
            self.change(document)
        return document

    def words(self) -> list[str]:
        """Return the same for ``podman run``, but for the root and the command."""
        assert self.change is None, "podman is told by words"
        words = [f"--workdir={self.cwd}"]
        if self.readonly:
            words += ["--read-only", "--read-only-tmpfs=false"]
        for mount in self.mounts:
            if isinstance(mount, Volume):
                options = ",".join(["rbind", *mount.options])
                words.append(f"--volume={mount.source}:{mount.destination}:{options}")
            else:
                options = ",".join(["notmpcopyup", *mount.options])
                words.append(f"--tmpfs={mount.destination}:{options}")
        words += [f"--env={name}={value}" for name, value in self.env.items()]
        words += [f"--annotation={name}={value}" for name, value in self.annotations.items()]
        if self.terminal:
            words.append("--tty")
        if self.waits:
            words.append("--interactive")
        if self.user:
            words += [f"--uidmap=0:{FIRST_ID}:{IDS}", f"--gidmap=0:{FIRST_ID}:{IDS}"]
        return words + self.podman


    def docker_words(self) -> list[str]:
        """Return the same for ``docker create``."""
        assert self.change is None, "docker is told by words"
        words = [f"--workdir={self.cwd}", *(["--read-only"] if self.readonly else [])]
        for mount in self.mounts:
            kind, source = ("volume", f"{mount.source}:") if isinstance(mount, Volume) else (
                "tmpfs", "")
            options = ",".join(mount.options)
            words.append(f"--{kind}={source}{mount.destination}{options and ':'}{options}")
        words += [f"--env={name}={value}" for name, value in self.env.items()]
        words += [f"--annotation={name}={value}" for name, value in self.annotations.items()]
        words += [*(["--tty"] if self.terminal else []), *(["--interactive"] if self.waits else [])]
        assert not self.user, "docker's user namespaces are the daemon's"
        return words


class View:
    """What the payload of a container printed by `PROBE` (and `WRITES`)."""

    def __init__(self, output: str) -> None:
        self.sections: dict[str, str] = {}
        for part in output.replace("\r", "").split("== ")[1:]:
            name, _, text = part.partition("\n")
            self.sections[name] = text
        assert "who" in self.sections, f"the payload did not get that far: {output}"
        self.mounts = visible(self.sections["mounts"])

    def lines(self, section: str) -> list[str]:
        return self.sections[section].splitlines()


Row = dict[str, object]
_NO_DIGITS = str.maketrans("", "", "0123456789")


def visible(text: str) -> dict[str, Row]:
    """Return the mounts of a mountinfo text that a path reaches, by mountpoint, comparable.

    Numbers that the kernel gives out (ids, devices, ptys) are left out, but for the peer groups
    that the tests' own mounts are in; which mounts show the same file system is kept.
    """
    ours = {record.peer_group for record in mountinfo.of_process()} - {0}
    records = mounttable.parents_first(mountinfo.parse(text.encode("utf-8", "surrogateescape")))
    hidden = mounttable.hidden(records)
    by_id = {record.id: record for record in records}
    root = next(each for each in records if each.mountpoint == b"/" and each.id not in hidden)
    same: dict[tuple[int, int], list[str]] = {}
    rows: dict[str, Row] = {}
    for record in sorted(records, key=lambda each: each.mountpoint):
        if record.id in hidden:
            continue
        point = record.mountpoint.decode("utf-8", "surrogateescape")
        assert point not in rows, f"two mounts are visible at {point}"
        type = record.type.decode()
        unsaid = {"idmapped"} if record is root else set()
        groups = [number for number in (record.peer_group, record.master) if number in ours]
        rows[point] = {
            "type": type,
            "source": _without_numbers(type, record.source),
            "shows": _without_numbers(type, record.root),
            # The ids of an idmapped root are those of the lower; the overlay on it isn't mapped.
            "flags": " ".join(sorted(flags_of(record) - unsaid)),
            "propagation": f"{mounttable.propagation_of(record).translate(_NO_DIGITS)} {groups}",
            "options": sorted(_without_numbers(type, record.superblock_options).split(",")),
            "on": _below(record, by_id),
        }
        inside = _inside(record, root)
        if inside is not None:
            rows[point].update(type="the root's", source="", shows=inside, options="")
            if record.propagation == root.propagation:
                rows[point]["propagation"] = "the root's"
        elif point != "/":
            same.setdefault(record.device, []).append(point)
            rows[point]["same file system"] = same[record.device]
    return rows


def _below(record: MountRecord, by_id: Mapping[int, MountRecord]) -> str:
    """Return the mountpoint that a stack of mounts is on."""
    below = record
    while below.mountpoint == record.mountpoint:
        below = by_id.get(below.parent_id)
        if below is None:
            return ""
    return below.mountpoint.decode("utf-8", "surrogateescape")


def _inside(record: MountRecord, root: MountRecord) -> str | None:
    """Return what a mount shows of the file system that is the container's root, or None."""
    base = root.root.rstrip(b"/") + b"/"
    if record.device != root.device or not record.root.startswith(base) or record is root:
        return None
    return "/" + record.root.removeprefix(base).decode("utf-8", "surrogateescape")


def _without_numbers(type: str, text: bytes) -> str:
    words = text.decode("utf-8", "surrogateescape")
    if type == "devpts":
        return re.sub(r"^/\d+$", "/N", words)
    # podman's containers, and the overlays that it makes for volumes.
    return re.sub(r"\b[0-9a-f]{64}\b(/userdata/overlay/\d+)?", "ID", words)


# Of the root the hook gives another file system, which is nobody's slave, and nothing else.
_OF_ANOTHER_ROOT = ("type", "source", "shows", "options", "propagation")


def differences(plain: View, hooked: View, *, new: Iterable[str] = ("/tmp",)) -> list[str]:
    """Return how a container's view differs with the hook from the one without, a line each.

    new: mountpoints that the hook adds.  The root's file system may be another.
    """
    lines = []
    expected, found = dict(plain.mounts), dict(hooked.mounts)
    for point in new:
        if point not in expected and not found.pop(point, None):
            lines.append(f"{point}: the hook mounted nothing there")
    for point in sorted(expected.keys() | found.keys()):
        if point not in found or point not in expected:
            what = "gone" if point in expected else "new"
            lines.append(f"{point}: {what}: {expected.get(point) or found.get(point)}")
            continue
        lines += [
            f"{point}: {field} was {expected[point].get(field)!r}, is {value!r}"
            for field, value in found[point].items()
            if value != expected[point].get(field)
            and not (point == "/" and field in _OF_ANOTHER_ROOT)
        ]
    one, other = (str(view.mounts["/"]["propagation"]) for view in (plain, hooked))
    lines += [f"/: {word} there, not here: {one!r}, {other!r}" for word in ("shared", "unbindable")
              if (word in one) != (word in other)]
    for section in ("nodes", "masked", "sealed", "who"):
        one = [line for line in plain.lines(section) if not _of_new(line, new)]
        other = [line for line in hooked.lines(section) if not _of_new(line, new)]
        lines += [f"{section}: was {line!r}" for line in one if line not in other]
        lines += [f"{section}: is {line!r}" for line in other if line not in one]
    return lines


def _of_new(line: str, new: Iterable[str]) -> bool:
    return line.partition(" ")[0] in new
