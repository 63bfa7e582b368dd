"""What one pod, or one container of a pod, may try against others and the host."""

import json
import os
from pathlib import Path

import pytest

from sandboxfs.errors import MountError
from sandboxfs.hooks import pod_record, pod_replica
from sandboxfs.kernel import fscontext
from tests.attacks.tools import attacker, exchange
from tests.support import mount_at, mount_tmpfs, parsed, run_cli
from tests.support.fakes import HINT, SOURCE, on_fake_host
from tests.support.host import attach
from tests.support.pods import STORE, assert_nothing_left, pods, store_mounts

pytestmark = pytest.mark.needs("root", "launcher")
CRI = "io.kubernetes.cri.sandbox-id"
CRIO = "io.kubernetes.cri-o.SandboxID"


def volume(at="/data", **more):
    return {"destination": at, "source": SOURCE, "type": "tmpfs", "options": [], **more}


def test_annotations_of_a_pod_reach_no_other_pod():
    """CRI-O CVE-2024-3154's kind: whoever writes a pod says it is another one."""

    def body(host):
        victim = host.container("victim", pod=None, annotations={CRIO: "victim"})
        victim.hook("createRuntime", check=0)
        victim.path("/data/secret").write_text("secret")
        # The control: the runtime's own word shares.
        friend = host.container("friend", pod=None, annotations={CRIO: "victim"})
        friend.hook("createRuntime", check=0)
        assert friend.path("/data/secret").read_text() == "secret"
        named = host.container("named", pod="victim", annotations={CRIO: "attacker"})
        named.hook("createRuntime", check=0)
        assert not named.path("/data/secret").exists()
        alone = host.container("alone", pod="victim")
        alone.hook("createRuntime", check=0)
        assert not alone.path("/data/secret").exists()
        both = host.container("both", pod=None, annotations={CRIO: "attacker", CRI: "victim"})
        done = both.hook("createRuntime")
        assert done.returncode == 65
        assert "whose pod this is can't be told" in done.stderr
        assert not both.path("/data/secret").exists()
        for each in (victim, friend, named, alone):
            each.hook("poststop", check=0)
        assert_nothing_left()

    on_fake_host(body)


@pytest.mark.parametrize("annotations", [None, {"dev.sandboxfs.pod": "p2"}])
def test_a_container_of_the_same_id_elsewhere_is_no_end_of_a_pod(annotations):
    """An id is one runtime's: another one's container of that id stops, in another pod or none."""

    def body(host):
        one, two = host.container("one"), host.container("two", pod="p2")
        for each in (one, two):
            each.hook("createRuntime", check=0)
        one.path("/data/file").write_text("here")
        state = {"ociVersion": "1.0.2", "id": "one", "status": "stopped", "bundle": "/gone",
                 "annotations": annotations or {}}
        run_cli("hook", "poststop", input=json.dumps(state), check=0)
        assert [each["id"] for each in pods("list")] == ["p1", "p2"]
        later = host.container("later")
        later.hook("createRuntime", check=0)
        assert later.path("/data/file").read_text() == "here"
        # The control: its own poststop, when it has ended.
        for each in (one, two, later):
            each.kill()
            each.hook("poststop", check=0)
        assert_nothing_left()

    on_fake_host(body)


def test_what_a_link_of_a_shared_volume_leads_to_is_not_procfs():
    """runc CVE-2019-16884's kind: what is written to /proc afterwards would go to a volume."""

    def mount_proc(rootfs):
        (rootfs / "proc").mkdir()
        attach(fscontext.create(b"proc", [], 0), rootfs / "proc")

    def body(host):
        one = host.container("one", inside=mount_proc)
        # Here nothing is mounted there, so that its directory can be renamed.
        os.rename(one.rootfs / "data", one.rootfs / "elsewhere")
        (one.rootfs / "data").symlink_to("proc")
        done = one.hook("createRuntime")
        assert done.returncode == 125
        assert "/data: ELOOP: a symlink on the path leads into procfs" in done.stderr
        assert one.path("/proc/self").is_symlink()
        assert_nothing_left()
        # The control: a link to where the runtime has mounted the volume.
        (one.rootfs / "data").unlink()
        (one.rootfs / "data").symlink_to("elsewhere")
        one.hook("createRuntime", check=0)
        one.hook("poststop", check=0)

    on_fake_host(body)


