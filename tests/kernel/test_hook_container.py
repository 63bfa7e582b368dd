"""createContainer: the root that a runtime has prepared, rebuilt and laid over the rootfs."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prctl
import pytest

from sandboxfs.hooks import registration
from sandboxfs.kernel import abi, syscalls
from tests.support import (
    LAUNCHER,
    Bundle,
    assert_mount,
    flags_of,
    in_namespace,
    mount_at,
    mount_tmpfs,
    points,
    run,
    table,
    untouched,
)
from tests.support.hooks import Runtime
from tests.support.specs import Document

pytestmark = pytest.mark.needs("root", "overlay", "busybox", "launcher")

MakeBundle = Callable[..., Bundle]
ENGINE = "dev.sandboxfs.engine"


@pytest.fixture(params=[
    pytest.param("detached", marks=pytest.mark.needs("detached-nesting")), "attached",
])
def made(request: pytest.FixtureRequest, bundle: MakeBundle) -> MakeBundle:
    """Bundles whose annotations ask for one engine, then for the other."""

    def make(change: Callable[[Document], Any] = lambda _document: None, **options: Any) -> Bundle:
        def changed(document: Document) -> None:
            document.setdefault("annotations", {})[ENGINE] = request.param
            document["hooks"] = registration.hooks_object(str(LAUNCHER))
            change(document)

        return bundle(changed, **options)

    return make


def add(document: Document, destination: str, type: str, source: str, *options: str) -> None:
    document["mounts"].append({
        "destination": destination, "type": type, "source": source, "options": list(options),
    })


def annotate(document: Document, **values: str) -> None:
    """Set annotations; a double underscore stands for a dot."""
    for key, value in values.items():
        document["annotations"]["dev.sandboxfs." + key.replace("__", ".")] = value


def hint(document: Document, name: str, source: str, **fields: str) -> None:
    for key, value in {"source": source, "type": "tmpfs", "share": "container", **fields}.items():
        document["annotations"][f"dev.sandboxfs.mount.{name}.{key}"] = value


def told(record: Any) -> tuple[Any, ...]:
    """What has to be the same of a mount that was carried over."""
    return (record.mountpoint, record.type, record.source, record.root, record.device,
            record.attributes, record.propagation, record.peer_group, record.master)


def test_every_mount_is_carried_over_as_it_is(made: MakeBundle) -> None:
    prepared = made()

    def body() -> None:
        runtime = Runtime(prepared)
        before = [told(record) for record in runtime.inside()[1:]]
        runtime.hook()
        found = runtime.inside()
        assert_mount(found, "/", type="overlay", flags=set(), propagation=abi.MS_PRIVATE)
        assert sorted(map(told, found[1:]))[:-1] == sorted(before)
        assert_mount(found, "/tmp", type="tmpfs", flags={"nosuid", "nodev"})
        assert len(found) == len(before) + 2
        for name in ("bin/x", "etc/passwd"):
            (prepared.rootfs / name).write_text("written", "utf-8")
        (prepared.rootfs / "bin/busybox").unlink()

    with untouched(prepared.rootfs):
        in_namespace(body)


def test_stacked_nested_and_hidden_mounts(made: MakeBundle, public_path: Path) -> None:
    source = public_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "file").touch()

    def mounts(document: Document) -> None:
        add(document, "/data", "bind", str(source), "rbind", "ro", "nosuid")
        add(document, "/data/sub", "tmpfs", "inner", "noexec", "size=1m")
        add(document, "/data/file", "bind", "/dev/null", "bind")
        add(document, "/stack", "tmpfs", "hidden", "size=1m")
        add(document, "/stack/below", "tmpfs", "hidden too")
        add(document, "/stack", "tmpfs", "seen", "nodev")
        add(document, "/stack/over", "tmpfs", "lower one")
        add(document, "/stack/over", "tmpfs", "upper one")

    prepared = made(mounts)

    def body() -> None:
        runtime = Runtime(prepared)
        runtime.hook()
        found = runtime.inside()
        assert_mount(found, "/data", flags={"ro", "nosuid"}, root=None)
        assert_mount(found, "/data/sub", source="inner", flags={"noexec"})
        assert_mount(found, "/data/file", root="/null")
        assert (prepared.rootfs / "data/file").is_char_device()
        stack = [record.source for record in found if record.mountpoint == b"/stack"]
        assert stack == [b"seen"], "what is hidden under the top isn't the container's"
        over = [record.source for record in found if record.mountpoint == b"/stack/over"]
        assert over == [b"lower one", b"upper one"]
        assert "/stack/below" not in points(found)

    in_namespace(body)


@pytest.mark.parametrize("sealed_before", [False, True], ids=["runc", "crun"])
def test_a_read_only_root(made: MakeBundle, sealed_before: bool) -> None:
    def read_only(document: Document) -> None:
        document["root"]["readonly"] = True
        document["process"]["cwd"] = "/made/for/it"

    prepared = made(read_only)

    def body() -> None:
        runtime = Runtime(prepared)
        if sealed_before:
            runtime.change(runtime.rootfs, abi.MOUNT_ATTR_RDONLY)
        with untouched(prepared.rootfs / "etc"):
            runtime.hook()
        assert_mount(runtime.inside(), "/", type="overlay", flags={"ro"})
        assert (prepared.rootfs / "made/for/it").is_dir()
        with pytest.raises(OSError, match="Read-only file system"):
            (prepared.rootfs / "x").touch()
        (prepared.rootfs / "tmp/x").touch()

    in_namespace(body)


@pytest.mark.parametrize(("name", "flags"), [("runc:[2:INIT]", set()), ("crun", {"ro"})])
def test_a_console_that_runc_makes_later_finds_the_root_writable(
    made: MakeBundle, name: str, flags: set[str]
) -> None:
    """crun makes none there, and would seal the rootfs that it has opened before."""

    def terminal(document: Document) -> None:
        document["root"]["readonly"] = True
        document["process"]["terminal"] = True
        document["mounts"] = [
            mount for mount in document["mounts"] if mount["destination"] != "/dev"
        ]

    prepared = made(terminal)

    def body() -> None:
        prctl.set_name(name)
        runtime = Runtime(prepared)
        runtime.hook()
        assert_mount(runtime.inside(), "/", type="overlay", flags=flags)

    in_namespace(body)


def test_the_rootfs_s_own_flags_hold_for_the_overlay(made: MakeBundle) -> None:
    prepared = made()

    def body() -> None:
        runtime = Runtime(prepared)
        runtime.change(runtime.rootfs, abi.MOUNT_ATTR_NOSUID | abi.MOUNT_ATTR_NODEV)
        runtime.hook()
        assert_mount(runtime.inside(), "/", type="overlay", flags={"nosuid", "nodev"})

    in_namespace(body)


def test_who_stands_below_the_new_root_can_do_nothing_there(made: MakeBundle) -> None:
    """runc --no-pivot makes the directory that it entered before the hook the root."""
    prepared = made()

    def body() -> None:
        runtime = Runtime(prepared)
        before = os.open(runtime.rootfs, os.O_RDONLY | os.O_DIRECTORY)
        try:
            runtime.hook()
            with pytest.raises(OSError, match="Read-only file system"):
                os.open("x", os.O_CREAT | os.O_WRONLY, dir_fd=before)
            assert not os.access("bin/busybox", os.X_OK, dir_fd=before)
            assert os.access(prepared.rootfs / "bin/busybox", os.X_OK)
        finally:
            os.close(before)

    in_namespace(body)


@pytest.mark.parametrize("propagation", [abi.MS_SHARED, abi.MS_SLAVE, abi.MS_UNBINDABLE])
def test_the_rootfs_s_propagation(made: MakeBundle, propagation: int) -> None:
    """Nothing reaches the peers, and the mount that the root lies on can be pivoted away from."""
    prepared = made()

    def body() -> None:
        runtime = Runtime(prepared)
        runtime.set_propagation(runtime.rootfs, abi.MS_SHARED)
        peer = prepared.path / "peer"
        peer.mkdir()
        runtime.bind(runtime.rootfs, peer)
        runtime.set_propagation(runtime.rootfs, propagation)
        seen = [told(each) for each in table() if each.mountpoint.startswith(os.fsencode(peer))]
        runtime.hook()
        found = runtime.inside()
        wanted = abi.MS_SHARED if propagation == abi.MS_SHARED else abi.MS_PRIVATE
        assert_mount(found, "/", type="overlay", propagation=wanted)
        below = next(each for each in table() if each.id == found[0].parent_id)
        assert not below.propagation & abi.MS_SHARED, "pivot_root refuses a shared parent"
        assert seen == [
            told(each) for each in table() if each.mountpoint.startswith(os.fsencode(peer))
        ]

    in_namespace(body)


def test_unbindable_mounts_are_there_and_unbindable(made: MakeBundle, public_path: Path) -> None:
    source = public_path / "source"
    source.mkdir()

    def mounts(document: Document) -> None:
        add(document, "/top", "tmpfs", "top", "unbindable")
        add(document, "/top/inner", "tmpfs", "inner", "nodev")
        add(document, "/other", "bind", str(source), "bind", "rslave")
        add(document, "/other/deep", "tmpfs", "deep", "unbindable", "noexec")

    prepared = made(mounts)

    def body() -> None:
        runtime = Runtime(prepared)
        before = [told(record) for record in runtime.mounts()[1:]]
        runtime.hook()
        found = runtime.inside()
        assert_mount(found, "/top", source="top", propagation=abi.MS_UNBINDABLE)
        assert_mount(found, "/top/inner", source="inner", propagation=abi.MS_PRIVATE)
        assert_mount(found, "/other/deep", flags={"noexec"}, propagation=abi.MS_UNBINDABLE)
        after = {told(record) for record in runtime.mounts()}
        assert set(before) <= after, "the runtime's own are unbindable again"

    in_namespace(body)


def test_shared_and_slave_binds_keep_their_peers(made: MakeBundle, public_path: Path) -> None:
    source = public_path / "source"
    (source / "late").mkdir(parents=True)

    def mounts(document: Document) -> None:
        add(document, "/shared", "bind", str(source), "rbind", "rshared")
        add(document, "/slave", "bind", str(source), "rbind", "rslave")

    prepared = made(mounts)

    def body() -> None:
        runtime = Runtime(prepared)
        runtime.bind(source, source)
        runtime.set_propagation(str(source), abi.MS_SHARED)
        for mount in prepared.document["mounts"][-2:]:
            runtime.mount(mount)
        runtime.hook()
        runtime.mount_tmpfs(source / "late")
        found = runtime.inside()
        assert mount_at(found, "/shared/late").type == b"tmpfs"
        assert mount_at(found, "/slave/late").type == b"tmpfs"

    in_namespace(body)


def test_what_can_not_be_moved_is_cloned(made: MakeBundle, public_path: Path) -> None:
    """A mount on a shared one stays there; what the spec has read-only is so in the clone."""
    source = public_path / "source"
    (source / "sub").mkdir(parents=True)

    def mounts(document: Document) -> None:
        add(document, "/stack", "bind", str(source), "bind", "rshared")
        add(document, "/stack", "tmpfs", "seen", "ro")
        add(document, "/stack/in", "tmpfs", "inner", "unbindable")

    prepared = made(mounts)
    entries = prepared.document["mounts"]
    last, prepared.document["mounts"] = entries[-3:], entries[:-3]

    def body() -> None:
        runtime = Runtime(prepared)
        runtime.bind(source, source)
        runtime.set_propagation(str(source), abi.MS_SHARED)
        runtime.mount(last[0])
        runtime.mount({**last[1], "options": []})
        runtime.mount(last[2])
        original = mount_at(runtime.inside(), "/stack").id
        peers = [told(each) for each in table() if os.fsencode(source) in each.mountpoint]
        runtime.hook()
        found = runtime.inside()
        assert assert_mount(found, "/stack", source="seen", flags={"ro"}).id != original
        assert_mount(found, "/stack/in", source="inner", propagation=abi.MS_UNBINDABLE)
        assert [told(each) for each in table() if os.fsencode(source) in each.mountpoint] == peers

    in_namespace(body)


@pytest.mark.parametrize("tmp", ["absent", "empty", "full", "symlink", "file", "mounted", "inside"])
def test_tmp_is_mounted_where_nothing_is_hidden(made: MakeBundle, tmp: str) -> None:
    def mounts(document: Document) -> None:
        if tmp == "mounted":
            add(document, "/tmp", "tmpfs", "its own")
        if tmp == "inside":
            add(document, "/tmp/x", "tmpfs", "inside")

    prepared = made(mounts)
    place = prepared.rootfs / "tmp"
    if tmp == "full":
        (place / "x").touch()
    elif tmp in ("absent", "symlink", "file"):
        place.rmdir()
        if tmp == "symlink":
            place.symlink_to("run")
        if tmp == "file":
            place.touch()

    def body() -> None:
        runtime = Runtime(prepared)
        runtime.hook()
        found = [record.source for record in runtime.inside() if record.mountpoint == b"/tmp"]
        assert found == {"absent": [b"tmpfs"], "empty": [b"tmpfs"], "mounted": [b"its own"]}.get(
            tmp, [])

    in_namespace(body)


def test_overlay_none_with_nothing_to_do_does_nothing(made: MakeBundle) -> None:
    prepared = made(lambda document: annotate(document, overlay="none", tmp="keep"))

    def body() -> None:
        runtime = Runtime(prepared)
        before = [(record.id, *told(record)) for record in runtime.mounts()]
        runtime.hook()
        assert [(record.id, *told(record)) for record in runtime.mounts()] == before
        assert "createContainer hook-test: nothing to do" in runtime.log()

    in_namespace(body)


def test_overlay_none_with_a_volume(made: MakeBundle) -> None:
    def volume(document: Document) -> None:
        annotate(document, overlay="none", tmp="keep")
        add(document, "/data", "tmpfs", "mine", "size=1m")
        hint(document, "a", "mine")

    prepared = made(volume)

    def body() -> None:
        runtime = Runtime(prepared)
        below = mount_at(runtime.inside(), "/")
        runtime.hook()
        found = runtime.inside()
        root = mount_at(found, "/")
        assert (root.type, root.root, root.device) == (below.type, below.root, below.device)
        assert root.id != below.id
        (prepared.rootfs / "etc/written").touch()

    in_namespace(body)
    assert (prepared.rootfs / "etc/written").exists(), "the rootfs itself is what is written"


def test_a_volume_of_the_container(made: MakeBundle, public_path: Path) -> None:
    """In place of the bind, with the hint's options, and what is nested in it on top."""
    source = public_path / "volume"
    (source / "deep").mkdir(parents=True)
    (source / "secret").touch()

    def volume(document: Document) -> None:
        add(document, "/outer", "bind", "/etc", "bind", "ro")
        add(document, "/data", "bind", str(source), "rbind", "noexec")
        add(document, "/data/deep", "tmpfs", "deep", "ro")
        add(document, "/data/deep", "tmpfs", "deeper")
        hint(document, "v", str(source), options="size=64k,mode=0711")

    prepared = made(volume)

    def body() -> None:
        runtime = Runtime(prepared)
        runtime.hook()
        found = runtime.inside()
        assert [each.type for each in found if each.mountpoint == b"/data"] == [b"tmpfs"]
        assert_mount(found, "/data", type="tmpfs", flags={"nosuid", "nodev", "noexec"},
                     superblock={"size=64k", "mode=711"})
        assert_mount(found, "/data/deep", source="deeper")
        assert sorted(os.listdir(prepared.rootfs / "data")) == ["deep"]
        (prepared.rootfs / "data/x").touch()

    with untouched(source):
        in_namespace(body)


