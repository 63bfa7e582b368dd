"""What the pods' store goes through: kills, reboots, damage, and the command that looks at it."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from sandboxfs.hooks import pod_record
from sandboxfs.hooks import pods as store
from tests.attacks import inject
from tests.support import LAUNCHER, UNPRIVILEGED, run_cli
from tests.support.commands import ENVIRONMENT
from tests.support.fakes import HINT, SOURCE, on_fake_host
from tests.support.pods import STORE, assert_nothing_left, pods, pods_here, store_mounts

pytestmark = pytest.mark.needs("root", "launcher")
RECORD = STORE / "named-p1" / "record"

# All by which the hook changes something, or learns what to change.
CALLS = (
    "mkdirat", "mkdir", "rmdir", "unlinkat", "unlink", "renameat", "rename", "fsopen", "fsconfig",
    "fsmount", "open_tree", "move_mount", "mount_setattr", "openat2", "umount2", "setns", "pipe2",
    "clone", "fork", "vfork", "clone3", "flock", "write", "pwrite64", "ftruncate", "wait4",
    "prctl", "statx", "fstatfs",
)


def test_enter_and_leave():
    def body(host):
        one, two = host.container("one"), host.container("two")
        for each in (one, two):
            done = each.hook("createRuntime", check=0)
            assert done.stderr == ""
        one.path("/data/file").write_text("here")
        assert two.path("/data/file").read_text() == "here"
        # Whoever doesn't say a size gets the one there is.
        three = host.container("three", hints={"cache": HINT | {"options": ""}})
        three.hook("createRuntime", check=0)
        assert three.path("/data/file").read_text() == "here"
        for each in (one, two, three):
            each.kill()
            each.hook("poststop", check=0)
            each.hook("poststop", check=0)
        assert_nothing_left()

    on_fake_host(body)


def test_a_hook_that_is_registered_twice():
    def body(host):
        one = host.container("one")
        one.hook("createRuntime", check=0)
        one.path("/data/file").write_text("here")
        one.hook("createRuntime", check=0)
        assert one.path("/data/file").read_text() == "here"
        (pod,) = pods("list")
        assert [each["id"] for each in pod["containers"]] == ["one"]
        one.hook("poststop", check=0)
        assert_nothing_left()

    on_fake_host(body)


def test_poststop_of_a_runtime_that_says_no_annotations():
    def body(host):
        one, two = host.container("one"), host.container("two", pod="p2")
        one.hook("createRuntime", check=0)
        two.hook("createRuntime", check=0)
        state = {"ociVersion": "1.0.2", "id": "two", "status": "stopped", "bundle": "/gone"}
        two.kill()
        run_cli("hook", "poststop", input=json.dumps(state), check=0)
        assert [each["id"] for each in pods("list")] == ["p1"]
        run_cli("hook", "poststop", input=json.dumps(state | {"id": "unknown"}), check=0)
        assert [each["id"] for each in pods("list")] == ["p1"]
        one.kill()
        run_cli("hook", "poststop", input=json.dumps(state | {"id": "one"}), check=0)
        assert_nothing_left()

    on_fake_host(body)


def test_the_last_poststop_takes_dead_ones_along():
    """One crashed and was forgotten by its runtime: nothing waits for its poststop."""

    def body(host):
        one, two = host.container("one"), host.container("two")
        one.hook("createRuntime", check=0)
        two.hook("createRuntime", check=0)
        one.kill()
        two.kill()
        two.hook("poststop", check=0)
        assert_nothing_left()

    on_fake_host(body)


def test_hints_of_several_containers_add_up():
    def body(host):
        other = {"source": "/volumes/other", "type": "tmpfs", "share": "pod"}
        one = host.container("one")
        two = host.container("two", hints={"other": other}, mounts=[
            {"destination": "/data", "source": SOURCE, "type": "tmpfs", "options": []},
            {"destination": "/other", "source": "/volumes/other", "type": "tmpfs", "options": []},
        ])
        one.hook("createRuntime", check=0)
        two.hook("createRuntime", check=0)
        one.path("/data/file").write_text("here")
        assert two.path("/data/file").read_text() == "here"
        assert len(store_mounts()) == 2
        three = host.container("three", hints={"third": other})
        done = three.hook("createRuntime")
        assert done.returncode == 65
        assert "hints other and third of pod p1 have the same source" in done.stderr
        assert len(store_mounts()) == 2
        for each in (one, two):
            each.hook("poststop", check=0)
        assert_nothing_left()

    on_fake_host(body)


def test_a_container_without_hints_makes_no_store():
    def body(host):
        one = host.container("one", hints={})
        one.hook("createRuntime", check=0)
        two = host.container("two", hints={"cache": HINT | {"share": "shared"}})
        two.hook("createRuntime", check=0)
        assert not STORE.exists()

    on_fake_host(body)


@pytest.mark.needs("strace")
@pytest.mark.parametrize("with_other", [False, True])
@pytest.mark.parametrize("hook", ["createRuntime", "poststop"])
def test_killed_at_any_call(tmp_path, hook, with_other):
    """The hook dies at every call it makes: the next one, `pod list` and `pod delete` understand.

    With a second container in the pod, which must keep what it has, and without.
    """

    def body(host):
        command = ["/bin/sh", "-c", f"exec {LAUNCHER} hook {hook} < {tmp_path}/state"]
        counted = 0
        faults = None
        while faults is None or faults:
            other = host.container("other") if with_other else None
            if other is not None:
                other.hook("createRuntime", check=0)
                other.path("/data/file").write_text("kept")
            one = host.container("one")
            if hook == "poststop":
                one.hook("createRuntime", check=0)
            (tmp_path / "state").write_text(one.state())
            if faults is None:
                faults = inject.faults(inject.occurrences(command, tmp_path, CALLS), [inject.KILL])
            else:
                fault = faults.pop()
                done = inject.run_with(fault, command)
                # 125: it was the child that attaches.
                assert done.returncode in (-signal.SIGKILL, 137, 125, 0), str(fault)
                counted += done.returncode != 0
            one.kill()
            _next_ones_understand(host, other)
            for each in list(host.containers):
                each.end()
                _remove(each)
        return counted

    # Every call was reached.
    assert on_fake_host(body, timeout=400) > (20 if hook == "createRuntime" else 5)


def _next_ones_understand(host, other):
    found = pods_here()
    if other is not None:
        assert other.path("/data/file").read_text() == "kept"
        assert [each["stale"] for each in found] == [False]
    else:
        assert all(each["stale"] for each in found)
    two = host.container("two")
    two.hook("createRuntime", check=0)
    assert two.path("/data").is_dir()
    assert two.path("/data/file").exists() == (other is not None)
    assert len(store_mounts()) == 1
    (pod,) = pods_here()
    assert [each["id"] for each in pod["containers"]] == ["other"] * (other is not None) + ["two"]
    store.delete("p1", force=True)
    assert_nothing_left()


def _remove(container):
    (container.bundle / "config.json").unlink()
    for directory in (container.rootfs / "data", container.rootfs, container.bundle):
        if directory.exists():
            directory.rmdir()


@pytest.mark.needs("strace")
def test_any_call_fails(tmp_path):
    """Nothing is left of a container whose hook fails, at whatever call; others keep theirs."""

    def body(host):
        command = ["/bin/sh", "-c", f"exec {LAUNCHER} hook createRuntime < {tmp_path}/state"]
        other = host.container("other")
        other.hook("createRuntime", check=0)
        one = host.container("one")
        (tmp_path / "state").write_text(one.state())
        calls = [each for each in CALLS if each not in ("wait4", "write", "prctl", "flock")]
        most = inject.occurrences(command, tmp_path, calls)
        one.hook("poststop", check=0)
        failed = 0
        for fault in inject.faults(most, ["ENOMEM"]):
            done = inject.run_with(fault, command)
            (pod,) = pods_here()
            ids = [each["id"] for each in pod["containers"]]
            if done.returncode == 0:
                assert ids == ["other", "one"], fault
                one.hook("poststop", check=0)
            else:
                failed += 1
                assert ids == ["other"], (fault, done.stderr)
                assert done.stderr.startswith("sandboxfs: "), (fault, done.stderr)
                assert "ENOMEM" in done.stderr, (fault, done.stderr)
                assert "Traceback" not in done.stderr
            one.kill()
            _forget(host, one)
            one = host.container("one")
            (tmp_path / "state").write_text(one.state())
        other.hook("poststop", check=0)
        assert_nothing_left()
        return failed

    assert on_fake_host(body, timeout=400) > 8


def _forget(host, container):
    container.end()
    _remove(container)


def test_after_a_reboot():
    """/run is empty then; if it weren't, nothing recorded before would be believed."""

    def body(host):
        one = host.container("one")
        one.hook("createRuntime", check=0)
        assert pods("list")[0]["boot"] == pod_record.boot_id()
        record = json.loads(RECORD.read_text())
        RECORD.write_text(json.dumps(record | {"boot": "0000-another"}))
        (pod,) = pods("list")
        assert pod["stale"] is True
        two = host.container("two")
        two.hook("createRuntime", check=0)
        (pod,) = pods("list")
        assert [each["id"] for each in pod["containers"]] == ["two"]
        two.hook("poststop", check=0)
        assert_nothing_left()

    on_fake_host(body)


