"""Pods of real containers, by runc and crun, through the hooks as they are registered."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from sandboxfs.kernel import abi
from tests.support import (
    LAUNCHER,
    flags_of,
    mount_at,
    mount_tmpfs,
    parsed,
    run,
    run_cli,
    set_propagation,
)
from tests.support.commands import ENVIRONMENT
from tests.support.pods import (
    HINT,
    STORE,
    assert_nothing_left,
    on_host,
    pods,
    pods_here,
    store_mounts,
)

pytestmark = pytest.mark.needs("root", "runc", "crun", "launcher")
each_runtime = pytest.mark.parametrize("runtime", ["runc", "crun"])
ROUNDS = 100


@each_runtime
def test_two_containers_without_a_sandbox_share_a_volume(public_path, runtime):
    def body(host):
        one = host.started("one")
        two = host.started("two", at="/elsewhere")
        one.sh("echo first > /data/file")
        assert two.sh("cat /elsewhere/file") == "first\n"
        two.sh("echo second >> /elsewhere/file")
        assert one.sh("cat /data/file") == "first\nsecond\n"
        # Neither what the runtime bound there nor the host sees any of it.
        assert os.listdir(host.path / "volumes-cache") == []
        (pod,) = pods("list")
        assert pod["id"] == "p1"
        assert pod["stale"] is False
        assert [each["living"] for each in pod["containers"]] == [True, True]
        (volume,) = pod["volumes"]
        assert volume["size"] == 1 << 20
        assert volume["used"] >= 4096
        assert len(store_mounts()) == 1
        one.delete()
        assert two.sh("cat /elsewhere/file") == "first\nsecond\n"
        assert len(store_mounts()) == 1
        two.delete()
        assert pods("list") == []
        assert_nothing_left()

    on_host(body, public_path, runtime)


@each_runtime
@pytest.mark.parametrize("keys", ["io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID"])
def test_a_sandbox_first_then_containers_without_hints_of_their_own(public_path, runtime, keys):
    """As a runtime of Kubernetes does it: the pod's annotations reach the sandbox container."""

    def body(host):
        same = {"pod": None, "annotations": {keys: "0123abcd"}}
        pause = host.started("pause", **same, at=None, hints={
            "cache": HINT | {"source": str(host.path / "volumes-cache")},
        })
        assert len(store_mounts()) == 1
        one = host.started("one", **same, hints={})
        two = host.started("two", **same, hints={})
        one.sh("echo here > /data/file")
        assert two.sh("cat /data/file") == "here\n"
        one.delete()
        two.delete()
        # The sandbox lives, and so does what was written.
        three = host.started("three", **same, hints={})
        assert three.sh("cat /data/file") == "here\n"
        assert "sandbox-0123abcd" in run_cli("pod", "list", check=0).stdout
        three.delete()
        pause.delete()
        assert_nothing_left()

    on_host(body, public_path, runtime)


@each_runtime
def test_other_pods_and_no_pod_share_nothing(public_path, runtime):
    def body(host):
        hosts = [host.started("one", pod="p1"), host.started("two", pod="p2")]
        for number, container in enumerate(hosts):
            container.sh(f"test ! -e /data/file; echo {number} > /data/file")
        assert [each.sh("cat /data/file") for each in hosts] == ["0\n", "1\n"]
        assert len(pods("list")) == 2
        for each in hosts:
            each.delete()
        assert_nothing_left()

    on_host(body, public_path, runtime)


def test_two_containers_starting_at_the_same_instant(public_path):
    """A hundred rounds: one master, both counted, each other's bytes seen, nothing left."""

    def body(host):
        host.hooks = ["createRuntime", "poststop"]
        one, two = host.container("one"), host.container("two")
        for round in range(ROUNDS):
            starting = [one.spawn(), two.spawn()]
            ends = [process.wait(60) for process in starting]
            assert ends == [0, 0], [(each.bundle.path / "stderr").read_text()
                                    for each in (one, two)]
            (pod,) = pods_here()
            assert sorted(each["id"] for each in pod["containers"]) == sorted([one.id, two.id])
            assert len(store_mounts()) == 1
            device = os.stat(store_mounts()[0]).st_dev
            roots = [f"/proc/{each.pid}/root/data" for each in (one, two)]
            assert [os.stat(each).st_dev for each in roots] == [device, device], round
            Path(roots[0], "file").write_text(str(round))
            assert Path(roots[1], "file").read_text() == str(round)
            # They end at once, too.
            ending = [subprocess.Popen(host.command("delete", "--force", each.id),
                                       env=ENVIRONMENT, cwd="/") for each in (one, two)]
            assert [process.wait(60) for process in ending] == [0, 0]
            assert_nothing_left()

    on_host(body, public_path, "crun", timeout=240)


