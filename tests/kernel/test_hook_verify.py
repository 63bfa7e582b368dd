"""What was attached and isn't as planned is taken away again, and nothing else with it."""

import os
from collections.abc import Callable
from typing import Any

import pytest

from sandboxfs import policy
from sandboxfs.build import carry
from sandboxfs.errors import HookError
from sandboxfs.hooks import lifecycle, state
from sandboxfs.kernel import abi, syscalls
from sandboxfs.plan import carry as planner
from sandboxfs.plan import live
from sandboxfs.spec import load
from tests.support import Bundle, in_namespace, mount_tmpfs, table
from tests.support.hooks import Runtime
from tests.support.specs import Document

pytestmark = pytest.mark.needs("root", "overlay", "busybox", "launcher")

MakeBundle = Callable[..., Bundle]
ENGINES = (pytest.param("detached", marks=pytest.mark.needs("detached-nesting")), "attached")


def nested(engine: str, source: str) -> Callable[[Document], None]:
    """Mounts on a shared mount, whose unmounting would reach the peers of what it lies on."""

    def change(document: Document) -> None:
        document["annotations"] = {"dev.sandboxfs.engine": engine}
        document["mounts"] += [
            {"destination": "/data", "type": "bind", "source": source,
             "options": ["rbind", "rshared"]},
            {"destination": "/data/deep", "type": "tmpfs", "source": "deep", "options": []},
        ]

    return change


def rows() -> list[tuple[Any, ...]]:
    """The whole table but the ids: what propagates and comes back would show in the order."""
    return sorted((each.id, each.mountpoint, each.attributes, each.propagation, each.peer_group)
                  for each in table())


def path_in(root: Any, name: str) -> str:
    return f"/proc/self/fd/{root.fd}/{name}"


def mount_more(root: Any) -> None:
    mount_tmpfs(path_in(root, "etc"))


def mount_over(root: Any) -> None:
    mount_tmpfs(path_in(root, "dev"))


def change_flags(root: Any) -> None:
    fd = os.open(path_in(root, "dev"), os.O_PATH)
    syscalls.mount_setattr(fd, abi.MOUNT_ATTR_NODEV)
    os.close(fd)


def unmount_one(root: Any) -> None:
    fd = os.open(path_in(root, "dev/shm"), os.O_PATH)
    syscalls.umount2(f"/proc/self/fd/{fd}".encode(), abi.MNT_DETACH)
    os.close(fd)


def after(interfere: Callable[[Any], None], before: list[tuple[Any, ...]]) -> Any:
    """Return the table that is left: the runtime's mounts are back, as somebody changed them."""
    if interfere is unmount_one:
        return [row for row in before if not row[1].endswith(b"rootfs/dev/shm")]
    if interfere is change_flags:
        return [(*row[:2], row[2] | abi.MOUNT_ATTR_NODEV * row[1].endswith(b"rootfs/dev"), *row[3:])
                for row in before]
    return before


def unseal(root: Any) -> None:
    syscalls.mount_setattr(root.fd, abi.MOUNT_ATTR_RDONLY)


def share(root: Any) -> None:
    syscalls.mount_setattr(root.fd, propagation=abi.MS_SLAVE)


INTERFERENCE = [
    (mount_more, "/etc: tmpfs is mounted there, and isn't in the plan"),
    (mount_over, "/dev: "), (change_flags, "/dev: flags rw,nosuid,nodev"),
    (unmount_one, "/dev/shm: nothing is mounted there"),
    (unseal, "/: flags ro instead of rw"), (share, "/: propagation "),
]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("interfere", "text"), INTERFERENCE)
def test_a_root_that_is_not_as_planned(
    interfere: Callable[[Any], None], text: str, engine: str, bundle: MakeBundle,
    public_path: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    (public_path / "source/deep").mkdir(parents=True)
    prepared = bundle(nested(engine, str(public_path / "source")))

    def body() -> None:
        # What is mounted or unmounted on a shared mount reaches its peers by itself.
        alone = interfere in (mount_over, unmount_one)
        propagation = abi.MS_PRIVATE if alone else abi.MS_SHARED
        runtime = Runtime(prepared, propagation=propagation)
        before = rows()
        monkeypatch.setattr(carry, "_make_unbindable", interfere)
        os.umask(0)
        with pytest.raises(HookError) as caught:
            lifecycle.create_container(
                state.parse(runtime.state().encode()), policy.Policy(), lambda *_words: None)
        line = caught.value.line()
        assert line.startswith(f"verify: {prepared.rootfs}: not as planned, and taken away again: "
                               + text), line
        assert rows() == after(interfere, before)

    in_namespace(body)


@pytest.mark.parametrize("engine", ENGINES)
def test_verify_of_a_carried_plan(engine: str, bundle: MakeBundle, public_path: Any) -> None:
    """The library's way: `Root.verify` says nothing, then what was changed since."""
    (public_path / "source/deep").mkdir(parents=True)
    prepared = bundle(nested(engine, str(public_path / "source")))

    def body() -> None:
        Runtime(prepared)
        spec = load.load(prepared.path)
        plan = planner.plan(spec, live.read(spec))
        os.umask(0)
        with carry.build(plan) as root:
            carry.lay_over(root)
            assert root.verify() == []
            change_flags(root)
            (line,) = root.verify()
            assert line.startswith("/dev: flags rw,nosuid,nodev,strictatime instead of rw,nosuid")

    in_namespace(body)


def test_another_mount_at_the_path_meanwhile(
    bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime goes by the path: if it leads elsewhere, the container doesn't start."""
    prepared = bundle()

    def body() -> None:
        runtime = Runtime(prepared)

        def cover(_root: Any) -> None:
            runtime.mount_tmpfs(runtime.rootfs)

        monkeypatch.setattr(carry, "_make_unbindable", cover)
        os.umask(0)
        with pytest.raises(HookError, match="leads to another mount than the new root"):
            lifecycle.create_container(
                state.parse(runtime.state().encode()), policy.Policy(), lambda *_words: None)

    in_namespace(body)


def test_a_rootfs_that_is_exchanged_between_the_plan_and_the_build(bundle: MakeBundle) -> None:
    prepared = bundle()

    def body() -> None:
        runtime = Runtime(prepared)
        spec = load.load(prepared.path)
        plan = planner.plan(spec, live.read(spec))
        runtime.mount_tmpfs(runtime.rootfs)
        before = rows()
        with pytest.raises(OSError, match="leads to another mount than a moment ago"):
            carry.build(plan)
        assert rows() == before

    in_namespace(body)
