"""The hook as an attack surface: what it is started with, and what the image holds, is hostile."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.tools import ENGINES, attacker, exchange
from tests.support import Bundle, assert_mount, in_namespace, run, table
from tests.support.hooks import Runtime

pytestmark = pytest.mark.needs("root", "overlay", "busybox", "strace")
MakeBundle = Callable[..., Bundle]

WITNESS = "/var/tmp/tests-hook-was-here"
PAYLOAD = f"import posix; posix.close(posix.open({WITNESS!r}, posix.O_CREAT | posix.O_WRONLY))\n"
# Whatever any Python start might import, be it by accident.
NAMES = (
    "json", "os", "re", "enum", "io", "codecs", "abc", "stat", "errno", "site", "sitecustomize",
    "usercustomize", "encodings/__init__", "sandboxfs/__init__", "sandboxfs/__main__", "gc",
    "marshal", "posix", "ctypes/__init__", "tomllib/__init__", "time", "prctl", "_json",
)


@pytest.fixture
def hostile(bundle: MakeBundle) -> Any:
    """A bundle whose image has a module for every import, in all places, and the environment."""
    prepared = bundle()
    for directory in (".", "lib", "usr/lib/python3.11", "usr/local/lib/python3.11/site-packages"):
        for name in NAMES:
            path = prepared.rootfs / directory / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(PAYLOAD, "utf-8")
    library = prepared.rootfs / "lib/evil.so"
    source = prepared.path / "evil.c"
    source.write_text(
        "#include <fcntl.h>\n__attribute__((constructor)) static void here(void)\n"
        f'{{ open("{WITNESS}", O_CREAT | O_WRONLY, 0600); }}\n', "utf-8")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    yield prepared
    Path(WITNESS).unlink(missing_ok=True)


def environment(prepared: Bundle) -> dict[str, str]:
    root = str(prepared.rootfs)
    return {
        "PYTHONPATH": f".:{root}:{root}/lib", "PYTHONHOME": f"{root}/usr", "PYTHONSTARTUP": "os.py",
        "PYTHONUSERBASE": root, "PYTHONPLATLIBDIR": "lib", "PYTHONWARNINGS": "error",
        "PYTHONBREAKPOINT": "json.dumps", "PYTHONINSPECT": "1", "PYTHONPYCACHEPREFIX": root,
        "PYTHONDEVMODE": "1", "PYTHONIOENCODING": "utf-32", "HOME": root, "PATH": root,
        "LANG": "tr_TR", "LC_ALL": "xx", "LOCPATH": root, "TMPDIR": root,
    }


def test_nothing_of_the_image_is_executed(hostile: Bundle) -> None:
    """Neither by its modules in the working directory nor by its environment."""
    before = sorted(hostile.rootfs.rglob("*"))

    def body() -> None:
        runtime = Runtime(hostile)
        for hook in ("createRuntime", "createContainer", "poststop"):
            done = runtime.hook(hook, env=environment(hostile))
            assert done.stderr == ""
            runtime.hook(hook, input="{}", env=environment(hostile), check=125)
            if hook == "createContainer":
                runtime.take_away()
        assert not os.path.exists(WITNESS)

    in_namespace(body, timeout=120)
    assert sorted(hostile.rootfs.rglob("*")) == before, "no __pycache__ and the like"


def test_controls_an_interpreter_that_is_started_carelessly_does(hostile: Bundle) -> None:
    """Without -I the modules are executed; and a preload is, where a registration lets it in."""
    for words, env in (
        ([sys.executable, "-S", "-c", "import json"], {"PYTHONPATH": str(hostile.rootfs)}),
        ([sys.executable, "-I", "-S", "-c", ""],
         {"LD_PRELOAD": str(hostile.rootfs / "lib/evil.so")}),
    ):
        Path(WITNESS).unlink(missing_ok=True)
        run(*words, env=env)
        assert os.path.exists(WITNESS), words


def test_files_that_are_opened_lie_on_the_host(hostile: Bundle, tmp_path: Path) -> None:
    """By strace: of the rootfs only descriptors for paths are had, and nothing is relative."""
    trace = tmp_path / "trace"

    def body() -> str:
        runtime = Runtime(hostile)
        run("/usr/bin/strace", "-f", "-o", trace, "-e", "trace=openat,open", *runtime.command(),
            input=runtime.state(), cwd=runtime.rootfs, env=environment(hostile), check=0)
        return trace.read_text("utf-8", "replace")

    lines = [line for line in in_namespace(body).splitlines() if " ENOENT " not in line]
    opened = [line for line in lines if str(hostile.rootfs) in line and "O_PATH" not in line]
    assert opened == []
    relative = [line for line in lines if 'AT_FDCWD, "' in line and 'AT_FDCWD, "/' not in line]
    assert relative == [], "the working directory is the container's"


def test_descriptors_that_a_runtime_leaks_are_closed(bundle: MakeBundle, tmp_path: Path) -> None:
    """runc 1.1 leaks its init socket: nothing of it is left before config.json is read."""
    prepared = bundle()
    trace = tmp_path / "trace"

    def body() -> str:
        runtime = Runtime(prepared)
        leaked = [os.open("/", os.O_RDONLY), os.open(runtime.rootfs, os.O_RDONLY | os.O_DIRECTORY)]
        try:
            run("strace", "-f", "-o", str(trace), "-e", "trace=close_range,openat,openat2",
                *runtime.command(), input=runtime.state(), pass_fds=tuple(leaked), check=0)
        finally:
            for fd in leaked:
                os.close(fd)
        return trace.read_text("utf-8", "replace")

    lines = in_namespace(body).splitlines()
    closed = next(at for at, line in enumerate(lines) if "close_range(3, 4294967295, 0)" in line)
    config = next(at for at, line in enumerate(lines) if '"config.json"' in line)
    assert closed < config
    assert "= 0" in lines[closed]


def test_the_state_s_pid_is_never_used_by_create_container(bundle: MakeBundle) -> None:
    """It is one of another pid namespace: what it names here is somebody else."""
    prepared = bundle()

    def body() -> None:
        runtime = Runtime(prepared)
        for pid in (0, 1, os.getpid(), 4194304):
            runtime.hook(input=runtime.state(pid=pid))
            runtime.take_away()

    in_namespace(body)


@pytest.mark.parametrize("engine", ENGINES)
def test_symlinks_of_the_image_lead_nowhere_outside(
    bundle: MakeBundle, public_path: Path, engine: str
) -> None:
    """cwd, /tmp and the volumes' mountpoints are made inside, whatever links are on the way."""
    outside = public_path / "outside"
    outside.mkdir()

    def change(document: dict[str, Any]) -> None:
        document["annotations"] = {"dev.sandboxfs.engine": engine, "dev.sandboxfs.tmp": "tmpfs"}
        document["process"]["cwd"] = "/a/b/c"

    prepared = bundle(change)
    (prepared.rootfs / "a").symlink_to(outside)
    (prepared.rootfs / "tmp").rmdir()
    (prepared.rootfs / "tmp").symlink_to("../../../../../../../../" + str(outside))

    def body() -> None:
        runtime = Runtime(prepared)
        runtime.hook()
        found = [record.mountpoint for record in runtime.inside()]
        assert os.fsencode(outside) in found, "the link's target, inside"
        assert os.listdir(outside) == []
        assert (prepared.rootfs / str(outside).lstrip("/") / "b/c").is_dir() or engine

    in_namespace(body)
    assert os.listdir(outside) == []