@each_runtime
def test_a_container_that_dies_without_poststop(public_path, runtime):
    def body(host):
        one = host.started("one")
        one.sh("echo old > /data/file")
        one.kill()
        shutil.rmtree(host.path / "state" / one.id)
        (pod,) = pods("list")
        assert pod["stale"] is True
        assert [each["living"] for each in pod["containers"]] == [False]
        assert "stale" in run_cli("pod", "list", check=0).stdout
        # Whoever comes next doesn't find what a dead pod has left.
        two = host.started("two")
        assert two.sh("ls -A /data") == ""
        (pod,) = pods("list")
        assert [each["id"] for each in pod["containers"]] == [two.id]
        two.kill()
        run_cli("pod", "delete", "p1", check=0)
        assert_nothing_left()

    on_host(body, public_path, runtime)


@each_runtime
@pytest.mark.parametrize("propagation", ["private", "slave"])
def test_each_start_in_a_mount_namespace_of_its_own(public_path, runtime, propagation):
    """The host has /run shared; what a runtime mounts in its own namespace stays there."""

    def body(host):
        set_propagation(abi.MS_SHARED)
        host.prefix = ["unshare", "--mount", "--propagation", propagation, "--"]
        one = host.started("one")
        two = host.started("two")
        one.sh("echo first > /data/file")
        assert two.sh("cat /data/file") == "first\n"
        assert store_mounts() == []
        (pod,) = pods("list")
        assert [each["living"] for each in pod["containers"]] == [True, True]
        assert pod["volumes"][0]["size"] is None
        one.delete()
        # The one that made it is gone, and its mount namespace.
        three = host.started("three")
        assert three.sh("cat /data/file") == "first\n"
        two.delete()
        three.delete()
        assert_nothing_left()

    on_host(body, public_path, runtime)


def test_a_copy_in_another_mount_namespace_keeps_no_memory(public_path):
    """A private copy of all mounts, taken while the pod lives, as some services have it."""

    def body(host):
        one = host.started("one")
        holder = subprocess.Popen(["unshare", "--mount", "--propagation", "private", "--",
                                   "sleep", "600"], env=ENVIRONMENT)
        table = Path(f"/proc/{holder.pid}/mountinfo")
        try:
            while os.readlink(f"/proc/{holder.pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt"):
                pass
            while "sleep" not in Path(f"/proc/{holder.pid}/comm").read_text():
                pass
            assert f" {STORE}/" in table.read_text()
            one.delete()
            assert f" {STORE}/" not in table.read_text()
        finally:
            holder.kill()
            holder.wait()
        assert_nothing_left()

    on_host(body, public_path, "crun")


def mapped(document):
    document["linux"]["namespaces"].append({"type": "user"})
    mapping = [{"containerID": 0, "hostID": 200000, "size": 65536}]
    document["linux"]["uidMappings"] = document["linux"]["gidMappings"] = mapping


@each_runtime
def test_containers_with_user_namespaces(public_path, runtime):
    """The volume belongs to the container's root, and ids of options are the container's."""

    def body(host):
        os.chown(host.rootfs, 200000, 200000)
        options = {"hints": {"cache": HINT | {"options": "size=1M,uid=5,gid=6,mode=0750"}}}
        one = host.started("one", change=mapped)
        two = host.started("two", change=mapped)
        one.sh("echo first > /data/file; mkdir /data/directory")
        assert two.sh("cat /data/file; stat -c %u:%g:%a /data /data/file") == (
            "first\n0:0:1777\n0:0:644\n"
        )
        (mounted,) = store_mounts()
        assert os.stat(mounted).st_uid == 200000
        other = host.started("other", pod="p2", change=mapped, **options)
        assert other.sh("stat -c %u:%g:%a /data") == "5:6:750\n"
        for each in (one, two, other):
            each.delete()
        assert_nothing_left()

    on_host(body, public_path, runtime)