def test_overlays_over_binds(made: MakeBundle, public_path: Path) -> None:
    source = public_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "file").write_text("before", "utf-8")

    def mounts(document: Document) -> None:
        annotate(document, overlay__binds="true")
        add(document, "/data", "bind", str(source), "rbind", "nodev")
        add(document, "/data/deep", "tmpfs", "deep")
        add(document, "/one", "bind", str(source / "file"), "bind")
        add(document, "/closed", "bind", str(source), "bind", "ro")

    prepared = made(mounts)

    def body() -> None:
        runtime = Runtime(prepared)
        runtime.hook()
        found = runtime.inside()
        assert_mount(found, "/data", type="overlay", flags={"nodev"})
        assert_mount(found, "/data/deep", source="deep")
        assert flags_of(mount_at(found, "/closed")) == {"ro"}
        assert mount_at(found, "/closed").type != b"overlay"
        (prepared.rootfs / "data/new").touch()
        (prepared.rootfs / "data/file").write_text("after", "utf-8")
        (prepared.rootfs / "one").write_text("after", "utf-8")

    with untouched(source):
        in_namespace(body)


def test_overlays_over_idmapped_binds_and_what_overlayfs_refuses(
    made: MakeBundle, public_path: Path
) -> None:
    source = public_path / "source"
    source.mkdir()
    (source / "file").write_text("before", "utf-8")

    def mounts(document: Document) -> None:
        annotate(document, overlay__binds="true")
        add(document, "/data", "bind", str(source), "bind")
        add(document, "/one", "bind", str(source / "file"), "bind")
        add(document, "/events", "bind", "/proc/sys", "bind")

    prepared = made(mounts)

    def body() -> None:
        runtime = Runtime(prepared)
        ids = [(0, 400000, 65536)]
        runtime.bind(source, prepared.rootfs / "data", ids)
        runtime.bind(source / "file", prepared.rootfs / "one", ids)
        runtime.hook()
        found = runtime.inside()
        assert_mount(found, "/data", type="overlay", flags=set())
        assert_mount(found, "/one", type="tmpfs", flags=set())
        for path in ("data/file", "one"):
            assert (prepared.rootfs / path).stat().st_uid == 400000
            (prepared.rootfs / path).write_text("after", "utf-8")
        assert "ro" in flags_of(mount_at(found, "/events"))
        assert mount_at(found, "/events").type == b"proc"

    with untouched(source):
        in_namespace(body)


