"""Volumes of pods on an older kernel, whose detached mounts can't be cloned or mounted onto."""

import pytest

from tests.guest import guest

pytestmark = pytest.mark.guest

# Two containers as a runtime leaves them, a mount inside of the volume, and one of them in a
# mount namespace that the master isn't mounted in.
PODS = r"""
import json, os, subprocess, sys
sys.path[:0] = ["/guest/checkout"]
from sandboxfs.kernel import abi, fscontext, syscalls

START = "import sys; sys.path[:0] = ['/guest/checkout']; import sandboxfs.__main__ as m; m.main()"
COMMAND = ["/usr/bin/python3", "-ISB", "-c", START]


def mount(path, fill=b"0755"):
    os.makedirs(path, exist_ok=True)
    made = fscontext.create(b"tmpfs", [fscontext.string(b"mode", fill)], 0)
    syscalls.move_mount_path(made, abi.AT_FDCWD, path.encode())
    os.close(made)


def private():
    syscalls.unshare(abi.CLONE_NEWNS)
    root = syscalls.open_tree(abi.AT_FDCWD, b"/", 0)
    syscalls.mount_setattr(root, propagation=abi.MS_PRIVATE, recursive=True)
    os.close(root)


def container(name, mounts, options=()):
    bundle = f"/run/bundles/{name}"
    rootfs = bundle + "/rootfs"
    os.makedirs(rootfs)
    hint = {"source": "/volumes/cache", "type": "tmpfs", "share": "pod", "options": "size=1M"}
    said = {f"dev.sandboxfs.mount.cache.{key}": hint[key] for key in hint}
    document = {
        "ociVersion": "1.0.2", "root": {"path": "rootfs"},
        "mounts": [{"destination": at, "source": source, "type": "tmpfs", "options": list(options)}
                   for at, source in mounts],
        "annotations": {"dev.sandboxfs.pod": "p1", **said},
        "process": {"args": ["/bin/true"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "linux": {"namespaces": [{"type": "mount"}]},
    }
    with open(bundle + "/config.json", "w") as file:
        json.dump(document, file)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        private()
        mount(rootfs)
        for at, _source in mounts:
            mount(rootfs + at)
        os.write(writer, b".")
        os.read(os.pipe()[0], 1)
        os._exit(0)
    os.read(reader, 1)
    return {"ociVersion": "1.0.2", "id": name, "status": "created", "pid": child,
            "bundle": bundle}, f"/proc/{child}/root{rootfs}"


def hook(name, state, prefix=()):
    done = subprocess.run([*prefix, *COMMAND, "hook", name], input=json.dumps(state), text=True,
                          capture_output=True)
    print(name, state["id"], done.returncode, done.stderr, flush=True)


mount("/run")
one, in_one = container("one", [("/data", "/volumes/cache"), ("/data/inner", "tmpfs")],
                        ["ro", "nosuid", "nodev"])
two, in_two = container("two", [("/data", "/volumes/cache")])
hook("createRuntime", one)
child = os.fork()
if child == 0:
    # The master is in the namespace around this one alone.
    private()
    for line in open("/proc/self/mountinfo"):
        point = line.split()[4]
        if "/sandboxfs/pods/" in point:
            syscalls.umount2(point.encode(), abi.MNT_DETACH)
    hook("createRuntime", two)
    os._exit(0)
os.waitpid(child, 0)
with open(in_two + "/data/file", "w") as file:
    file.write("shared")
print("read:", open(in_one + "/data/file").read())
print("inner:", os.stat(in_one + "/data/inner").st_dev != os.stat(in_one + "/data").st_dev,
      os.listdir(in_two + "/data"))
try:
    open(in_one + "/data/mine", "w")
except OSError as error:
    print("write:", error.strerror)
for each in (one, two):
    os.kill(each["pid"], 9)
    os.waitpid(each["pid"], 0)
    hook("poststop", each)
print("left:", os.listdir("/run/sandboxfs/pods"), "pods/" in open("/proc/self/mountinfo").read())
"""


@pytest.mark.needs("guest")
def test_pods_on_a_kernel_without_nesting_in_detached_trees():
    outcome = guest.boot({"code": PODS, "arguments": ["-c"]}, timeout=60)
    for line in ("createRuntime one 0 \n", "createRuntime two 0 \n", "read: shared\n",
                 "inner: True ['file', 'inner']\n", "write: Read-only file system\n",
                 "poststop one 0 \n", "poststop two 0 \n", "left: ['lock'] False\n"):
        assert line in outcome.output, outcome.output