def test_an_id_that_isnt_mapped(public_path):
    def body(host):
        os.chown(host.rootfs, 200000, 200000)
        options = {"hints": {"cache": HINT | {"options": "uid=70000"}}}
        done = host.container("one", change=mapped, **options).create()
        assert done.returncode != 0
        assert "hint cache: uid=70000: the id isn't mapped in the container's user" in done.stderr
        assert_nothing_left()

    on_host(body, public_path, "runc")


@each_runtime
def test_another_hook_fails_after_ours(public_path, runtime):
    """crun then runs no poststop, and nobody tells us: the container's process is gone."""

    def body(host):
        def failing(document):
            document["hooks"]["createRuntime"].append({"path": "/bin/false"})

        one = host.container("one", change=failing)
        assert one.create().returncode != 0
        found = pods("list")
        if runtime == "crun":
            assert [each["stale"] for each in found] == [True]
        else:
            assert found == []
        two = host.started("two")
        assert two.sh("ls -A /data") == ""
        (pod,) = pods("list")
        assert [each["id"] for each in pod["containers"]] == [two.id]
        assert len(store_mounts()) == 1
        two.delete()
        assert_nothing_left()

    on_host(body, public_path, runtime)


@each_runtime
def test_a_stale_pod_goes_when_another_begins(public_path, runtime):
    def body(host):
        one = host.started("one", pod="p1")
        one.kill()
        two = host.started("two", pod="p2")
        assert [each["id"] for each in pods("list")] == ["p2"]
        assert len(store_mounts()) == 1
        two.delete()
        assert_nothing_left()

    on_host(body, public_path, runtime)


def cache(**fields):
    return {"hints": {"cache": HINT | fields}}


INCOMPATIBLE = [
    (cache(options="size=2M"), {},
     'mount.cache.options: "size=1048576": hint cache of pod p1 was recorded with "size=2097152"'),
    (cache(options="size=1M,noexec"), {},
     'hint cache of pod p1 was recorded with "size=1048576,noexec"'),
    (cache(options="size=1M,mode=700"), cache(options="size=1M,mode=0755"),
     'hint cache of pod p1 was recorded with "size=1048576,mode=700"'),
    (cache(source="/volumes/other"), {"type": "tmpfs", "options": ()},
     'hint cache of pod p1 was recorded with source "/volumes/other"'),
    (cache(options="ro"), cache(options="ro"), "LOOSER rbind,rw ro,SIZE,nosuid,nodev"),
    (cache(options="noexec"), cache(options="noexec") | {"options": ("rbind", "exec")},
     "LOOSER rbind,exec noexec,SIZE,nosuid,nodev"),
    (cache(options="noatime"), cache(options="noatime") | {"options": ("rbind", "strictatime")},
     "LOOSER rbind,strictatime noatime,SIZE,nosuid,nodev"),
    ({}, {"options": ("rbind", "suid")}, "LOOSER rbind,suid size=1048576,nosuid,nodev"),
    ({}, {"options": ("rbind", "dev")}, "LOOSER rbind,dev size=1048576,nosuid,nodev"),
]


@pytest.mark.parametrize(("first", "second", "text"), INCOMPATIBLE)
def test_what_doesnt_fit_is_refused_quoting_both_sides(public_path, first, second, text):
    def body(host):
        first_options = {"options": ("rbind", "ro", "noexec", "noatime")} | first
        one = host.started("one", **first_options)
        two = host.container("two", **second)
        done = two.create()
        assert done.returncode != 0
        wanted = text
        if text.startswith("LOOSER"):
            _, words, recorded = text.split(" ")
            size = json.loads((STORE / "named-p1" / "record").read_text())
            recorded = recorded.replace("SIZE", size["masters"][0]["options"][-1])
            index = len(two.bundle.document["mounts"]) - 1
            wanted = (f'/mounts/{index}/options: "{words}": looser than hint cache of pod p1, '
                      f'recorded with "{recorded}"')
        assert wanted in done.stderr.replace('\\"', '"')
        # Only the one that fits is counted.
        (pod,) = pods("list")
        assert [each["id"] for each in pod["containers"]] == [one.id]
        one.delete()
        assert_nothing_left()

    on_host(body, public_path, "runc")


