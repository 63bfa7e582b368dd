"""The program in front of a runtime: what the runtime gets of its caller."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support import LAUNCHER, in_namespace, needs, run, run_cli
from tests.support.commands import ENVIRONMENT
from tests.support.front import RECORDED, front, logged, recorded, recorder

pytestmark = pytest.mark.needs("root", "overlay", "busybox", "launcher", "gcc")


@pytest.fixture
def wrapped(public_path: Path) -> Path:
    """The front of the recorder, which answers as runc."""
    return front(public_path, recorder(public_path))


def started(program: Path, *words: str, **how: object) -> dict[str, list[str]]:
    done = run(program, *words, **how)  # type: ignore[arg-type]
    assert done.returncode == RECORDED, done.stderr
    return recorded(done.stdout)


@pytest.mark.parametrize("words", [
    ["state", "id"], ["--version"], [], ["start", "create"], ["kill", "run"], ["--root", "create"],
    ["--root=/r", "delete", "id"], ["--unknown", "x", "start", "id"], ["-v"], ["features"],
])
def test_every_other_command_is_passed_on(wrapped: Path, words: list[str]) -> None:
    if words == ["--version"]:
        assert run(wrapped, *words).stdout == "runc version 1.0\n"
        return
    found = started(wrapped, *words, cwd="/usr", env={"PYTHONPATH": "/x", "A": "b=c"})
    assert found["argument"][1:] == words
    assert found["directory"] == ["/usr"]
    assert {"PYTHONPATH=/x", "A=b=c"} <= set(found["environment"])


def test_no_python_is_started_for_other_commands(wrapped: Path) -> None:
    done = run("strace", "-f", "-e", "trace=execve", wrapped, "state", "id")
    calls = [line for line in done.stderr.splitlines() if "execve(" in line]
    assert len(calls) == 2, calls


@pytest.mark.parametrize("words", [["create"], ["--log", "/dev/null", "run", "-d"]])
def test_a_container_starts_as_its_caller_would_have_started_it(
    wrapped: Path, bundle, public_path: Path, words: list[str]
) -> None:
    made = bundle()
    environment = {"LC_ALL": "POSIX", "PYTHONHOME": "/nowhere", "LD_TRACE_LOADED": "",
                   "EMPTY": "", "SIGN": "a=b=c", "BYTES": "\udcff"}
    reader, writer = os.pipe()
    try:
        done = subprocess.run(
            [wrapped, *words, "--bundle", made.path, "id"], cwd="/usr", capture_output=True,
            env={**ENVIRONMENT, **environment}, pass_fds=(writer,), umask=0o027, check=False,
            stdin=subprocess.DEVNULL, text=True, errors="surrogateescape",
        )
    finally:
        os.close(reader)
        os.close(writer)
    assert done.returncode == RECORDED, done.stderr
    found = recorded(done.stdout)
    assert found["argument"] == [str(public_path / "real-runc/runc"), *words, "--bundle",
                                 str(made.path), "id"]
    assert found["environment"] == [
        f"{name}={value}".replace("\udcff", r"\xff")
        for name, value in {**ENVIRONMENT, **environment}.items()]
    assert found["directory"] == ["/usr"]
    assert found["umask"] == ["0027"]
    assert set(found["descriptor"]) == {"0", "1", "2", str(writer)}


def test_a_name_may_stand_twice_in_the_environment(wrapped: Path, bundle) -> None:
    # No Python can start a program so: a shell's `env` neither, but the C library can.
    made = bundle()
    source = Path(made.path) / "twice.c"
    source.write_text(
        '#include <unistd.h>\nint main(int c, char **a) { char *e[] = {"A=1", "A=2", 0};'
        "(void)c; execve(a[1], a + 1, e); return 1; }\n", "utf-8")
    twice = source.with_suffix("")
    subprocess.run(["gcc", "-o", twice, source], check=True)
    done = run(twice, wrapped, "create", "--bundle", made.path, "id")
    assert recorded(done.stdout)["environment"] == ["A=1", "A=2"]


@pytest.mark.parametrize("ignored", [[], [signal.SIGPIPE], [signal.SIGXFSZ, signal.SIGHUP],
                                     [signal.SIGPIPE, signal.SIGXFSZ]])
def test_signals_are_ignored_or_not_as_they_were(wrapped: Path, bundle, ignored) -> None:
    made = bundle()

    def prepare() -> None:
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    for words in (["state", "id"], ["create", "--bundle", str(made.path), "id"]):
        done = subprocess.run([wrapped, *words], capture_output=True, text=True, check=False,
                              preexec_fn=prepare, restore_signals=False)
        found = recorded(done.stdout).get("ignored", [])
        assert found == sorted(map(str, map(int, ignored)), key=int), words


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_standard_streams_that_are_closed_stay_closed(
    wrapped: Path, bundle, public_path: Path, closed: tuple[int, ...]
) -> None:
    made = bundle()
    output = public_path / "output"
    words = "".join(f"{number}>&- " if number else "0<&- " for number in closed)
    # Where standard output is closed the recorder has nowhere to tell it.
    kept = "" if 1 in closed else f">{output}"
    script = f'exec "$@" {kept} {words}'
    done = run("sh", "-c", script, "sh", wrapped, "create", "--bundle", made.path, "id")
    assert done.returncode == RECORDED
    if 1 not in closed:
        told = recorded(output.read_text())["descriptor"]
        assert told == [str(each) for each in range(3) if each not in closed]


def test_limits_are_the_callers(wrapped: Path, bundle) -> None:
    made = bundle()
    done = run("sh", "-c", 'ulimit -Sn 99; exec "$@"', "sh", wrapped, "create", "--bundle",
               made.path, "id")
    assert recorded(done.stdout)["limit"] == ["99"]


# -- what a hostile caller or image can't do -----------------------------------------------


def test_no_module_of_the_callers_is_imported(wrapped: Path, bundle) -> None:
    made = bundle()
    for name in ("json", "errno", "sandboxfs", "select", "encodings"):
        (made.path / f"{name}.py").write_text("import os; os.write(1, b'HOSTILE'); os._exit(9)\n")
    environment = {"PYTHONPATH": str(made.path), "PYTHONSTARTUP": f"{made.path}/json.py",
                   "PYTHONINSPECT": "1", "PYTHONHOME": str(made.path)}
    # The control: a plain interpreter does import it.
    control = run("/usr/bin/python3", "-c", "import json", cwd=made.path,
                  env={"PYTHONPATH": str(made.path)})
    assert "HOSTILE" in control.stdout
    done = run(wrapped, "create", "id", cwd=made.path, env=environment)
    assert (done.returncode, "HOSTILE" in done.stdout) == (RECORDED, False), done.stderr


def test_a_library_of_the_callers_reaches_the_runtime_alone(
    wrapped: Path, bundle, public_path: Path
) -> None:
    """What the caller's environment preloads is for the runtime, not for our Python."""
    source, library = public_path / "p.c", public_path / "p.so"
    source.write_text(
        "#include <stdio.h>\n#include <unistd.h>\n"
        "__attribute__((constructor)) static void told(void) "
        '{ char b[200] = {0}; if (readlink("/proc/self/exe", b, 199) > 0) '
        'dprintf(2, "LOADED %s\\n", b); }\n')
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    done = run(wrapped, "create", "--bundle", bundle().path, "id", env={"LD_PRELOAD": str(library)})
    assert done.returncode == RECORDED
    loaded = [line for line in done.stderr.splitlines() if line.startswith("LOADED")]
    assert loaded == [f"LOADED {public_path}/real-runc/runc"]


