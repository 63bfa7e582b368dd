"""The runtimes, started once a worker; images; and what may not be left after any container."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sandboxfs.kernel import abi, syscalls
from tests.runtimes.cases import Place
from tests.runtimes.registration import Hooks, install
from tests.runtimes.runtimes import (
    Containerd,
    Crun,
    Podman,
    RootlessPodman,
    Runc,
    Runtime,
    Unified,
)
from tests.support import RANGED, bind, busybox_rootfs, capabilities, needs, table
from tests.support.host import WORKER

NAMES = ("runc", "crun", "containerd", "podman", "podman-rootless")


@pytest.fixture(scope="session", autouse=True)
def started() -> Iterator[dict[str, Runtime]]:
    """All runtimes that are installed, ready; before the first test's leak check begins."""
    if os.geteuid() != 0:
        yield {}
        return
    home = Path(tempfile.mkdtemp(dir="/var/tmp", prefix=f"tests-{WORKER}-"))
    home.chmod(0o755)
    bound = _name_the_user(home)
    unified = Unified()
    makers: dict[str, Callable[[], Runtime]] = {
        "runc": lambda: Runc(home), "crun": lambda: Crun(home, unified),
        "containerd": lambda: Containerd(home), "podman": lambda: Podman(home, unified),
        "podman-rootless": lambda: RootlessPodman(home, unified),
    }
    runtimes: dict[str, Runtime] = {}
    try:
        for name, make in makers.items():
            if capabilities.absence(program_of(name)) is None:
                runtimes[name] = make()
        yield runtimes
    finally:
        for runtime in runtimes.values():
            runtime.close()
        unified.close()
        for path in reversed(bound):
            syscalls.umount2(path.encode(), abi.MNT_DETACH)
        shutil.rmtree(home)


def program_of(name: str) -> str:
    """Return the capability that a runtime needs of the machine."""
    return name.partition("-")[0]


def _name_the_user(home: Path) -> list[str]:
    """Give `RANGED` a name and subordinate ids for as long as the runtimes run."""
    users = Path("/etc/passwd").read_text("utf-8")
    texts = {
        "passwd": f"{users}ranged:x:{RANGED}:{RANGED}::/:/bin/sh\n",
        "group": f"{Path('/etc/group').read_text('utf-8')}ranged:x:{RANGED}:\n",
        "subuid": "ranged:200000:65536\n",
        "subgid": "ranged:200000:65536\n",
    }
    bound = []
    for name, text in texts.items():
        source = home / f"etc-{name}"
        source.write_text(text, "utf-8")
        source.chmod(0o644)
        bind(source, f"/etc/{name}")
        bound.append(f"/etc/{name}")
    return bound


@pytest.fixture
def runtime_of(started: dict[str, Runtime]) -> Callable[[str], Runtime]:
    """Return a runtime by its name; a skip if it isn't installed or can't be used here."""

    def find(name: str) -> Runtime:
        needs(program_of(name))
        if name == "podman-rootless":
            needs("user-namespaces", "newuidmap")
        return started[name]

    return find


@pytest.fixture
def place(public_path: Path) -> Iterator[Place]:
    """A busybox image, and room for what a case lays out; what it mounts there is taken away."""
    rootfs = busybox_rootfs(public_path / "image")
    (rootfs / "etc" / "moved").write_text("old\n", "utf-8")
    yield Place(public_path, rootfs)
    below = os.fsencode(public_path) + b"/"
    for record in reversed(table()):
        if record.mountpoint.startswith(below):
            syscalls.umount2(record.mountpoint, abi.MNT_DETACH)


@pytest.fixture(scope="session")
def hooks(started: dict[str, Runtime]) -> Iterator[Hooks]:
    """The hooks as the product registers them."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix=f"tests-{WORKER}-") as path:
        os.chmod(path, 0o755)
        yield install(Path(path))


@pytest.fixture(autouse=True)
def nothing_of_a_container_left(started: dict[str, Runtime]) -> Iterator[None]:
    """Fail if a container's state or cgroup is left, or more of ours than a log and a lock."""
    before = {each for runtime in started.values() for each in runtime.left()}
    yield
    left = [each for runtime in started.values() for each in runtime.left() if each not in before]
    for state in {Path(runtime.state) for runtime in started.values()}:
        if state.is_dir():
            left += [str(each) for each in state.rglob("*") if not each.is_dir()
                     and each.name not in ("hook.log", "hook.log.1", "lock")]
            shutil.rmtree(state)
    assert not left, left
