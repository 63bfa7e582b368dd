"""Children that live in one memory, one after the other: nothing of one reaches the next."""

import os
import random
import threading
import time
from pathlib import Path

import pytest

import sandboxfs
from sandboxfs.harness import child, client
from sandboxfs.kernel.submount_watch import Watch
from tests.support import default_spec, in_namespace, mount_tmpfs, reap_orphans, table
from tests.support.host import bind

pytestmark = pytest.mark.needs("root", "overlay", "detached-nesting", "busybox")
LIVES = 4


@pytest.fixture(autouse=True)
def no_warm_process_is_left():
    yield
    client.stop()


def by_assembly(document):
    """Have a document that isn't built at once."""
    document["mounts"].append({"destination": "/scratch", "type": "tmpfs", "source": "t"})


@pytest.fixture(params=["usual", "by assembly", "pool"])
def lane(request, bundle):
    made = bundle(by_assembly if request.param == "by assembly" else None)
    if request.param == "pool":
        opened = sandboxfs.Pool(sandboxfs.plan(sandboxfs.load(made)), size=2)
    else:
        opened = sandboxfs.Sandbox(made)
    with opened as made:
        yield made


def settled(lane):
    """Wait until nothing runs and all that should wait do, rested hosts' children among them."""
    deadline = time.monotonic() + 10
    while lane.status() != {"waiting": 2, "building": 0, "running": 0}:
        assert time.monotonic() < deadline, lane.status()
        time.sleep(0.005)
    time.sleep(0.02)


def hosts():
    """Return the pids of the warm process's children that have our pid namespace, as a set."""
    pid = client.current().pid
    ours = os.stat("/proc/self/ns/pid").st_ino
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        children = [int(each) for each in file.read().split()]
    found = set()
    for each in children:
        try:
            if os.stat(f"/proc/{each}/ns/pid").st_ino == ours:
                found.add(each)
        except FileNotFoundError:
            continue
    return found


def test_a_host_has_one_child_after_the_other(lane):
    settled(lane)
    lane.run(["/bin/true"], check=True)
    settled(lane)
    before = hosts()
    for _each in range(LIVES):
        lane.run(["/bin/true"], check=True)
        settled(lane)
    assert hosts() == before


def test_every_life_begins_as_the_first_one_did(lane):
    """Also after one with an environment, a directory and streams of its own."""
    script = ("pwd; env; ls -l /proc/self/fd | wc -l; cat /proc/self/limits; umask; "
              "grep -E 'Cap|NoNew|Groups|Uid|Sig[BIC]' /proc/self/status; ps -o sid,comm; "
              "cat /proc/self/oom_score_adj; ls /tmp; ip link show lo; "
              "cut -d' ' -f41 /proc/self/stat; cut -d' ' -f5- /proc/self/mountinfo")
    seen = []
    for number in range(LIVES):
        settled(lane)
        seen.append(lane.run(["/bin/sh", "-c", script], capture_output=True, text=True).stdout)
        settled(lane)
        lane.run(["/bin/sh", "-c", "touch /tmp/x /y; kill -9 $$"] if number % 2 else ["true"],
                 env={"SECRET": "x", "PATH": "/bin"}, cwd="/tmp", input="x")
    assert "CapBnd" in seen[0]
    assert "SECRET" not in seen[-1]
    assert "LOOPBACK,UP" in seen[0]
    assert "\n0\n" in seen[0]  # SCHED_OTHER
    for each in seen[1:]:
        assert each.splitlines() == seen[0].splitlines()


def test_hosts_keep_nothing_of_their_children(lane):
    def held():
        return sorted(os.readlink(f"/proc/{pid}/fd/{name}").partition(":")[0]
                      for pid in hosts() for name in os.listdir(f"/proc/{pid}/fd"))

    settled(lane)
    for _each in range(2):
        lane.run(["/bin/true"], check=True)
        settled(lane)
    before, mounts = held(), len(table())
    for _each in range(LIVES * 2):
        lane.run(["/bin/cat"], input=b"x", capture_output=True, check=True)
        settled(lane)
    assert held() == before
    assert len(table()) == mounts


def test_hosts_do_not_grow(lane):
    """What one life leaves in circles is collected before the next one."""
    def kilobytes():
        text = "".join(Path(f"/proc/{pid}/status").read_text("utf-8") for pid in hosts())
        return sum(int(line.split()[1]) for line in text.splitlines() if "RssAnon" in line)

    settled(lane)
    for _each in range(LIVES):
        lane.run(["/bin/true"], check=True)
        settled(lane)
    before = kilobytes()
    for _each in range(40):
        lane.run(["/bin/true"], check=True)
        settled(lane)
    assert kilobytes() - before < 400


class Taken:
    """Stands for what is taken along into the base namespace."""

    closed = False

    def close(self):
        self.closed = True


@pytest.mark.parametrize(("watched", "begun", "used"), [
    (True, 3, True), (False, 3, False), (True, 4, False),
])
def test_what_was_taken_along_ahead_is_used_while_no_mount_has_changed(
        monkeypatch, watched, begun, used):
    monkeypatch.setattr(child.base, "prepare", lambda _plan, _fd: "made anew")
    template = child.Template.__new__(child.Template)
    template.plan, template.base, template.watch = None, 5, Watch()
    template.watch.begun, template.taken_at = begun, 3
    template.taken = ahead = Taken()
    assert template.take_along(watched) == (ahead if used else "made anew")
    assert ahead.closed is not used
    assert template.take_along(True) == "made anew"


