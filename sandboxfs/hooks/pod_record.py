"""What is known of a pod: its masters and its containers, as one small file of the store.

The file is JSON, replaced all at once, and written last: what it names was there when it was
written, and what it doesn't name is a leftover of somebody who was killed.
"""

from sandboxfs.errors import SpecError, StateError
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import read_file
from sandboxfs.spec import load

try:
    from _json import encode_basestring_ascii as _quoted
except ImportError:  # an interpreter without C accelerators
    from json.encoder import py_encode_basestring_ascii as _quoted

NAME = "record"
VERSION = 1


class Master:
    """The one mount of a hint's tmpfs that everybody's replica is cloned from.

    name, source, options: the hint's, as first asked for.  size_asked: False if the size among
    the options is the operator's default.  directory: its mountpoint's name in the pod's
    directory.  device: the file system's number (st_dev), which is no other's as long as
    anybody has it mounted.  namespace: the inode of the mount namespace it was made in.
    """

    __slots__ = (
        "device", "directory", "name", "namespace", "options", "size_asked", "source",
    )

    def __init__(self, name, source, options, size_asked, directory, device=0, namespace=0):
        self.name = name
        self.source = source
        self.options = options
        self.size_asked = size_asked
        self.directory = directory
        self.device = device
        self.namespace = namespace


class Container:
    """One that is counted.  pid: of its first process; start: when that one started, so that a
    later process of the same number isn't taken for it (proc_pid_stat(5), field 22).
    """

    __slots__ = ("id", "pid", "start")

    def __init__(self, id, pid, start):
        self.id = id
        self.pid = pid
        self.start = start


class Record:
    """The record of one pod.

    id, named: see `spec.annotations.Pod`.  boot: the id of the boot it was made in.
    pid_namespace: inode of the one that its pids are of.  masters, containers: lists.
    """

    __slots__ = ("boot", "containers", "id", "masters", "named", "pid_namespace")

    def __init__(self, id, named):
        self.id = id
        self.named = named
        self.boot = boot_id()
        self.pid_namespace = namespace(b"self", b"pid")
        self.masters = []
        self.containers = []

    def master(self, name):
        """Return the `Master` of a hint's name, or None."""
        return next((each for each in self.masters if each.name == name), None)

    def of_source(self, source):
        """Return the `Master` that mounts of this source are replicas of, or None."""
        return next((each for each in self.masters if each.source == source), None)

    def drop(self, container_id):
        """Count a container no longer; returns whether it was counted."""
        before = len(self.containers)
        self.containers = [each for each in self.containers if each.id != container_id]
        return len(self.containers) != before

    def alive(self, container):
        """Return whether a container's first process still runs.

        Of pids of another pid namespace nothing is known: such a container counts as alive.
        """
        if self.boot != boot_id():
            return False
        if self.pid_namespace != namespace(b"self", b"pid"):
            return True
        return start_of(container.pid) == container.start

    def living(self):
        """Return the containers that are alive."""
        return [each for each in self.containers if self.alive(each)]

    def encoded(self):
        """Return the record as bytes of JSON."""
        return (_encoded({
            "version": VERSION, "pod": self.id, "named": self.named, "boot": self.boot,
            "pidNamespace": self.pid_namespace,
            "masters": [
                {"hint": each.name, "source": each.source, "options": each.options,
                 "sizeAsked": each.size_asked, "directory": each.directory,
                 "device": each.device, "mountNamespace": each.namespace}
                for each in self.masters
            ],
            "containers": [
                {"id": each.id, "pid": each.pid, "start": each.start}
                for each in self.containers
            ],
        }) + "\n").encode()


def decoded(content, where):
    """Return the `Record` of bytes; StateError for anything that isn't one.  where: its path."""
    try:
        document = load.parse(content, where)
        if document["version"] != VERSION:
            raise StateError("", "read", where, f"has version {document['version']}: written "
                             "by another sandboxfs")
        record = Record.__new__(Record)
        record.id = _text(document["pod"])
        record.named = bool(document["named"])
        record.boot = _text(document["boot"])
        record.pid_namespace = _number(document["pidNamespace"])
        record.masters = [
            Master(_text(each["hint"]), _text(each["source"]),
                   [_text(option) for option in each["options"]], bool(each["sizeAsked"]),
                   _directory(each["directory"]), _number(each["device"]),
                   _number(each["mountNamespace"]))
            for each in document["masters"]
        ]
        record.containers = [
            Container(_text(each["id"]), _number(each["pid"]), _number(each["start"]))
            for each in document["containers"]
        ]
    except (KeyError, TypeError, SpecError) as error:
        raise StateError("", "read", where, f"is damaged: {error}") from None
    return record


def _text(value):
    if type(value) is not str:
        raise TypeError(f"{value!r} is no string")
    return value


def _number(value):
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} is no number")
    return value


def _directory(value):
    # It becomes part of a path: what we write is a number.
    if not (_text(value).isascii() and value.isdigit()):
        raise TypeError(f"{value!r} is no master's directory")
    return value


def _encoded(value):
    """Return a value of dicts, lists, strings, ints and bools as JSON."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(key)}: {_encoded(value[key])}" for key in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join([_encoded(each) for each in value]) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) else _quoted(value)


# -- what the kernel says ----------------------------------------------------------------


def boot_id():
    """Return the id of this boot (random(4))."""
    return read_file(b"/proc/sys/kernel/random/boot_id").strip().decode("ascii")


def namespace(process, kind):
    """Return the inode of a process's namespace; both bytes (``b"self"``, ``b"mnt"``)."""
    return os.stat(b"/proc/%s/ns/%s" % (process, kind)).st_ino


def start_of(pid):
    """Return when a process started, in ticks since boot, or None: gone, or a zombie."""
    try:
        words = read_file(b"/proc/%d/stat" % pid)
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name, in parentheses, may hold anything.
    fields = words[words.rindex(b")") + 2:].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])
