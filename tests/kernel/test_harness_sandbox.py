"""`Sandbox.run`: like subprocess.run, from wherever it is called, and nothing is left of it."""

import asyncio
import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import sandboxfs
from sandboxfs.harness import client
from sandboxfs.kernel import abi, syscalls, vfork
from tests.support import (
    UNPRIVILEGED,
    default_spec,
    in_namespace,
    minimal_spec,
    mount_tmpfs,
    parsed,
    points,
    run,
    table,
    untouched,
)

pytestmark = pytest.mark.needs("root", "overlay", "busybox")


@pytest.fixture(autouse=True)
def no_warm_process_is_left():
    yield
    client.stop()


@pytest.fixture
def box(bundle):
    with sandboxfs.Sandbox(bundle()) as made:
        yield made


# -- like subprocess.run ---------------------------------------------------------------------


@pytest.mark.parametrize(("args", "how"), [
    (["/bin/true"], {}),
    (["/bin/false"], {}),
    (["/bin/sh", "-c", "exit 77"], {}),
    (["sh", "-c", "kill -9 $$"], {"env": {"PATH": "/bin"}}),
    (["/bin/sh", "-c", "echo out; echo err >&2"], {"capture_output": True}),
    (["/bin/sh", "-c", "echo out; echo err >&2"], {"capture_output": True, "text": True}),
    (["/bin/sh", "-c", "echo both; echo err >&2"],
     {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}),
    (["/bin/cat"], {"input": b"x" * 300_000, "stdout": subprocess.PIPE}),
    (["/bin/cat"], {"input": "häé\n", "stdout": subprocess.PIPE, "encoding": "utf-8"}),
    (["/bin/true"], {"input": b"x" * 300_000}),
    (["/bin/cat"], {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}),
    (["/bin/env"], {"env": {"A": "1", "B": "é"}, "stdout": subprocess.PIPE, "text": True}),
    (["/bin/pwd"], {"cwd": "/tmp", "capture_output": True}),
    (["/bin/echo", b"\xff\xfe", "x" * 120_000], {"capture_output": True}),
])
def test_the_result_is_that_of_subprocess(box, args, how):
    """The same call on a program of this machine's, except that env and cwd are the box's own."""
    got = box.run(args, **how)
    own = {"env": {"PATH": "/usr/bin:/bin"}, **how}
    want = subprocess.run(args, **own, check=False)
    if args[:2] == ["sh", "-c"]:
        # There the shell is init of its pid namespace, which no signal of its own can end.
        want.returncode = got.returncode
    assert (got.returncode, got.stdout, got.stderr) == (want.returncode, want.stdout, want.stderr)
    assert got.args == args


def test_check_raises_what_subprocess_raises(box):
    with pytest.raises(subprocess.CalledProcessError) as caught:
        box.run(["/bin/sh", "-c", "echo why; exit 3"], check=True, capture_output=True, text=True)
    assert (caught.value.returncode, caught.value.stdout) == (3, "why\n")


def test_a_timeout_ends_everything_inside(box):
    started = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        box.run(["/bin/sh", "-c", "echo begun; sleep 1000 & sleep 1000"], timeout=0.5,
                capture_output=True)
    assert caught.value.output == b"begun\n"
    assert time.monotonic() - started < 10
    assert box.status()["running"] == 0
    assert box.run(["/bin/true"]).returncode == 0


def test_files_and_descriptors_of_the_caller(box, tmp_path):
    (tmp_path / "in").write_text("content")
    with open(tmp_path / "in", "rb") as source, open(tmp_path / "out", "wb") as target:
        box.run(["/bin/cat"], stdin=source, stdout=target.fileno(), check=True)
    assert (tmp_path / "out").read_text() == "content"


def test_no_other_descriptor_of_the_caller_or_of_ours_gets_inside(box):
    secret = os.open("/etc/passwd", os.O_RDONLY)
    os.set_inheritable(secret, True)
    try:
        done = box.run(["/bin/ls", "/proc/self/fd"], capture_output=True, text=True)
    finally:
        os.close(secret)
    assert set(done.stdout.split()) <= {"0", "1", "2", "3"}  # 3 is the directory it lists


@pytest.mark.parametrize(("args", "error"), [
    ("a string", TypeError), ([], ValueError), (["a\0b"], ValueError),
])
def test_what_cannot_be_a_command(box, args, error):
    with pytest.raises(error):
        box.run(args)


def test_what_cannot_be_executed_is_told(box):
    with pytest.raises(sandboxfs.ProcessError, match="no such file in the container") as caught:
        box.run(["/bin/nothing"])
    assert caught.value.exit_status == 127
    with pytest.raises(sandboxfs.ProcessError) as caught:
        box.run(["/etc/passwd"])
    assert caught.value.exit_status == 126
    with pytest.raises(sandboxfs.ProcessError, match=r"process\.cwd"):
        box.run(["/bin/true"], cwd="/nowhere/at/all\x01" * 200)
    assert box.run(["/bin/true"]).returncode == 0


