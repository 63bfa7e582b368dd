"""What tests may need of a machine, each found out by trying.

A probe returns None where the capability is there, else the reason why not.  What the set-up
installs or the documented way of running the tests gives (root) is never "absent" in CI: there
it is a failure (`skips`).
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from pyroute2 import IPRoute, NetlinkError

from sandboxfs.kernel import abi, fscontext, syscalls, vfork
from tests.support import enginetrees
from tests.support.host import CHECKOUT, WORKER, mount_tmpfs
from tests.support.namespace import UNPRIVILEGED, ChildFailed, in_namespace

Probe = Callable[[], str | None]


def _program(name: str, package: str) -> Probe:
    def probe() -> str | None:
        found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        return None if found else f"{name} is not installed (package {package})"

    return probe


def _file(path: str, package: str) -> Probe:
    return lambda: None if os.path.exists(path) else f"{path} is missing (package {package})"


def _root() -> str | None:
    return None if os.geteuid() == 0 else "the tests don't run as root"


def _tried(function: Callable[[], object]) -> Probe:
    """Make a probe of a function that raises OSError where the kernel can't."""

    def probe() -> str | None:
        try:
            in_namespace(function)
        except (OSError, NetlinkError, ChildFailed) as error:
            return f"{getattr(error, 'call', function.__name__)}: {error}"
        return None

    return probe


def _overlay_over(work: int) -> int:
    """Return a detached overlay with two directories of the tmpfs `work`."""
    fds = []
    for name in ("lower", "upper", "work"):
        os.mkdir(name, dir_fd=work)
        fds.append(os.open(name, os.O_PATH | os.O_CLOEXEC, dir_fd=work))
    keys = (b"lowerdir+", b"upperdir", b"workdir")
    settings = [fscontext.descriptor(key, fd) for key, fd in zip(keys, fds, strict=True)]
    try:
        return int(fscontext.create(b"overlay", settings, 0))
    finally:
        for fd in fds:
            os.close(fd)


def _overlay() -> None:
    work = fscontext.create(b"tmpfs", [], 0)
    os.close(_overlay_over(work))
    os.close(work)


def _detached_nesting() -> None:
    """Mount onto a tree that isn't attached anywhere (Linux 6.15)."""
    outer = fscontext.create(b"tmpfs", [], 0)
    inner = fscontext.create(b"tmpfs", [], 0)
    os.mkdir("inner", dir_fd=outer)
    syscalls.move_mount_path(inner, outer, b"inner")
    os.close(outer)
    os.close(inner)


def _user_namespaces() -> str | None:
    try:
        in_namespace(lambda: mount_tmpfs("/tmp"), uid=UNPRIVILEGED)
    except (OSError, ChildFailed) as error:
        return f"an unprivileged user can't make user namespaces: {error}"
    return None


def _unshared(flag: int) -> Probe:
    return _tried(lambda: syscalls.unshare(flag))


def _pidns_option() -> None:
    """Give procfs its pid namespace by descriptor (Linux 6.18)."""
    context = syscalls.fsopen(b"proc")
    pidns = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscalls.fsconfig(context, abi.FSCONFIG_SET_FD, b"pidns", None, pidns)
    finally:
        os.close(pidns)
        os.close(context)


def _listmount() -> str | None:
    from sandboxfs.kernel import mounttable

    try:
        mounttable.by_listmount()
    except OSError as error:
        return f"listmount, statmount: {error}"
    return None


def _image(command: list[str], type: bytes, loop: bool) -> Probe:
    """Make a probe that mounts an image with one file in it, straight or by a loop device."""

    def probe() -> str | None:
        if not shutil.which(command[0], path="/usr/bin:/usr/sbin:/bin:/sbin"):
            return f"{command[0]} is not installed"
        # Not /tmp, which may be a tmpfs: images on those are a matter of their own.
        with tempfile.TemporaryDirectory(dir="/var/tmp", prefix=f"tests-{WORKER}-") as work:
            source, image = Path(work, "tree"), Path(work, "image")
            source.mkdir()
            (source / "file").write_text("content\n", "utf-8")
            order = [str(image), str(source)] if type == b"erofs" else [str(source), str(image)]
            subprocess.run([*command, *order], capture_output=True, check=True)
            try:
                in_namespace(_mount_image, str(image), type, loop)
            except (OSError, ChildFailed) as error:
                return f"{type.decode()} {'on a loop device' if loop else 'from a file'}: {error}"
        return None

    return probe


def _mount_image(image: str, type: bytes, loop: bool) -> None:
    LOOP_CTL_GET_FREE, LOOP_SET_FD, LOOP_CLR_FD = 0x4C82, 0x4C00, 0x4C01
    if not loop:
        settings = [fscontext.string(b"source", os.fsencode(image)), fscontext.flag(b"ro")]
        os.close(fscontext.create(type, settings, abi.MOUNT_ATTR_RDONLY))
        return
    import fcntl

    with open("/dev/loop-control", "rb") as control:
        number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
    with open(f"/dev/loop{number}", "rb") as device, open(image, "rb") as backing:
        fcntl.ioctl(device, LOOP_SET_FD, backing.fileno())
        try:
            settings = [fscontext.string(b"source", b"/dev/loop%d" % number), fscontext.flag(b"ro")]
            os.close(fscontext.create(type, settings, abi.MOUNT_ATTR_RDONLY))
        finally:
            fcntl.ioctl(device, LOOP_CLR_FD)