def test_another_process_of_the_same_number_is_not_the_container():
    def body(host):
        one = host.container("one")
        one.hook("createRuntime", check=0)
        record = json.loads(RECORD.read_text())
        record["containers"][0]["start"] -= 1
        RECORD.write_text(json.dumps(record))
        assert pods("list")[0]["stale"] is True
        run_cli("pod", "delete", "p1", check=0)
        assert_nothing_left()

    on_fake_host(body)


def test_pids_of_another_pid_namespace_count_as_alive():
    """Deleting on a guess would take away what somebody may be using."""

    def body(host):
        one = host.container("one")
        one.hook("createRuntime", check=0)
        record = json.loads(RECORD.read_text())
        RECORD.write_text(json.dumps(record | {"pidNamespace": 1}))
        one.kill()
        assert pods("list")[0]["stale"] is False
        assert run_cli("pod", "delete", "p1").returncode == 125
        run_cli("pod", "delete", "--force", "p1", check=0)
        assert_nothing_left()

    on_fake_host(body)


@pytest.mark.parametrize(("content", "why"), [
    ("", "no JSON value in it"),
    ("{}", "is damaged: 'version'"),
    ('{"version": 2}', "has version 2: written by another sandboxfs"),
    ("[]", "is damaged"),
])
def test_a_damaged_record(content, why):
    def body(host):
        one = host.container("one")
        one.hook("createRuntime", check=0)
        RECORD.write_text(content)
        two = host.container("two")
        done = two.hook("createRuntime")
        assert done.returncode == 125
        assert f"read {RECORD}: " in done.stderr
        assert why in done.stderr
        two.hook("poststop", check=0)
        (pod,) = pods("list")
        assert why in pod["fault"]
        assert "damaged" in run_cli("pod", "list", check=0).stdout
        assert "damaged" in run_cli("pod", "show", "p1", check=0).stdout
        assert run_cli("pod", "delete", "p1").returncode == 125
        run_cli("pod", "delete", "--force", "p1", check=0)
        assert_nothing_left()

    on_fake_host(body)