def test_a_pod_s_volume_is_carried_and_missed(made: MakeBundle) -> None:
    """createRuntime has left it there; without, the container doesn't start with another one."""
    def volume(document: Document) -> None:
        add(document, "/data", "tmpfs", "shared-one", "size=1m")
        add(document, "/data/inner", "tmpfs", "inner")
        hint(document, "v", "shared-one", share="pod")
        document["annotations"]["io.kubernetes.cri.sandbox-id"] = "pod-1"

    prepared = made(volume)

    def body(registered: bool) -> None:
        runtime = Runtime(prepared)
        if registered:
            runtime.mount_tmpfs(prepared.rootfs / "data", "sandboxfs:v")
            runtime.mount({"destination": "/data/inner", "type": "tmpfs", "source": "again"})
            runtime.hook()
            found = runtime.inside()
            assert [each.source for each in found if each.mountpoint == b"/data"] == [
                b"sandboxfs:v"]
            assert_mount(found, "/data/inner", source="again")
            return
        before = [(record.id, *told(record)) for record in runtime.mounts()]
        done = runtime.hook(check=125)
        assert done.stderr.startswith(f"sandboxfs: mounts[{len(prepared.document['mounts']) - 2}]: "
                                      "/data: the volume of hint v, shared in the pod, isn't ")
        assert "createRuntime" in done.stderr
        assert [(record.id, *told(record)) for record in runtime.mounts()] == before

    in_namespace(body, True)
    in_namespace(body, False)


