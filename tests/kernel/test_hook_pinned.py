"""Where no hook's root would be the container's, none starts; who asks for nothing gets nothing."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import prctl
import pytest

from sandboxfs.hooks import registration
from sandboxfs.kernel import abi, fscontext, syscalls
from tests.support import (
    LAUNCHER,
    Bundle,
    attach,
    containerd_spec,
    in_namespace,
    mount_tmpfs,
    run,
    table,
)
from tests.support.hooks import Runtime
from tests.support.specs import Document

pytestmark = pytest.mark.needs("root", "overlay", "busybox", "launcher")

MakeBundle = Callable[..., Bundle]
RUNC = "runc:[2:INIT]"


@contextmanager
def container(runtime: Runtime, name: str = RUNC, holds: str | None = "") -> Iterator[int]:
    """A runtime's process in a copy of this mount namespace, which holds a path of the rootfs."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            prctl.set_name(name)
            syscalls.unshare(abi.CLONE_NEWNS)
            if holds is not None:
                os.open(runtime.rootfs + holds, os.O_PATH)
            os.write(writer, b"x")
            signal.pause()
        finally:
            os._exit(1)
    try:
        assert os.read(reader, 1) == b"x"
        yield pid
    finally:
        os.close(reader)
        os.close(writer)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def annotated(**values: str) -> Callable[[Document], None]:
    """Annotations; a double underscore stands for a dot."""

    def change(document: Document) -> None:
        document["annotations"] = {
            "dev.sandboxfs." + key.replace("__", "."): value for key, value in values.items()}
        document["hooks"] = registration.hooks_object(str(LAUNCHER))

    return change


def create_runtime(runtime: Runtime, pid: int, check: int) -> str:
    return runtime.hook("createRuntime", input=runtime.state(pid=pid), check=check).stderr


VOLUME = {f"mount__v__{key}": value
          for key, value in {"source": "mine", "type": "tmpfs", "share": "container"}.items()}


@pytest.mark.parametrize("asked", [{}, {"overlay": "none", "tmp": "tmpfs"},
                                   {"overlay": "none", "overlay__binds": "true"},
                                   {"overlay": "none", **VOLUME}])
def test_a_runtime_that_holds_the_rootfs_is_refused(
    bundle: MakeBundle, asked: dict[str, str]
) -> None:
    prepared = bundle(annotated(**asked))

    def body() -> None:
        runtime = Runtime(prepared)
        with container(runtime) as pid:
            told = create_runtime(runtime, pid, 125)
        assert told.startswith(f"sandboxfs: createRuntime: {prepared.rootfs}: this runc enters ")
        assert "use sandboxfs-runtime in front of it: sandboxfs install --for ENGINE" in told
        assert told in runtime.log() or told.removeprefix("sandboxfs: ") in runtime.log()

    in_namespace(body)


@pytest.mark.parametrize(("name", "holds", "overlay"), [
    (RUNC, None, "tmpfs"), (RUNC, "/dev", "tmpfs"), ("crun", "", "tmpfs"), (RUNC, "", "none"),
], ids=["an older runc", "another mount", "crun", "nothing asked for"])
def test_controls_what_is_not_refused(
    bundle: MakeBundle, name: str, holds: str | None, overlay: str
) -> None:
    prepared = bundle(annotated(overlay=overlay))

    def body() -> None:
        runtime = Runtime(prepared)
        with container(runtime, name, holds) as pid:
            assert create_runtime(runtime, pid, 0) == ""

    in_namespace(body)


def test_a_process_that_is_gone_is_no_answer(bundle: MakeBundle) -> None:
    prepared = bundle(annotated())

    def body() -> None:
        runtime = Runtime(prepared)
        with container(runtime) as pid:
            pass
        for number in (pid, 0):
            told = create_runtime(runtime, number, 125)
            assert told.startswith(f"sandboxfs: state/pid: {number}: is no running process")

    in_namespace(body)