@each_runtime
def test_replicas_may_be_stricter(public_path, runtime):
    def body(host):
        one = host.started("one")
        reader = host.started("reader", options=("rbind", "ro", "noexec"))
        options = ("ro", "nosuid", "nodev", "size=64k", "mode=0700")
        source = str(host.path / "volumes-cache")
        memory = host.started("memory", type="tmpfs", options=options, source=source,
                              **cache(source=source))
        one.sh("printf '#!/bin/sh\\necho ran\\n' > /data/echo; chmod +x /data/echo; /data/echo")
        for each in (reader, memory):
            assert "Read-only file system" in each.sh("touch /data/file", check=None)
        assert "ermission denied" in reader.sh("/data/echo", check=None)
        assert memory.sh("/data/echo") == "ran\n"
        # runc makes a tmpfs read-only by its path afterwards: that mount, not the file system.
        one.sh("echo still > /data/file")
        assert reader.sh("cat /data/file") == "still\n"
        for each in (one, reader, memory):
            replica = mount_at(parsed(each.sh("cat /proc/self/mountinfo")), "/data")
            assert replica.source == b"sandboxfs:cache"
            assert {"nosuid", "nodev"} <= flags_of(replica)
            each.delete()
        assert_nothing_left()

    on_host(body, public_path, runtime)


def test_a_read_only_tmpfs_names_the_flags_it_is_to_keep(public_path):
    """runc remounts such a mount when all hooks have run, with its own words and no others."""

    def body(host):
        hints = cache(options="noexec")
        one = host.container("one", type="tmpfs", options=("ro", "nosuid"), **hints)
        done = one.create()
        assert done.returncode != 0
        assert ('"ro,nosuid\\": a read-only tmpfs that a hint makes a volume has to say nodev, '
                "noexec") in done.stderr.replace('\\\\"', '\\"')
        assert_nothing_left()
        options = ("ro", "nosuid", "nodev", "noexec")
        two = host.started("two", type="tmpfs", options=options, **hints)
        replica = mount_at(parsed(two.sh("cat /proc/self/mountinfo")), "/data")
        assert {"ro", "nosuid", "nodev", "noexec"} <= flags_of(replica)
        two.delete()
        assert_nothing_left()

    on_host(body, public_path, "runc")


@each_runtime
def test_the_size_is_a_cap(public_path, runtime):
    def body(host):
        one = host.started("one")
        filled = one.sh("dd if=/dev/zero of=/data/file bs=64k count=32", check=None)
        assert "No space left on device" in filled
        assert int(one.sh("stat -c %s /data/file")) == 1 << 20
        # Nor can it be had in empty files.
        one.sh("rm /data/file")
        one.sh("for n in $(seq 2000); do true > /data/$n || break; done 2>/dev/null", check=None)
        assert 500 < int(one.sh("ls /data | wc -l")) <= 1024
        one.delete()
        assert_nothing_left()

    on_host(body, public_path, runtime)


@each_runtime
@pytest.mark.parametrize("access", ["rw", "ro"])
def test_mounts_inside_of_the_volume(public_path, runtime, access):
    """They are on the replica afterwards, in order, of this container alone."""

    def body(host):
        (host.path / "settings").write_text("settings\n")
        (host.path / "etc").mkdir()
        (host.path / "etc" / "name").write_text("name\n")
        inside = [
            {"destination": "/data/etc", "source": str(host.path / "etc"), "type": "bind",
             "options": ["rbind", "ro"]},
            {"destination": "/data/etc/more", "source": "tmpfs", "type": "tmpfs", "options": []},
            {"destination": "/data/deep/er/settings", "source": str(host.path / "settings"),
             "type": "bind", "options": ["rbind", "ro"]},
        ]
        # The runtime needs them in what it binds first; in the volume they are ours to make.
        (host.path / "etc" / "more").mkdir()
        (host.path / "volumes-cache" / "etc").mkdir(parents=True)
        (host.path / "volumes-cache" / "deep" / "er").mkdir(parents=True)
        (host.path / "volumes-cache" / "deep" / "er" / "settings").touch()
        one = host.started("one", options=("rbind", access), mounts=inside)
        two = host.started("two")
        assert one.sh("cat /data/etc/name /data/deep/er/settings") == "name\nsettings\n"
        one.sh("echo x > /data/etc/more/file")
        assert "Read-only" in one.sh("touch /data/etc/file", check=None)
        assert two.sh("cd /data; find . | sort; cat deep/er/settings") == (
            ".\n./deep\n./deep/er\n./deep/er/settings\n./etc\n"
        )
        two.sh("echo shared > /data/file")
        assert one.sh("cat /data/file") == "shared\n"
        one.delete()
        two.delete()
        assert_nothing_left()

    on_host(body, public_path, runtime)


