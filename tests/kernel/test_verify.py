"""verify on real trees: what is right passes, and each thing that is changed is told."""

import os
import stat
import subprocess
import time

import pytest

from sandboxfs.build import assemble, verify
from sandboxfs.kernel import abi, fscontext, mounttable, submounts, syscalls
from sandboxfs.plan import from_spec
from sandboxfs.spec import load
from tests.support.bundles import bundle as make_bundle
from tests.support.commands import ENVIRONMENT, LAUNCHER, run_cli
from tests.support.host import attach, bind, mount_tmpfs
from tests.support.namespace import UNPRIVILEGED, in_namespace
from tests.support.specs import default_spec

pytestmark = pytest.mark.needs("root", "busybox", "detached-nesting")


def mount(destination, type="tmpfs", source="tmpfs", *options):
    return {"destination": destination, "type": type, "source": source, "options": list(options)}


def rbind(destination, source, *options):
    return mount(destination, "bind", str(source), "rbind", *options)


def spec_with(*mounts, **changes):
    document = default_spec()
    document["mounts"] += mounts
    for key, value in changes.items():
        document[key] = value
    return document


class Tree:
    """A built root, attached at `path` of a private namespace."""

    def __init__(self, directory, document):
        self.bundle = make_bundle(directory, document)
        self.plan = from_spec.plan(load.load(str(self.bundle.path)))
        self.path = directory / "root"
        self.path.mkdir()
        self.root = assemble.build(self.plan)
        self.root.attach(self.path)

    def differences(self):
        return self.root.verify()

    def at(self, path):
        return os.fsencode(str(self.path) + path)

    def set(self, path, **changes):
        fd = os.open(self.at(path), os.O_PATH | os.O_CLOEXEC)
        syscalls.mount_setattr(fd, **changes)
        os.close(fd)

    def unmount(self, path):
        syscalls.umount2(self.at(path), abi.MNT_DETACH)

    def mount(self, path, type=b"tmpfs", source=b"tmpfs", attributes=0):
        settings = [fscontext.string(b"source", source)]
        attach(fscontext.create(type, settings, attributes), self.at(path))


def differences_of(directory, document, change=None):
    """Build, attach, `change(tree)`, and return the differences; the unchanged tree has none."""

    def check():
        mount_tmpfs(directory)
        prepare = directory / "host"
        prepare.mkdir()
        tree = Tree(directory, document(prepare) if callable(document) else document)
        with tree.root:
            before = tree.differences()
            if change is None:
                return before
            assert before == []
            change(tree)
            return tree.differences()

    return in_namespace(check)


# -- trees as they should be ---------------------------------------------------------------


def tree_on(host, *mounted):
    """A directory of the host with mounts in it."""
    base = host / "data"
    base.mkdir()
    for name in mounted:
        (base / name).mkdir(parents=True)
        mount_tmpfs(base / name)
    return base


def shared(path):
    mount_tmpfs(path)
    fd = os.open(path, os.O_PATH)
    syscalls.mount_setattr(fd, propagation=abi.MS_SHARED)
    os.close(fd)
    return path


def deep_lower(host):
    """A rootfs with mounts of its own below it comes with the bundle; see `Tree`."""
    document = default_spec()
    lower = tree_on(host, "home", "home/deep", "srv with space")
    (lower / "proc").mkdir()
    attach(fscontext.create(b"proc", [], 0), lower / "proc")
    (lower / "home/user").mkdir()
    mount_tmpfs(lower / "home/user")
    for name in ("dev", "sys", "run", "tmp"):
        (lower / name).mkdir()
    document["root"]["path"] = str(lower)
    document["mounts"].append(mount("/home/user/cache"))
    return document


def file_in(host):
    path = host / "file"
    path.write_text("content\n", "utf-8")
    return path


