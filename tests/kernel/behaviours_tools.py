"""What behaviours of the build share: documents, trees of files, and looking at a built root.

`inside` and `refused` build from a document on the path that `run` takes (load, plan, gather,
assemble) in a forked child with a mount namespace of its own, and show afterwards that
nothing outside of the root was changed: the scratch directory with all that lies mounted in
it, the mount table and the open descriptors are what they were.
"""

import ctypes
import errno
import json
import linecache
import os
import stat
import sys
import traceback

from sandboxfs.build import usual, verify  # noqa: F401  # loaded before the pivot
from sandboxfs.build.assemble import assemble
from sandboxfs.build.compiled import compile_once
from sandboxfs.build.gather import Materials, belongs_inside, gather
from sandboxfs.build.preparation import go_ahead
from sandboxfs.errors import SandboxError
from sandboxfs.kernel import abi, fscontext, mountinfo, mounttable, syscalls, usernamespace
from sandboxfs.plan import from_spec
from sandboxfs.spec import load

USER = 61234  # an id that no system gives to a user
# How a root is built: as `run` does, by the prepared calls of the usual case
# (`sandboxfs.build.calls`); without them; where it is possible, as `sandboxfs.build` does for a
# program, with the gathering among them (`sandboxfs.build.usual`); or with what needs nothing of
# the host made before.
LONG, AT_ONCE, AHEAD = "the long way", "at once", "ahead"
WAYS = ("", LONG, AT_ONCE, AHEAD)
way = ""
DIRECTORY = object()

_WORDS = {
    abi.MOUNT_ATTR_RDONLY: "ro", abi.MOUNT_ATTR_NOSUID: "nosuid", abi.MOUNT_ATTR_NODEV: "nodev",
    abi.MOUNT_ATTR_NOEXEC: "noexec", abi.MOUNT_ATTR_NOATIME: "noatime",
    abi.MOUNT_ATTR_STRICTATIME: "strictatime", abi.MOUNT_ATTR_NODIRATIME: "nodiratime",
    abi.MOUNT_ATTR_NOSYMFOLLOW: "nosymfollow", abi.MOUNT_ATTR_IDMAP: "idmapped",
}


# -- assertions ----------------------------------------------------------------------------


def same(actual, expected, what=""):
    """Assert equality, saying both."""
    assert actual == expected, f"{what}: {actual!r} instead of {expected!r}"


def holds(text, *parts):
    """Assert that each part occurs in a text."""
    for part in parts:
        assert part in text, f"{part!r} isn't in {text!r}"


def fails(name, action, *arguments, **named):
    """Assert that a call fails with the errno of this name (``"EROFS"``)."""
    try:
        action(*arguments, **named)
    except OSError as error:
        same(errno.errorcode[error.errno], name, f"{action.__name__}{arguments}")
        return
    raise AssertionError(f"{action.__name__}{arguments} didn't fail; {name} was expected")


# -- files ---------------------------------------------------------------------------------


def read(path):
    """Return a file's bytes."""
    with open(path, "rb", buffering=0) as file:
        return file.read()


def write(path, content=b"", mode=None):
    """Write a file, parents made."""
    parent = os.path.dirname(path)
    if parent:
        os.makedirs(parent, exist_ok=True)
    with open(path, "wb", buffering=0) as file:
        file.write(content)
    if mode is not None:
        os.chmod(path, mode)


def tree(base, entries):
    """Make a tree below `base`: a name ending in "/" is a directory, bytes are a file's content,
    a str the target of a symlink."""
    os.makedirs(base, exist_ok=True)
    for name, value in entries.items():
        path = os.path.join(base, name)
        if name.endswith("/" if isinstance(name, str) else b"/"):
            os.makedirs(path, exist_ok=True)
        elif isinstance(value, str):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.symlink(value, path)
        else:
            write(path, value)


def rootfs(entries=None, base="rootfs"):
    """Make the image: a root of its own mode, with the usual directories and `entries`."""
    tree(base, {"etc/passwd": b"root\n", "proc/": 0, "sys/": 0, "dev/": 0, **(entries or {})})
    return base


def mode_of(path):
    """Return the permission bits, links not followed."""
    return stat.S_IMODE(os.lstat(path).st_mode)