# -- roots -----------------------------------------------------------------------------------


def test_each_run_has_a_root_of_its_own_and_the_lower_is_not_written(bundle):
    made = bundle()
    with untouched(made.rootfs), sandboxfs.Sandbox(made) as box:
        box.run(["/bin/sh", "-c", "echo x > /file; rm /etc/passwd"], check=True)
        done = box.run(["/bin/ls", "/file", "/etc/passwd"], capture_output=True, text=True)
    assert done.stdout == "/etc/passwd\n"


def test_the_view_is_that_of_run(bundle):
    made = bundle()
    with sandboxfs.Sandbox(made) as box:
        inside = [box.run(["/bin/cat", "/proc/self/mountinfo"], capture_output=True).stdout
                  for _each in range(2)]
    from tests.support import run_cli

    outside = run_cli("run", "--bundle", made, "--", "/bin/cat", "/proc/self/mountinfo").stdout

    def comparable(text):
        # Without the order: file systems that need nothing of the host are made ahead.
        return sorted((each.mountpoint, each.root, each.type, each.attributes, each.propagation)
                      for each in parsed(text))

    assert comparable(inside[0]) == comparable(inside[1]) == comparable(outside)


def test_a_mountpoint_that_is_missing_in_a_read_only_mount_is_made(bundle):
    """Whatever that takes was loaded before there was a namespace without files."""
    def config(document):
        document["mounts"] += [
            {"destination": "/v", "type": "tmpfs", "source": "tmpfs", "options": ["ro"]},
            {"destination": "/v/in", "type": "tmpfs", "source": "tmpfs", "options": []},
        ]

    with sandboxfs.Sandbox(bundle(config)) as made:
        for _again in range(2):
            script = "touch /v/in/x && ! touch /v/x 2>/dev/null"
            assert made.run(["/bin/sh", "-c", script]).returncode == 0


def test_what_was_mounted_on_the_host_meanwhile_is_seen(public_path, bundle):
    """A child that waits has nothing built: the root is that of the moment of the call."""
    def seen():
        (public_path / "source" / "below").mkdir(parents=True)
        document = default_spec()
        document["mounts"].append({"destination": "/data", "type": "bind", "options": ["rbind"],
                                   "source": str(public_path / "source")})
        with sandboxfs.Sandbox(bundle(document)) as box:
            box.run(["/bin/true"], check=True)
            time.sleep(0.2)
            mount_tmpfs(public_path / "source" / "below")
            (public_path / "source" / "below" / "file").touch()
            done = box.run(["/bin/ls", "/data/below"], capture_output=True, text=True)
        client.stop()
        return done.stdout

    assert in_namespace(seen) == "file\n"


@pytest.mark.parametrize("options", [["mode=755"], []], ids=["usual", "by assembly"])
def test_what_was_made_on_the_host_meanwhile_is_there(public_path, bundle, options):
    """What is done ahead fails as long as it is missing, and nothing of that stays."""
    def config(document):
        document["mounts"] += [
            {"destination": "/data", "type": "bind", "options": ["rbind"],
             "source": str(public_path / "late")},
            {"destination": "/scratch", "type": "tmpfs", "source": "t", "options": options},
        ]

    with sandboxfs.Sandbox(bundle(config)) as box:
        time.sleep(0.2)
        (public_path / "late").mkdir()
        (public_path / "late/file").touch()
        done = box.run(["/bin/ls", "/data"], capture_output=True, text=True)
    assert done.stdout == "file\n"


def test_this_machines_own_root():
    with sandboxfs.Sandbox() as box:
        done = box.run(["sh", "-c", "touch /etc/sandboxfs-was-here && echo $PWD"],
                       capture_output=True, text=True, check=True)
    assert done.stdout.strip()
    assert not os.path.exists("/etc/sandboxfs-was-here")


@pytest.mark.parametrize("how", [
    {"overlay": "none"}, {"overlay": "tmpfs", "overlay_size": "1M"}, {"tmp": "tmpfs"},
    {"overlay_binds": True},
])
def test_the_options_of_the_command_line(bundle, how):
    with sandboxfs.Sandbox(bundle(), **how) as box:
        done = box.run(["/bin/sh", "-c", "echo x > /tmp/y; cat /tmp/y"], capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"x\n")


def test_an_upper_on_disk_is_removed_even_when_the_run_is_killed(bundle, public_path):
    upper = public_path / "upper"
    upper.mkdir()
    with sandboxfs.Sandbox(bundle(), overlay=f"dir={upper}") as box:
        box.run(["/bin/sh", "-c", "echo x > /file"], check=True)
        assert os.listdir(upper) == []
        with pytest.raises(subprocess.TimeoutExpired):
            box.run(["/bin/sh", "-c", "echo x > /file; sleep 1000"], timeout=0.5)
        assert os.listdir(upper) == []