@pytest.mark.parametrize("hooks", [
    {}, None, {"createRuntime": []}, {"createRuntime": [{"path": "/x", "args": ["x", "hook"]}]},
    {"createRuntime": [{"path": "/bin/true"}]},
])
def test_create_container_does_not_work_alone(bundle: MakeBundle, hooks: Any) -> None:
    prepared = bundle(lambda document: document.update(hooks=hooks))

    def body() -> None:
        runtime = Runtime(prepared)
        before = [repr(record) for record in table()]
        told = runtime.hook(check=125).stderr
        assert told.startswith("sandboxfs: createContainer: hooks.createRuntime: has no sandboxfs")
        assert "sandboxfs-runtime" in told
        assert [repr(record) for record in table()] == before

    in_namespace(body)


def test_another_program_may_start_the_hook(bundle: MakeBundle) -> None:
    hook = {"path": "/usr/bin/nice", "args": ["nice", "/launcher", "hook", "createRuntime"]}
    prepared = bundle(lambda document: document.update(hooks={"createRuntime": [hook]}))
    in_namespace(lambda: Runtime(prepared).hook() and None)


@pytest.mark.parametrize("readonly", [False, True])
def test_overlay_none_leaves_the_rootfs_alone(bundle: MakeBundle, readonly: bool) -> None:
    """Not even a directory is made in it, and no other hook has to be registered."""

    def change(document: Document) -> None:
        annotated(overlay="none")(document)
        document["hooks"] = {}
        document["root"]["readonly"] = readonly
        document["process"]["cwd"] = "/not/made"

    prepared = bundle(change)
    (prepared.rootfs / "tmp").rmdir()

    def body() -> None:
        runtime = Runtime(prepared)
        before = [repr(record) for record in table()]
        names = sorted(os.listdir(prepared.rootfs))
        runtime.hook()
        assert [repr(record) for record in table()] == before
        assert sorted(os.listdir(prepared.rootfs)) == names
        assert "createContainer hook-test: nothing to do: overlay=none" in runtime.log()

    in_namespace(body)


def test_a_root_of_the_runtime_in_front_is_left_alone(
    bundle: MakeBundle, public_path: Path
) -> None:
    """One overlay, not two; and whoever holds it enters the right root."""
    prepared = bundle(annotated())
    for name in ("upper", "work"):
        (public_path / name).mkdir()

    class Front(Runtime):
        def bind(self, source: Any, path: Any, idmap: Any = None) -> None:
            # Before the runtime binds the rootfs on itself.
            options = {"source": "sandboxfs-runtime", "lowerdir": str(source),
                       "upperdir": str(public_path / "upper"), "workdir": str(public_path / "work")}
            attach(fscontext.create(b"overlay", [
                fscontext.string(key.encode(), value.encode()) for key, value in options.items()
            ], 0), path)
            super().bind(source, path, idmap)

    def body() -> None:
        runtime = Front(prepared)
        before = [repr(record) for record in table()]
        with container(runtime) as pid:
            assert create_runtime(runtime, pid, 0) == ""
        runtime.hook()
        assert [repr(record) for record in table()] == before
        assert "the root is one of sandboxfs-runtime's already" in runtime.log()

    in_namespace(body)


@pytest.mark.needs("runc")
@pytest.mark.parametrize("readonly", [False, True])
def test_a_runc_that_is_told_not_to_pivot_is_refused(
    bundle: MakeBundle, public_path: Path, readonly: bool
) -> None:
    """It enters the directory that it stood in before the hooks."""

    def change(document: Document) -> None:
        document.update(containerd_spec("/bin/sh", "-c", "echo started"))
        document["root"] = {"path": "rootfs", "readonly": readonly}
        document["linux"].pop("cgroupsPath", None)
        document["hooks"] = registration.hooks_object(str(LAUNCHER))

    prepared = bundle(change)

    def body() -> None:
        mount_tmpfs("/run")
        command = ["runc", "--root", public_path / "state", "run", "--bundle", prepared.path]
        # The control: with a pivot it starts.
        assert run(*command, "tests-pivot", check=0).stdout == "started\n"
        done = run(*command, "--no-pivot", "tests-no-pivot")
        assert (done.returncode, done.stdout) == (1, "")
        assert "runc --no-pivot enters the directory" in done.stderr
        assert "sandboxfs-runtime" in done.stderr

    in_namespace(body)
