"""What bad input gets: one clear line, on standard error and in the log; nothing changed."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sandboxfs.kernel import abi, syscalls
from tests.support import Bundle, in_namespace, run, table
from tests.support.hooks import IDENTITY, Runtime

pytestmark = pytest.mark.needs("root", "overlay", "busybox", "launcher")

MakeBundle = Callable[..., Bundle]
HOOKS = ("createRuntime", "createContainer", "poststop")


def refused(runtime: Runtime, line: str, *words: str, status: int = 125, **how: Any) -> None:
    """Assert that a hook fails with one line that begins so, here and in the log, and no more."""
    before = [repr(record) for record in table()]
    done = runtime.hook(*words, check=status, **how)
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("sandboxfs: " + line), lines[0]
    assert done.stdout == ""
    assert lines[0].removeprefix("sandboxfs: ") in runtime.log()
    assert [repr(record) for record in table()] == before


STATES = [
    ("", "state: nothing is on standard input"),
    ("  \n", "state: nothing is on standard input"),
    ('{"ociVersion": "1.0.2", "id": "x", "bun', "state: line 1 column"),
    ("[]", "state: a JSON object is expected"),
    ('{"id": "x", "id": "y"}', "/id: stands twice"),
    ('{"bundle": "/x"}', "state/id: is missing"),
    ('{"id": 7, "bundle": "/x"}', "state/id: a string is expected"),
    ('{"id": "", "bundle": "/x"}', "state/id: a string is expected"),
    ('{"id": "a/../b", "bundle": "/x"}', "state/id: a/../b: a container's id has no slash"),
    ('{"id": "..", "bundle": "/x"}', "state/id: ..: a container's id"),
    ('{"id": "x\\u0000", "bundle": "/x"}', "state/id: a string is expected"),
    ('{"id": "x"}', "state/bundle: is missing"),
    ('{"id": "x", "bundle": "rel"}', "state/bundle: rel: the bundle has to be an absolute"),
    ('{"id": "x", "bundle": "/x", "pid": "1"}', "state/pid: a process id is a number"),
    ('{"id": "x", "bundle": "/x", "pid": -1}', "state/pid: a process id is a number"),
    ('{"id": "x", "bundle": "/x", "pid": true}', "state/pid: a process id is a number"),
    ('{"id": "x", "bundle": "/x", "status": 1}', "state/status: a string is expected"),
    ('{"id": "x", "bundle": "/x", "annotations": []}', "state/annotations: an object of strings"),
    ('{"id": "x", "bundle": "/x", "annotations": {"a": 1}}', "state/annotations: an object of s"),
    ("\ufeff{}", "state: begins with a byte order mark"),
    ("{} {}", "state: line 1 column 4: nothing may follow"),
]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_wrong_state(hook: str, bundle: MakeBundle) -> None:
    prepared = bundle()

    def body() -> None:
        runtime = Runtime(prepared)
        for text, line in STATES:
            refused(runtime, line, hook, input=text)

    in_namespace(body, timeout=120)


def test_a_state_without_end_and_one_that_is_closed(bundle: MakeBundle) -> None:
    prepared = bundle()

    def body() -> None:
        runtime = Runtime(prepared)
        refused(runtime, "state: is larger than 16 MiB", "createContainer",
                input="{" + " " * (17 << 20))
        closed = run("sh", "-c", 'exec 0<&-; exec "$@"', "sh", *runtime.command(), check=125)
        assert closed.stderr.startswith("sandboxfs: state: nothing is on standard input")

    in_namespace(body)


def test_what_runtimes_leave_out_or_add_is_no_fault(bundle: MakeBundle) -> None:
    """crun: no annotations, pid 0, root; runc's poststop: no pid; newer ones: other keys."""
    prepared = bundle()

    def body() -> None:
        runtime = Runtime(prepared)
        state = {"ociVersion": "1.2", "id": IDENTITY, "bundle": str(prepared.path),
                 "root": "/elsewhere", "owner": "x", "created": 0}
        runtime.hook(input=json.dumps({**state, "pid": 0, "status": "created"}))
        runtime.hook("poststop", input=json.dumps(state))

    in_namespace(body)