@pytest.mark.parametrize("how", [
    {"bundle": "/nowhere"}, {"rootfs": "/nowhere"}, {"overlay": "weird"}, {"tmp": "never"},
])
def test_what_is_wrong_is_told_at_once_or_by_the_run(how):
    with pytest.raises(sandboxfs.SandboxError), sandboxfs.Sandbox(**how) as box:
        box.run(["/bin/true"])


def test_a_document_that_is_wrong(bundle):
    made = bundle()
    (made.path / "config.json").write_text('{"ociVersion": 1}')
    with pytest.raises(sandboxfs.SpecError):
        sandboxfs.Sandbox(made)


@pytest.mark.needs("user-namespaces")
def test_in_a_user_namespace_of_roots(bundle):
    def change(document):
        mapping = [{"containerID": 0, "hostID": 200000, "size": 65536}]
        document["linux"]["namespaces"].append({"type": "user"})
        document["linux"].update(uidMappings=mapping, gidMappings=mapping)

    with sandboxfs.Sandbox(bundle(change)) as box:
        done = box.run(["/bin/cat", "/proc/self/uid_map"], capture_output=True, text=True)
        assert done.stdout.split() == ["0", "200000", "65536"]
        with pytest.raises(subprocess.TimeoutExpired):
            box.run(["/bin/sleep", "1000"], timeout=0.5)
        with pytest.raises(sandboxfs.ProcessError):
            box.run(["/bin/nothing"])


@pytest.mark.needs("user-namespaces")
def test_as_an_unprivileged_user(bundle):
    made = bundle()
    script = f"""
import sandboxfs
with sandboxfs.Sandbox(rootfs={os.fspath(made.rootfs)!r}) as box:
    for number in range(2):
        print(box.run(["id", "-u"], capture_output=True, text=True, check=True).stdout, end="")
"""
    done = run(sys.executable, "-c", script, uid=UNPRIVILEGED, check=0)
    assert done.stdout == "0\n0\n"


# -- from wherever it is called --------------------------------------------------------------