def test_no_annotation_writes_a_line_of_its_own():
    def body(host):
        one = host.container("one", annotations={"dev.sandboxfs.x\nsandboxfs: forged": "1"})
        done = one.hook("createRuntime", check=0)
        assert done.stderr.splitlines() == [
            "sandboxfs: warning: annotation dev.sandboxfs.x\\nsandboxfs: forged: unknown, ignored"]
        one.hook("poststop", check=0)
        two = host.container("two", hints={"x\nsandboxfs: forged": {"type": "tmpfs"}})
        done = two.hook("createRuntime")
        assert done.returncode == 65
        assert len(done.stderr.splitlines()) == 1
        assert "\\nsandboxfs: forged lacks" in done.stderr

    on_fake_host(body)


def test_another_process_of_the_same_number_gets_no_volume():
    def body(host):
        one = host.container("one")
        start = pod_record.start_of(one.pid)
        namespace = pod_replica._mount_namespace(pod_record.Container("one", one.pid, start))
        assert os.path.samestat(os.fstat(namespace), os.stat(f"/proc/{one.pid}/ns/mnt"))
        os.close(namespace)
        with pytest.raises(MountError, match="the container's process is gone"):
            pod_replica._mount_namespace(pod_record.Container("one", one.pid, start - 1))

    on_fake_host(body)


@pytest.mark.parametrize("name", ["../../../etc", "a/b", "..", ".", "x" * 300, "a\nb"])
def test_a_pods_id_is_no_path(name):
    def body(host):
        before = sorted(os.listdir("/run"))
        one = host.container("one", pod=name)
        done = one.hook("createRuntime")
        if name in ("..", "."):  # names like any other, behind what we put before them
            assert done.returncode == 0
            assert os.listdir(STORE / f"named-{name}")
            one.hook("poststop", check=0)
            assert_nothing_left()
        else:
            assert done.returncode == 65
            assert "a pod's id has letters" in done.stderr
            assert not STORE.exists()
            assert sorted(os.listdir("/run")) in (before, sorted([*before, "sandboxfs"]))

    on_fake_host(body)


@pytest.mark.parametrize("name", ["a/b", "x" * 201, "/"])
def test_a_hints_name_is_no_path(name):
    def body(host):
        one = host.container("one", hints={name: HINT})
        done = one.hook("createRuntime")
        if len(name) > 200:
            assert done.returncode == 65
            assert_nothing_left()
        else:
            assert done.returncode == 0
            assert sorted(os.listdir(STORE / "named-p1")) == ["0", "record"]
            one.hook("poststop", check=0)

    on_fake_host(body)


def test_a_hint_reaches_no_path_of_the_host():
    """It re-types a mount that is in the spec already; nothing else is done with its source."""

    def body(host):
        Path("/run/precious").write_text("precious")
        one = host.container("one", hints={"cache": HINT | {"source": "/run"}})
        one.hook("createRuntime", check=0)
        assert os.listdir(one.path("/data")) == []
        (point,) = store_mounts()
        assert os.listdir(point) == []
        one.hook("poststop", check=0)
        assert Path("/run/precious").read_text() == "precious"
        assert_nothing_left()

    on_fake_host(body)