def test_a_volume_below_a_shared_bind_is_refused(made: MakeBundle, public_path: Path) -> None:
    """The bind's peers, on the host, would get it as well."""
    source = public_path / "source"
    (source / "deep").mkdir(parents=True)

    def mounts(document: Document) -> None:
        add(document, "/data", "bind", str(source), "rbind", "rshared")
        add(document, "/data/deep", "tmpfs", "mine")
        hint(document, "v", "mine")

    prepared = made(mounts)

    def body() -> None:
        runtime = Runtime(prepared)
        before = [(record.id, *told(record)) for record in table()]
        done = runtime.hook(check=125)
        assert "/data: is a shared mount, and something below it is to be made anew" in done.stderr
        assert [(record.id, *told(record)) for record in table()] == before

    in_namespace(body)


def test_a_hundred_mounts(made: MakeBundle) -> None:
    def mounts(document: Document) -> None:
        for number in range(50):
            add(document, f"/many/{number}", "tmpfs", f"t{number}", "ro" if number % 3 else "rw")
            if not number % 3:
                add(document, f"/many/{number}/inside", "tmpfs", "inside")
        for number in range(33):
            add(document, f"/binds/{number}", "bind", "/etc", "bind", "ro")

    prepared = made(mounts)
    assert len(prepared.document["mounts"]) >= 107

    def body() -> None:
        runtime = Runtime(prepared)
        before = sorted(told(record) for record in runtime.inside()[1:])
        # Runtimes give hooks the limits of the container's process: descriptors may be few.
        run("sh", "-c", 'ulimit -n 48; exec "$@"', "sh", *runtime.command(),
            input=runtime.state(), check=0)
        found = sorted(told(record) for record in runtime.inside()[1:])
        assert [each for each in found if each[0] != b"/tmp"] == before

    in_namespace(body)


