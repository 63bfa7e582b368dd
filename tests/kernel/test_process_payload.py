"""The payload's process: what it is when it starts, and how it ends."""

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from sandboxfs.process.credentials import NAMES
from sandboxfs.process.run import close_all
from tests.support import LAUNCHER, minimal_spec, needs, reap_orphans, run_cli
from tests.support.commands import ENVIRONMENT

pytestmark = pytest.mark.needs("root", "overlay", "busybox", "launcher")

SETS = {"inheritable": "CapInh", "permitted": "CapPrm", "effective": "CapEff",
        "bounding": "CapBnd", "ambient": "CapAmb"}


def shell(bundle, script, change=None, **options):
    """Run a script in a bundle whose document `change` may change; returns what was done."""

    def configure(document):
        document["process"]["args"] = ["/bin/sh", "-c", script]
        if change is not None:
            change(document)

    made = bundle(configure)
    return run_cli("run", "--bundle", made, **options)


def status(output):
    """Return /proc/self/status as a dict."""
    return dict(line.split(":\t", 1) for line in output.splitlines() if ":\t" in line)


def bits(names):
    return sum(1 << NAMES.index(name) for name in names)


def own_capabilities():
    text = Path("/proc/self/status").read_text("ascii")
    return int(status(text)["CapPrm"], 16)


# -- how it starts -------------------------------------------------------------------------


def test_user_groups_umask_and_directory(bundle):
    def change(document):
        document["process"].update(
            user={"uid": 1000, "gid": 1001, "additionalGids": [5, 2000], "umask": 0o27},
            cwd="/made/for/it", env=["PATH=/bin", "A=b=c", "EMPTY="],
        )

    done = shell(bundle, "id -u; id -g; id -G; umask; pwd; env | sort", change)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:5] == ["1000", "1001", "1001 5 2000", "0027", "/made/for/it"]
    environment = [line for line in lines[5:] if not line.startswith(("PWD=", "SHLVL="))]
    assert environment == ["A=b=c", "EMPTY=", "PATH=/bin"]


def test_the_umask_is_the_callers_where_none_is_asked_for(bundle):
    made = bundle(lambda document: document["process"].update(args=["/bin/sh", "-c", "umask"]))
    done = subprocess.run(
        [LAUNCHER, "run", "--bundle", made], env=ENVIRONMENT, umask=0o37, capture_output=True,
        text=True, check=True,
    )
    assert done.stdout == "0037\n"


def test_a_directory_that_only_the_user_may_enter(bundle):
    made = bundle(lambda document: document["process"].update(
        args=["/bin/pwd"], cwd="/private", user={"uid": 1000, "gid": 1000},
    ))
    (made.rootfs / "private").mkdir(mode=0o700)
    os.chown(made.rootfs / "private", 1000, 1000)
    assert run_cli("run", "--bundle", made, check=0).stdout == "/private\n"


@pytest.mark.parametrize("uid", [0, 1000])
def test_all_five_capability_sets(bundle, uid):
    wanted = {
        "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW", "CAP_SETUID"],
        "permitted": ["CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW"],
        "effective": ["CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW"],
        "inheritable": ["CAP_KILL", "CAP_NET_RAW"],
        "ambient": ["CAP_NET_RAW"],
    }

    def change(document):
        document["process"].update(capabilities=wanted, user={"uid": uid, "gid": uid})

    done = shell(bundle, "cat /proc/self/status", change)
    found = status(done.stdout)
    # What exec makes of them: capabilities(7), "Transformation of capabilities".
    expected = {**wanted, "permitted": wanted["ambient"], "effective": wanted["ambient"]}
    if uid == 0:
        # Root would get the bounding set, but no_new_privs lets exec add nothing.
        expected["permitted"] = expected["effective"] = wanted["permitted"]
    for name, field in SETS.items():
        assert int(found[field], 16) == bits(expected[name]), name
    assert found["NoNewPrivs"] == "1"


def test_a_process_without_capabilities_has_none(bundle):
    done = shell(bundle, "cat /proc/self/status",
                 lambda document: document["process"].pop("capabilities"))
    found = status(done.stdout)
    assert {int(found[field], 16) for field in SETS.values()} == {0}