TREES = {
    "default": lambda _: default_spec(),
    "read-only root": lambda _: spec_with(
        mount("/new/mountpoint"), root={"path": "rootfs", "readonly": True}),
    "rootfs itself": lambda _: spec_with(annotations={"dev.sandboxfs.overlay": "none"}),
    "stacked": lambda _: spec_with(
        mount("/x", "tmpfs", "one"), mount("/x", "tmpfs", "two", "ro"), mount("/x/../x")),
    "hidden": lambda _: spec_with(
        mount("/a/b", "tmpfs", "inner"), mount("/a", "tmpfs", "outer"),
        mount("/a/b", "tmpfs", "seen")),
    "recursive bind": lambda host: spec_with(
        rbind("/data", tree_on(host, "one", "one/two", "new\nline"))),
    "recursive read-only bind": lambda host: spec_with(
        rbind("/data", tree_on(host, "one", "one/two"), "rro", "nosuid")),
    "a mount over one that came with a bind": lambda host: spec_with(
        rbind("/data", tree_on(host, "one", "one/two")),
        mount("/data/one", "tmpfs", "above", "ro"), mount("/data/one", "tmpfs", "top")),
    "rootfs with mounts of its own": lambda host: {
        **deep_lower(host), "annotations": {"dev.sandboxfs.overlay": "none"}},
    "plain bind of a tree": lambda host: spec_with(
        mount("/data", "bind", str(tree_on(host, "one")), "bind", "noexec")),
    "bind of a file": lambda host: spec_with(rbind("/etc/new/file", file_in(host), "ro")),
    "mountpoint in a read-only bind": lambda host: spec_with(
        rbind("/data", tree_on(host), "ro"), mount("/data/missing", "tmpfs", "tmpfs", "nosuid")),
    "mountpoint in a read-only tree": lambda host: spec_with(
        rbind("/data", tree_on(host, "one"), "ro"), mount("/data/missing")),
    "overlay on binds": lambda host: spec_with(
        rbind("/data", tree_on(host)), rbind("/file", file_in(host)),
        annotations={"dev.sandboxfs.overlay.binds": "true"}),
    "mounts below the lower": deep_lower,
    "shared and slave": lambda host: spec_with(
        rbind("/peer", shared(tree_on(host)), "rshared"),
        rbind("/follower", host / "data", "rslave"),
        mount("/alone", "tmpfs", "tmpfs", "unbindable"), mount("/peer/inside")),
    "destination by a symlink": lambda host: spec_with(
        mount("/bin/../link/sub"), rbind("/etc/link", host_link(host))),
    "a symlink that is copied": lambda host: spec_with(
        mount("/etc/copied", "bind", str(host_link(host) / "../link"), "bind", "copy-symlink")),
    "cgroup": lambda _: spec_with(
        mount("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid", "noexec", "nodev", "ro")),
    "no /tmp of ours": lambda _: spec_with(mount("/tmp/inside")),
    "atime": lambda host: spec_with(
        mount("/a", "tmpfs", "tmpfs", "noatime"), rbind("/b", tree_on(host), "strictatime"),
        rbind("/c", host / "data", "nodiratime", "noatime", "nosymfollow")),
    "idmap": lambda host: spec_with({
        **rbind("/data", tree_on(host), "idmap"),
        "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}],
        "gidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}],
    }),
    "devices": lambda _: spec_with(linux={**default_spec()["linux"], "devices": [
        {"path": "/dev/fuse2", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640},
        {"path": "/dev/pipe", "type": "p"},
    ]}),
    "masks inside masks": lambda _: spec_with(linux={
        **default_spec()["linux"],
        "maskedPaths": ["/proc/keys", "/proc/keys", "/proc/fs", "/nowhere", "/proc/acpi"],
        "readonlyPaths": ["/proc/sys/kernel", "/proc/sys", "/proc/irq", "/proc/irq"],
    }),
}


def host_link(host):
    link = host / "link"
    if not link.is_symlink():
        (host / "target").mkdir()
        link.symlink_to("target")
    return link


@pytest.mark.parametrize("name", TREES)
def test_a_tree_as_planned_has_no_differences(tmp_path, name):
    assert differences_of(tmp_path, TREES[name]) == []


# -- trees that were changed ---------------------------------------------------------------


def replace_node(tree):
    os.unlink(tree.at("/dev/zero"))
    os.mknod(tree.at("/dev/zero"), stat.S_IFCHR, os.makedev(1, 1))
    os.chmod(tree.at("/dev/zero"), 0o666)


def replace_symlink(tree):
    os.unlink(tree.at("/dev/fd"))
    os.symlink("/etc", tree.at("/dev/fd"))


def cover_with(source):
    def change(tree):
        tree.unmount("/proc/keys")
        bind(source, tree.at("/proc/keys").decode())

    return change


def add_below_bind(tree):
    os.mkdir(tree.at("/run/extra"))
    tree.mount("/run/extra")
    tree.mount("/run/extra")


def swap_stack(tree):
    tree.unmount("/x")
    tree.unmount("/x")
    tree.mount("/x", source=b"two")
    tree.mount("/x", source=b"one")