def owner_of(path):
    """Return (uid, gid), links not followed."""
    status = os.lstat(path)
    return status.st_uid, status.st_gid


def mount_on(path, type=b"tmpfs", settings=(), attributes=0, make=True):
    """Mount a new file system in this namespace, the directory made; returns the path."""
    if make:
        os.makedirs(path, exist_ok=True)
    fd = fscontext.create(type, [fscontext.string(*pair) for pair in settings], attributes)
    attach(fd, path)
    return path


def attach(fd, path):
    """Attach a mount on a path and close its descriptor."""
    syscalls.move_mount_path(fd, abi.AT_FDCWD, os.fsencode(path))
    os.close(fd)


def bind_on(source, path, attributes=0, recursive=False):
    """Bind a path on another in this namespace."""
    flags = abi.OPEN_TREE_CLONE | (abi.AT_RECURSIVE if recursive else 0)
    fd = syscalls.open_tree(abi.AT_FDCWD, os.fsencode(source), flags)
    if attributes:
        syscalls.mount_setattr(fd, attributes)
    attach(fd, path)


def set_propagation(path, propagation, recursive=False):
    """Set the propagation of the mount at a path."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    syscalls.mount_setattr(fd, propagation=propagation, recursive=recursive)
    os.close(fd)


def table():
    """Return the records of this namespace's mounts, by mountinfo, parents first."""
    return mounttable.parents_first(mountinfo.parse(read("/proc/self/mountinfo")))


def _mountpoints():
    # Sorted: a copy of a namespace may have another order.
    return sorted(each.mountpoint for each in table())


def snapshot(base, left_out=()):
    """Return {path: all that a write could change} below `base`, without what is left out."""
    found = {}
    waiting = [os.fsencode(base)]
    left_out = {os.fsencode(os.path.normpath(os.path.join(base, path))) for path in left_out}
    while waiting:
        path = waiting.pop()
        if os.path.normpath(path) in left_out:
            found[path] = "left out"
            continue
        status = os.lstat(path)
        entry = [
            oct(status.st_mode), status.st_uid, status.st_gid, status.st_rdev, status.st_nlink,
            status.st_dev, status.st_ino,
            [(name, os.getxattr(path, name, follow_symlinks=False))
             for name in os.listxattr(path, follow_symlinks=False)],
        ]
        # A directory whose entries we leave out changes with them.
        if not any(os.path.dirname(each) == os.path.normpath(path) for each in left_out):
            entry.append(status.st_mtime_ns)
        if stat.S_ISDIR(status.st_mode):
            waiting += [os.path.join(path, name) for name in os.listdir(path)]
        elif stat.S_ISREG(status.st_mode):
            entry.append(read(path))
        elif stat.S_ISLNK(status.st_mode):
            entry.append(os.readlink(path))
        found[path] = entry
    return found