def test_more_memory_than_the_operator_allows(tmp_path):
    """The first hint is checked against the cap; the size is one for everybody after that."""

    def body(host):
        config = tmp_path / "config.toml"
        config.write_text('[hints]\nsize = "64K"\ncap = "1M"\n')
        config.chmod(0o600)
        arguments = ("--config", str(config))
        large = host.container("large", hints={"cache": HINT | {"options": "size=2M"}})
        done = run_cli("hook", "createRuntime", *arguments, input=large.state())
        assert done.returncode == 65
        assert "of 2M is above the cap of 1M" in done.stderr
        assert_nothing_left()
        unsaid = host.container("unsaid", hints={"cache": HINT | {"options": ""}})
        run_cli("hook", "createRuntime", *arguments, input=unsaid.state(), check=0)
        assert pods("list")[0]["volumes"][0]["size"] == 64 << 10
        # Nor does a later container make it larger.
        later = host.container("later", hints={"cache": HINT | {"options": "size=1M"}})
        run_cli("hook", "createRuntime", *arguments, input=later.state(), check=0)
        assert pods("list")[0]["volumes"][0]["size"] == 64 << 10
        with pytest.raises(OSError, match="No space left"):
            later.path("/data/file").write_bytes(bytes(1 << 20))
        # A name for an inode costs memory, too.
        later.path("/data/file").unlink()
        made = [0]
        with pytest.raises(OSError, match="No space left"):
            make_files(later.path("/data"), made)
        assert 100 < made[0] <= 1024
        for each in (unsaid, later):
            each.hook("poststop", check=0)
        assert_nothing_left()

    on_fake_host(body)


def make_files(directory, made):
    for number in range(100_000):
        (directory / str(number)).touch()
        made[0] += 1


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_link_in_the_volume_leads_no_mount_elsewhere(kind):
    """Kubernetes CVE-2021-25741's kind: another container of the pod puts a link in the way."""

    def body(host):
        def inside(rootfs):
            if kind == "file":
                (rootfs / "data" / "inner").touch()
                attach_file(rootfs / "data" / "inner")
            else:
                (rootfs / "data" / "inner").mkdir()
                mount_tmpfs(rootfs / "data" / "inner")

        mounts = [volume(), volume(at="/data/inner", source="tmpfs")]
        first = host.container("first")
        first.hook("createRuntime", check=0)
        first.path("/data/inner").symlink_to("/run")
        done = host.container("second", mounts=mounts[:1], inside=inside)
        done.document["mounts"] = mounts
        done.write()
        refused = done.hook("createRuntime")
        assert refused.returncode == 125
        assert "mounts[1]: " in refused.stderr
        assert "/data/inner: ELOOP" in refused.stderr
        assert "a symlink is where none may be" in refused.stderr
        (pod,) = pods("list")
        assert [each["id"] for each in pod["containers"]] == ["first"]
        # The control: without the link it works.
        first.path("/data/inner").unlink()
        done.kill()
        third = host.container("third", mounts=mounts[:1], inside=inside)
        third.document["mounts"] = mounts
        third.write()
        third.hook("createRuntime", check=0)
        first.hook("poststop", check=0)
        third.hook("poststop", check=0)
        assert_nothing_left()

    on_fake_host(body)


def attach_file(path):
    from tests.support import bind

    bind("/etc/passwd", path)


def test_a_destination_that_is_exchanged_meanwhile(tmp_path):
    """The rootfs is another container's to write: a directory and a link change places."""

    def body(host):
        victim = Path("/run/victim")
        victim.mkdir()
        hits = errors = 0
        for number in range(30):
            one = host.container(f"one{number}", pod=f"p{number}", mounts=[volume(at="/a/data")])
            (one.rootfs / "b").symlink_to(victim)
            (one.rootfs / "a").stat()
            names = (os.fsencode(one.rootfs / "a"), os.fsencode(one.rootfs / "b"))
            with attacker(lambda _number, names=names: exchange(*names)):
                done = one.hook("createRuntime")
            hits += done.returncode == 0
            errors += done.returncode != 0
            table = Path(f"/proc/{one.pid}/mountinfo").read_text()
            mine = [line.split()[4] for line in table.splitlines() if "sandboxfs:cache" in line]
            assert all(point.startswith(f"{one.rootfs}/") for point in mine), mine
            if done.returncode:
                assert "Traceback" not in done.stderr
                assert done.stderr.startswith("sandboxfs: mounts[0]: ")
            assert "sandboxfs:cache" not in "".join(
                line for line in Path("/proc/self/mountinfo").read_text().splitlines()
                if str(STORE) not in line
            )
            one.hook("poststop", check=0)
            one.kill()
        assert_nothing_left()
        return hits, errors

    hits, errors = on_fake_host(body)
    # The control: it was a race, which both sides won at times.
    assert hits
    assert errors