def test_a_capability_that_cannot_be_granted_is_a_warning(bundle):
    lacking = [name for number, name in enumerate(NAMES) if not own_capabilities() >> number & 1]
    command = ["/usr/bin/setpriv", "--bounding-set", "-sys_boot", "--"]
    made = bundle(lambda document: document["process"].update(
        capabilities={"bounding": ["CAP_SYS_BOOT"], "permitted": ["CAP_SYS_BOOT"]},
    ))
    done = subprocess.run(
        [*command, LAUNCHER, "run", "--bundle", made], env=ENVIRONMENT, capture_output=True,
        text=True, check=True,
    )
    assert "can't grant CAP_SYS_BOOT" in done.stderr
    assert "CAP_SYS_BOOT" not in lacking


def test_without_no_new_privileges(bundle):
    done = shell(bundle, "cat /proc/self/status",
                 lambda document: document["process"].update(noNewPrivileges=False))
    assert status(done.stdout)["NoNewPrivs"] == "0"


def test_limits_and_oom_score(bundle):
    def change(document):
        document["process"].update(
            oomScoreAdj=321,
            rlimits=[{"type": "RLIMIT_NOFILE", "soft": 123, "hard": 456},
                     {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
                     {"type": "RLIMIT_FSIZE", "soft": 1 << 40, "hard": (1 << 64) - 1}],
        )

    done = shell(bundle, "cat /proc/self/limits /proc/self/oom_score_adj", change)
    limits = {line[:26].strip(): line[26:].split()[:2] for line in done.stdout.splitlines()}
    assert limits["Max open files"] == ["123", "456"]
    assert limits["Max core file size"] == ["0", "0"]
    assert limits["Max file size"] == [str(1 << 40), "unlimited"]
    assert done.stdout.splitlines()[-1] == "321"


def test_a_limit_that_may_not_be_raised_names_its_entry(bundle):
    if own_capabilities() >> NAMES.index("CAP_SYS_RESOURCE") & 1:
        command = ["/usr/bin/setpriv", "--bounding-set", "-sys_resource", "--"]
    else:
        command = []
    made = bundle(lambda document: document["process"].update(
        rlimits=[{"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
                 {"type": "RLIMIT_NOFILE", "soft": 1, "hard": 1 << 20}],
    ))
    done = subprocess.run([*command, LAUNCHER, "run", "--bundle", made], env=ENVIRONMENT,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 125
    assert done.stderr.startswith(
        "sandboxfs: process.rlimits[1]: prlimit RLIMIT_NOFILE: EPERM: "
    )


def test_signals_start_as_if_nobody_had_touched_them(bundle):
    fields = status(shell(bundle, "cat /proc/self/status").stdout)
    assert int(fields["SigBlk"], 16) == 0
    # What our caller ignores stays ignored (nohup); Python would leave these two so.
    assert not int(fields["SigIgn"], 16) & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1)


def test_no_descriptor_but_three_reaches_it(bundle):
    reader, writer = os.pipe()
    try:
        done = shell(bundle, "ls /proc/self/fd", pass_fds=(reader, writer))
    finally:
        os.close(reader)
        os.close(writer)
    # 3 is what `ls` reads the directory with.
    assert done.stdout.split() == ["0", "1", "2", "3"]


def test_standard_streams_are_passed_through(bundle):
    done = shell(bundle, "cat; echo error >&2", input="from outside\n")
    assert (done.stdout, done.stderr) == ("from outside\n", "error\n")


def test_the_payload_is_pid_1_in_a_session_of_its_own(bundle):
    done = shell(bundle, "echo $$; cut -d ' ' -f 4-6 /proc/self/stat")
    first, stat = done.stdout.splitlines()
    assert first == "1"
    assert stat.split()[1:] == ["1", "1"]  # process group, session


def test_names_of_the_machine(bundle):
    done = shell(bundle, "hostname; cat /proc/sys/kernel/domainname",
                 lambda document: document.update(hostname="box", domainname="yard"))
    assert done.stdout.split() == ["box", "yard"]
    assert os.uname().nodename != "box"


# -- how it ends ---------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 3, 125, 255])
def test_its_own_exit_status(bundle, code):
    assert shell(bundle, f"exit {code}").returncode == code


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_signal_that_ends_it(bundle, number):
    def change(document):
        document["linux"]["namespaces"].remove({"type": "pid"})
        # A fresh proc would need the pid namespace.
        document["mounts"] = [mount for mount in document["mounts"] if mount["type"] != "proc"]

    assert shell(bundle, f"kill -{number.value} $$; sleep 9", change).returncode == 128 + number


def test_what_is_not_found_and_what_cannot_be_executed(bundle):
    cases = {
        "/bin/missing": (127, "execve /bin/missing: ENOENT: "),
        "missing": (127, "in no directory of the container's PATH"),
        "/etc/passwd": (126, "execve /etc/passwd: EACCES: "),
        "/bin": (126, "execve /bin: EACCES: "),
        "/bin/no-loader": (127, "the interpreter or loader it names is not"),
        "/bin/garbage": (126, "execve /bin/garbage: ENOEXEC: "),
    }
    made = bundle()
    for name, content in (("no-loader", "#!/bin/missing\n"), ("garbage", "\0\1\2")):
        (made.rootfs / "bin" / name).write_text(content)
        (made.rootfs / "bin" / name).chmod(0o755)
    for command, (code, words) in cases.items():
        done = run_cli("run", "--bundle", made, "--", command, check=code)
        assert done.stderr.startswith("sandboxfs: process.args[0]: execve "), command
        assert words in done.stderr


def test_a_bare_name_is_looked_up_in_the_containers_path(bundle):
    made = bundle(lambda document: document["process"].update(
        env=["PATH=/nowhere:/etc:/own"], args=["tool"],
    ))
    (made.rootfs / "own").mkdir()
    (made.rootfs / "own/tool").write_text("#!/bin/sh\nexit 42\n")
    (made.rootfs / "own/tool").chmod(0o755)
    (made.rootfs / "etc/tool").write_text("not executable")
    run_cli("run", "--bundle", made, check=42)


def test_errors_of_the_child_are_worded_by_the_parent(bundle):
    made = bundle(lambda document: document["mounts"].append(
        {"destination": "/x", "source": "/nonexistent\nsource", "options": ["bind"]},
    ))
    done = run_cli("run", "--bundle", made, check=125)
    assert done.stderr.splitlines()[0] == (
        "sandboxfs: mounts[7]: open_tree /nonexistent\\nsource: ENOENT: No such file or directory"
    )
    done = run_cli("run", "--log-format", "json", "--bundle", made, check=125)
    fields = json.loads(done.stderr)
    assert (fields["origin"], fields["errno"], fields["status"]) == ("mounts[7]", "ENOENT", 125)


# -- signals -------------------------------------------------------------------------------

WAITING = (
    "trap 'echo term; exit 7' TERM; trap 'echo usr1' USR1; echo ready; while :; do sleep .1; done"
)


def started(made, **options):
    """Start a run, and return it once its payload says so."""
    process = subprocess.Popen(
        [LAUNCHER, "run", "--bundle", made], env=ENVIRONMENT, stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL, text=True, **options,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def waiting(bundle, script=WAITING):
    return bundle(lambda document: document["process"].update(args=["/bin/sh", "-c", script]))


def test_signals_are_forwarded(bundle):
    with started(waiting(bundle)) as process:
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "usr1\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "term\n"
    assert process.returncode == 7


def payload_of(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text("ascii")
    (payload,) = children.split()
    return int(payload)


def test_kill_of_the_parent_ends_the_payload(bundle):
    with started(waiting(bundle)) as process:
        payload = payload_of(process)
        process.kill()
        # Its end of the pipe is closed when the last process of the container ends.
        process.stdout.read()
    reap_orphans()
    assert not os.path.exists(f"/proc/{payload}")


def test_stopping_stops_both_and_continuing_continues_both(bundle):
    with started(waiting(bundle)) as process:
        payload = payload_of(process)
        process.send_signal(signal.SIGTSTP)
        _pid, stopped = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(stopped)
        stat = Path(f"/proc/{payload}/stat").read_text("ascii")
        assert stat.rpartition(")")[2].split()[0] == "T"
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 7


def test_orphans_of_the_payload_are_reaped(bundle):
    # pid 1 of the namespace is a shell that only waits; the run itself leaves no zombie.
    done = shell(bundle, "(sleep .2 &); (sleep .2 &); sleep .4; exit 0")
    assert done.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_during_the_build_ends_the_run(bundle, number):
    needs("strace")
    with subprocess.Popen(
        ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=pivot_root",
         "-e", "inject=pivot_root:delay_enter=2000000", LAUNCHER, "run", "--bundle", bundle()],
        env=ENVIRONMENT,
    ) as strace:
        run = child_of(strace.pid)
        child_of(run)
        os.kill(run, number)
    assert strace.returncode in (128 + number, -number)
    reap_orphans()


def test_a_stop_during_the_build_waits_for_the_payload(bundle):
    """A child that stopped first would keep its parent, and so the caller's shell, waiting."""
    needs("strace", "vfork-children")
    made = bundle(minimal_spec("/bin/sleep", "0.2"))
    with subprocess.Popen(
        ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=pivot_root",
         "-e", "inject=pivot_root:delay_enter=500000", LAUNCHER, "run", "--bundle", made],
        env=ENVIRONMENT, process_group=0,  # in an orphaned one SIGTSTP does nothing
    ) as strace:
        run = child_of(strace.pid)
        child = child_of(run)
        for pid in (child, run):
            os.kill(pid, signal.SIGTSTP)
        deadline = time.monotonic() + 5
        while state_of(run) not in "Tt" and time.monotonic() < deadline:
            time.sleep(0.01)
        states = state_of(run), os.path.basename(os.readlink(f"/proc/{child}/exe"))
        # "t" may still be strace's own stop, before it hands the signal on: go on until they do.
        while strace.poll() is None:
            for pid in (child, run):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT if time.monotonic() < deadline else signal.SIGKILL)
            time.sleep(0.05)
    assert (states[0].upper(), states[1]) == ("T", "busybox")
    assert strace.returncode == 0


def state_of(pid):
    return Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0]


