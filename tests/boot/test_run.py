"""`run` inside an initramfs, where pivot_root may fail: nothing of the machine stays reachable."""

import json
from pathlib import Path

import pytest

from sandboxfs.process.credentials import NAMES
from tests.boot import machine

pytestmark = [pytest.mark.boot, pytest.mark.needs("guest")]

BOUND = ("usr", "lib", "lib64", "bin", "sandboxfs")
TRICKS = [
    "dots", "own_descriptors", "other_processes", "chroot_with_descriptor",
    "chroot_with_directory", "chroot_up", "own_namespace", "namespace_of_1", "mount_rootfs",
    "user_namespace", "user_namespace_pivot", "move_root", "unmount_up", "unmount_root",
]
CONTROL = ["chroot_with_descriptor", "chroot_with_directory", "own_namespace"]

START = """#!/bin/sh
sandboxfs early-mounts
load-modules
echo secret >/host-marker
mount -t tmpfs run /run; echo secret >/run/host-marker
mkdir -p /container/tmp /container/proc /bundle /chroot/tmp /chroot/proc
for name in usr lib lib64 bin sandboxfs; do mkdir /container/$name /chroot/$name; done
cp /escape.py /container/
cp /escape.py /chroot/
run() { sandboxfs run --bundle /bundle "$@"; echo "status $?"; }
escape="python3 -ISB /escape.py"
"""

CAPABILITIES = f"""{START}
echo "== pivot"
can-pivot
echo "== is it one"
python3 -ISB -c '
import sys; sys.path[:0] = ["/sandboxfs"]
from sandboxfs.boot import is_initramfs
print(is_initramfs())'
echo "== mounts"
run --config /most.json --verify -- cat /proc/self/mountinfo
echo "== tricks"
run --config /most.json --strict -- $escape
echo "== machine afterwards"
ls /host-marker /run/host-marker /proc/self/mountinfo /dev/console /sys/kernel/mm
echo "== strict"
run --config /all.json --strict -- echo inside
echo "== all but the last tricks"
run --config /all.json -- $escape {" ".join(TRICKS[:-2])}
echo "== uncovered"
run --config /all.json -- $escape unmount_root
echo "== mounts of the machine"
cut -d' ' -f5 /proc/self/mountinfo
echo "== end"
poweroff -f
"""

USERS = f"""{START}
echo "== view of the machine"
sandboxfs run -- sh -c 'cat /host-marker; rm /host-marker; touch /new; ls /new' && ls /host-marker
ls /new
echo "== user namespace"
run --config /user.json --strict --verify -- $escape
echo "== unprivileged"
cat >/as-user <<'END'
import os, sys
os.setgroups([]); os.setgid(1000); os.setuid(1000)
os.execv("/bin/sandboxfs", ["sandboxfs", "run", *sys.argv[1:]])
END
python3 -ISB /as-user -- sh -c 'id -u; touch /new && ls /new; ls /run/host-marker'
echo "status $?"
echo "== unprivileged, strict"
python3 -ISB /as-user --strict -- echo inside
echo "status $?"
echo "== control"
unshare -m sh -c '
for name in usr lib lib64 bin sandboxfs; do mount -o bind /$name /chroot/$name; done
mount -t proc proc /chroot/proc
exec chroot /chroot {" ".join(["python3 -ISB /escape.py", *CONTROL])}'
echo "== end"
poweroff -f
"""


def document(bounding, mappings=False):
    """Return a config.json: the machine's Python in a container, with some capabilities."""
    sets = dict.fromkeys(("bounding", "effective", "permitted"), bounding)
    mounts = [
        {"destination": f"/{name}", "source": f"/{name}", "options": ["rbind", "ro"]}
        for name in BOUND
    ]
    mounts.append({"destination": "/proc", "type": "proc", "source": "proc"})
    linux = {"namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts")]}
    if mappings:
        linux["namespaces"].append({"type": "user"})
        linux["uidMappings"] = linux["gidMappings"] = [
            {"containerID": 0, "hostID": 100000, "size": 65536}
        ]
    return json.dumps({
        "ociVersion": "1.0.2", "root": {"path": "/container"}, "mounts": mounts, "linux": linux,
        "process": {
            "args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0},
            "env": ["PATH=/bin:/usr/bin"], "capabilities": sets,
        },
    })


