"""Paths that a runtime may follow otherwise than we: never a container on another root."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import Bundle, in_namespace, run, untouched
from tests.support.front import RECORDED, Runc, front, recorder
from tests.support.specs import containerd_spec

pytestmark = pytest.mark.needs("root", "overlay", "busybox", "launcher", "runc", "gcc")

Make = Callable[..., Bundle]
WRITES = "echo ran; echo x >/written"


@pytest.fixture
def made(bundle: Callable[..., Bundle]) -> Make:
    def make(name: str, **changes: Any) -> Bundle:
        document = containerd_spec("/bin/sh", "-c", WRITES)
        document["root"] = {"path": "rootfs", "readonly": False}
        document["linux"].pop("cgroupsPath", None)
        document.update(changes)
        return bundle(document, name=name, mountpoints=False)

    return make


def test_dots_behind_a_link_in_the_bundle_s_path(made: Make, public_path: Path) -> None:
    """The kernel goes where the link leads; text alone would take the decoy."""
    (public_path / "decoy").mkdir()
    (public_path / "deep/l").mkdir(parents=True)
    decoy, real = made("decoy/b"), made("deep/b")
    (public_path / "decoy/link").symlink_to(public_path / "deep/l")
    runc = Runc(public_path)
    with untouched(decoy.path, real.path):
        done = runc.run(public_path / "decoy/link/../b")
    assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr


def test_dots_behind_a_link_in_root_path(made: Make, public_path: Path) -> None:
    box = made("b", root={"path": "link/../rootfs"})
    other = public_path / "other"
    (other / "l").mkdir(parents=True)
    (other / "rootfs").mkdir()
    (box.path / "link").symlink_to(other / "l")
    runc = Runc(public_path)
    with untouched(box.path, other):
        done = runc.run(box.path)
    assert (done.returncode, done.stdout) == (125, "")
    assert "leads to one place as text" in done.stderr
    # The control: runc by itself goes by the text.
    assert run("runc", "--root", public_path / "plain", "run", "--bundle", box.path, "tests",
               ).stdout == "ran\n"
    assert (box.rootfs / "written").exists()


def test_a_working_directory_that_the_environment_tells_otherwise(
    made: Make, public_path: Path
) -> None:
    (public_path / "deep").mkdir()
    box = made("deep/q")
    (box.path / "in").mkdir()
    document = box.document
    document["root"]["path"] = "rootfs"
    box.write(document)
    (public_path / "z").mkdir()
    (public_path / "z/rootfs").mkdir()
    (public_path / "z/link").symlink_to(box.path / "in")
    runc = Runc(public_path)
    with untouched(public_path / "deep", public_path / "z"):
        done = runc.call("run", "tests", cwd=box.path,
                         env={"PWD": f"{public_path}/z/link/.."})
        assert (done.returncode, done.stdout) == (125, ""), done.stderr
        done = runc.call("run", "tests", cwd=box.path, env={"PWD": str(box.path)})
        assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr


def test_dots_behind_a_link_in_the_source_of_a_bind(made: Make, public_path: Path) -> None:
    box = made("b", annotations={"dev.sandboxfs.overlay.binds": "true"})
    far = public_path / "far"
    (far / "l").mkdir(parents=True)
    (far / "data").mkdir()
    (box.path / "data").mkdir()
    (box.path / "link").symlink_to(far / "l")
    document = box.document
    document["mounts"].append({"destination": "/data", "type": "bind", "source": "link/../data",
                               "options": ["rbind", "rw"]})
    document["process"]["args"][2] = "echo x >/data/written"
    box.write(document)
    runc = Runc(public_path)
    with untouched(box.path, far):
        assert runc.run(box.path).returncode == 125
    document["mounts"][-1]["source"] = "data"
    (box.path / "config.json").write_text(json.dumps(document))
    with untouched(box.path, far):
        assert runc.run(box.path).returncode == 0


def test_a_directory_of_a_root_of_ours_is_no_root_of_ours(public_path: Path) -> None:
    """A nested engine's rootfs, inside a container whose root the runtime in front has made."""
    from sandboxfs.kernel import fscontext, mounttable, syscalls
    from sandboxfs.plan import live
    from tests.support import attach, bind, mount_tmpfs

    def body() -> list[bool]:
        mount_tmpfs(public_path)
        for name in ("lower/inner", "upper", "work", "root"):
            (public_path / name).mkdir(parents=True)
        settings = [fscontext.string(b"source", b"sandboxfs-runtime")]
        settings += [fscontext.string(key, os.fsencode(public_path / name)) for key, name in (
            (b"lowerdir", "lower"), (b"upperdir", "upper"), (b"workdir", "work"))]
        attach(fscontext.create(b"overlay", settings, 0), public_path / "root")
        inner = public_path / "root/inner"
        bind(inner, inner)
        found = []
        for path in (public_path / "root", inner):
            fd = os.open(path, os.O_PATH)
            found.append(live.is_made_by_runtime(mounttable.record(syscalls.mount_id(fd)[0])))
            os.close(fd)
        return found

    assert in_namespace(body) == [True, False]


@pytest.mark.parametrize("word", ["\u00a0create", "create\u00a0", "\u2003create"])
def test_white_space_of_unicode_hides_no_command(
    made: Make, public_path: Path, word: str
) -> None:
    program = front(public_path, recorder(public_path))
    done = run(program, word, "--bundle", made("b").path, "id")
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    # The control: no other command is kept from its runtime by such a character.
    assert run(program, "state", "\u00e4").returncode == RECORDED


def test_an_option_without_a_value_elsewhere_hides_no_command(
    made: Make, public_path: Path
) -> None:
    program = front(public_path, recorder(public_path, "runsc"))
    for words in (["--rootless", "create"], ["--root", "run"]):
        done = run(program, *words, "--bundle", made(words[1]).path, "id")
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert run(program, "--root", "/r", "state", "id").returncode == RECORDED


def test_a_link_to_a_document_on_another_mount(made: Make, public_path: Path) -> None:
    from sandboxfs.kernel import abi, syscalls
    from tests.support import mount_tmpfs

    box = made("b")
    elsewhere = public_path / "elsewhere"
    elsewhere.mkdir()
    mount_tmpfs(elsewhere)
    try:
        (box.path / "config.json").rename(box.path / "other")
        (elsewhere / "real.json").write_bytes((box.path / "other").read_bytes())
        (box.path / "link.json").symlink_to(elsewhere / "real.json")
        program = front(public_path, recorder(public_path, "crun"))
        done = run(program, "run", "-f", box.path / "link.json", "-b", box.path, "id")
        assert done.returncode == RECORDED, done.stderr
    finally:
        syscalls.umount2(os.fsencode(elsewhere), abi.MNT_DETACH)


def test_an_upper_on_disk_goes_where_the_runtime_can_t_be_executed(
    made: Make, public_path: Path
) -> None:
    policy = public_path / "config.toml"
    policy.write_text("[annotations]\nhost-paths = true\n")
    uppers = public_path / "uppers"
    uppers.mkdir()
    box = made("b", annotations={"dev.sandboxfs.overlay": f"dir={uppers}"})
    real = recorder(public_path)
    program = front(public_path, real, policy)
    real.unlink()
    done = run(program, "create", "--bundle", box.path, "id")
    assert (done.returncode, done.stdout) == (125, "")
    assert "execve" in done.stderr
    assert list(uppers.iterdir()) == []