@each_runtime
def test_a_volume_inside_of_another(public_path, runtime):
    def body(host):
        (host.path / "inner").mkdir()
        inner = {"destination": "/data/inner", "source": str(host.path / "inner"),
                 "type": "bind", "options": ["rbind"]}
        hints = {"cache": HINT, "inner": HINT | {"source": str(host.path / "inner")}}
        one = host.started("one", hints=hints, mounts=[inner])
        two = host.started("two", hints=hints, mounts=[inner | {"destination": "/inner"}])
        one.sh("echo a > /data/inner/file; echo b > /data/file")
        assert two.sh("cat /inner/file /data/file; ls /data/inner") == "a\nb\n"
        one.delete()
        two.delete()
        assert_nothing_left()

    on_host(body, public_path, runtime)


@each_runtime
def test_a_destination_behind_a_link_of_the_image(public_path, runtime):
    def body(host):
        (host.rootfs / "real").mkdir()
        (host.rootfs / "link").symlink_to("/real")
        one = host.started("one", at="/link/data")
        two = host.started("two")
        one.sh("echo here > /real/data/file")
        assert two.sh("cat /data/file") == "here\n"
        one.delete()
        two.delete()
        assert_nothing_left()

    on_host(body, public_path, runtime)


@each_runtime
def test_a_later_mount_hides_the_volume(public_path, runtime):
    def body(host):
        over = {"destination": "/data/", "source": "tmpfs", "type": "tmpfs", "options": []}
        one = host.started("one", mounts=[over])
        two = host.started("two")
        two.sh("echo shared > /data/file")
        assert one.sh("ls -A /data") == ""
        one.delete()
        two.delete()
        assert_nothing_left()

    on_host(body, public_path, runtime)


@each_runtime
@pytest.mark.parametrize("propagation", ["shared", "rshared", "rslave"])
def test_a_shared_rootfs_lets_no_replica_out(public_path, runtime, propagation):
    """On a host whose mounts are shared: the volume's memory would stay with the host's copy."""

    def body(host):
        set_propagation(abi.MS_SHARED)

        def change(document):
            document["linux"]["rootfsPropagation"] = propagation

        one = host.started("one", change=change)
        one.sh("echo here > /data/file")
        table = Path("/proc/self/mountinfo").read_text()
        assert [line for line in table.splitlines() if "sandboxfs:cache" in line
                and str(STORE) not in line] == []
        one.delete()
        assert_nothing_left()

    on_host(body, public_path, runtime)


@each_runtime
def test_all_hooks_together(public_path, runtime):
    """The root is an overlay of ours, and the volume is carried over onto it."""

    def body(host):
        one = host.started("one")
        two = host.started("two", options=("rbind", "ro"))
        assert " / overlay " in " ".join(
            f" {line.split()[4]} {line.split(' - ')[1].split()[0]} "
            for line in one.sh("cat /proc/self/mountinfo").splitlines()
        )
        one.sh("echo first > /data/file; echo only here > /file")
        assert two.sh("cat /data/file; ls /file 2>/dev/null || true") == "first\n"
        assert not (host.rootfs / "file").exists()
        one.delete()
        two.delete()
        assert_nothing_left()

    on_host(body, public_path, runtime)


@each_runtime
def test_all_hooks_together_with_user_namespaces(public_path, runtime):
    """createContainer can't reach the store then: it finds the volume left by createRuntime."""

    def body(host):
        os.chown(host.rootfs, 200000, 200000)
        one = host.started("one", change=mapped)
        two = host.started("two", change=mapped)
        one.sh("echo first > /data/file; echo only here > /file")
        assert two.sh("cat /data/file; ls /file 2>/dev/null || true") == "first\n"
        one.delete()
        two.delete()
        assert_nothing_left()

    on_host(body, public_path, runtime)


@each_runtime
def test_a_create_container_hook_of_ours_that_fails(public_path, runtime):
    """It takes its container out of the pod, where it can reach the store."""

    def body(host):
        other = host.started("other")

        def change(document):
            # Gone when the second of our hooks comes.
            document["hooks"]["createRuntime"].append(
                {"path": "/bin/rm", "args": ["rm", str(host.path / "one" / "config.json")]}
            )

        one = host.container("one", change=change)
        done = one.create()
        assert done.returncode != 0
        (pod,) = pods("list")
        assert [each["id"] for each in pod["containers"]] == [other.id]
        other.delete()
        assert_nothing_left()

    on_host(body, public_path, runtime)