def child_of(pid):
    """Return the first child of a process that runs Python, as soon as there is one.

    strace forks to try things out before it starts what it was given.
    """
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split():
            try:
                if "python" in os.readlink(f"/proc/{child}/exe"):
                    return int(child)
            except FileNotFoundError:
                continue  # it has just ended
        time.sleep(0.01)
    raise AssertionError(f"{pid} has no child")


# -- nothing of the container is loaded ----------------------------------------------------


def test_nothing_but_the_program_is_opened_in_the_container(bundle, public_path):
    needs("strace")
    made = bundle(lambda document: document["process"].update(
        args=["/bin/true"], user={"uid": 7, "gid": 7, "additionalGids": [8]}, umask=0o22,
    ))
    trace = public_path / "trace"
    subprocess.run(
        ["strace", "-f", "-qq", "-e", "trace=open,openat,openat2,pivot_root,execve,execveat",
         "-o", trace, LAUNCHER, "run", "--bundle", made],
        env=ENVIRONMENT, check=True, capture_output=True,
    )
    lines = trace.read_text().splitlines()
    (pivot,) = [at for at, line in enumerate(lines) if "pivot_root(" in line]
    child = lines[pivot].split()[0]
    after = [line for line in lines[pivot + 1:] if line.split()[0] == child]
    execution = next(at for at, line in enumerate(after) if "execve(" in line)
    # Its own program is looked at (never the interpreter that runs us), and nothing else.
    opened = [line for line in after[:execution] if "open" in line]
    assert [line for line in opened if '"/bin/true"' not in line] == []