@pytest.mark.parametrize("kind", ["fifo", "device", "directory", "link", "large", "socket"])
def test_a_document_that_is_no_file_neither_hangs_nor_starts(
    wrapped: Path, bundle, kind: str
) -> None:
    made = bundle()
    path = made.path / "config.json"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        os.mknod(path, 0o20666, os.makedev(1, 5))
    elif kind == "directory":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("/dev/zero")
    elif kind == "large":
        path.write_text(" " * (17 << 20) + "{}")
    else:
        import socket

        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    done = run(wrapped, "create", "--bundle", made.path, "id", timeout=10)
    assert done.returncode in (65, 125)
    assert "argument" not in done.stdout
    assert done.stderr.startswith("sandboxfs: config.json")


@pytest.mark.parametrize("text", [
    "", "{", '{"root": {"path": "rootfs"}, "root": {"path": "/"}}', '{"ROOT": {"path": "/"}}',
    '{"ociVersion": "1.0.0"} x', "\ufeff{}", '{"root": {"path": "rootfs\\u0000/x"}}',
    '{"root": []}', '{"annotations": {"dev.sandboxfs.overlay": "maybe"}, "root": {"path": "r"}}',
])
def test_a_document_that_can_be_read_in_two_ways_is_refused(
    wrapped: Path, bundle, public_path: Path, text: str
) -> None:
    made = bundle()
    (made.path / "config.json").write_text(text, "utf-8")
    log = public_path / "log"
    done = run(wrapped, "--log", log, "--log-format", "json", "create", "--bundle", made.path, "id")
    assert done.returncode in (65, 125), done.stderr
    assert "argument" not in done.stdout
    entry, = logged(log)
    assert entry["level"] == "error"
    assert entry["msg"] + "\n" == done.stderr


@pytest.mark.parametrize("annotations", [
    {"dev.sandboxfs.overlay.binds": "true"},
    {"dev.sandboxfs.mount.v.source": "v", "dev.sandboxfs.mount.v.type": "tmpfs",
     "dev.sandboxfs.mount.v.share": "container"},
])
def test_mounts_are_judged_where_an_annotation_changes_them(wrapped: Path, bundle, annotations):
    def change(document):
        document["mounts"].append({"destination": 5})

    made = bundle(change)
    # Without, they are the runtime's to judge.
    assert run(wrapped, "create", "--bundle", made.path, "id").returncode == RECORDED
    document = made.document
    document["annotations"] = annotations
    made.write(document)
    done = run(wrapped, "create", "--bundle", made.path, "id")
    assert (done.returncode, done.stdout) == (65, ""), done.stderr
    assert "/mounts/" in done.stderr