def test_a_bundle_that_is_not_there(bundle: MakeBundle) -> None:
    prepared = bundle()

    def body() -> None:
        runtime = Runtime(prepared)
        for hook in ("createRuntime", "createContainer"):
            gone = runtime.state(bundle="/not/there")
            refused(runtime, "bundle: open /not/there: ENOENT", hook, input=gone)
            other = runtime.state(bundle=str(prepared.rootfs))
            refused(runtime, "config.json: open config.json: ENOENT", hook, input=other)
        # Containers whose bundle is gone are taken leave of all the same.
        runtime.hook("poststop", input=runtime.state(bundle="/not/there"))

    in_namespace(body)


WORDS = [
    ((), "hook: which one?"),
    (("prestart",), "hook: prestart: no such hook"),
    (("createcontainer",), "hook: createcontainer: no such hook"),
    (("createContainer", "--strict"), "hook: --strict: no such option"),
    (("createContainer", "--config"), "hook: --config: needs a value"),
    (("createContainer", "word"), "hook: word: no such option"),
]


def test_a_wrong_command_line(bundle: MakeBundle) -> None:
    prepared = bundle()

    def body() -> None:
        runtime = Runtime(prepared)
        for words, line in WORDS:
            done = run(*runtime.command()[:2], *words, input=runtime.state(), check=2)
            assert done.stderr.startswith("sandboxfs: " + line), done.stderr
            assert done.stderr.count("\n") == 1
            assert "createRuntime, createContainer and poststop" in done.stderr or words

    in_namespace(body)


def test_a_policy_that_cannot_be_used(bundle: MakeBundle, public_path: Path) -> None:
    prepared = bundle()
    policy = public_path / "policy.toml"
    policy.write_text("[overlay]\nmode = 'none'\nsise = 1\n", "utf-8")

    def body() -> None:
        runtime = Runtime(prepared)
        before = [repr(record) for record in table()]
        for hook in ("createRuntime", "createContainer"):
            done = runtime.hook(hook, "--config", str(policy), check=65)
            assert "policy.toml" in done.stderr
            assert "3" in done.stderr
            assert done.stderr.count("\n") == 1
            done = runtime.hook(hook, "--config", "/not/there", check=65)
            assert "/not/there" in done.stderr
        assert [repr(record) for record in table()] == before

    in_namespace(body)


ANNOTATIONS: list[tuple[dict[str, str], str]] = [
    ({"dev.sandboxfs.overlay": "tmpsf"}, '/annotations/dev.sandboxfs.overlay: "tmpsf": allowed'),
    ({"dev.sandboxfs.overlay": "dir=/etc"}, ""),
    ({"dev.sandboxfs.overlay": "dir="}, '/annotations/dev.sandboxfs.overlay: "dir="'),
    ({"dev.sandboxfs.lower": "/etc"}, ""),
    ({"dev.sandboxfs.overlay.size": "0"}, '/annotations/dev.sandboxfs.overlay.size: "0"'),
    ({"dev.sandboxfs.overlay.size": "1X"}, '/annotations/dev.sandboxfs.overlay.size: "1X"'),
    ({"dev.sandboxfs.overlay.size": "1M,mode=777"}, "/annotations/dev.sandboxfs.overlay.size"),
    ({"dev.sandboxfs.overlay.binds": "yes"}, '/annotations/dev.sandboxfs.overlay.binds: "yes"'),
    ({"dev.sandboxfs.tmp": "never"}, '/annotations/dev.sandboxfs.tmp: "never"'),
    ({"dev.sandboxfs.engine": "fast"}, '/annotations/dev.sandboxfs.engine: "fast"'),
    ({"dev.sandboxfs.mount.a.source": "x"}, "/annotations/dev.sandboxfs.mount.a.source: hint a l"),
    ({"dev.sandboxfs.mount.a.b.c": "x"}, "/annotations/dev.sandboxfs.mount.a.b.c: a hint is wri"),
    ({"dev.gvisor.spec.mount.a.type": "ext4"}, "/annotations/dev.gvisor.spec.mount.a.type"),
    ({"dev.sandboxfs.mount.a.share": "world"}, "/annotations/dev.sandboxfs.mount.a.share"),
    ({"dev.sandboxfs.mount.a.options": "suid"}, "/annotations/dev.sandboxfs.mount.a.options"),
    ({"dev.sandboxfs.mount.a.options": "size=1,2"}, "/annotations/dev.sandboxfs.mount.a.options"),
]


