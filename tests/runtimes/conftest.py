"""The runtimes, started once a worker; images; and what may not be left after any container."""

import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from sandboxfs.kernel import abi, syscalls
from tests.runtimes import compatibility
from tests.runtimes.cases import Place
from tests.runtimes.matrix import MACHINE, REFUSED, is_wanted
from tests.runtimes.registration import Hooks, install
from tests.runtimes.runtimes import (
    FRONT,
    By,
    Containerd,
    Crun,
    Docker,
    Podman,
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
KINDS: dict[str, type[Runtime]] = {
    "runc": Runc, "crun": Crun, "containerd": Containerd, "podman": Podman,
    "podman-rootless": RootlessPodman, "docker": Docker,
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is of the matrix and not of this run."""
    left_out = [item for item in items if not is_wanted(item)]
    if left_out:
        items[:] = [item for item in items if is_wanted(item)]
        config.hook.pytest_deselected(items=left_out)


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
    result = "failed" if report.failed else "refused" if REFUSED in item.stash else "held"
    compatibility.record(compatibility.Outcome(kind, title, way, case, result))
    if report.failed and tree and (kind, title) not in compatibility.listed():
        told_only(report, f"{kind} {title}")
    return report


@pytest.fixture(scope="session", autouse=True)
def started(request: pytest.FixtureRequest) -> Iterator[dict[str, Runtime]]:
    """All runtimes that the tests want, ready; before the first test's leak check begins."""
    if os.geteuid() != 0:
        yield {}
        return
    wanted = dict.fromkeys(NAMES)
    for item in request.session.items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        wanted.update({each: None for each in values if isinstance(each, str)
                       and each.partition("@")[0] in KINDS})
    home = Path(tempfile.mkdtemp(dir="/var/tmp", prefix=f"tests-{WORKER}-"))
    home.chmod(0o755)
    bound = _name_the_user(home)
    # What a runtime of this machine needs: crun and podman refuse a hybrid hierarchy.
    machine, unified, trees = Space(), Unified(), dict[str, Space]()
    runtimes: dict[str, Runtime] = {}
    try:
        for name in wanted:
            kind, _, tree = name.partition("@")
            if any(capabilities.absence(each) for each in needed_by(name)):
                continue
            if tree and tree not in trees:
                trees[tree] = Tree(tree)
            space = trees[tree] if tree else machine if KINDS[kind].program == "runc" else unified
            runtimes[name] = KINDS[kind](home, name, space)
        yield runtimes
    finally:
        for runtime in runtimes.values():
            runtime.close()
        for each in (unified, *trees.values()):
            each.close()
        for path in reversed(bound):
            syscalls.umount2(path.encode(), abi.MNT_DETACH)
        shutil.rmtree(home)


def needed_by(name: str) -> list[str]:
    """Return the capabilities that a runtime needs of the machine."""
    kind, _, tree = name.partition("@")
    rootless = ["user-namespaces", "newuidmap"] if kind == "podman-rootless" else []
    return [f"tree-{tree}" if tree else kind.partition("-")[0], *rootless]


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
