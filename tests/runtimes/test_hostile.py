"""Images that want their own code to run on the host, as root, through the hook."""

import subprocess

import pytest

from tests.runtimes.conftest import NAMES
from tests.runtimes.container import Container
from tests.support import untouched

pytestmark = pytest.mark.needs("root", "overlay", "busybox", "launcher", "gcc")

# What the interpreter imports by itself, or the hook does, and what has that name elsewhere.
MODULES = (
    "sitecustomize", "usercustomize", "json", "os", "encodings/__init__", "site", "sandboxfs",
    "sandboxfs/__init__", "stat", "codecs", "io", "abc", "zipimport", "tomllib", "ctypes",
)
ENVIRONMENT = {
    "PYTHONPATH": ".:/:/evil", "PYTHONHOME": "/evil", "PYTHONSTARTUP": "./sitecustomize.py",
    "PYTHONUSERBASE": "/evil", "PYTHONINSPECT": "1", "PYTHONWARNINGS": "error",
    "PYTHONVERBOSE": "1",
    "PYTHONBREAKPOINT": "sitecustomize.x", "LD_PRELOAD": "./evil.so", "LD_AUDIT": "./evil.so",
    "LD_LIBRARY_PATH": ".", "HOME": "/evil", "SANDBOXFS_CONFIG": "/evil/config.toml",
    "MALLOC_TRACE": "./trace", "GCONV_PATH": ".", "TMPDIR": "/evil",
}
PRELOADED = """
#include <fcntl.h>
__attribute__((constructor)) static void evil(void) { open(MARKER, O_CREAT | O_WRONLY, 0644); }
unsigned la_version(unsigned version) { evil(); return version; }
"""


@pytest.fixture
def marker(place):
    """The file that code of the image makes on the host, once any of it runs there."""
    directory = place.directory("host")
    directory.chmod(0o777)
    path = directory / "evil was here"
    for name in MODULES:
        module = place.image / f"{name}.py"
        module.parent.mkdir(exist_ok=True)
        # Some of them are imported before there is an open().
        module.write_text(
            f"import posix\nposix.close(posix.open({str(path)!r}, posix.O_CREAT))\n", "utf-8")
    (place.image / "evil").mkdir()
    source = place.path / "evil.c"
    source.write_text(PRELOADED.replace("MARKER", f'"{path}"'), "utf-8")
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", place.image / "evil.so", source], check=True)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_image_runs_in_the_hook(runtime_of, name, place, hooks, marker):
    runtime = runtime_of(name)
    place.give_image_to(runtime.uid or 0)
    container = Container(
        "echo $PYTHONPATH $LD_PRELOAD; grep ' / / ' /proc/self/mountinfo", env=ENVIRONMENT)
    runtime.run(Container(), place.rootfs)
    with untouched(place.path):
        done = runtime.run(container, place.rootfs, hooks)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    # The payload has its environment.
    assert first == f"{ENVIRONMENT['PYTHONPATH']} ./evil.so"
    assert " overlay " in second
    assert not marker.exists()


@pytest.mark.parametrize("name", ["PYTHONPATH", "LD_PRELOAD"])
def test_a_careless_registration_does_run_it(runtime_of, place, hooks, marker, name):
    """The control: runc gives a hook without `env` the image's, and its root to stand in."""

    def careless(hook):
        del hook["env"]
        hook.update(path="/usr/bin/python3", args=["python3", "-c", "pass"])

    container = Container(env={name: ENVIRONMENT[name]})
    runtime_of("runc").run(container, place.rootfs, hooks.changed(careless, "createContainer"))
    assert marker.exists()