FILES = {
    "/escape.py": (Path(__file__).parent / "escape.py").read_bytes(),
    "/most.json": document([name for name in NAMES if name != "CAP_SYS_ADMIN"]),
    "/all.json": document(list(NAMES)),
    "/user.json": document(list(NAMES), mappings=True),
}


@pytest.fixture(scope="module")
def inside():
    """Boot, and try to get out of containers that root made."""
    return machine.boot(CAPABILITIES, FILES).sections


@pytest.fixture(scope="module")
def users():
    """Boot, and try it with user namespaces and without a container."""
    return machine.boot(USERS, FILES).sections


def results(text):
    """Return {trick: "in" or "out"} of what escape.py printed."""
    pairs = [line.split()[:2] for line in text.splitlines() if line.split()[:1] != ["status"]]
    return {name: result for name, result in pairs if name in TRICKS}


def test_this_is_an_initramfs(inside):
    assert inside["is it one"] == "True\n"


def test_a_view_of_the_initramfs_itself(users):
    """The default view: an overlay over / of the initramfs, which it doesn't write to."""
    text = users["view of the machine"]
    assert text.startswith("secret\n/new\n")
    assert "\n/host-marker\n" in text
    assert text.endswith("ls: /new: No such file or directory\n")


def test_the_payload_sees_its_own_mounts_only(inside):
    lines = inside["mounts"].splitlines()
    assert lines.pop() == "status 0"
    assert sorted(line.split()[4] for line in lines) == sorted(
        ["/", "/proc", "/tmp", *(f"/{name}" for name in BOUND)]
    )
    root = next(line for line in lines if line.split()[4] == "/")
    assert " - overlay overlay " in root


def test_without_the_capability_nothing_gets_out(inside):
    assert results(inside["tricks"]) == dict.fromkeys(TRICKS, "in")
    assert inside["tricks"].endswith("status 0\n")


def test_the_machine_keeps_its_mounts(inside):
    assert "No such file" not in inside["machine afterwards"]
    assert inside["mounts of the machine"].split() == [
        "/", "/sys", "/proc", "/dev", "/dev/pts", "/sys/fs/cgroup", "/run",
    ]


def pivots(inside):
    """Return whether pivot_root leaves an initramfs there: then nothing lies below the new root."""
    return inside["pivot"] == "True\n"


def test_strict_refuses_the_capability_that_could_uncover_the_initramfs(inside):
    text = inside["strict"]
    if pivots(inside):
        assert text == "inside\nstatus 0\n"
        return
    assert "sandboxfs: process.capabilities: pivot_root /: EINVAL: the root is an initramfs" in text
    assert "hint: without the capability" in text
    assert text.endswith("status 125\n")
    assert "inside" not in text


def test_with_the_capability_only_unmounting_ones_own_root_gets_out(inside):
    """What the documentation says: and then the bare initramfs is there, none of its mounts."""
    text = inside["all but the last tricks"]
    assert results(text) == dict.fromkeys(TRICKS[:-2], "in")
    warned = "sandboxfs: warning: the root is an initramfs, which can't be pivoted away" in text
    assert warned != pivots(inside)
    if pivots(inside):
        assert results(inside["uncovered"]) == {"unmount_root": "in"}
        return
    assert results(inside["uncovered"]) == {"unmount_root": "out"}
    assert "{'run': [], 'proc': [], 'sys': []}" in inside["uncovered"]


def test_in_a_user_namespace_made_by_root_it_is_locked(users):
    text = users["user namespace"]
    assert results(text) == dict.fromkeys(TRICKS, "in")
    assert text.endswith("status 0\n")


def test_an_unprivileged_user_has_a_view_too(users, inside):
    text = users["unprivileged"]
    # /run belongs to the view: a mount of the machine's, with an overlay of its own.
    assert text.startswith("0\n/new\n/run/host-marker\n")
    assert text.endswith("status 0\n")
    status = 0 if pivots(inside) else 125
    assert f"status {status}" in users["unprivileged, strict"]


def test_the_tricks_work_where_there_is_only_chroot(users):
    """The control: a plain chroot is left by them, and by joining one's own namespace again."""
    assert results(users["control"]) == dict.fromkeys(CONTROL, "out")