def test_an_image_without_mountpoints_and_with_links(made: MakeBundle) -> None:
    prepared = made(mountpoints=False)
    (prepared.rootfs / "var").mkdir()
    (prepared.rootfs / "var/run").mkdir()
    (prepared.rootfs / "run").symlink_to("/var/run")

    def body() -> None:
        runtime = Runtime.__new__(Runtime)
        document = prepared.document
        runs = [mount for mount in document["mounts"] if mount["destination"] == "/run"]
        document["mounts"] = [
            mount for mount in document["mounts"] if mount["destination"] != "/run"
        ]
        runtime.__init__(prepared)  # type: ignore[misc]
        runtime.mount({**runs[0], "destination": "/var/run"})
        runtime.hook()
        assert_mount(runtime.inside(), "/var/run", type="tmpfs")
        assert (prepared.rootfs / "run").is_symlink()

    in_namespace(body)


def test_a_user_namespace(made: MakeBundle) -> None:
    """The hook is the mapped root, and owns neither the host's directories nor its ids."""
    prepared = made(lambda document: document["process"].update(cwd="/made"))
    for path in (prepared.rootfs, *prepared.rootfs.rglob("*")):
        os.chown(path, 200000, 200000, follow_symlinks=False)

    def body() -> None:
        runtime = Runtime(prepared, pseudo=False)
        runtime.hook()
        record = assert_mount(runtime.inside(), "/", type="overlay", superblock={"userxattr"})
        assert record.attributes == 0
        (prepared.rootfs / "etc/passwd").write_text("mine", "utf-8")
        assert (prepared.rootfs / "made").stat().st_uid == 0

    in_namespace(body, mappings=[(0, 200000, 65536)])


