"""The runtime in front of a real runc: the container's root, and what the host sees of it."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sandboxfs.kernel import abi, syscalls
from tests.support import Bundle, bind, mount_tmpfs, run, table, untouched
from tests.support.front import RECORDED, Runc, front, logged, recorder
from tests.support.mounts import MountRecord
from tests.support.specs import containerd_spec

pytestmark = pytest.mark.needs("root", "overlay", "busybox", "launcher", "runc", "gcc")

PREFIX = "dev.sandboxfs."
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def runc(public_path: Path) -> Runc:
    return Runc(public_path)


@pytest.fixture
def made(bundle: Callable[..., Bundle]) -> Callable[..., Bundle]:
    """Make a bundle whose container runs a script."""

    def make(script: str, change: Change = lambda document: None) -> Bundle:
        document = containerd_spec("/bin/sh", "-c", script)
        document["root"] = {"path": "rootfs", "readonly": False}
        document["linux"].pop("cgroupsPath", None)
        change(document)
        return bundle(document, mountpoints=False)

    return make


@pytest.fixture(autouse=True)
def nothing_below_run() -> Iterator[None]:
    """What is ours stays in no directory of the host."""
    before = sorted(os.listdir("/run"))
    yield
    assert sorted(os.listdir("/run")) == before


def rows() -> list[str]:
    return Path("/proc/self/mountinfo").read_text("utf-8").splitlines()


def test_the_container_writes_to_our_root_and_the_image_stays(runc, made) -> None:
    box = made("echo new >/etc/new; rm /etc/passwd; mkdir /a; ls /; "
               "grep ' / / ' /proc/self/mountinfo")
    before = rows()
    with untouched(box.path):
        done = runc.run(box.path)
    assert done.returncode == 0, done.stderr
    assert {"a", "bin", "dev", "proc", "sys", "tmp"} <= set(done.stdout.split())
    assert " overlay sandboxfs-runtime " in done.stdout
    assert rows() == before


def test_the_control_writes_to_the_image(made, public_path) -> None:
    box = made("echo new >/etc/new; mkdir /a")
    done = run("runc", "--root", public_path / "state", "run", "--bundle", box.path, "tests")
    assert done.returncode == 0, done.stderr
    assert (box.rootfs / "etc/new").exists()
    assert (box.rootfs / "dev").exists()


def test_what_is_read_only_refuses_writes(runc, made, public_path) -> None:
    data = public_path / "data"
    data.mkdir()
    (data / "file").write_text("old\n")

    def change(document: dict[str, Any]) -> None:
        document["root"]["readonly"] = True
        document["mounts"] += [
            {"destination": "/data", "type": "bind", "source": str(data),
             "options": ["rbind", "ro"]},
            {"destination": "/sealed", "type": "tmpfs", "source": "tmpfs", "options": ["ro"]},
        ]

    places = ("/x", "/etc/passwd", "/data/file", "/data/new", "/sealed/x",
              "/proc/sys/kernel/domainname", "/sys/x", "/proc/sysrq-trigger")
    script = "".join(f"(echo x >{place}) 2>/dev/null && echo wrote {place};" for place in places)
    box = made(script + "echo x >/tmp/x && echo wrote /tmp", change)
    with untouched(box.path, data):
        done = runc.run(box.path)
    assert (done.returncode, done.stdout) == (0, "wrote /tmp\n"), done.stderr


def test_tmp_belongs_to_the_containers_root(runc, made) -> None:
    def change(document: dict[str, Any]) -> None:
        document["linux"]["namespaces"].append({"type": "user"})
        ids = [{"containerID": 0, "hostID": 100000, "size": 65536}]
        document["linux"].update(uidMappings=ids, gidMappings=ids)

    box = made("stat -c '%u %g %a' /tmp /; echo x >/tmp/x && echo x >/x && echo both", change)
    for path in [box.rootfs, *box.rootfs.rglob("*")]:
        os.lchown(path, 100000, 100000)
    with untouched(box.rootfs):
        done = runc.run(box.path)
    assert done.stdout == "0 0 1777\n0 0 755\nboth\n", done.stderr


def test_tmp_is_left_alone_where_something_is_in_it(runc, made, public_path) -> None:
    box = made("ls /tmp; mount | grep -c ' /tmp '")
    (box.rootfs / "tmp").mkdir()
    (box.rootfs / "tmp/file").touch()
    assert runc.run(box.path).stdout == "file\n0\n"

    def change(document: dict[str, Any]) -> None:
        document["mounts"].append({"destination": "/tmp//inside/", "type": "tmpfs",
                                   "source": "tmpfs"})

    (box.rootfs / "tmp/file").unlink()
    document = box.document
    change(document)
    box.write(document)
    assert runc.run(box.path).stdout == "inside\n0\n"


# -- who decides ----------------------------------------------------------------------------


def test_overlay_none_is_as_without_us(runc, made) -> None:
    def change(document: dict[str, Any]) -> None:
        document["annotations"] = {f"{PREFIX}overlay": "none"}

    box = made("echo kept >/etc/kept; grep -c sandboxfs /proc/self/mountinfo; "
               "mount | grep -c ' /tmp '", change)
    done = runc.run(box.path)
    assert done.stdout == "0\n0\n", done.stderr
    assert (box.rootfs / "etc/kept").read_text() == "kept\n"
    assert not (box.rootfs / "tmp").exists()


def test_the_operators_file_decides(made, public_path, bundle) -> None:
    policy = public_path / "config.toml"
    policy.write_text('[overlay]\nmode = "none"\n[annotations]\nhonour = ["dev.sandboxfs.tmp"]\n')
    runc = Runc(public_path, policy)

    def change(document: dict[str, Any]) -> None:
        document["annotations"] = {f"{PREFIX}overlay": "tmpfs"}

    box = made("echo kept >/etc/kept", change)
    log = public_path / "log"
    done = runc.call("--log", log, "--log-format", "json", "run", "--bundle", box.path, "tests")
    assert done.returncode == 0, done.stderr
    assert (box.rootfs / "etc/kept").exists()
    assert any("not honoured" in entry["msg"] for entry in logged(log))
    # A file that is wrong keeps containers from starting, other commands not.
    policy.write_text("[overlay]\nmode = 1\n")
    assert runc.run(box.path).returncode == 65
    assert runc.call("list").returncode == 0


def test_sizes_are_limited(runc, made) -> None:
    def change(document: dict[str, Any]) -> None:
        document["annotations"] = {f"{PREFIX}overlay.size": "1M"}

    box = made("dd if=/dev/zero of=/big bs=1k count=2000 2>&1 | grep -o 'No space left'", change)
    assert runc.run(box.path).stdout == "No space left\n"


@pytest.mark.parametrize("share", ["container", "pod"])
def test_a_hint_makes_a_mount_a_tmpfs(runc, made, public_path, share) -> None:
    data = public_path / "data"
    data.mkdir()

    def change(document: dict[str, Any]) -> None:
        document["annotations"] = {
            f"{PREFIX}mount.v.source": str(data), f"{PREFIX}mount.v.type": "tmpfs",
            f"{PREFIX}mount.v.share": share, f"{PREFIX}mount.v.options": "size=1M,noexec",
        }
        document["mounts"].append({"destination": "/data", "type": "bind", "source": str(data),
                                   "options": ["rbind", "rw"]})

    box = made("echo x >/data/x; mount | grep ' /data '; ls -d /data", change)
    with untouched(box.path, data):
        done = runc.run(box.path)
    assert "tmpfs on /data type tmpfs (rw,nosuid,nodev,noexec" in done.stdout, done.stderr
    assert "size=1024k" in done.stdout


def test_writes_to_binds_go_to_overlays_by_annotation(runc, made, public_path) -> None:
    data = public_path / "data"
    (data / "inner").mkdir(parents=True)
    (data / "file").write_text("old\n")
    single = public_path / "single"
    single.write_text("old\n")
    mount_tmpfs(data / "inner")
    (data / "inner/file").write_text("old\n")

    def change(document: dict[str, Any]) -> None:
        document["annotations"] = {f"{PREFIX}overlay.binds": "true"}
        for at, source in (("/data", data), ("/again", data / "inner"), ("/single", single)):
            document["mounts"].append({"destination": at, "type": "bind", "source": str(source),
                                       "options": ["rbind", "rw"]})

    box = made("for f in /data/file /data/inner/file /single /again/file; do echo new >$f; "
               "cat $f; done; echo more >/data/more", change)
    before = rows()
    try:
        with untouched(box.path, data, single.parent / "data"):
            done = runc.run(box.path)
        assert done.stdout == "new\n" * 4, done.stderr
        assert single.read_text() == "old\n"
        assert rows() == before
    finally:
        syscalls.umount2(os.fsencode(data / "inner"), abi.MNT_DETACH)


def test_an_upper_on_disk_goes_with_the_container(made, public_path) -> None:
    policy = public_path / "config.toml"
    policy.write_text('[annotations]\nhost-paths = true\n[log]\nlevel = "error"\n')
    runc = Runc(public_path, policy)
    uppers = public_path / "uppers"
    uppers.mkdir()

    def change(document: dict[str, Any]) -> None:
        document["annotations"] = {f"{PREFIX}overlay": f"dir={uppers}"}

    box = made("echo x >/etc/x; ls /etc/x; while [ ! -e /control/end ]; do sleep .05; done", change)
    control = public_path / "control"
    control.mkdir()
    document = box.document
    document["mounts"].append({"destination": "/control", "type": "bind", "source": str(control),
                               "options": ["rbind", "rw"]})
    box.write(document)
    process = subprocess.Popen([runc.program, "--root", runc.state, "run", "--bundle", box.path,
                                "tests"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "/etc/x\n"
    assert (uppers / "tests/upper/etc/x").read_text() == "x\n"
    (control / "end").touch()
    assert process.wait(20) == 0
    process.stdout.close()
    assert list(uppers.iterdir()) == []


def test_two_containers_of_a_pod_share_a_volume(made, public_path) -> None:
    import shutil

    policy = public_path / "config.toml"
    policy.write_text(f'[log]\nfile = "{public_path}/hook.log"\n')
    runc = Runc(public_path, policy)
    volume = public_path / "volume"
    volume.mkdir()
    control = public_path / "control"
    control.mkdir()

    def change(document: dict[str, Any]) -> None:
        document["annotations"] = {
            f"{PREFIX}pod": "tests", f"{PREFIX}mount.v.source": str(volume),
            f"{PREFIX}mount.v.type": "tmpfs", f"{PREFIX}mount.v.share": "pod",
        }
        for at, source in (("/v", volume), ("/control", control)):
            document["mounts"].append({"destination": at, "type": "bind", "source": str(source),
                                       "options": ["rbind", "rw"]})

    box = made("echo first >/v/file; echo ready; while [ ! -e /control/end ]; do sleep .05; done; "
               "cat /v/file", change)
    process = subprocess.Popen([runc.program, "--root", runc.state, "run", "--bundle", box.path,
                                "one"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        document = json.loads(json.dumps(box.document))
        document["process"]["args"][2] = "cat /v/file; echo second >/v/file"
        other = Bundle(public_path / "other")
        other.path.mkdir()
        document["root"]["path"] = str(box.rootfs)
        other.write(document)
        done = runc.run(other.path, name="two")
        assert (done.returncode, done.stdout) == (0, "first\n"), done.stderr
        (control / "end").touch()
        assert process.stdout.read() == "second\n"
        assert process.wait(20) == 0
        process.stdout.close()
        assert list(volume.iterdir()) == []
        assert not any(record.mountpoint.startswith(b"/run/sandboxfs/pods") for record in table())
    finally:
        shutil.rmtree("/run/sandboxfs", ignore_errors=True)


def test_builds_are_passed_on(public_path, bundle) -> None:
    program = front(public_path, recorder(public_path))
    made = bundle(name="buildah12345")
    document = made.document
    document["linux"]["namespaces"] = [{"type": "mount", "path": "/proc/self/ns/mnt"}]
    made.write(document)  # refused, if it isn't passed on
    for name, status in (("buildah-buildah12345", RECORDED), ("other", 125)):
        assert run(program, "create", "--bundle", made.path, name).returncode == status


# -- a root that can't be ours --------------------------------------------------------------


@pytest.mark.parametrize(("namespaces", "text"), [
    ([{"type": "mount", "path": "/proc/1/ns/mnt"}], "joined"),
    ([{"type": "pid"}], "no mount namespace"),
])
def test_a_mount_namespace_of_somebody_elses_is_refused(runc, made, namespaces, text) -> None:
    box = made("echo started", lambda document: document["linux"].update(namespaces=namespaces))
    with untouched(box.path):
        done = runc.run(box.path)
    assert (done.returncode, done.stdout) == (125, "")
    assert text in done.stderr


@pytest.mark.parametrize("root", ["missing", "etc/passwd", None])
def test_a_missing_root_is_an_error(runc, made, root) -> None:
    box = made("echo started", lambda document: document.update(
        root={"path": f"rootfs/{root}"}) if root else document.pop("root"))
    done = runc.run(box.path)
    assert done.returncode in (65, 125), done.stderr
    assert done.stdout == ""


def test_a_root_above_its_bundle_is_attached_elsewhere(runc, made, public_path) -> None:
    box = made("ls /; echo x >/x; ls /sys/kernel/debug | head -1")
    inner = Bundle(box.rootfs / "inside")
    inner.path.mkdir()
    document = box.document
    document["root"]["path"] = ".."
    inner.write(document)
    with untouched(box.rootfs):
        done = runc.run(inner.path)
    assert done.returncode == 0, done.stderr
    assert "inside" in done.stdout.split()


def test_the_machines_own_root_can_be_a_containers(runc, made) -> None:
    def change(document: dict[str, Any]) -> None:
        document["root"] = {"path": "/"}

    box = made("test -e /etc/debian_version && echo x >/etc/of-the-container && "
               "ls /etc/of-the-container", change)
    before = rows()
    done = runc.run(box.path)
    assert done.stdout == "/etc/of-the-container\n", done.stderr
    assert not os.path.exists("/etc/of-the-container")
    assert rows() == before


def test_mounts_below_the_rootfs_are_in_the_view(runc, made) -> None:
    box = made("cat /etc/below/file; echo new >/etc/below/file; echo more >/etc/below/more")
    (box.rootfs / "etc/below").mkdir()
    mount_tmpfs(box.rootfs / "etc/below")
    (box.rootfs / "etc/below/file").write_text("old\n")
    try:
        done = runc.run(box.path)
        assert done.stdout == "old\n", done.stderr
        assert os.listdir(box.rootfs / "etc/below") == ["file"]
        assert (box.rootfs / "etc/below/file").read_text() == "old\n"
    finally:
        syscalls.umount2(os.fsencode(box.rootfs / "etc/below"), abi.MNT_DETACH)


@pytest.mark.parametrize("propagation", [abi.MS_SHARED, abi.MS_PRIVATE, abi.MS_UNBINDABLE])
def test_a_rootfs_that_is_a_mount(runc, made, propagation) -> None:
    box = made("echo x >/etc/x; cat /etc/group")
    bind(box.rootfs, box.rootfs)
    fd = os.open(box.rootfs, os.O_PATH)
    syscalls.mount_setattr(fd, propagation=propagation)
    os.close(fd)
    before = rows()
    try:
        done = runc.run(box.path)
        assert done.stdout == "root:x:0:\n", done.stderr
        assert not (box.rootfs / "etc/x").exists()
        assert rows() == before
    finally:
        syscalls.umount2(os.fsencode(box.rootfs), abi.MNT_DETACH)


# -- the host's mounts, while and after a container starts ----------------------------------


def running(runc: Runc, box: Bundle) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [runc.program, "--root", runc.state, "run", "--bundle", box.path, "tests"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def said(process: "subprocess.Popen[str]") -> str:
    return process.communicate("go\n", timeout=20)[0]


def test_mounts_that_the_host_makes_later_arrive(runc, made, public_path) -> None:
    """On a volume beside the rootfs, whose mount is touched for the root."""
    volume = public_path / "volume"
    (volume / "point").mkdir(parents=True)

    def change(document: dict[str, Any]) -> None:
        document["process"]["terminal"] = False
        document["mounts"].append({"destination": "/volume", "type": "bind", "source": str(volume),
                                   "options": ["rbind", "rslave"]})

    process = running(runc, made("echo ready; read go; ls /volume/point", change))
    mount_tmpfs(volume / "point")
    try:
        (volume / "point/file").touch()
        assert said(process) == "file\n"
    finally:
        syscalls.umount2(os.fsencode(volume / "point"), abi.MNT_DETACH)


def test_mounts_that_a_container_makes_on_an_rshared_volume_reach_the_host(
    runc, made, public_path
) -> None:
    volume = public_path / "volume"
    (volume / "point").mkdir(parents=True)

    def change(document: dict[str, Any]) -> None:
        # runc makes all mounts slaves first, unless it is told this.
        document["linux"]["rootfsPropagation"] = "rshared"
        document["process"]["capabilities"] = {
            kind: ["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"]
            for kind in ("bounding", "effective", "permitted")}
        document["mounts"].append({"destination": "/volume", "type": "bind", "source": str(volume),
                                   "options": ["rbind", "rshared"]})

    script = "mount -t tmpfs t /volume/point; touch /volume/point/file; echo ready; read go"
    process = running(runc, made(script, change))
    try:
        assert os.listdir(volume / "point") == ["file"]
    finally:
        said(process)
        syscalls.umount2(os.fsencode(volume / "point"), abi.MNT_DETACH)


def test_nothing_is_lost_while_the_host_mounts_all_the_time(runc, made, public_path) -> None:
    """The moment in which a copy is private is looked at, and all begins anew if it mattered."""
    volume = public_path / "volume"
    for number in range(30):
        (volume / str(number)).mkdir(parents=True)
    end = threading.Event()
    busy = public_path / "busy"
    busy.mkdir()

    def mount_and_unmount() -> None:
        while not end.is_set():
            mount_tmpfs(busy)
            syscalls.umount2(os.fsencode(busy), abi.MNT_DETACH)

    def change(document: dict[str, Any]) -> None:
        document["mounts"].append({"destination": "/volume", "type": "bind", "source": str(volume),
                                   "options": ["rbind", "rslave"]})

    box = made("echo ready; read go; ls -d /volume/*/file | wc -l", change)
    thread = threading.Thread(target=mount_and_unmount)
    thread.start()
    try:
        process = running(runc, box)
    finally:
        end.set()
        thread.join()
    try:
        for number in range(30):
            mount_tmpfs(volume / str(number))
            (volume / str(number) / "file").touch()
        assert said(process) == "30\n"
    finally:
        for number in range(30):
            syscalls.umount2(os.fsencode(volume / str(number)), abi.MNT_DETACH)


def peers(path: Path) -> MountRecord:
    return max((record for record in table()
                if os.fsencode(path).startswith(record.mountpoint.rstrip(b"/") + b"/")),
               key=lambda record: len(record.mountpoint))


def test_the_touched_mount_is_the_hosts_peer_again(public_path, bundle) -> None:
    """Seen by what is executed in the real runtime's place, in the very namespace."""
    script = public_path / "runc"
    script.write_text("#!/bin/sh\n[ $1 = --version ] && { echo runc version 1; exit; }\n"
                      "cat /proc/self/mountinfo\n")
    script.chmod(0o755)
    program = front(public_path, script)
    made = bundle()
    done = run(program, "create", "--bundle", made.path, "id", check=0)
    from tests.support import parsed

    inside = parsed(done.stdout)
    host = peers(made.path)
    copy = next(record for record in inside if record.mountpoint == host.mountpoint
                and record.device == host.device)
    assert host.peer_group
    assert copy.peer_group == host.peer_group
    root = next(record for record in inside if record.mountpoint == os.fsencode(made.rootfs))
    assert (root.type, root.peer_group) == (b"overlay", 0)


def test_a_kill_while_the_root_is_built_leaves_nothing(public_path, bundle) -> None:
    program = front(public_path, recorder(public_path))
    made = bundle()
    before = rows()
    for delay in range(0, 24, 2):
        process = subprocess.Popen([program, "create", "--bundle", made.path, "id"],
                                   stdout=subprocess.DEVNULL)
        time.sleep(delay / 1000)
        process.kill()
        process.wait()
        assert rows() == before