@pytest.mark.parametrize("engine", ENGINES)
def test_a_volume_s_directories_are_exchanged_meanwhile(
    bundle: MakeBundle, public_path: Path, engine: str
) -> None:
    """Who shares a volume with the container renames in it: no mount gets anywhere else."""
    volume = public_path / "volume"
    for name in ("one", "other"):
        (volume / name / "inner").mkdir(parents=True)
    escape = public_path / "escape"
    (escape / "inner").mkdir(parents=True)
    (volume / "link").symlink_to(escape)

    def change(document: dict[str, Any]) -> None:
        document["annotations"] = {
            "dev.sandboxfs.engine": engine,
            "dev.sandboxfs.mount.v.source": "mine", "dev.sandboxfs.mount.v.type": "tmpfs",
            "dev.sandboxfs.mount.v.share": "container",
        }
        document["mounts"] += [
            {"destination": "/data", "type": "bind", "source": str(volume), "options": ["bind"]},
            {"destination": "/data/one/inner", "type": "tmpfs", "source": "mine", "options": []},
        ]

    prepared = bundle(change)

    def step(_number: int) -> None:
        # From another mount namespace: in this one a mountpoint's directory can't be renamed.
        exchange(os.fsencode(volume / "other"), os.fsencode(volume / "link"))

    def body() -> None:
        runtime = Runtime(prepared)
        for _round in range(12):
            with attacker(step):
                done = runtime.hook(check=None)
            assert [each.mountpoint for each in table()
                    if each.mountpoint.startswith(os.fsencode(escape))] == []
            assert os.listdir(escape / "inner") == []
            if done.returncode == 0:
                assert_mount(runtime.inside(), "/data/one/inner", type="tmpfs")
                runtime.take_away()

    in_namespace(body, timeout=120)
    assert sorted(os.listdir(escape)) == ["inner"]


def test_a_hook_that_waits_reads_no_fifo_and_follows_no_link(
    bundle: MakeBundle, public_path: Path
) -> None:
    """A bundle's config.json that is a FIFO or a link: told, without a wait."""
    prepared = bundle()
    config = prepared.path / "config.json"
    text = config.read_text("utf-8")
    config.unlink()

    def body() -> None:
        os.mkfifo(config)
        runtime = Runtime(prepared)
        done = runtime.hook(check=125, timeout=10)
        assert "config.json: open config.json: EINVAL: is not a regular file" in done.stderr
        config.unlink()
        elsewhere = public_path / "elsewhere.json"
        elsewhere.write_text(text, "utf-8")
        config.symlink_to(elsewhere)
        done = runtime.hook(check=125, timeout=10)
        assert "config.json: open config.json: ELOOP: is a symbolic link" in done.stderr
        config.unlink()

    in_namespace(body)