def test_who_reads_a_stream_waits_for_no_host(lane):
    settled(lane)
    for _each in range(LIVES):
        reader, writer = os.pipe()
        lane.run(["/bin/echo", "x"], stdout=writer)
        os.close(writer)
        assert os.read(reader, 10) == b"x\n"
        assert os.read(reader, 10) == b""
        os.close(reader)


@pytest.mark.needs("vfork-children")
def test_one_that_fails_ends_its_host(lane):
    settled(lane)
    before = hosts()
    for _each in range(2):
        with pytest.raises(sandboxfs.ProcessError, match="no such file in the container"):
            lane.run(["/bin/nothing"])
    assert lane.run(["/bin/true"]).returncode == 0
    settled(lane)
    assert len(hosts() & before) <= len(before) - 2


def test_a_host_that_was_killed_is_replaced(lane):
    settled(lane)
    lane.run(["/bin/true"], check=True)
    for pid in hosts():
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            continue
    for _each in range(LIVES):
        assert lane.run(["/bin/true"]).returncode == 0
    client.stop()
    reap_orphans()


def test_whatever_is_killed_the_warm_process_goes_on(lane):
    """Hosts and children at any moment: a run ends, is told of its end, or of its failure."""
    server = client.current().pid
    sweeper = min(hosts() - {server})
    others, told, over = random.Random(1), [], threading.Event()

    def work():
        while not over.is_set():
            try:
                told.append(lane.run(["/bin/true"]).returncode)
            except sandboxfs.SandboxError as error:
                told.append(str(error))

    threads = [threading.Thread(target=work) for _each in range(2)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        time.sleep(others.random() * 0.01)
        with open(f"/proc/{server}/task/{server}/children", encoding="ascii") as file:
            pids = [int(each) for each in file.read().split() if int(each) != sweeper]
        try:
            os.kill(others.choice(pids), 9)
        except (IndexError, ProcessLookupError):
            continue
    over.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert client.current().pid == server
    assert all(each in (0, -9) or "ended before it began" in str(each)
               or "children that wait end" in str(each) for each in told), set(told)
    assert lane.run(["/bin/true"]).returncode == 0
    lane.run(["/bin/true"])  # has those made that are missing
    settled(lane)
    client.stop()
    reap_orphans()


CHANGES = {
    "mount": lambda lower: mount_tmpfs(lower / "etc"),
    "bind": lambda lower: bind(lower.parent / "other", lower / "etc"),
    "renamed into it": lambda lower: os.rename(lower.parent / "a", lower / "a"),
    "another directory": lambda lower: (
        os.rename(lower, lower.parent / "old"), os.rename(lower.parent / "new", lower)),
    "renamed above": lambda lower: (
        os.rename(lower.parent, f"{lower.parent}-old"),
        os.rename(f"{lower.parent}-new", lower.parent)),
}


@pytest.mark.parametrize("many", [False, True], ids=["few mounts", "many mounts"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_becomes_of_the_lower_between_two_lives_is_seen(public_path, bundle, change, many):
    """A host that has looked at it looks again."""
    script = "ls /etc /a /a/b; cat /which"

    def seen(made):
        for index in range(300 if many else 0):
            (public_path / "many" / str(index)).mkdir(parents=True)
            mount_tmpfs(public_path / "many" / str(index))
        lower = public_path / "top" / "lower"
        with sandboxfs.Sandbox(made) as box:
            for _each in range(LIVES):
                box.run(["/bin/true"], check=True)
                settled(box)
            before = box.run(["/bin/sh", "-c", script], capture_output=True).stdout
            settled(box)
            CHANGES[change](lower)
            outs = [box.run(["/bin/sh", "-c", script], capture_output=True).stdout]
            settled(box)
            outs.append(box.run(["/bin/sh", "-c", script], capture_output=True).stdout)
        with sandboxfs.Sandbox(made) as box:
            fresh = box.run(["/bin/sh", "-c", script], capture_output=True).stdout
        client.stop()
        return before, outs, fresh

    def inside():
        mount_tmpfs(public_path)
        for name in ("top", "top-new"):
            (public_path / name).mkdir(mode=0o755)
            for which in ("lower", "new"):
                root = bundle(name=f"made-{name}-{which}").rootfs
                (root / "which").write_text(f"{name} {which}\n")
                os.rename(root, public_path / name / which)
            (public_path / name / "other").mkdir()
            (public_path / name / "other" / "bound").touch()
            (public_path / name / "a" / "b").mkdir(parents=True)
            mount_tmpfs(public_path / name / "a" / "b")
            (public_path / name / "a" / "b" / "file").touch()
        document = default_spec()
        document["root"]["path"] = str(public_path / "top" / "lower")
        return seen(bundle(document, name="asked"))

    before, outs, fresh = in_namespace(inside)
    assert before != fresh
    assert outs == [fresh, fresh]