@each_runtime
def test_a_container_that_is_created_again_is_counted_once(public_path, runtime):
    def body(host):
        other = host.started("other")
        one = host.started("one")
        one.kill()
        shutil.rmtree(host.path / "state" / one.id)
        one = host.started("one")
        (pod,) = pods("list")
        assert [each["id"] for each in pod["containers"]] == [other.id, one.id]
        one.delete()
        other.delete()
        assert_nothing_left()

    on_host(body, public_path, runtime)


def test_the_state_tells_no_process(public_path):
    """createRuntime without a pid can't count anybody."""

    def body(host):
        one = host.container("one")
        state = {"ociVersion": "1.0.2", "id": "x", "status": "created", "pid": 0,
                 "bundle": str(one.bundle.path)}
        done = run_cli("hook", "createRuntime", input=json.dumps(state))
        assert done.returncode == 125
        assert "state/pid: 0: is no running process" in done.stderr
        assert_nothing_left()

    on_host(body, public_path, "crun")


def test_a_container_in_the_hosts_mount_namespace_is_refused(public_path):
    def body(host):
        one = host.container("one")
        state = {"ociVersion": "1.0.2", "id": "x", "status": "created", "pid": os.getpid(),
                 "bundle": str(one.bundle.path)}
        done = run_cli("hook", "createRuntime", input=json.dumps(state))
        assert done.returncode == 125
        assert "shares the host's mount namespace" in done.stderr
        assert_nothing_left()

    on_host(body, public_path, "crun")


@pytest.mark.needs("podman")
def test_a_pod_of_podman(public_path):
    """podman (4.3) calls its pod by CRI-O's key, and so does the store."""

    def body(host):
        host.hooks = []
        hooks = host.path / "hooks.d"
        hooks.mkdir()
        for stage in ("createRuntime", "createContainer", "poststop"):
            (hooks / f"{stage}.json").write_text(json.dumps({
                "version": "1.0.0", "when": {"always": True}, "stages": [stage],
                "hook": {"path": str(LAUNCHER), "args": [str(LAUNCHER), "hook", stage],
                         "env": ["PATH=/usr/sbin:/usr/bin"]},
            }))
        volume = host.path / "volume"
        volume.mkdir()
        podman = [
            "podman", "--root", str(host.path / "storage"), "--runroot", str(host.path / "run"),
            "--tmpdir", str(host.path / "tmp"), "--cgroup-manager", "cgroupfs", "--runtime", "crun",
            "--events-backend", "none", "--storage-driver", "vfs", "--hooks-dir", str(hooks),
        ]
        limits = ["--cgroups=disabled", "--network=none", "--ulimit=nofile=1024:1024",
                  "--ulimit=nproc=1024:1024", f"--volume={volume}:/data"]
        fields = {"source": str(volume), "type": "tmpfs", "share": "pod", "options": "size=1M"}
        said = [f"--annotation=dev.gvisor.spec.mount.cache.{key}={fields[key]}" for key in fields]
        mount_tmpfs("/var/lib")  # podman makes directories there, whatever it is told
        mount_tmpfs("/dev/shm")  # and its locks here
        try:
            run(*podman, "pod", "create", "--infra=false", "together", check=0)
            for name in ("one", "two"):
                run(*podman, "run", "--detach", "--pod=together", "--name", name, *limits, *said,
                    "--rootfs", str(host.rootfs), "/bin/sleep", "600", check=0, timeout=60)
            run(*podman, "exec", "one", "/bin/sh", "-c", "echo here > /data/file", check=0)
            assert run(*podman, "exec", "two", "/bin/cat", "/data/file", check=0).stdout == "here\n"
            assert os.listdir(volume) == []
            identity = run(*podman, "pod", "inspect", "--format", "{{.ID}}", "together",
                           check=0).stdout.strip()
            (pod,) = pods("list")
            assert pod["name"] == f"sandbox-{identity}"
        finally:
            run(*podman, "pod", "rm", "--force", "--time=0", "together", timeout=60)
        assert_nothing_left()

    on_host(body, public_path, "crun")