def descriptors():
    """Return {number: what it is} of this process's open files."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink("/proc/self/fd/" + name)
        except FileNotFoundError:  # listdir's own
            continue
    return found


# -- documents -----------------------------------------------------------------------------


def config(*mounts, root="rootfs", readonly=False, annotations=None, process=None, **linux):
    """Return a config.json as a dict; keyword arguments are the fields of `linux`."""
    linux.setdefault("namespaces", [{"type": "mount"}])
    return {
        "ociVersion": "1.0.2",
        "process": {"args": ["/bin/true"], "cwd": "/", "user": {"uid": 0, "gid": 0},
                    **(process or {})},
        "root": {"path": root, "readonly": readonly},
        "mounts": list(mounts),
        "linux": linux,
        "annotations": annotations or {},
    }


def mount(destination, type, source=None, *options, **fields):
    """Return an entry of `mounts`."""
    entry = {"destination": destination, "type": type, "options": list(options), **fields}
    if source is not None:
        entry["source"] = source
    return entry


def tmpfs(destination, *options):
    """Return a tmpfs as an entry of `mounts`."""
    return mount(destination, "tmpfs", "tmpfs", *options)


def bind(destination, source, *options, **fields):
    """Return a bind as an entry of `mounts`."""
    if not {"bind", "rbind"} & set(options):
        options = ("bind", *options)
    return mount(destination, "bind", source, *options, **fields)


# -- building ------------------------------------------------------------------------------


class View:
    """A built root as its inside sees it, after the pivot.

    spec, plan, root: what it came from.  `proc` is the host's procfs, by descriptor: the root
    may have none.
    """

    def __init__(self, spec, plan, root, proc):
        self.spec = spec
        self.plan = plan
        self.root = root
        self.proc = proc

    def table(self):
        """Return the mounts seen from here, parents first."""
        fd = os.open("self/mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.proc)
        with open(fd, "rb", buffering=0) as file:
            content = b"".join(iter(lambda: file.read(1 << 16), b""))
        return mounttable.parents_first(mountinfo.parse(content))

    def at(self, path):
        """Return the topmost mount at a path."""
        found = [each for each in self.table() if each.mountpoint == os.fsencode(path)]
        assert found, f"nothing is mounted at {path!r}: {self.points()}"
        return found[-1]

    def points(self):
        """Return the mountpoints, sorted: the table's order is that of making, not attaching."""
        return sorted(os.fsdecode(each.mountpoint) for each in self.table())

    def flags(self, path):
        """Return the words of a mount's flags as a set."""
        attributes = self.at(path).attributes
        return {word for bit, word in _WORDS.items() if attributes & bit}

    def superblock(self, path):
        """Return the words of the file system's own options as a set."""
        return set(os.fsdecode(self.at(path).superblock_options).split(","))

    def outcome(self, kind):
        """Return the details of the outcomes of one kind."""
        return [detail for _operation, found, detail in self.root.outcomes if found == kind]

    def notes(self):
        """Return the plan's notes as one text."""
        return "\n".join(f"{note.origin}: {note.text}" for note in self.plan.notes)


def inside(engine, document, check, **how):
    """Build a document, pivot into it, and call ``check(view)`` there; returns what it returns.

    overrides: {key: value} of ``dev.sandboxfs.KEY``.  bundle: its directory.  written: paths
    that may change, relative to the scratch directory.  umask: the builder's, 077 unless told.
    unshare: further CLONE_NEW* flags.  user: (uid, inside the map) build unprivileged, or
    None.  attach: attach on this path instead of the pivot.  prepare: called in the child
    first.  change: called with the plan before it is built.  What is returned has to be JSON.
    """
    return _observed(_entered, engine, document, check, how)


def refused(engine, document, **how):
    """Assert that a document can't be built and that nothing is left; return the error's fields
    (origin, operation, target, text, errno (a name), hint, kind, line).  `how` as for `inside`."""
    return _observed(_refusing, engine, document, None, how)


def _observed(action, engine, document, check, how):
    """Fork, act, and compare what is outside before and after."""
    written = how.pop("written", ())
    # As on a host that systemd booted: what propagates out of the child is seen here.
    set_propagation("/", abi.MS_SHARED, True)
    before = snapshot(".", written), read("/proc/self/mountinfo"), descriptors()
    _keep_sources()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        answer = {}
        try:
            answer["value"] = action(engine, document, check, **how)
        except BaseException:  # noqa: BLE001  # whatever it is, it travels as text
            answer["failure"] = traceback.format_exc()
        _send(writer, answer)
    os.close(writer)
    answer = json.loads(_all_of(reader) or b'{"failure": "the child died silently"}')
    os.waitpid(child, 0)
    if "failure" in answer:
        raise AssertionError(answer["failure"])
    after = snapshot(".", written), read("/proc/self/mountinfo"), descriptors()
    for path in before[0].keys() | after[0].keys():
        same(after[0].get(path), before[0].get(path), f"changed outside: {path!r}")
    same(after[1], before[1], "the mount table outside")
    same(after[2], before[2], "the descriptors outside")
    return answer["value"]


def _send(writer, answer):
    # No flushing, no clean-up: the interpreter's files may be out of reach.
    line = json.dumps(answer).encode()
    while line:
        line = line[os.write(writer, line):]
    os._exit(0)


def _all_of(reader):
    with open(reader, "rb", buffering=0) as file:
        return b"".join(iter(lambda: file.read(1 << 16), b""))


