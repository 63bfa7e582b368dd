"""Fixtures of all tests.  The helpers themselves live in `tests.support`."""

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from sandboxfs.kernel import abi, syscalls
from tests.guest import kernel as guest_kernel
from tests.support import RANGED, Bundle, bind, enginetrees, leaks, make_bundle, skips
from tests.support.host import WORKER, isolate

# The machines are small and busy: a time limit for one example would be noise.
hypothesis.settings.register_profile(
    "here",
    deadline=None,
    database=None,
    # Our function-scoped fixture looks for leaks around a whole test; that is as it should be.
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow,
    ],
)
hypothesis.settings.register_profile(
    "ci", hypothesis.settings.get_profile("here"), derandomize=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "here")


def pytest_configure(config: pytest.Config) -> None:
    isolate()
    # A shell's background job ignores them, and so would all payloads.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    config.pluginmanager.register(skips)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is of the matrix and not of this run."""
    from tests.runtimes.matrix import is_wanted

    left_out = [item for item in items if not is_wanted(item)]
    if left_out:
        items[:] = [item for item in items if is_wanted(item)]
        config.hook.pytest_deselected(items=left_out)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say which versions of engines, interpreters and kernels the tests met."""
    reports = [each for kind in terminalreporter.stats.values() for each in kind]
    names = {getattr(each, "nodeid", "").rpartition("/")[0] for each in reports}
    if names & {"tests/guest", "tests/boot"}:
        found = (each.release for each in map(guest_kernel.unpacked, guest_kernel.SUITES) if each)
        terminalreporter.write_line(f"guests' kernels: {', '.join(found)}")
    if not names & {"tests/runtimes", "tests/pythons"}:
        return
    places = ["", *(name for name in enginetrees.RECIPES if not enginetrees.absence(name))]
    terminalreporter.section("engines and runtimes")
    for place in places:
        found = (f"{name} {version}" for name, version in enginetrees.versions(place).items())
        terminalreporter.write_line(f"{place or 'this machine'}: {', '.join(found)}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    from tests.support.schedule import OneGuest

    return OneGuest(config, log)


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves mounts, descriptors, processes, files or loop devices behind.

    ``@pytest.mark.leaks_allowed("processes")`` turns kinds off (`tests.support.leaks`).
    """
    mark = request.node.get_closest_marker("leaks_allowed")
    before = leaks.state()
    yield
    left = leaks.differences(before, mark.args if mark else ())
    if left:
        pytest.fail("the test left something behind:\n" + "\n".join(left), pytrace=False)


@pytest.fixture
def public_path() -> Iterator[Path]:
    """A directory that every user can reach, on disk; `tmp_path` lies below a closed one."""
    path = Path(tempfile.mkdtemp(dir="/var/tmp", prefix=f"tests-{WORKER}-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def bundle(public_path: Path) -> Callable[..., Bundle]:
    """`tests.support.make_bundle` in a directory that every user can reach."""

    def make(*arguments, **options) -> Bundle:
        return make_bundle(public_path, *arguments, **options)

    return make


@pytest.fixture
def subordinate_ids(public_path: Path) -> Iterator[None]:
    """Give the user `RANGED` a name and 65,536 subordinate ids, from 200,000 on.

    The files are bound over /etc's in the mount namespace of the tests: no user is made, and
    nothing is left on the machine.
    """
    passwd = Path("/etc/passwd").read_text("utf-8")
    group = Path("/etc/group").read_text("utf-8")
    files = {
        "passwd": f"{passwd}ranged:x:{RANGED}:{RANGED}::/:/bin/sh\n",
        "group": f"{group}ranged:x:{RANGED}:\n",
        "subuid": "ranged:200000:65536\n",
        "subgid": "ranged:200000:65536\n",
    }
    bound = []
    try:
        for name, content in files.items():
            source = public_path / f"etc-{name}"
            source.write_text(content, "utf-8")
            source.chmod(0o644)
            bind(source, f"/etc/{name}")
            bound.append(name)
        yield
    finally:
        for name in bound:
            syscalls.umount2(f"/etc/{name}".encode(), abi.MNT_DETACH)