def test_an_error_is_in_the_log_of_every_form(wrapped: Path, public_path: Path) -> None:
    log = public_path / "log"
    for words in (["--log", log], [f"--log={log}", "--log-format=json"], [f"--log=file:{log}"]):
        log.unlink(missing_ok=True)
        done = run(wrapped, *words, "create", "--bundle", public_path / "none", "id")
        assert done.returncode == 125
        assert "ENOENT" in done.stderr
        assert done.stderr.strip() in log.read_text("utf-8").replace('\\"', '"')
    done = run(wrapped, "--log", public_path, "create", "--bundle", public_path / "none", "id")
    assert done.returncode == 125
    assert "--log" in done.stderr


def test_an_interpreter_that_is_gone_is_an_error_and_no_container(
    public_path: Path, bundle
) -> None:
    from sandboxfs.runtime import wrap

    real = recorder(public_path)
    interpreter = os.path.realpath("/usr/bin/python3")
    program = public_path / "runc"
    content = wrap.content(str(real)).replace(
        os.fsencode(interpreter) + b"\0", (b"/gone" + b"x" * (len(interpreter) - 5)) + b"\0", 1)
    program.write_bytes(content)
    program.chmod(0o755)
    log = public_path / "log"
    done = run(program, "--log", log, "create", "--bundle", bundle().path, "id")
    assert (done.returncode, done.stdout) == (125, "")
    assert "/gone" in logged(log)[0]["msg"]
    assert started(program, "state", "id")["argument"][1:] == ["state", "id"]


def test_a_package_that_is_gone_is_an_error_and_no_container(public_path: Path, bundle) -> None:
    from sandboxfs.runtime import wrap

    real = recorder(public_path)
    program = public_path / "runc"
    content = wrap.content(str(real)).replace(b"sandboxfs.runtime.main", b"sandboxfs.runtime.gone")
    program.write_bytes(content)
    program.chmod(0o755)
    log = public_path / "log"
    done = run(program, "--log", log, "create", "--bundle", bundle().path, "id")
    assert (done.returncode, done.stdout) == (125, "")
    assert "sandboxfs" in logged(log)[0]["msg"]


# -- the program itself ---------------------------------------------------------------------


def test_the_kind_of_a_runtime_decides_how_its_words_are_read(public_path: Path, bundle) -> None:
    made = bundle()
    for name, words, fine in [
        ("runc", ["-bundle", made.path, "id"], True), ("runc", [f"-b{made.path}", "id"], False),
        ("crun", [f"-b{made.path}", "id"], True), ("crun", ["-bundle", made.path, "id"], False),
        ("youki", ["-bundle", made.path, "id"], False), ("youki", ["-b", made.path, "id"], True),
    ]:
        program = front(public_path, recorder(public_path, name))
        done = run(program, "create", *words)
        assert (done.returncode == RECORDED) is fine, (name, words, done.stderr)
        assert fine or "argument" not in done.stdout


def test_wrapping_refuses_what_it_can_t_stand_in_front_of(public_path: Path) -> None:
    program = front(public_path, recorder(public_path))
    for words, text in [
        ([program, "/x"], "itself"), (["runc", "/x"], "absolute"),
        ([public_path / "none", "/x"], "ENOENT"),
        (["/bin/sh", public_path / "none" / "x"], "ENOENT"), (["/bin/sh", "/bin/sh"], "exists"),
    ]:
        done = run_cli("runtime", "wrap", *words)
        assert done.returncode in (2, 125)
        assert text in done.stderr, done.stderr
    assert run(program, "--version").returncode == 0
    # Written anew, and by no name of another's.
    run_cli("runtime", "wrap", recorder(public_path), program, check=0)
    other = public_path / "file"
    other.write_text("somebody's")
    assert run_cli("runtime", "wrap", recorder(public_path), other).returncode == 2
    run_cli("runtime", "wrap", recorder(public_path), other, "--force", check=0)


def test_a_plain_user_gets_one_clear_error(public_path: Path, bundle) -> None:
    program = front(public_path, recorder(public_path))
    made = bundle()
    done = run(program, "create", "--bundle", made.path, "id", uid=61234)
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.count("\n") == 1
    assert "unshare CLONE_NEWNS: EPERM" in done.stderr
    assert "dev.sandboxfs.overlay=none" in done.stderr


def test_root_of_a_user_namespace_has_it(public_path: Path, bundle) -> None:
    needs("user-namespaces")
    program = front(public_path, recorder(public_path))
    made = bundle()

    def body() -> None:
        assert started(program, "create", "--bundle", str(made.path), "id")

    in_namespace(body, uid=61234)
    assert LAUNCHER.exists()
