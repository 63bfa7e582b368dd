"""A hook that fails: the container doesn't start, one line says why, and nothing is changed."""

import pytest

from tests.runtimes.cases import DOCUMENTS
from tests.runtimes.conftest import NAMES
from tests.runtimes.container import Container, Volume
from tests.support import untouched

pytestmark = pytest.mark.needs("root", "overlay", "busybox", "launcher", "strace")

RAN = "the payload ran"
PREFIX = "dev.sandboxfs."


def fails(runtime, container, place, hooks) -> tuple[str, str]:
    """Run a container whose hook fails; return the one line of the log, and what was printed."""
    # Its runtime makes what the image lacks before any hook.
    plain = runtime.run(Container(f"echo {RAN}", mounts=container.mounts), place.rootfs)
    assert RAN in plain.stdout
    container.script = f"echo {RAN}; touch /etc/ran"
    with untouched(place.path):
        done = runtime.run(container, place.rootfs, hooks)
    assert done.returncode != 0
    assert RAN not in done.stdout
    told = [line for line in runtime.log() if " error " in line]
    assert len(told) == 1, runtime.log()
    if runtime.tells:
        assert done.stderr.count("sandboxfs: ") == 1, done.stderr
    assert "Traceback" not in done.stderr
    return told[0], done.stderr


@pytest.mark.parametrize("stages", [("createRuntime",), ("createContainer",), ()],
                         ids=["createRuntime", "createContainer", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_annotation(runtime_of, name, place, hooks, stages):
    runtime = runtime_of(name)
    place.give_image_to(runtime.uid or 0)
    container = Container(annotations={f"{PREFIX}tmp": "sometimes"})
    registered = hooks.only(*stages, "poststop") if stages else hooks
    line, stderr = fails(runtime, container, place, registered)
    words = 'annotations/dev.sandboxfs.tmp: "sometimes": allowed: auto, tmpfs, keep'
    assert words in line
    # runc quotes it, and containerd what runc said.
    assert not runtime.tells or words in stderr.replace('\\"', '"').replace("\\", "")


@pytest.mark.parametrize("name", NAMES)
def test_what_the_kernel_refuses(runtime_of, name, place, hooks):
    """The last call but one: everything was built, and is to be attached."""
    runtime = runtime_of(name)
    place.give_image_to(runtime.uid or 0)
    through = hooks.through(
        "/usr/bin/strace", "-qq", "-o", "/dev/null", "-e", "trace=fsmount",
        "-e", "inject=fsmount:error=ENOSPC:when=2")
    line, stderr = fails(runtime, Container(), place, through)
    assert ": fsmount" in line
    assert "ENOSPC" in line
    assert not runtime.tells or "ENOSPC" in stderr


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_hook_that_is_not_there(runtime_of, name, place, hooks):
    """The runtime itself says what."""
    runtime = runtime_of(name)
    gone = hooks.changed(lambda hook: hook.update(path="/usr/libexec/not/there"), "createContainer")
    runtime.run(Container(), place.rootfs)
    with untouched(place.path):
        done = runtime.run(Container(f"echo {RAN}"), place.rootfs, gone)
    assert done.returncode != 0
    assert RAN not in done.stdout


def test_podman_leaves_out_a_registration_without_its_program(runtime_of, place, hooks):
    """What docs/hooks.md warns of."""
    gone = hooks.changed(lambda hook: hook.update(path="/usr/libexec/not/there"), "createContainer")
    done = runtime_of("podman").run(Container(f"echo {RAN}"), place.rootfs, gone)
    assert (done.returncode, done.stdout) == (0, f"{RAN}\n")


WRONG = {
    "overlay": ["", "none ", "dir=", "tmpfs:keep", "dir=/nowhere"],
    "overlay.size": ["0", "-1", "1Q", "200%", "99999999999999999999", "1 M"],
    "overlay.binds": ["yes", "TRUE"],
    "tmp": ["", "Auto"],
    "engine": ["fast"],
    "lower": ["", "/var/tmp"],
    "lower.x": ["/"],
    "mount.a.source": ["/volume"],
    "mount.a": ["x"],
    "mount.a.colour": ["red"],
}


@pytest.mark.parametrize(("key", "value"), [(key, each) for key in WRONG for each in WRONG[key]])
def test_wrong_annotations(runtime_of, place, hooks, key, value):
    runtime = runtime_of("crun")
    line, _ = fails(runtime, Container(annotations={PREFIX + key: value}), place, hooks)
    assert f"/annotations/{PREFIX}{key}" in line or "host path" in line


def test_more_memory_than_the_operator_allows(runtime_of, place, hooks):
    runtime = runtime_of("runc")
    volume = place.directory("volume")
    policy = place.path / "config.toml"
    policy.write_text('[hints]\ncap = "64K"\n', "utf-8")
    capped = hooks.changed(
        lambda hook: hook["args"].extend(["--config", str(policy)]), *hooks.section)
    hint = {"source": str(volume), "type": "tmpfs", "share": "container", "options": "size=1M"}
    container = Container(
        mounts=[Volume(volume, "/volume")],
        annotations={f"{PREFIX}mount.v.{field}": value for field, value in hint.items()})
    line, stderr = fails(runtime, container, place, capped)
    for words in (line, stderr):
        assert "1M" in words or "1048576" in words
        assert "64K" in words or "65536" in words