def test_a_mountpoint_in_the_volume_that_is_exchanged_meanwhile():
    """Another container of the pod turns the directory into a link, and back, all the time."""

    def body(host):
        victim = Path("/run/victim")
        victim.mkdir()
        mounts = [volume(), volume(at="/data/inner", source="tmpfs")]
        first = host.container("first")
        first.hook("createRuntime", check=0)
        inner, link = first.path("/data/inner"), first.path("/data/link")
        inner.mkdir()
        link.symlink_to("/run/victim")
        outcomes = set()
        for number in range(30):
            one = host.container(f"one{number}", mounts=mounts[:1], inside=mount_inner)
            one.document["mounts"] = mounts
            one.write()
            with attacker(lambda _number: exchange(os.fsencode(inner), os.fsencode(link))):
                done = one.hook("createRuntime")
            table = parsed(Path(f"/proc/{one.pid}/mountinfo").read_bytes())
            data = mount_at(table, f"{one.rootfs}/data")
            assert data.source == b"sandboxfs:cache"
            if done.returncode == 0:
                # On the volume, by whichever name it has now; nowhere else.
                (carried,) = [each for each in table if each.parent_id == data.id]
                assert carried.mountpoint.startswith(os.fsencode(one.rootfs) + b"/data/")
            else:
                assert "mounts[1]: " in done.stderr
                assert "Traceback" not in done.stderr
            assert not [each for each in table if each.mountpoint.startswith(os.fsencode(victim))]
            outcomes.add(done.returncode)
            one.hook("poststop", check=0)
            one.kill()
        assert os.listdir(victim) == []
        first.hook("poststop", check=0)
        assert_nothing_left()
        return outcomes

    # The control: at times the attacker was there in between.
    assert on_fake_host(body) == {0, 125}


def mount_inner(rootfs):
    (rootfs / "data" / "inner").mkdir()
    mount_tmpfs(rootfs / "data" / "inner")


def test_what_is_written_into_the_store_by_hand_is_no_path(tmp_path):
    """Root alone can; a mistake there must not unmount or remove anything elsewhere."""

    def body(host):
        one = host.container("one")
        one.hook("createRuntime", check=0)
        record = STORE / "named-p1" / "record"
        document = json.loads(record.read_text())
        document["masters"][0]["directory"] = "../../../bundles"
        record.write_text(json.dumps(document))
        assert "is no master's directory" in pods("list")[0]["fault"]
        run_cli("pod", "delete", "--force", "p1", check=0)
        assert Path("/run/bundles/one").is_dir()
        assert_nothing_left()

    on_fake_host(body)


def test_a_mount_of_another_pods_making_is_not_taken_for_a_master():
    """A container may call a tmpfs what it likes: the device tells which it is."""

    def body(host):
        one = host.container("one")
        one.hook("createRuntime", check=0)
        one.path("/data/file").write_text("here")
        (point,) = store_mounts()
        from sandboxfs.kernel import fscontext
        from tests.support import attach

        # Over the master in the store lies something else now.
        settings = [fscontext.string(b"source", b"sandboxfs:cache")]
        attach(fscontext.create(b"tmpfs", settings, 0), point)
        two = host.container("two")
        two.hook("createRuntime", check=0)
        assert two.path("/data/file").read_text() == "here"
        run_cli("pod", "delete", "--force", "p1", check=0)
        assert_nothing_left()

    on_fake_host(body)
