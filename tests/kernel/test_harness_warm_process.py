"""The warm process: killed, hung, asked by strangers, left alone; and nothing remains of it."""

import ast
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import sandboxfs
from sandboxfs.harness import client, wire
from tests.support import CHECKOUT, reap_orphans, run

pytestmark = pytest.mark.needs("root", "overlay", "busybox")


@pytest.fixture(autouse=True)
def no_warm_process_is_left():
    yield
    client.stop()


@pytest.fixture
def box(bundle):
    with sandboxfs.Sandbox(bundle()) as made:
        made.run(["/bin/true"], check=True)
        yield made


def gone(pid, seconds=5.0):
    """Wait until a process has ended; returns whether it did."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
                if file.read().rpartition(") ")[2][0] == "Z":
                    return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def settle():
    """End the warm process and wait for what a killed one has left to be reaped."""
    client.stop()
    reap_orphans()


def children_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(each) for each in file.read().split()]


def in_a_thread(box, *command):
    """Start a command in a thread; returns (thread, list that gets its error)."""
    errors = []

    def work():
        try:
            box.run(command)
        except sandboxfs.SandboxError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    deadline = time.monotonic() + 5
    while not box.status()["running"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return thread, errors


# -- killed ----------------------------------------------------------------------------------


def test_one_that_was_killed_is_replaced(box):
    first = client.current().pid
    family = children_of(first)
    os.kill(first, signal.SIGKILL)
    assert gone(first)
    assert box.run(["/bin/true"]).returncode == 0
    assert client.current().pid != first
    assert all(gone(pid) for pid in family)
    settle()


def test_a_run_notices_at_once_that_it_was_killed(box):
    thread, errors = in_a_thread(box, "/bin/sleep", "1000")
    first = client.current().pid
    family = children_of(first)
    started = time.monotonic()
    os.kill(first, signal.SIGKILL)
    thread.join(5)
    assert time.monotonic() - started < 2
    assert errors[0].startswith(
        f"run /bin/sleep: the warm process {first} was killed by signal 9\n")
    assert "whether it has run is unknown" in errors[0]
    assert all(gone(pid) for pid in family)
    settle()
    assert box.run(["/bin/true"]).returncode == 0


def test_what_runs_inside_goes_with_it(box):
    """Also what the command started in the background: the pid namespace ends."""
    thread, errors = in_a_thread(box, "/bin/sh", "-c", "sleep 1000 & sleep 1000")
    first = client.current().pid
    deep = []
    deadline = time.monotonic() + 5
    while not deep:
        assert time.monotonic() < deadline
        deep = [grandchild for each in children_of(first) for grandchild in children_of(each)]
        time.sleep(0.01)
    os.kill(first, signal.SIGKILL)
    thread.join(5)
    assert errors
    assert all(gone(pid) for pid in deep)
    settle()


# -- hung ------------------------------------------------------------------------------------


def test_one_that_hangs_is_noticed_and_replaced(box):
    first = client.current().pid
    family = children_of(first)
    os.kill(first, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(sandboxfs.ProcessError, match="doesn't answer, and was killed"):
        box.run(["/bin/true"])
    assert time.monotonic() - started < 4
    assert gone(first)
    assert all(gone(pid) for pid in family)
    settle()
    assert box.run(["/bin/true"]).returncode == 0


def test_one_that_hangs_during_a_run_is_noticed(box):
    thread, errors = in_a_thread(box, "/bin/sleep", "1000")
    first = client.current().pid
    family = children_of(first)
    os.kill(first, signal.SIGSTOP)
    started = time.monotonic()
    thread.join(10)
    assert time.monotonic() - started < 5
    assert f"the warm process {first} doesn't answer" in errors[0]
    assert all(gone(pid) for pid in family)
    settle()


def test_a_long_command_is_not_taken_for_a_hang(box, monkeypatch):
    monkeypatch.setattr(client, "FIRST_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(client, "LOOK_SECONDS", 0.2)
    assert box.run(["/bin/sleep", "2"]).returncode == 0


def test_closing_a_sandbox_of_one_that_hangs_ends_it(bundle, monkeypatch):
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.5)
    box = sandboxfs.Sandbox(bundle())
    first = client.current().pid
    os.kill(first, signal.SIGSTOP)
    box.close()
    assert gone(first)
    settle()


# -- strangers -------------------------------------------------------------------------------


def test_a_request_from_another_process_is_refused(box):
    """A forked child has the same socket; the kernel says who sends."""
    process = client.current()
    control = os.dup(process.control.fileno())
    number = box._number
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            ours, theirs = wire.pair()
            words = ("run", number, [b"/bin/true"], None, None)
            null = os.open("/dev/null", os.O_RDWR)
            wire.send(wire.adopt(control), words, (theirs.fileno(), null, null, null))
            theirs.close()
            os.write(writer, repr(wire.receive(ours)[0]).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(control)
    os.close(writer)
    kind, *fields = ast.literal_eval(os.read(reader, 4096).decode())
    os.close(reader)
    assert kind == "failed"
    assert f"process {child}" in fields
    assert any(f"belongs to process {os.getpid()}" in field for field in fields)
    # The same words by the owner: that they are right is shown.
    assert box.run(["/bin/true"]).returncode == 0


@pytest.mark.parametrize("content", [b"", b"x", b"i", b"inonsense", b"f"])
def test_what_another_process_writes_is_not_even_read(content, box):
    """Of other ids, for instance: marshal isn't made for what strangers write."""
    process = client.current()
    control = os.dup(process.control.fileno())
    child = os.fork()
    if child == 0:
        try:
            with open("/dev/null", "rb") as null:
                descriptors = null.fileno().to_bytes(4, sys.byteorder)
                os.setresuid(65534, 65534, 65534)
                socket.socket(fileno=control).sendmsg(
                    [content], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(control)
    assert box.run(["/bin/true"]).returncode == 0
    assert client.current() is process


def test_a_request_that_makes_no_sense_ends_nobody_elses_work(box):
    """It comes from the owner's own process, so it is a bug: said, and started anew."""
    process = client.current()
    wire.send(process.control, ("nonsense",))
    assert gone(process.pid)
    assert "KeyError: 'nonsense'" in str(process.died())
    assert box.run(["/bin/true"]).returncode == 0
    settle()


# -- the owner's end -------------------------------------------------------------------------

OWNER = """
import os, sys, threading, sandboxfs
from sandboxfs.harness import client
box = sandboxfs.Sandbox(sys.argv[1])
def work():
    try:
        box.run(["/bin/sleep", "1000"])
    except sandboxfs.SandboxError:
        pass
threading.Thread(target=work, daemon=True).start()
while not box.status()["running"]: pass
pid = client.current().pid
with open(f"/proc/{pid}/task/{pid}/children") as file:
    print(pid, *file.read().split(), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_owners_death_ends_its_sandboxes(bundle, number):
    owner = subprocess.Popen([sys.executable, "-c", OWNER, bundle()], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True, cwd=CHECKOUT)
    family = [int(pid) for pid in owner.stdout.readline().split()]
    assert len(family) >= 3
    owner.send_signal(number)
    owner.wait(10)
    owner.stdin.close()
    owner.stdout.close()
    assert all(gone(pid) for pid in family)
    settle()


def test_an_owner_that_ends_without_closing_anything_leaves_nothing(bundle):
    code = OWNER.replace("sys.stdin.read()", "os._exit(0)")
    done = run(sys.executable, "-c", code, bundle(), cwd=CHECKOUT, check=0)
    assert all(gone(int(pid)) for pid in done.stdout.split())
    settle()


def test_an_ordinary_end_closes_it(bundle):
    code = OWNER.replace("sys.stdin.read()", "")
    done = run(sys.executable, "-c", code, bundle(), cwd=CHECKOUT, check=0)
    assert all(gone(int(pid)) for pid in done.stdout.split())
    assert done.stderr == ""
    settle()


def descriptors_of(pid):
    """Return what a process has open, but for mounts of its own that are attached nowhere."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
            mount = Path(f"/proc/{pid}/fdinfo/{name}").read_text().split("mnt_id:")[1].split()[0]
            table = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
        except FileNotFoundError:
            continue
        attached = mount in {line.split()[0] for line in table}
        if re.fullmatch(r"/proc/\d+/mountinfo", target):
            continue  # by which one that waits is told of mounts
        if attached or not target.startswith(("/", "fscontext")):
            found.append(target)
    return found


def test_it_keeps_nothing_of_its_owners_open(box):
    """Who reads a pipe of the owner's to its end doesn't wait for the warm process."""
    server = client.current().pid
    deadline = time.monotonic() + 5
    while True:  # a child that waits builds a root once, and drops it
        strange = [
            target for pid in [server, *children_of(server)] for target in descriptors_of(pid)
            if not target.startswith(("/dev/null", "socket:", "pipe:", "anon_inode:", "mnt:"))
            # Since 3.5 libffi keeps its own file open: callbacks are mapped from it.
            and "/libffi.so." not in target
        ]
        if not strange:
            break
        assert time.monotonic() < deadline, strange
        time.sleep(0.02)
    ours = {os.readlink(f"/proc/self/fd/{name}") for name in ("0", "1", "2")}
    theirs = {os.readlink(f"/proc/{server}/fd/{name}") for name in os.listdir(f"/proc/{server}/fd")}
    assert not {each for each in ours & theirs if each != "/dev/null"}


def test_its_interpreter_is_bare(box):
    """Nothing of the caller's environment, path or site reaches it."""
    pid = client.current().pid
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        words = file.read().split(b"\0")
    assert words[1:5] == [b"-I", b"-S", b"-B", b"-c"]
    with open(f"/proc/{pid}/environ", "rb") as file:
        names = {entry.partition(b"=")[0] for entry in file.read().split(b"\0") if entry}
    assert names <= {b"LC_ALL", b"LC_CTYPE", b"LANG"}
    with open(f"/proc/{pid}/maps", encoding="utf-8") as file:
        maps = file.read()
    assert "_ctypes" in maps
    assert "_ssl" not in maps
    assert "_pickle" not in maps


# -- what crosses ----------------------------------------------------------------------------


class Slotted:
    __slots__ = ("left", "right")


def test_objects_cross_as_plain_values():
    from sandboxfs.plan.operations import Note
    from sandboxfs.spec.model import Namespace

    entry = Namespace(1, "mount", None)
    value = {"a": [1, (2.5, None, b"\xff"), {"x"}, frozenset({3})], "b": entry, ("k",): entry}
    back = wire.unpack(wire.pack(value))
    assert back["a"] == value["a"]
    assert back["b"] is back["k",]
    assert (back["b"].index, back["b"].type, back["b"].path) == (1, "mount", None)
    assert type(back["b"]) is Namespace
    assert Note is not Namespace
    with pytest.raises(TypeError, match="Slotted"):
        wire.pack([Slotted()])


@pytest.mark.parametrize("name", ["cgroup", "idmapped", "overlay", "read-only", "rootless"])
def test_a_plan_crosses_whole(name):
    plan = sandboxfs.plan(sandboxfs.load(CHECKOUT / "specs" / "examples" / name))
    back = wire.unpack(wire.pack(plan, without=("compiled",)))
    assert back.to_json() == plan.to_json()
    assert str(back) == str(plan)
    assert back.process is back.spec.process


def test_the_last_words_are_heard_by_who_was_not():
    """An end that closes with a question unread resets the connection; its answer counts."""
    left, right = wire.pair()
    wire.send(left, ("ping",))
    wire.send(right, ("ended", 0))
    right.close()
    assert wire.receive(left)[0] == ("ended", 0)
    assert wire.receive(left)[0] is None
    left.close()


def test_long_messages_cross_beside_descriptors():
    left, right = wire.pair()
    long = "x" * (wire.LONGEST * 3)
    null = os.open("/dev/null", os.O_RDONLY)
    wire.send(left, ("kind", long), (null, null))
    message, descriptors, _sender = wire.receive(right)
    assert message == ("kind", long)
    assert len(descriptors) == 2
    for fd in (null, *descriptors):
        os.close(fd)
    left.close()
    assert wire.receive(right) == (None, [], 0)
    right.close()
