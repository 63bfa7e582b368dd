"""The unit, launcher, harness and kernel tests on the interpreters of other Debian releases.

Each runs in a tree of that release (`enter`), with its own Python, pytest and libraries.
"""

import faulthandler
import os
import re
import subprocess
import sys

import pytest

from tests.support import CHECKOUT
from tests.support.commands import ENVIRONMENT

pytestmark = pytest.mark.needs("root", "overlay")

# The longest that a part of the tests may take, where others run beside it.
SECONDS = 800
SCRIPT = """set -e
python3 --version
python3 -m sandboxfs launcher .venv/bin/sandboxfs
exec python3 -m pytest -p no:cacheprovider -q --deselect "$DESELECTED" "$@"
"""
# About containerd 1.x, which the trees have a later one of.
DESELECTED = "tests/kernel/test_hooks_install.py::test_the_table_of_runc_is_needed"

KERNEL = sorted(path.name for path in (CHECKOUT / "tests" / "kernel").glob("test_*.py"))
# What containers of the tree's runtimes come to is told by tests/runtimes, not by a Python.
LEFT_OUT = ("test_pods_runtimes.py", "test_behaviours.py")
OTHERS = [name for name in KERNEL if name not in LEFT_OUT and "harness" not in name]
PARTS: dict[str, list[str]] = {
    # The project's own files are the same on every Python, and what it promises to tests isn't.
    "unit": ["tests/unit", "--ignore-glob=*/test_project_*.py"],
    "behaviours": ["tests/kernel/test_behaviours.py"],
    "harness": [f"tests/kernel/{name}" for name in KERNEL if "harness" in name],
    "kernel, first": [f"tests/kernel/{name}" for name in OTHERS[: len(OTHERS) // 2]],
    "kernel, second": [f"tests/kernel/{name}" for name in OTHERS[len(OTHERS) // 2 :]],
}
# What has failed on a new interpreter before: how we start, what is imported, who is whose child.
SAMPLES: dict[str, list[str]] = {
    "sid": [
        "tests/unit/test_archive.py", "tests/unit/test_spec_load.py", "tests/unit/test_system.py",
        *(f"tests/kernel/test_{name}.py" for name in (
            "demo", "harness_pool", "hook_start", "launcher", "start", "vfork")),
    ],
    "trixie": ["tests/unit/test_archive.py", "tests/kernel/test_start.py"],
}


def run_there(tree: str, tests: list[str]) -> None:
    """Run tests with the Python of a tree; its failures are ours, its words too."""
    faulthandler.cancel_dump_traceback_later()  # many tests take longer than one may
    environment = dict(ENVIRONMENT)
    if "CI" in os.environ:
        environment["CI"] = os.environ["CI"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.pythons.enter", tree, "sh", "-c",
         SCRIPT.replace("$DESELECTED", DESELECTED), "sh", *tests],
        cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False,
        timeout=SECONDS,
    )
    print(done.stdout.partition("\n")[0], *done.stdout.splitlines()[-12:], sep="\n")
    if done.returncode:
        pytest.fail(f"{done.stdout[-20000:]}\n{done.stderr[-2000:]}", pytrace=False)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-2000:]
    assert int(passed[1]) > 10


@pytest.mark.parametrize("tree", [
    pytest.param(tree, marks=pytest.mark.needs(f"tree-{tree}")) for tree in SAMPLES
])
def test_a_sample_passes(tree: str) -> None:
    run_there(tree, SAMPLES[tree])


@pytest.mark.matrix
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("tree", [
    pytest.param(tree, marks=pytest.mark.needs(f"tree-{tree}")) for tree in SAMPLES
])
def test_all_passes(tree: str, part: str) -> None:
    run_there(tree, PARTS[part])


@pytest.mark.needs("tree-sid")
def test_a_failure_there_is_a_failure_here(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The control, with a test that fails: /tmp is the same there."""
    failing = tmp_path_factory.mktemp("control") / "test_control.py"
    failing.write_text("import sys\ndef test_it():\n    assert sys.version_info < (3, 12)\n")
    with pytest.raises(pytest.fail.Exception, match="1 failed"):
        run_there("sid", [str(failing), "--rootdir", str(failing.parent)])
