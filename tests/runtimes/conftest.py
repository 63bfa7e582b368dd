"""The runtimes, started once a worker; images; and what may not be left after any container."""

import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path

import pytest

from sandboxfs.kernel import abi, syscalls
from tests.runtimes import compatibility
from tests.runtimes.cases import Place
from tests.runtimes.cri import Cri
from tests.runtimes.matrix import MACHINE, NOT_CALLED, REFUSED
from tests.runtimes.registration import Hooks, install
from tests.runtimes.runtimes import (
    FRONT,
    By,
    Containerd,
    Crun,
    Docker,
    Podman,
    PodmanImage,
    RootlessPodman,
    Runc,
    Runtime,
)
from tests.runtimes.spaces import Space, Tree, Unified, named
from tests.support import bind, busybox_rootfs, capabilities, enginetrees, needs, table
from tests.support.host import WORKER
from tests.support.skips import told_only

# Those of this machine, which every test of this folder runs on.
NAMES = MACHINE
# Pods have a weight in any case, which a cgroup2 without controllers doesn't take.
NEED_CONTROLLERS = ("cri",)
KINDS: dict[str, type[Runtime]] = {
    "runc": Runc, "crun": Crun, "containerd": Containerd, "podman": Podman,
    "podman-rootless": RootlessPodman, "podman-image": PodmanImage, "docker": Docker, "cri": Cri,
}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Write down what a field of the table came to; an unlisted version's failure is only told."""
    report = yield
    mark = item.get_closest_marker("combination")
    if mark is None or report.skipped or (report.passed and report.when != "call"):
        return report
    engine, way, case = mark.args
    kind, _, tree = engine.partition("@")
    title = compatibility.title(kind, enginetrees.versions(tree))
    result = ("failed" if report.failed else "refused" if REFUSED in item.stash else
              "not called" if NOT_CALLED in item.stash else "held")
    compatibility.record(compatibility.Outcome(kind, title, way, case, result))
    if report.failed and tree and (kind, title) not in compatibility.listed():
        told_only(report, f"{kind} {title}")
    return report


class Started(dict[str, Runtime]):
    """The runtimes and engines that are ready, by name; `start` adds one that can be had here."""

    def __init__(self, home: Path) -> None:
        super().__init__()
        self.home = home
        self.machine = Space()
        # Those of this machine run here, as far as they like a hybrid cgroup hierarchy.
        self.unified = Unified()
        self.trees: dict[tuple[str, bool], Space] = {}

    def start(self, names: Iterable[str]) -> None:
        for name in names:
            kind, _, tree = name.partition("@")
            if name in self or any(capabilities.absence(each) for each in needed_by(name)):
                continue
            space = self.machine if KINDS[kind].program == "runc" else self.unified
            if tree:
                key = (tree, kind not in NEED_CONTROLLERS)
                if key not in self.trees:
                    self.trees[key] = Tree(*key)
                space = self.trees[key]
            self[name] = KINDS[kind](self.home, name, space)

    def close(self) -> None:
        for runtime in self.values():
            runtime.close()
        for space in (self.unified, *self.trees.values()):
            space.close()


STARTED = pytest.StashKey[Started]()


@pytest.fixture(scope="session", autouse=True)
def started(request: pytest.FixtureRequest) -> Iterator[dict[str, Runtime]]:
    """This machine's runtimes, ready before the first test's leak check begins, and others later.

    An engine of a tree starts before the first test that names it, and its leak check.
    """
    if os.geteuid() != 0:
        yield {}
        return
    home = Path(tempfile.mkdtemp(dir="/var/tmp", prefix=f"tests-{WORKER}-"))
    home.chmod(0o755)
    bound = _name_the_user(home)
    runtimes = Started(home)
    request.session.stash[STARTED] = runtimes
    try:
        runtimes.start([*NAMES, *request.session.stash.get(WANTED, [])])
        yield runtimes
    finally:
        runtimes.close()
        for path in reversed(bound):
            syscalls.umount2(path.encode(), abi.MNT_DETACH)
        shutil.rmtree(home)


WANTED = pytest.StashKey[list[str]]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Start the engine that a test names, before any of its fixtures."""
    mark = item.get_closest_marker("combination")
    wanted = [mark.args[0]] if mark else []
    item.session.stash[WANTED] = wanted
    if STARTED in item.session.stash:
        item.session.stash[STARTED].start(wanted)


def needed_by(name: str) -> list[str]:
    """Return the capabilities that a runtime needs of the machine."""
    kind, _, tree = name.partition("@")
    rootless = ["user-namespaces", "newuidmap"] if kind == "podman-rootless" else []
    program = {"cri": "containerd"}.get(kind, kind.partition("-")[0])
    return [f"tree-{tree}" if tree else program, *rootless]


def _name_the_user(home: Path) -> list[str]:
    """Give `RANGED` a name and subordinate ids for as long as the runtimes run."""
    texts = named("/etc")
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
        needs(*needed_by(name))
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
def hooks_of(started: dict[str, Runtime]) -> Iterator[Callable[[str], Hooks]]:
    """Return the hooks for a runtime, as the product registers them where it runs."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix=f"tests-{WORKER}-") as path:
        os.chmod(path, 0o755)
        made: dict[str, Hooks] = {}

        def find(name: str) -> Hooks:
            place = name.partition("@")[2] or "host"
            if place not in made:
                space = started[name].space if place != "host" else Space()
                made[place] = install(Path(path, place), space=space)
            return made[place]

        yield find


@pytest.fixture(scope="session")
def by(hooks_of: Callable[[str], Hooks]) -> Callable[[str, str], By]:
    """Return what `Runtime.run` is told to use the product in a way."""
    return lambda name, way: FRONT if way == "runtime" else hooks_of(name)


@pytest.fixture(scope="session")
def hooks(hooks_of: Callable[[str], Hooks]) -> Hooks:
    """The hooks as the product registers them on this machine."""
    return hooks_of("runc")


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