def test_an_idmapped_rootfs(made: MakeBundle) -> None:
    prepared = made()

    def body() -> None:
        runtime = Runtime(prepared, idmap=[(0, 300000, 65536)])
        owner = (prepared.rootfs / "etc/passwd").stat().st_uid
        assert owner == 300000
        runtime.hook()
        assert_mount(runtime.inside(), "/", type="overlay")
        assert (prepared.rootfs / "etc/passwd").stat().st_uid == 300000
        assert prepared.rootfs.stat().st_uid == 300000

    with untouched(prepared.rootfs):
        in_namespace(body)


def test_further_lowers_with_mounts_of_their_own(made: MakeBundle, public_path: Path) -> None:
    lower = public_path / "lower"
    (lower / "opt/mounted").mkdir(parents=True)
    (lower / "opt/file").write_text("below", "utf-8")
    (lower / "etc").mkdir()
    (lower / "etc/passwd").write_text("hidden", "utf-8")
    policy = public_path / "policy.toml"
    policy.write_text("[annotations]\nhost-paths = true\n", "utf-8")
    prepared = made(lambda document: annotate(document, lower=str(lower)))

    def body() -> None:
        runtime = Runtime(prepared)
        runtime.mount_tmpfs(lower / "opt/mounted")
        (lower / "opt/mounted/inside").touch()
        runtime.hook("createContainer", "--config", str(policy))
        assert (prepared.rootfs / "opt/file").read_text("utf-8") == "below"
        assert (prepared.rootfs / "etc/passwd").read_text("utf-8").startswith("root:")
        assert_mount(runtime.inside(), "/opt/mounted", type="overlay")
        (prepared.rootfs / "opt/mounted/new").touch()
        assert os.listdir(lower / "opt/mounted") == ["inside"]
        runtime.take_away()
        refused = runtime.hook(check=65)
        assert f"{lower}: a path of the host, which annotations may not name" in refused.stderr

    with untouched(lower):
        in_namespace(body)