def test_a_master_that_nobody_has_mounted_any_more():
    def body(host):
        pause = host.container("pause", mounts=[])
        pause.hook("createRuntime", check=0)
        (point,) = store_mounts()
        Path(point, "file").write_text("lost")
        from sandboxfs.kernel import abi, syscalls

        syscalls.umount2(point.encode(), abi.MNT_DETACH)
        one = host.container("one", hints={})
        one.hook("createRuntime", check=0)
        assert os.listdir(one.path("/data")) == []
        assert len(store_mounts()) == 1
        log = Path("/run/sandboxfs/hook.log").read_text()
        assert "was mounted nowhere, made anew" in log
        two = host.container("two", hints={})
        two.hook("createRuntime", check=0)
        one.path("/data/file").write_text("here")
        assert two.path("/data/file").read_text() == "here"
        run_cli("pod", "delete", "--force", "p1", check=0)
        assert_nothing_left()

    on_fake_host(body)


def test_a_busy_lock_names_its_holder():
    def body(host):
        one = host.container("one")
        one.hook("createRuntime", check=0)
        holder = subprocess.Popen(
            ["/usr/bin/flock", str(STORE / "lock"), "sleep", "60"], env=ENVIRONMENT,
            start_new_session=True,
        )
        try:
            while run_flock():
                pass
            done = run_cli("pod", "list", timeout=60)
            assert done.returncode == 125
            assert f"lock {STORE}/lock: held for more than 10 s by process" in done.stderr
        finally:
            os.killpg(holder.pid, signal.SIGKILL)
            holder.wait()
        run_cli("pod", "delete", "--force", "p1", check=0)

    on_fake_host(body)


def run_flock():
    """Return whether the store's lock is free."""
    done = subprocess.run(["/usr/bin/flock", "--nonblock", STORE / "lock", "true"],
                          env=ENVIRONMENT, check=False)
    return done.returncode == 0


