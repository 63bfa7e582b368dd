"""runc and crun inside an initramfs, by --no-pivot: alone, and with our hooks."""

import json

import pytest

from tests.boot import machine
from tests.boot.test_user_root import mounts, program

pytestmark = [pytest.mark.boot, pytest.mark.needs("guest", "runc", "crun")]

INIT = """#!/bin/sh
sandboxfs early-mounts
load-modules
mount -t tmpfs run /run
echo secret >/host-marker
for name in plain hooked; do
    mkdir -p /$name/rootfs
    for each in bin dev proc tmp; do mkdir /$name/rootfs/$each; done
    cp /bin/busybox /$name/rootfs/bin/; ln -s busybox /$name/rootfs/bin/sh
done
for name in plain hooked; do
    echo "== runc $name"
    runc run --no-pivot --bundle /$name runc-$name 2>&1; echo "status $?"
    echo "== crun $name"
    crun --cgroup-manager=disabled run --no-pivot --bundle /$name crun-$name; echo "status $?"
    echo "== written $name"
    ls /$name/rootfs; rm -f /$name/rootfs/new
done
echo "== pivot"
can-pivot
echo "== runc by pivot"
runc run --bundle /plain pivot; echo "status $?"
echo "== runc hooked by pivot"
runc run --bundle /hooked pivot-hooked 2>&1; echo "status $?"
echo "== written by pivot"
ls /hooked/rootfs
echo "== afterwards"
cut -d' ' -f5 /proc/self/mountinfo
echo "== end"
poweroff -f
"""

# What a container shows: what it can write, its mounts, and whether the machine is in sight.
SCRIPT = """PATH=/bin; b=busybox; $b touch /new && $b ls /; $b ls /../host-marker /host-marker;
$b cat /proc/self/mountinfo"""


def document(hooks):
    """Return a config.json, with the hooks or without."""
    capabilities = ["CAP_CHOWN", "CAP_SYS_CHROOT"]
    config = {
        "ociVersion": "1.0.2",
        "process": {
            "args": ["/bin/sh", "-c", SCRIPT], "cwd": "/", "env": ["PATH=/bin"],
            "user": {"uid": 0, "gid": 0},
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
        },
        "root": {"path": "rootfs"},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]},
    }
    if hooks:
        config["hooks"] = {
            stage: [{
                "path": "/bin/sandboxfs", "args": ["sandboxfs", "hook", stage],
                "env": ["PATH=/bin"],
            }]
            for stage in ("createRuntime", "createContainer", "poststop")
        }
    return json.dumps(config)


@pytest.fixture(scope="module")
def runtimes():
    """Boot, and run containers with both runtimes."""
    copies = {**program("/usr/sbin/runc"), **program("/usr/bin/crun")}
    files = {"/plain/config.json": document(False), "/hooked/config.json": document(True)}
    return machine.boot(INIT, files, copies=copies).sections


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_without_hooks_the_rootfs_is_the_root(runtime, runtimes):
    text = runtimes[f"{runtime} plain"]
    assert text.endswith("status 0\n")
    assert "host-marker: No such file or directory" in text
    assert "new" in runtimes["written plain"].split()


def test_with_our_hooks_cruns_root_is_an_overlay_and_the_rootfs_is_left_alone(runtimes):
    text = runtimes["crun hooked"]
    assert text.endswith("status 0\n")
    assert "host-marker: No such file or directory" in text
    table, _rest = mounts(text)
    assert " - overlay " in table["/"]
    assert runtimes["written hooked"].split() == ["bin", "dev", "proc", "tmp"]


def test_with_our_hooks_runc_is_refused_before_it_would_write_to_the_rootfs(runtimes):
    """It enters the directory in which it stands, below the root that the hook would mount."""
    text = runtimes["runc hooked"]
    assert "createRuntime: /hooked/rootfs: runc --no-pivot enters the directory" in text
    assert "crun --no-pivot works" in text
    assert text.endswith("status 1\n")


def test_a_pivot_works_where_the_kernel_has_it_or_there_is_no_container(runtimes):
    assert runtimes["written by pivot"].split() == ["bin", "dev", "proc", "tmp"]
    if runtimes["pivot"] == "False\n":
        assert "pivot_root" in runtimes["runc by pivot"]
        assert runtimes["runc hooked by pivot"].endswith("status 1\n")
        return
    assert runtimes["runc by pivot"].endswith("status 0\n")
    text = runtimes["runc hooked by pivot"]
    assert text.endswith("status 0\n")
    assert "host-marker: No such file or directory" in text
    table, _rest = mounts(text)
    assert " - overlay " in table["/"]


def test_nothing_is_left_on_the_machine(runtimes):
    assert runtimes["afterwards"].split() == [
        "/", "/sys", "/proc", "/dev", "/dev/pts", "/sys/fs/cgroup", "/run",
    ]
