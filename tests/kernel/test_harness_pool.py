"""`Pool`: roots that are built ahead, taken once, and built anew behind."""

import os
import select
import subprocess
import threading
import time

import pytest

import sandboxfs
from sandboxfs.harness import ahead as ahead_of_time
from sandboxfs.harness import client, sandbox
from sandboxfs.kernel import abi, syscalls
from tests.support import (
    default_spec,
    in_namespace,
    mount_tmpfs,
    parsed,
    set_propagation,
    table,
    untouched,
)

pytestmark = pytest.mark.needs("root", "overlay", "detached-nesting", "busybox")


@pytest.fixture(autouse=True)
def no_warm_process_is_left():
    yield
    client.stop()


def planned(made):
    return sandboxfs.plan(sandboxfs.load(made))


def full(pool, size):
    """Wait until all roots of a pool are built."""
    deadline = time.monotonic() + 10
    while pool.status() != {"waiting": size, "building": 0, "running": 0}:
        assert time.monotonic() < deadline, pool.status()
        time.sleep(0.01)


def waiting_pids():
    """Return the children of the warm process that have a pid namespace of their own."""
    pid = client.current().pid
    ours = os.stat(f"/proc/{pid}/ns/pid").st_ino
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        children = [int(each) for each in file.read().split()]
    return [each for each in children if os.stat(f"/proc/{each}/ns/pid").st_ino != ours]


def test_the_roots_are_there_before_they_are_asked_for(bundle):
    with sandboxfs.Pool(planned(bundle()), size=3) as pool:
        full(pool, 3)
        assert len(waiting_pids()) == 3
        for pid in waiting_pids():
            records = table(pid)
            assert records[0].mountpoint == b"/"
            assert records[0].type == b"overlay"
            assert b"/dev/pts" in [record.mountpoint for record in records]
        namespaces = {os.stat(f"/proc/{pid}/ns/mnt").st_ino for pid in waiting_pids()}
        assert len(namespaces) == 3


def test_taking_one_uses_a_child_that_waited_and_refills(bundle):
    with sandboxfs.Pool(planned(bundle()), size=2) as pool:
        full(pool, 2)
        before = waiting_pids()
        inodes = {os.stat(f"/proc/{pid}/ns/mnt").st_ino for pid in before}
        done = pool.run(["/bin/readlink", "/proc/self/ns/mnt"], capture_output=True, text=True)
        assert int(done.stdout.strip()[5:-1]) in inodes
        full(pool, 2)
        assert len(set(waiting_pids()) - set(before)) == 1


def test_each_command_has_a_root_of_its_own_and_the_same_view(bundle):
    made = bundle()
    with untouched(made.rootfs), sandboxfs.Pool(planned(made), size=2) as pool:
        outs = [
            pool.run(["/bin/sh", "-c", "ls /; echo x > /file; cat /proc/self/mountinfo >&2"],
                     capture_output=True, check=True)
            for _each in range(4)
        ]
    with sandboxfs.Sandbox(made) as box:
        single = box.run(["/bin/cat", "/proc/self/mountinfo"], capture_output=True).stdout
    assert len({done.stdout for done in outs}) == 1
    assert b"file" not in outs[0].stdout

    def comparable(text):
        # Without the order: a sandbox that had time makes file systems of its own ahead.
        return sorted((each.mountpoint, each.root, each.type, each.attributes)
                      for each in parsed(text))

    assert comparable(outs[3].stderr) == comparable(single)


def test_the_payload_has_what_the_document_gives_it(bundle):
    """Capabilities, limits and ids were taken before the command was known."""
    def change(document):
        document["process"]["user"] = {"uid": 1000, "gid": 1001, "additionalGids": [5]}
        document["process"]["cwd"] = "/tmp"
        document["process"]["rlimits"] = [{"type": "RLIMIT_NOFILE", "soft": 16, "hard": 16}]

    script = "id -u; id -G; pwd; ulimit -n; grep -E 'Cap(Eff|Bnd)|NoNew' /proc/self/status"
    made = bundle(change)
    with sandboxfs.Pool(planned(made), size=1) as pool, sandboxfs.Sandbox(made) as box:
        command = ["/bin/sh", "-c", script]
        ahead = pool.run(command, capture_output=True, text=True, check=True).stdout
        single = box.run(command, capture_output=True, text=True, check=True).stdout
        elsewhere = pool.run(["/bin/pwd"], cwd="/etc", capture_output=True, text=True).stdout
        with pytest.raises(sandboxfs.ProcessError, match=r"process\.cwd"):
            pool.run(["/bin/pwd"], cwd="/nowhere")
    assert ahead == single
    assert ahead.splitlines()[:4] == ["1000", "1001 5", "/tmp", "16"]
    assert elsewhere == "/etc\n"


def test_more_than_are_ready_are_served_too(bundle):
    with sandboxfs.Pool(planned(bundle()), size=1) as pool:
        results = []

        def work(number):
            results.append(pool.run(["/bin/echo", str(number)], capture_output=True).stdout)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        full(pool, 1)
    assert sorted(results) == sorted(b"%d\n" % number for number in range(12))