def test_a_rootless_runtime_has_a_store_of_its_user():
    """Its hooks are root of a user namespace; the pod is not one of root's."""

    def body(host):
        with pytest.raises(FileNotFoundError):
            os.listdir("/run/sandboxfs")
        session = Path(f"/run/user/{UNPRIVILEGED}")
        one, two = host.container("one"), host.container("two")
        done = one.hook("createRuntime")
        assert done.returncode == 125
        assert "a user's session directory is made at login" in done.stderr
        session.mkdir(mode=0o755, parents=True)
        session.chmod(0o700)
        for each in (one, two):
            each.hook("createRuntime", check=0)
        one.path("/data/file").write_text("here")
        assert two.path("/data/file").read_text() == "here"
        assert [each["id"] for each in pods("list")] == ["p1"]
        assert sorted(os.listdir(session / "sandboxfs/pods")) == ["lock", "named-p1"]
        assert (session / "sandboxfs/hook.log").stat().st_size > 0
        for each in (one, two):
            each.hook("poststop", check=0)
        assert os.listdir(session / "sandboxfs/pods") == ["lock"]
        assert not Path("/run/sandboxfs").exists()

    on_fake_host(body, uid=UNPRIVILEGED)


# -- the command --------------------------------------------------------------------------


def test_the_command_tells_what_there_is():
    def body(host):
        assert run_cli("pod", "list", check=0).stdout == "no pods\n"
        assert pods("list") == []
        one = host.container("one")
        one.hook("createRuntime", check=0)
        one.path("/data/file").write_bytes(bytes(8192))
        lines = run_cli("pod", "list", check=0).stdout.splitlines()
        assert [line.split() for line in lines] == [
            ["POD", "STATE", "CONTAINERS", "VOLUMES", "USED"],
            ["named-p1", "living", "1/1", "cache", "8K"],
        ]
        lines = run_cli("pod", "show", "p1", check=0).stdout.splitlines()
        assert lines[0] == "pod p1 (named by dev.sandboxfs.pod): living"
        assert lines[2].split() == ["cache", SOURCE, "size=1048576", "8K", "1M"]
        assert lines[4].split() == ["one", str(one.pid), "living"]
        data = pods("show", "named-p1")
        assert data == pods("list")[0]
        assert data["volumes"] == [{"hint": "cache", "source": SOURCE, "used": 8192,
                                    "options": ["size=1048576"], "size": 1 << 20}]
        done = run_cli("pod", "delete", "p1")
        assert done.returncode == 125
        assert done.stderr == (
            "sandboxfs: delete p1: has living containers: one\n"
            "  hint: --force deletes it all the same; they keep the replicas they have\n"
        )
        run_cli("pod", "delete", "p1", "--force", check=0)
        # What is used goes on working, until its container ends.
        assert one.path("/data/file").read_bytes() == bytes(8192)
        one.hook("poststop", check=0)
        assert_nothing_left()

    on_fake_host(body)


def test_one_id_of_two_pods_has_to_be_told_apart():
    def body(host):
        key = {"io.kubernetes.cri.sandbox-id": "p1"}
        one, two = host.container("one"), host.container("two", pod=None, annotations=key)
        one.hook("createRuntime", check=0)
        two.hook("createRuntime", check=0)
        one.path("/data/file").write_text("not shared")
        assert not two.path("/data/file").exists()
        done = run_cli("pod", "show", "p1")
        assert "is several pods: say named-p1 or sandbox-p1" in done.stderr
        run_cli("pod", "delete", "--force", "sandbox-p1", check=0)
        run_cli("pod", "delete", "--force", "p1", check=0)
        assert_nothing_left()

    on_fake_host(body)


@pytest.mark.parametrize(("arguments", "status", "text"), [
    (["show"], 2, "pod show: which pod?"),
    (["delete"], 2, "pod delete: which pod?"),
    (["list", "p1"], 2, "pod list p1: takes no pod"),
    (["list", "--force"], 2, "--force: pod list: is for delete"),
    (["show", "p1"], 125, "p1: no such pod"),
    (["delete", "../p1"], 125, "../p1: no such pod"),
])
def test_what_the_command_refuses(arguments, status, text):
    def body(host):
        done = run_cli("pod", *arguments)
        return done.returncode, done.stderr

    found, stderr = on_fake_host(body)
    assert found == status
    assert stderr.startswith(f"sandboxfs: {text}")
