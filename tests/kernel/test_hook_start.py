"""What a hook loads: the exact set, since every container's start waits for it."""

import subprocess
from collections.abc import Callable

import pytest

from sandboxfs import archive
from tests.kernel.test_start import OTHERS
from tests.support import LAUNCHER, Bundle, in_namespace
from tests.support.hooks import Runtime

pytestmark = pytest.mark.needs("root", "overlay", "busybox", "launcher")


def loaded(prepared: Bundle, *command: str) -> set[str]:
    """Return the modules that a command of the launcher's interpreter imports by itself."""

    def body() -> list[str]:
        done = subprocess.run(command, input=Runtime(prepared).state(), capture_output=True,
                              text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stderr.splitlines()

    lines = [line for line in in_namespace(body) if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines[1:]}


def start_without_archive() -> tuple[list[str], str]:
    """Return (interpreter with options, the launcher's program without its archive)."""
    shebang, paths, *_ = LAUNCHER.read_text("utf-8").splitlines()
    python = [shebang[2:].split()[0], "-ISB", "-X", "importtime", "-c"]
    return python, f"{paths}\nfrom sandboxfs.__main__ import main; sys.exit(main())"


@pytest.mark.parametrize(("hook", "kind"), [
    ("createContainer", "container"), ("createRuntime", "hook"), ("poststop", "hook"),
])
def test_a_hook_loads_exactly_this(
    hook: str, kind: str, bundle: Callable[..., Bundle]
) -> None:
    prepared = bundle()
    python, program = start_without_archive()
    bare = loaded(prepared, *python, "pass")
    found = loaded(prepared, *python, program, "hook", hook) - bare
    ours = {name for name in found if name.startswith("sandboxfs")}
    # The store is looked for by poststop always, by the others for containers of a pod.
    store = {"sandboxfs.state", "sandboxfs.state.directory"}
    if kind == "hook":
        store.add("sandboxfs.spec.annotations")
    assert ours == set(archive.SETS[kind]) - (store if hook != "poststop" else set())
    assert found - ours <= OTHERS


@pytest.mark.parametrize(("words", "kind"), [
    (["hook", "createContainer"], "container"), (["hook", "createRuntime"], "hook"),
    (["hook", "poststop", "--config", "createContainer"], "hook"), (["run"], "hot"),
    (["run", "createContainer"], "hot"), ([], "hot"),
])
def test_the_launcher_takes_the_archive_of_the_command(words: list[str], kind: str) -> None:
    lines = "\n".join(archive.start_lines())
    shebang = LAUNCHER.read_text("utf-8").splitlines()[0]
    program = f"import marshal, sys\n{lines}\nprint(len([m for m in sys.modules if 'sandb' in m]))"
    done = subprocess.run([shebang[2:].split()[0], "-ISB", "-c", program, *words],
                          capture_output=True, text=True, check=True)
    assert done.stdout == f"{len(archive.SETS[kind])}\n"