def test_a_child_that_waited_and_died_is_replaced(bundle):
    with sandboxfs.Pool(planned(bundle()), size=2) as pool:
        full(pool, 2)
        for pid in waiting_pids():
            pidfd = os.pidfd_open(pid)
            os.kill(pid, 9)
            select.select([pidfd], [], [])
            os.close(pidfd)
        assert pool.run(["/bin/true"]).returncode == 0
        full(pool, 2)


def test_nothing_is_left_when_it_is_closed(bundle):
    pool = sandboxfs.Pool(planned(bundle()), size=4)
    full(pool, 4)
    pids = waiting_pids()
    pool.close()
    assert waiting_pids() == []
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    with pytest.raises(sandboxfs.ProcessError, match="closed"):
        pool.run(["/bin/true"])


@pytest.mark.parametrize("size", [0, -1, 10**9])
def test_a_size_that_cannot_be_is_refused_at_once(bundle, size):
    plan = planned(bundle())
    with pytest.raises(sandboxfs.UsageError, match="at least" if size < 1 else "allows"):
        sandboxfs.Pool(plan, size=size)
    assert client._current is None  # nothing was started for it


@pytest.mark.parametrize("size", [1.5, True, "2", None])
def test_a_size_that_is_no_number_is_refused(bundle, size):
    with pytest.raises(sandboxfs.UsageError, match="no number"):
        sandboxfs.Pool(planned(bundle()), size=size)


def test_the_limits_are_those_of_the_machine():
    most, limit = sandbox.most_roots()
    assert 0 < most < 10**9
    assert limit.startswith(("RLIMIT_", "/proc/sys/"))


def test_a_root_that_cannot_be_built_is_told_at_once(bundle):
    document = default_spec()
    document["mounts"].append({"destination": "/data", "type": "bind", "options": ["rbind"],
                               "source": "/nowhere/at/all"})
    with pytest.raises(sandboxfs.MountError, match=r"mounts\[7\].*ENOENT"):
        sandboxfs.Pool(planned(bundle(document)), size=2)
    assert waiting_pids() == []


def test_a_root_that_can_no_longer_be_built_fails_the_run_and_does_not_loop(bundle, public_path):
    source = public_path / "source"
    source.mkdir()
    document = default_spec()
    document["mounts"].append({"destination": "/data", "type": "bind", "options": ["rbind"],
                               "source": str(source)})
    with sandboxfs.Pool(planned(bundle(document)), size=1) as pool:
        full(pool, 1)
        source.rmdir()
        assert pool.run(["/bin/true"]).returncode == 0  # it was built before
        with pytest.raises(sandboxfs.MountError, match=r"mounts\[7\]"):
            pool.run(["/bin/true"])
        time.sleep(0.1)
        assert waiting_pids() == []
        source.mkdir()
        assert pool.run(["/bin/true"]).returncode == 0


# -- what isn't built ahead ------------------------------------------------------------------


@pytest.mark.parametrize(("option", "ahead"), [
    ("rprivate", True), ("rslave", False), ("slave", False), ("rshared", False),
])
def test_binds_that_follow_the_host_are_not_built_ahead(bundle, public_path, option, ahead):
    (public_path / "source" / "below").mkdir(parents=True)
    document = default_spec()
    document["mounts"].append({"destination": "/data", "type": "bind", "options": ["rbind", option],
                               "source": str(public_path / "source")})
    plan = planned(bundle(document))
    assert ahead_of_time.may_be_built_ahead(plan) == ahead

    def seen():
        set_propagation(abi.MS_SHARED)
        with sandboxfs.Pool(plan, size=1) as pool:
            time.sleep(0.1)
            mount_tmpfs(public_path / "source" / "below")
            (public_path / "source" / "below" / "file").touch()
            done = pool.run(["/bin/ls", "/data/below"], capture_output=True, text=True)
            syscalls.umount2(os.fsencode(public_path / "source" / "below"), abi.MNT_DETACH)
        client.stop()
        return done.stdout

    # What was built before the mount was made doesn't have it; that is why the others wait.
    assert in_namespace(seen) == ("" if ahead else "file\n")


def test_plans_that_need_a_parent_are_served_all_the_same(bundle):
    made = bundle()
    plan = sandboxfs.plan(sandboxfs.load(made))
    assert ahead_of_time.may_be_built_ahead(plan)
    document = default_spec()
    mapping = [{"containerID": 0, "hostID": 200000, "size": 65536}]
    document["linux"]["namespaces"].append({"type": "user"})
    document["linux"].update(uidMappings=mapping, gidMappings=mapping)
    with sandboxfs.Pool(planned(bundle(document, name="user")), size=2) as pool:
        done = pool.run(["/bin/cat", "/proc/self/uid_map"], capture_output=True, text=True)
    assert done.stdout.split() == ["0", "200000", "65536"]


def test_a_plan_with_a_terminal_is_refused(bundle):
    def change(document):
        document["process"]["terminal"] = True

    with pytest.raises(sandboxfs.ProcessError, match=r"process\.terminal"):
        sandboxfs.Pool(planned(bundle(change)))


def test_a_timeout_and_a_status(bundle):
    with sandboxfs.Pool(planned(bundle()), size=1) as pool:
        with pytest.raises(subprocess.TimeoutExpired):
            pool.run(["/bin/sleep", "1000"], timeout=0.3)
        with pytest.raises(subprocess.CalledProcessError):
            pool.run(["/bin/false"], check=True)
        full(pool, 1)