def test_locked_mounts_are_carried_whole(made: MakeBundle, public_path: Path) -> None:
    """In a user namespace what the host has mounted below a bind can't be had without the rest."""
    source = public_path / "source"
    for name in ("one", "other"):
        (source / name).mkdir(parents=True)

    def change(document: Document) -> None:
        add(document, "/data", "bind", str(source), "rbind")

    def with_a_volume(document: Document) -> None:
        change(document)
        add(document, "/data/one", "tmpfs", "mine")
        hint(document, "v", "mine")

    def with_an_overlay(document: Document) -> None:
        change(document)
        annotate(document, overlay__binds="true")

    prepared = made(change)
    volume, overlay = made(with_a_volume, name="volume"), made(with_an_overlay, name="overlay")

    def body() -> None:
        runtime = Runtime(prepared, pseudo=False)
        before = [told(each) for each in runtime.inside() if b"/data" in each.mountpoint]
        assert len(before) == 3
        runtime.hook()
        assert [told(each) for each in runtime.inside() if b"/data" in each.mountpoint] == before
        runtime = Runtime(volume, pseudo=False)
        runtime.hook()
        found = runtime.inside()
        # The host's below it, and the volume in the place of the runtime's.
        stack = [flags_of(each) for each in found if each.mountpoint == b"/data/one"]
        assert stack == [set(), {"nosuid", "nodev"}]
        assert mount_at(found, "/data/other").type == b"tmpfs"
        runtime = Runtime(overlay, pseudo=False)
        before = [(record.id, *told(record)) for record in table()]
        done = runtime.hook(check=125)
        assert "/data: EINVAL: Invalid argument (the mounts below it are locked" in done.stderr
        assert [(record.id, *told(record)) for record in table()] == before

    mounted = []
    try:
        for name in ("one", "other"):
            mount_tmpfs(source / name)
            mounted.append(source / name)
        in_namespace(body, mappings=[(0, 0, 65536)])
    finally:
        for path in mounted:
            syscalls.umount2(os.fsencode(path), abi.MNT_DETACH)


def test_overlay_dir_is_made_and_removed(made: MakeBundle, public_path: Path) -> None:
    place = public_path / "uppers"
    place.mkdir()
    policy = public_path / "policy.toml"
    policy.write_text("[annotations]\nhost-paths = true\n", "utf-8")
    prepared = made(lambda document: annotate(document, overlay=f"dir={place}"))

    def body() -> None:
        runtime = Runtime(prepared)
        runtime.hook("createContainer", "--config", str(policy))
        (prepared.rootfs / "etc/new").touch()
        assert (place / "hook-test/upper/etc/new").exists()
        done = runtime.hook("createContainer", "--config", str(policy), check=125)
        assert f"overlay: mkdir {place}/hook-test: EEXIST" in done.stderr
        assert (place / "hook-test/upper/etc/new").exists(), "another container's is left alone"
        runtime.hook("poststop", "--config", str(policy))
        assert os.listdir(place) == []
        (place / "hook-test").mkdir()
        (place / "hook-test/of-somebody").touch()
        runtime.hook("poststop", "--config", str(policy))
        assert (place / "hook-test/of-somebody").exists(), "not made by a hook"

    in_namespace(body)


@pytest.mark.parametrize("fault", ["[overlay]\nsize = 1\n", None])
def test_overlay_dir_is_removed_although_the_operators_file_is_damaged(
    fault: str | None, made: MakeBundle, public_path: Path
) -> None:
    place = public_path / "uppers"
    place.mkdir()
    policy = public_path / "policy.toml"
    policy.write_text("[annotations]\nhost-paths = true\n", "utf-8")
    prepared = made(lambda document: annotate(document, overlay=f"dir={place}"))

    def body() -> None:
        runtime = Runtime(prepared)
        runtime.hook("createContainer", "--config", str(policy))
        assert os.listdir(place) == ["hook-test"]
        if fault is None:
            policy.unlink()
        else:
            policy.write_text(fault, "utf-8")
        runtime.hook("createContainer", "--config", str(policy), check=65)
        done = runtime.hook("poststop", "--config", str(policy))
        assert done.stderr.startswith(f"sandboxfs: warning: {policy}:")
        assert os.listdir(place) == []

    in_namespace(body)


def test_overlay_dir_is_kept_where_asked(made: MakeBundle, public_path: Path) -> None:
    place = public_path / "uppers"
    place.mkdir()
    policy = public_path / "policy.toml"
    policy.write_text("[annotations]\nhost-paths = true\n", "utf-8")
    prepared = made(lambda document: annotate(document, overlay=f"dir={place}:keep"))
    changed = dict(prepared.document)

    def body() -> None:
        runtime = Runtime(prepared)
        runtime.hook("createContainer", "--config", str(policy))
        runtime.hook("poststop", "--config", str(policy))
        assert (place / "hook-test/upper").is_dir()
        # The same id again, this time to be removed: not what the other one kept.
        changed["annotations"] = {"dev.sandboxfs.overlay": f"dir={place}"}
        prepared.write(changed)
        runtime.hook("poststop", "--config", str(policy))
        assert (place / "hook-test/upper").is_dir()

    in_namespace(body)