CHANGES = {
    "a flag cleared": (
        lambda tree: tree.set("/sys", attr_clr=abi.MOUNT_ATTR_RDONLY),
        ["mounts[5]: /sys: flags rw,nosuid,nodev,noexec instead of ro,nosuid,nodev,noexec"]),
    "a flag set": (
        lambda tree: tree.set("/run", attr_set=abi.MOUNT_ATTR_NOEXEC),
        [("mounts[6]: /run: flags rw,nosuid,noexec,strictatime instead of "
          "rw,nosuid,strictatime")]),
    "atime changed": (
        lambda tree: tree.set("/run", attr_clr=abi.MOUNT_ATTR__ATIME,
                              attr_set=abi.MOUNT_ATTR_NOATIME),
        ["mounts[6]: /run: flags rw,nosuid,noatime instead of rw,nosuid,strictatime"]),
    "the root sealed": (
        lambda tree: tree.set("", attr_set=abi.MOUNT_ATTR_RDONLY),
        ["overlay: /: flags ro instead of rw"]),
    "the propagation changed": (
        lambda tree: tree.set("/run", propagation=abi.MS_SHARED),
        "mounts[6]: /run: propagation shared:"),
    "a mount more": (
        lambda tree: tree.mount("/root", attributes=abi.MOUNT_ATTR_NOSUID),
        ["not in the plan: /root: tmpfs of tmpfs, rw,nosuid"]),
    "a stack of mounts more": (
        add_below_bind, ["not in the plan: /run/extra: tmpfs of tmpfs, rw"]),
    "a mount more over one of the plan": (
        lambda tree: tree.mount("/run", type=b"ramfs"),
        ["not in the plan: /run: ramfs of tmpfs, rw"]),
    "a mount more over the root": (
        lambda tree: tree.mount(""), ["not in the plan: /: tmpfs of tmpfs, rw"]),
    "a mount less": (
        lambda tree: tree.unmount("/dev/shm"),
        ["mounts[3]: /dev/shm: nothing is mounted there"]),
    "a file system exchanged": (
        lambda tree: (tree.unmount("/dev/shm"), tree.mount("/dev/shm", b"ramfs", b"shm", 0xE)),
        ["mounts[3]: /dev/shm: file system ramfs instead of tmpfs"]),
    "a source exchanged": (
        lambda tree: (tree.unmount("/dev/shm"), tree.mount("/dev/shm", source=b"x",
                                                           attributes=0xE)),
        ["mounts[3]: /dev/shm: source x instead of shm"]),
    "a mask less": (
        lambda tree: tree.unmount("/proc/keys"),
        ["linux.maskedPaths[3]: /proc/keys: nothing is mounted there"]),
    "a mask that is no null device": (
        cover_with("/dev/zero"),
        ["linux.maskedPaths[3]: /proc/keys: flags rw instead of rw,noexec",
         "linux.maskedPaths[3]: /proc/keys: covered by something else than /dev/null"]),
    "a mask that can be written": (
        lambda tree: (tree.unmount("/sys/firmware"), tree.mount("/sys/firmware",
                                                                attributes=0xF)),
        ["linux.maskedPaths[8]: /sys/firmware: the tmpfs that covers it is writable"]),
    "a read-only path that isn't": (
        lambda tree: tree.set("/proc/sys", attr_clr=abi.MOUNT_ATTR_RDONLY),
        "linux.readonlyPaths[3]: /proc/sys: flags rw,nosuid,nodev,noexec instead of ro"),
    "a read-only path that lost a flag": (
        lambda tree: tree.set("/proc/sys", attr_clr=abi.MOUNT_ATTR_NOSUID),
        [("linux.readonlyPaths[3]: /proc/sys: flags ro,nodev,noexec instead of "
          "ro,nosuid,nodev,noexec")]),
    "no /tmp": (
        lambda tree: tree.unmount("/tmp"), ["/tmp: /tmp: nothing is mounted there"]),
    "another device": (replace_node, ["default: /dev/zero: not the device c 1:5"]),
    "a device's mode": (
        lambda tree: os.chmod(tree.at("/dev/zero"), 0o600),
        ["default: /dev/zero: mode 0600 instead of 0666"]),
    "a device less": (
        lambda tree: os.unlink(tree.at("/dev/zero")), ["default: /dev/zero: missing"]),
    "another symlink": (
        replace_symlink, ["default: /dev/fd: a symlink to /etc instead of one to /proc/self/fd"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_changed_is_told(tmp_path, name):
    change, wanted = CHANGES[name]
    found = differences_of(tmp_path, default_spec(), change)
    if isinstance(wanted, str):
        assert found[0].startswith(wanted)
    else:
        assert found == wanted


def test_the_order_of_a_stack_is_compared(tmp_path):
    document = spec_with(mount("/x", "tmpfs", "one"), mount("/x", "tmpfs", "two"))
    assert differences_of(tmp_path, document, swap_stack) == [
        "mounts[7]: /x: source two instead of one", "mounts[8]: /x: source one instead of two",
    ]


def test_a_hidden_mount_that_is_missing_is_told(tmp_path):
    document = spec_with(mount("/x", "tmpfs", "one"), mount("/x", "tmpfs", "two"))
    assert differences_of(tmp_path, document, lambda tree: tree.unmount("/x")) == [
        "mounts[8]: /x: nothing is mounted there",
    ]


def test_a_root_that_lost_its_seal_is_told(tmp_path):
    document = spec_with(root={"path": "rootfs", "readonly": True})
    change = lambda tree: tree.set("", attr_clr=abi.MOUNT_ATTR_RDONLY)  # noqa: E731
    assert differences_of(tmp_path, document, change) == ["overlay: /: flags rw instead of ro"]


def test_below_a_recursive_bind_the_flags_of_the_tree_are_compared(tmp_path):
    document = TREES["recursive read-only bind"]
    change = lambda tree: tree.set("/data/one/two", attr_clr=abi.MOUNT_ATTR_RDONLY)  # noqa: E731
    (line,) = differences_of(tmp_path, document, change)
    assert line.startswith("mounts[7]: /data/one/two: flags rw")


def test_a_lower_without_its_overlay_is_told(tmp_path):
    def change(tree):
        tree.unmount("/home/deep")
        bind(tree.path.parent / "host/data/home/deep", tree.at("/home/deep").decode())

    (line,) = differences_of(tmp_path, deep_lower, change)
    assert "/home/deep" in line
    assert "without an overlay" in line


def test_over_a_bind_a_mount_that_is_missing_or_more_is_told(tmp_path):
    document = TREES["a mount over one that came with a bind"]
    found = differences_of(tmp_path, document, lambda tree: tree.mount("/data/one"))
    assert found
    assert all("/data/one" in line for line in found)
    (tmp_path / "again").mkdir()
    found = differences_of(tmp_path / "again", document, lambda tree: tree.unmount("/data/one"))
    # Which of three is gone can't be seen where a bind brought one: both operations are named.
    assert {line.split(":")[0] for line in found} >= {"mounts[8]", "mounts[9]"}


def test_a_tree_that_is_not_attached_is_an_error_and_no_answer(tmp_path):
    def check():
        mount_tmpfs(tmp_path)
        made = make_bundle(tmp_path, default_spec())
        with assemble.build(from_spec.plan(load.load(str(made.path)))) as root, \
                pytest.raises(FileNotFoundError):
            root.verify()

    in_namespace(check)


def reusable_id(descriptor, _wanted=None):
    return syscalls.mount_id(descriptor, abi.STATX_MNT_ID)


def test_mountinfo_gives_the_same_verdicts(tmp_path, monkeypatch):
    def old_kernel(*_arguments, **_more):
        raise OSError(38, "listmount")

    for module in (mounttable, submounts, verify):
        monkeypatch.setattr(module, "mount_id", reusable_id)
    for module in (mounttable, submounts):
        monkeypatch.setattr(module, "listmount", old_kernel)
    monkeypatch.setattr(mounttable.Statmount, "tells_everything", lambda *_arguments: False)
    assert differences_of(tmp_path, TREES["hidden"]) == []
    (tmp_path / "again").mkdir()
    change, wanted = CHANGES["a flag cleared"]
    assert differences_of(tmp_path / "again", default_spec(), change) == wanted


# -- running containers --------------------------------------------------------------------


class Running:
    """A container that sleeps; `pid` is its payload's."""

    def __init__(self, made, *options, uid=None):
        self.process = subprocess.Popen(
            [LAUNCHER, "run", *options, "--bundle", str(made.path), "--", "/bin/sh", "-c",
             "echo ready; exec sleep 60"],
            stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, env=ENVIRONMENT, cwd="/",
            user=uid, group=uid, extra_groups=None if uid is None else [],
        )

    def __enter__(self):
        assert self.process.stdout.readline() == b"ready\n"
        # The payload is the youngest of the run's descendants.
        pid = self.process.pid
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            child = self.child_of(pid)
            if child is None:
                break
            pid = child
        self.pid = pid
        return self

    @staticmethod
    def child_of(pid):
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
            children = file.read().split()
        return int(children[-1]) if children else None

    def __exit__(self, *exception):
        os.kill(self.pid, 9)
        self.process.wait(10)
        self.process.stdout.close()

    def verify(self, made):
        return run_cli("verify", "--bundle", made.path, "--pid", str(self.pid))


def refuse(_path):
    raise PermissionError(13, "Permission denied")


@pytest.mark.needs("launcher")
def test_a_running_container_is_verified_from_outside(bundle, monkeypatch):
    made = bundle(spec_with(rbind("/host-etc", "/etc", "ro")))
    with Running(made, "--verify") as running:
        done = running.verify(made)
        assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
        in_mount_namespace_of(running.pid, lambda: mount_tmpfs("/root"))
        in_mount_namespace_of(running.pid, lambda: clear_read_only("/sys"))
        done = running.verify(made)
        # What mountinfo tells is as good, where the namespace itself can't be asked.
        monkeypatch.setattr(mounttable, "namespace_id_of", refuse)
        plan = from_spec.plan(load.load(str(made.path)))
        again = verify.verify_process(plan, running.pid).differences
    assert done.returncode == 1
    assert done.stdout.splitlines() == again
    assert done.stdout.splitlines() == [
        "mounts[5]: /sys: flags rw,nosuid,nodev,noexec instead of ro,nosuid,nodev,noexec",
        "not in the plan: /root: tmpfs of none, rw",
    ]


def in_mount_namespace_of(pid, function):
    def check():
        fd = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        syscalls.setns(fd, abi.CLONE_NEWNS)
        os.close(fd)
        function()

    in_namespace(check, check_descriptors=False)


def clear_read_only(path):
    fd = os.open(path, os.O_PATH)
    syscalls.mount_setattr(fd, attr_clr=abi.MOUNT_ATTR_RDONLY)
    os.close(fd)


@pytest.mark.needs("launcher")
def test_a_source_that_was_replaced_is_a_note(bundle, public_path):
    source = public_path / "source"
    source.write_text("old\n", "utf-8")
    made = bundle(spec_with(rbind("/etc/file", source)))
    with Running(made) as running:
        source.rename(public_path / "moved")
        source.write_text("new\n", "utf-8")
        done = running.verify(made)
    assert done.returncode == 0
    assert done.stdout == (
        f"note: mounts[7]: {source}: is another file by now than the one that is bound\n"
    )


@pytest.mark.needs("launcher", "user-namespaces")
def test_a_user_namespace_gets_its_notes(bundle):
    document = default_spec()
    document["linux"]["namespaces"].append({"type": "user"})
    document["linux"]["uidMappings"] = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    document["linux"]["gidMappings"] = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    made = bundle(document)
    os.chmod(made.rootfs, 0o755)
    with Running(made, "--verify") as running:
        done = running.verify(made)
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith("note: ")] == []
    assert done.returncode == 0
    assert any("/proc" in line and "pid namespace" in line for line in lines)


@pytest.mark.needs("launcher", "user-namespaces")
def test_an_unprivileged_container_verifies_itself(bundle):
    document = default_spec()
    for entry in document["mounts"]:
        entry["options"] = [word for word in entry["options"] if word != "gid=5"]
    made = bundle(document)
    run_cli("run", "--verify", "--bundle", made.path, uid=UNPRIVILEGED, check=0)


@pytest.mark.needs("launcher", "user-namespaces")
@pytest.mark.parametrize("uid", [None, UNPRIVILEGED])
@pytest.mark.parametrize("engine", ["detached", "attached"])
def test_the_view_of_this_machine_verifies_itself(engine, uid):
    run_cli("run", "--engine", engine, "--verify", "--", "/bin/true", uid=uid, check=0)


@pytest.mark.needs("launcher")
@pytest.mark.parametrize(("pid", "status", "words"), [
    ("0", 2, "not the number of a process"), ("99999999", 125, "no such process"),
])
def test_a_process_that_is_none(bundle, pid, status, words):
    done = run_cli("verify", "--bundle", bundle().path, "--pid", pid, check=status)
    assert words in done.stderr