def test_an_image_of_traps_is_never_imported(bundle):
    made = bundle(lambda document: document["process"].update(args=["/bin/missing"]))
    trap = "import os; os.write(2, b'TRAPPED')\n"
    for directory in ("usr/lib/python3.11", "usr/lib/python3.11/encodings", "work"):
        (made.rootfs / directory).mkdir(parents=True)
    for name in ("os", "json", "traceback", "encodings/idna", "linecache"):
        (made.rootfs / "usr/lib/python3.11" / f"{name}.py").write_text(trap)
    done = run_cli("run", "--debug", "--bundle", made, check=127,
                   env={"PYTHONPATH": "/usr/lib/python3.11"})
    assert "TRAPPED" not in done.stderr


def test_threads_are_refused():
    from tests.support import in_namespace

    def body():
        import threading

        from sandboxfs.errors import ProcessError
        from sandboxfs.process.namespaces import require_one_thread

        require_one_thread()
        stop = threading.Event()
        thread = threading.Thread(target=stop.wait)
        thread.start()
        try:
            with pytest.raises(ProcessError, match="has threads"):
                require_one_thread()
        finally:
            stop.set()
            thread.join()
        time.sleep(0.01)
        require_one_thread()
        return True

    assert in_namespace(body)


@pytest.mark.parametrize("closed", [(), (0,), (8,), (7, 0, 1, 2, 5), (8, 7), tuple(range(9))])
def test_descriptors_are_closed_and_their_neighbours_are_not(closed):
    all_of_them = [os.open("/dev/null", os.O_RDONLY) for _ in range(9)]
    close_all([all_of_them[index] for index in closed])
    open_still = [fd for fd in all_of_them if os.path.exists(f"/proc/self/fd/{fd}")]
    for fd in open_still:
        os.close(fd)
    assert open_still == [fd for index, fd in enumerate(all_of_them) if index not in closed]