def test_from_many_threads(box):
    results = {}

    def work(number):
        done = box.run(["/bin/sh", "-c", f"echo {number}; exit {number}"], capture_output=True,
                       text=True)
        results[number] = done.returncode, done.stdout

    threads = [threading.Thread(target=work, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: (number, f"{number}\n") for number in range(24)}


def test_under_asyncio(box):
    async def all_of_them():
        runs = [asyncio.to_thread(box.run, ["/bin/echo", str(number)], capture_output=True)
                for number in range(6)]
        other = await asyncio.create_subprocess_exec("/bin/true")
        return [done.stdout for done in await asyncio.gather(*runs)], await other.wait()

    out, status = asyncio.run(all_of_them())
    assert out == [b"%d\n" % number for number in range(6)]
    assert status == 0


def test_after_a_fork_the_child_has_a_warm_process_of_its_own(box):
    box.run(["/bin/true"], check=True)
    first = client.current().pid
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            done = box.run(["/bin/echo", "inside"], stdout=subprocess.PIPE)
            os.write(writer, b"%d %s" % (client.current().pid, done.stdout))
            client.stop()
        finally:
            os._exit(0)
    os.close(writer)  # a child that failed has said nothing, and is the last that could
    os.waitpid(child, 0)
    pid, said = os.read(reader, 100).split()
    os.close(reader)
    assert said == b"inside"
    assert int(pid) != first
    assert client.current().pid == first
    assert box.run(["/bin/true"]).returncode == 0


def test_a_fork_while_another_thread_runs_something(box):
    """The child's sandbox isn't the parent's, and the parent's run goes on."""
    thread = threading.Thread(target=box.run, args=(["/bin/sleep", "1"],))
    thread.start()
    time.sleep(0.2)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert box.status()["running"] == 1
    thread.join()


def test_signal_handlers_and_children_of_the_caller_are_left_alone(box):
    seen = []
    old = signal.signal(signal.SIGCHLD, lambda *arguments: seen.append(arguments))
    try:
        box.run(["/bin/true"], check=True)
        time.sleep(0.1)
    finally:
        signal.signal(signal.SIGCHLD, old)
    assert seen == []


def test_an_interrupt_while_it_waits_ends_the_run(box):
    before = signal.signal(signal.SIGALRM, lambda *_arguments: (_ for _ in ()).throw(
        KeyboardInterrupt))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            box.run(["/bin/sleep", "1000"])
    finally:
        signal.signal(signal.SIGALRM, before)
    deadline = time.monotonic() + 5
    while box.status()["running"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_mount_namespaces_of_the_caller_are_told_apart(bundle):
    """Who moves to other mounts gets a warm process that sees them."""
    made = bundle()

    def moved():
        with sandboxfs.Sandbox(made) as box:
            box.run(["/bin/true"], check=True)
            first = client.current().pid
            syscalls.unshare(abi.CLONE_NEWNS)
            (made.rootfs / "new").mkdir()
            mount_tmpfs(made.rootfs / "new")
            (made.rootfs / "new" / "file").touch()
            done = box.run(["/bin/ls", "/new"], capture_output=True, text=True)
            other = client.current().pid
        client.stop()
        return done.stdout, first != other

    # Seen from other mounts, the check's own descriptor has another name.
    assert in_namespace(moved, check_descriptors=False) == ("file\n", True)


# -- nothing is left -------------------------------------------------------------------------


def test_closing_ends_what_runs_and_what_waits(bundle):
    before = points(table())
    box = sandboxfs.Sandbox(bundle())
    errors = []

    def work():
        try:
            box.run(["/bin/sleep", "1000"])
        except sandboxfs.SandboxError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    while not box.status()["running"]:
        time.sleep(0.01)
    server = client.current().pid
    box.close()
    thread.join(10)
    assert not thread.is_alive()
    assert errors == ["run: the sandbox was closed while its command ran"]
    # What takes down the last references is all that is left beside it.
    assert len(children_of(server)) == 1
    with pytest.raises(sandboxfs.ProcessError, match="closed"):
        box.run(["/bin/true"])
    assert points(table()) == before


def children_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return file.read().split()


def test_descriptors_of_the_warm_process_do_not_grow(box):
    server = client.current().pid

    def descriptors():
        found = []
        for fd in os.listdir(f"/proc/{server}/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                found.append(os.readlink(f"/proc/{server}/fd/{fd}"))
        return found

    def settled():
        deadline = time.monotonic() + 5
        # Of those that wait each is known by a pidfd, once it has told its pid; the owner's is one.
        while box.status() != {"waiting": 2, "building": 0, "running": 0} or len(
            [each for each in descriptors() if "pidfd" in each]
        ) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return len(descriptors())

    box.run(["/bin/true"])
    before = settled()
    for number in range(20):
        box.run(["/bin/sh", "-c", f"exit {number}"], capture_output=True)
    with pytest.raises(sandboxfs.ProcessError):
        box.run(["/bin/nothing"])
    with pytest.raises(subprocess.TimeoutExpired):
        box.run(["/bin/sleep", "1000"], timeout=0.1)
    deadline = time.monotonic() + 5
    while settled() > before:  # the namespace of a run that has just ended may be held yet
        assert time.monotonic() < deadline
        time.sleep(0.02)
    # The sweeper, and for each that waits itself and its host, where it has one.
    assert len(children_of(server)) == (5 if vfork.is_possible() else 3)


def test_text_streams_are_those_of_the_caller(box, capfd):
    box.run(["/bin/sh", "-c", "echo to stdout; echo to stderr >&2"], check=True)
    said = capfd.readouterr()
    assert (said.out, said.err) == ("to stdout\n", "to stderr\n")


def test_a_stream_without_a_descriptor_is_refused(box):
    with pytest.raises(io.UnsupportedOperation):
        box.run(["/bin/true"], stdout=io.BytesIO())


def test_importing_the_package_loads_none_of_it():
    code = "import sys, sandboxfs; print([m for m in sys.modules if 'harness' in m])"
    assert run(sys.executable, "-c", code, check=0).stdout == "[]\n"


def test_a_minimal_document(bundle):
    with sandboxfs.Sandbox(bundle(minimal_spec())) as box:
        assert box.run(["/bin/true"]).returncode == 0


def test_nothing_is_made_on_the_host_before_a_command_runs(public_path, bundle):
    """A mountpoint that is missing in a writable bind is made there, but for a command alone."""
    (public_path / "source").mkdir()
    document = default_spec()
    document["mounts"] += [
        {"destination": "/data", "type": "bind", "source": str(public_path / "source"),
         "options": ["rbind"]},
        {"destination": "/data/sub/x", "type": "tmpfs", "source": "tmpfs"},
    ]
    with sandboxfs.Sandbox(bundle(document)) as box:
        time.sleep(0.5)
        assert os.listdir(public_path / "source") == []
        box.run(["/bin/true"], check=True)
        assert os.listdir(public_path / "source") == ["sub"]


def test_no_zombie_stays_in_the_warm_process(box):
    server = client.current().pid
    for number in range(3):
        assert box.run(["/bin/sh", "-c", f"exit {number}"]).returncode == number
    deadline = time.monotonic() + 5
    while any(state_of(pid) == "Z" for pid in children_of(server)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def state_of(pid):
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        return file.read().rpartition(") ")[2][0]