@pytest.mark.parametrize(("annotations", "line"), ANNOTATIONS)
def test_a_wrong_annotation(
    annotations: dict[str, str], line: str, bundle: MakeBundle
) -> None:
    prepared = bundle(lambda document: document.update(annotations=annotations))

    def body() -> None:
        runtime = Runtime(prepared)
        for hook in ("createRuntime", "createContainer"):
            refused(runtime, line, hook, status=65)

    in_namespace(body)


def test_a_wrong_document(bundle: MakeBundle) -> None:
    """The first fault is told, without the library that would find all."""
    prepared = bundle(lambda document: document.update(root={"path": 7}))

    def body() -> None:
        runtime = Runtime(prepared)
        refused(runtime, "/root/path: 7: a string is allowed", "createContainer", status=65)

    in_namespace(body)


def test_another_mount_namespace_than_the_container_s(bundle: MakeBundle) -> None:
    """Registered at another stage, it would lay the root over the rootfs on the host."""
    prepared = bundle()
    bare = bundle(lambda document: document.update(mounts=[]), name="bare")

    def body() -> None:
        for each, text in ((prepared, "has no mounts below it"), (bare, "isn't a mount")):
            runtime = Runtime(each)
            while runtime.mounts():
                syscalls.umount2(os.fsencode(runtime.rootfs), abi.MNT_DETACH)
            if each is prepared:
                runtime.bind(runtime.rootfs, runtime.rootfs)
            refused(runtime, f"root.path: {each.rootfs}: {text} in this mount namespace (register",
                    "createContainer", cwd="/")

    in_namespace(body)


def test_a_container_without_a_mount_namespace(bundle: MakeBundle) -> None:
    """Its runtime mounts on the host, and so would the hook."""
    prepared = bundle(lambda document: document["linux"].update(namespaces=[{"type": "pid"}]))

    def body() -> None:
        refused(Runtime(prepared), "linux.namespaces: the container has no mount namespace",
                "createContainer")

    in_namespace(body)


def test_missing_privileges(bundle: MakeBundle) -> None:
    prepared = bundle()
    program = (
        "import prctl, os, sys\n"
        "prctl.capbset_drop(prctl.CAP_SYS_ADMIN)\n"
        "os.execv(sys.argv[1], sys.argv[1:])\n"
    )

    def body() -> None:
        runtime = Runtime(prepared)
        before = [repr(record) for record in table()]
        python = str(Path(runtime.command()[0]).parent / "python")
        done = run(python, "-c", program, *runtime.command(), input=runtime.state(), check=125)
        assert done.stderr == (
            "sandboxfs: createContainer: CAP_SYS_ADMIN: is missing: this process may mount nothing "
            "(runtimes start this hook with the rights of the container's root, in its mount "
            "namespace)\n")
        assert done.stderr.removeprefix("sandboxfs: ") in runtime.log()
        assert [repr(record) for record in table()] == before

    in_namespace(body)


def test_standard_error_that_is_closed_or_broken(bundle: MakeBundle) -> None:
    """crun sends it nowhere: the log has the line, and no descriptor of ours takes its place."""
    prepared = bundle()

    def body() -> None:
        runtime = Runtime(prepared)
        for redirection in ("2>&-", ">&- 2>&-", "2>/dev/full"):
            run("sh", "-c", f'exec "$@" {redirection}', "sh", *runtime.command(),
                input="{}", check=125)
            run("sh", "-c", f'exec "$@" {redirection}', "sh", *runtime.command(),
                input=runtime.state(), check=0)
            assert runtime.log().count("state/id: is missing") >= 1
            runtime.take_away()

    in_namespace(body)