def _vfork_children() -> str | None:
    return None if vfork.is_possible() else "this interpreter can't share its memory with a child"


def _autofs() -> None:
    os.close(syscalls.fsopen(b"autofs"))


def _cgroup2() -> None:
    os.close(fscontext.create(b"cgroup2", [], 0))


def _cgroup1() -> str | None:
    lines = Path("/proc/self/cgroup").read_text("ascii").splitlines()
    if any(line.split(":")[1] for line in lines):
        return None
    return "no cgroup v1 hierarchy is mounted"


def _guest() -> str | None:
    from tests.guest import kernel

    lacking = kernel.missing()
    return "; ".join(lacking) or None


def _selinux() -> str | None:
    return None if os.path.exists("/sys/fs/selinux/enforce") else "no SELinux in this kernel"


def _network_device() -> None:
    """Make a pair of devices, in a network namespace of its own."""
    syscalls.unshare(abi.CLONE_NEWNET)
    with IPRoute() as route:
        route.link("add", ifname="probe0", kind="veth", peer="probe1")


# What the set-up gives: lacking in CI, it is a failure.
PROVIDED: dict[str, Probe] = {
    "root": _root,
    "busybox": _program("busybox", "busybox-static"),
    "bwrap": _program("bwrap", "bubblewrap"),
    "containerd": _program("containerd", "containerd"),
    "crun": _program("crun", "crun"),
    "gcc": _program("gcc", "gcc"),
    "guest": _guest,
    "launcher": _file(str(CHECKOUT / ".venv/bin/sandboxfs"), "tools/setup"),
    "mkfs.erofs": _program("mkfs.erofs", "erofs-utils"),
    "mmdebstrap": _program("mmdebstrap", "mmdebstrap"),
    "mksquashfs": _program("mksquashfs", "squashfs-tools"),
    "newuidmap": _program("newuidmap", "uidmap"),
    "oci-schemas": _file(
        "/usr/share/gocode/src/github.com/opencontainers/specs/schema/config-schema.json",
        "golang-github-opencontainers-specs-dev",
    ),
    "podman": _program("podman", "podman"),
    "qemu": _program("qemu-system-x86_64", "qemu-system-x86"),
    "runc": _program("runc", "runc"),
    "setfacl": _program("setfacl", "acl"),
    "setfattr": _program("setfattr", "attr"),
    "strace": _program("strace", "strace"),
}


def _tree(name: str) -> Probe:
    return lambda: enginetrees.absence(name)


def _newest_kernel() -> str | None:
    from tests.guest import kernel

    if kernel.unpacked("newest"):
        return None
    return kernel.failure("newest") or "the set-up has not fetched it"


# What the set-up fetches for tests only.  Where that failed, and the set-up has recorded why, a
# skip is honest in CI too: nobody's work is held up by a mirror's bad day.
FETCHED: dict[str, Probe] = {
    "kernel-newest": _newest_kernel,
    **{f"tree-{name}": _tree(name) for name in enginetrees.RECIPES},
}

# What the kernel and the machine give.
MACHINE: dict[str, Probe] = {
    "autofs": _tried(_autofs),
    "cgroup-namespaces": _unshared(abi.CLONE_NEWCGROUP),
    "cgroup1": _cgroup1,
    "cgroup2": _tried(_cgroup2),
    "detached-nesting": _tried(_detached_nesting),
    "erofs-file": _image(["mkfs.erofs"], b"erofs", loop=False),
    "erofs-loop": _image(["mkfs.erofs"], b"erofs", loop=True),
    "listmount": _listmount,
    "network-devices": _tried(_network_device),
    "overlay": _tried(_overlay),
    "proc-pidns": _tried(_pidns_option),
    "selinux": _selinux,
    "squashfs": _image(["mksquashfs"], b"squashfs", loop=True),
    "time-namespaces": _unshared(abi.CLONE_NEWTIME),
    "user-namespaces": _user_namespaces,
    "vfork-children": _vfork_children,
}


def unfetched(name: str) -> str | None:
    """Return why the set-up failed to fetch what `name` stands for; None if it never tried."""
    if name == "kernel-newest":
        from tests.guest import kernel

        return kernel.failure("newest")
    return enginetrees.failure(name.removeprefix("tree-"))


@cache
def absence(name: str) -> str | None:
    """Return why the capability `name` is absent, or None where it is there.

    KeyError: no such capability; add it, with a probe that tries it.
    """
    probe = PROVIDED.get(name) or FETCHED.get(name) or MACHINE.get(name)
    if probe is None:
        raise KeyError(f"no capability {name!r} in tests/support/capabilities.py")
    return probe()