def _keep_sources():
    """Let tracebacks show source lines where the files are out of reach."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("sandboxfs.", "tests.")) and getattr(module, "__file__", None):
            lines = linecache.getlines(module.__file__)
            # Without a time nobody looks whether the file changed.
            linecache.cache[module.__file__] = (0, None, lines, module.__file__)


def _new_namespaces(user, unshare):
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        # PR_SET_DUMPABLE, cleared by the change of ids; the guest has no python-prctl.
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
        syscalls.unshare(abi.CLONE_NEWUSER)
        for name, line in (("setgroups", b"deny"), ("uid_map", b"0 %d 1" % user),
                           ("gid_map", b"0 %d 1" % user)):
            fd = os.open(f"/proc/self/{name}", os.O_WRONLY)
            os.write(fd, line)
            os.close(fd)
    syscalls.unshare(abi.CLONE_NEWNS | unshare)


def _loaded(engine, document, overrides, bundle, change):
    """Return (spec, plan) of a document."""
    text = document if isinstance(document, str) else json.dumps(document)
    spec = load.load(bundle, text=text)
    for key, value in (overrides or {}).items():
        for each in value if isinstance(value, list) else [value]:
            spec.overrides.set(key, each, "--" + key)
    plan = from_spec.plan(spec)
    plan.engine = engine
    if change is not None:
        change(plan)
    return spec, plan


def _entered(engine, document, check, overrides=None, bundle=".", umask=0o77, unshare=0,
             user=None, attach=None, prepare=None, change=None):
    os.umask(umask)
    if prepare is not None:
        prepare()
    spec, plan, root = _built(engine, document, overrides, bundle, unshare, user, change)
    same(os.umask(umask), umask, "the umask after the build")
    if attach is not None:
        set_propagation("/", abi.MS_SLAVE, True)
        root.attach(attach)
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    if attach is None:
        root.pivot()
        # Before the check, which may write and mount.  Older kernels tell only through procfs.
        if os.path.exists("/proc/self/mountinfo") or _statmount_tells():
            same(root.verify(), [], "what verify finds")
    value = check(View(spec, plan, root, proc))
    root.materials.cleanup()  # as whoever built it does when the payload has ended
    return value


def _statmount_tells():
    try:
        mounttable.by_listmount()
    except OSError as error:
        same(error.errno, errno.ENOSYS)
        return False
    return True


def _built(engine, document, overrides, bundle, unshare, user, change):
    """Gather where `run` does: outside for root and detached trees, else in the namespaces."""
    if user is not None or engine == "attached":
        _new_namespaces(user, unshare)
        unshare = None
    spec, plan = _loaded(engine, document, overrides, bundle, change)
    if unshare is not None and belongs_inside(plan):
        _new_namespaces(None, unshare)
        unshare = None
    if way == AT_ONCE and not unshare:
        compile_once(plan)
        root = usual.build(plan)
        if root is not None:
            if unshare is not None:
                _new_namespaces(None, unshare)
            root.materials = Materials()
            return spec, plan, root
    materials = gather(plan)
    owner = -1
    try:
        if unshare is not None:
            _new_namespaces(None, unshare)
        if plan.user is not None:
            owner = usernamespace.with_mappings(plan.user.uid_mappings, plan.user.gid_mappings)
        return spec, plan, _assembled(plan, materials, owner)
    except BaseException:
        materials.close()
        materials.cleanup()
        raise
    finally:
        if owner >= 0:
            os.close(owner)


def _assembled(plan, materials, owner):
    if way == LONG:
        return assemble(plan, materials, owner)
    umask = os.umask(0)
    try:
        if way == AHEAD:
            go_ahead(plan)
        return assemble(plan, materials, owner, umask_is_clear=True)
    finally:
        os.umask(umask)


def _refusing(engine, document, _check, overrides=None, bundle=".", umask=0o77, unshare=0,
              user=None, prepare=None, change=None):
    os.umask(umask)
    if prepare is not None:
        prepare()
    before = descriptors()
    points = _mountpoints()
    try:
        _built(engine, document, overrides, bundle, unshare, user, change)
    except SandboxError as error:
        fields = {
            "origin": error.origin, "operation": error.operation, "text": error.text,
            "target": os.fsdecode(error.target) if error.target else "", "line": error.line(),
            "errno": errno.errorcode.get(error.errno), "hint": error.hint,
            "kind": type(error).__name__,
        }
    else:
        raise AssertionError("it was built; an error was expected")
    same(descriptors(), before, "descriptors after the error")
    if engine == "detached" and user is None:
        same(_mountpoints(), points, "the mounts after the error")
    return fields
