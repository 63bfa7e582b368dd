"""No descriptor, working directory or link of procfs is a way from the payload to the host."""

import fcntl
import os
import shutil
import stat

import pytest

from sandboxfs.kernel import abi, syscalls
from tests.attacks.tools import bind_mount
from tests.support import CHECKOUT, default_spec, in_namespace, run, run_cli
from tests.support.bundles import busybox_program

pytestmark = pytest.mark.needs("root", "overlay", "busybox")

UP = "/../" * 16
MOST = 24


@pytest.fixture
def host_program(public_path):
    """A program that only the host has."""
    path = public_path / "busybox-of-the-host"
    shutil.copy(busybox_program(), path)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("engine", ["detached", "attached"])
def test_no_descriptor_leads_args_to_the_host(bundle, host_program, engine):
    """All of them at once, by PATH; the program's name is one that only the host has."""
    def change(document):
        document["process"]["args"] = [host_program.name, "echo", "on the host"]
        ways = [f"/proc/self/fd/{number}{UP}{host_program.parent}" for number in range(64)]
        document["process"]["env"] = ["PATH=" + ":".join(ways)]

    done = run_cli("run", "--bundle", bundle(change), "--engine", engine)
    assert (done.returncode, done.stdout) == (127, "")
    assert "in no directory of the container's PATH" in done.stderr


def naive_exec(rootfs, program):
    """Enter a root with a descriptor of the host open, as runc before 1.1.12 did, and execute."""
    here = os.open("/", os.O_PATH | os.O_CLOEXEC)
    proc = syscalls.open_tree(abi.AT_FDCWD, b"/proc", abi.OPEN_TREE_CLONE)
    syscalls.move_mount_path(proc, abi.AT_FDCWD, os.fsencode(rootfs / "proc"))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.chroot(rootfs)
        os.chdir("/")
        os.dup2(writer, 1)
        os.execv(f"/proc/self/fd/{here}{UP}{program}", ["busybox", "echo", "on the host"])
    os.close(writer)
    said = os.read(reader, 100)
    os.waitpid(child, 0)
    for fd in (here, proc, reader):
        os.close(fd)
    return said


def test_the_way_by_a_descriptor_is_real(bundle, host_program):
    """The control: close-on-exec alone comes too late."""
    said = in_namespace(naive_exec, bundle().rootfs, host_program)
    assert said == b"on the host\n"


@pytest.mark.parametrize("path", ["/proc/self/fd/7", "/proc/self/cwd", "/proc/1/root", "/dev/fd/3"])
def test_a_link_of_procfs_is_no_working_directory(bundle, path):
    def change(document):
        document["process"]["cwd"] = path

    done = run_cli("run", "--bundle", bundle(change), check=65)
    assert done.stderr.startswith("sandboxfs: /process/cwd: ")


def test_an_image_link_to_a_descriptor_is_no_working_directory(bundle):
    made = bundle()
    for number in range(3, MOST):
        link = made.rootfs / f"work{number}"
        link.symlink_to(f"/proc/self/fd/{number}")
        document = default_spec("/bin/sh", "-c", "ls -a . ../..")
        document["process"]["cwd"] = f"/{link.name}"
        made.write(document)
        done = run_cli("run", "--bundle", made)
        assert done.returncode == 125, (number, done.stdout)
        assert done.stderr.count("\n") <= 2


def test_inherited_descriptors_do_not_reach_the_payload(bundle, public_path):
    secret = os.open(public_path, os.O_RDONLY | os.O_DIRECTORY)
    others = [fcntl.fcntl(secret, fcntl.F_DUPFD, number) for number in (200, 300, 900)]
    try:
        made = bundle(default_spec("/bin/ls", "/proc/self/fd"))
        done = run_cli("run", "--bundle", made, check=0, pass_fds=(secret, *others))
    finally:
        for fd in (secret, *others):
            os.close(fd)
    # 3 is the one that ls itself reads by.
    assert done.stdout.split() == ["0", "1", "2", "3"]


def test_closed_standard_streams_are_no_way_in(bundle, host_program):
    """Our own descriptors then have the numbers 0 to 2, and are closed all the same."""
    made = bundle()
    for number in range(3):
        made.write(default_spec(f"/proc/self/fd/{number}{UP}{host_program}", "echo", "on"))
        command = f"exec {CHECKOUT}/.venv/bin/sandboxfs run --bundle {made.path} <&- >&-"
        done = run("/bin/sh", "-c", command)
        assert done.returncode in (126, 127), done.stderr


def test_the_payload_cannot_be_our_interpreter(bundle):
    """runc CVE-2019-5736: /proc/self/exe is a file of the host until exec."""
    made = bundle()
    script = made.rootfs / "script"
    script.write_text("#!  /proc/self/exe -c\n")
    script.chmod(0o755)
    nested = made.rootfs / "nested"
    nested.write_text("#!/script\n")
    nested.chmod(0o755)
    (made.rootfs / "link").symlink_to("/proc/self/exe")
    for program in ("/proc/self/exe", "/link", "/script", "/nested", "/proc/thread-self/exe"):
        made.write(default_spec(program))
        done = run_cli("run", "--bundle", made, check=126)
        assert "the interpreter that sandboxfs itself runs in" in done.stderr
    # Where nothing more can be opened, too.
    document = default_spec("/link")
    document["process"]["rlimits"] = [{"type": "RLIMIT_NOFILE", "soft": 3, "hard": 3}]
    made.write(document)
    done = run_cli("run", "--bundle", made, check=126)
    assert "the interpreter that sandboxfs itself runs in" in done.stderr


@pytest.mark.needs("gcc")
def test_our_interpreter_is_no_elf_interpreter(bundle, tmp_path):
    source = tmp_path / "program.c"
    source.write_text("int main(void) { return 0; }\n")
    made = bundle(default_spec("/program"))
    program = made.rootfs / "program"
    run("gcc", "-o", program, source, "-Wl,--dynamic-linker=/proc/self/exe", check=0,
        env={"PATH": "/usr/bin:/bin"})
    done = run_cli("run", "--bundle", made, check=126)
    assert "the interpreter that sandboxfs itself runs in" in done.stderr


@pytest.mark.needs("bwrap")
def test_others_execute_themselves():
    """The control: bubblewrap's /proc/self/exe is bubblewrap."""
    done = run("bwrap", "--ro-bind", "/", "/", "--proc", "/proc", "/proc/self/exe", "--version")
    assert done.stdout.startswith("bubblewrap")


def test_the_interpreter_of_a_bind_is_the_containers_own(bundle):
    """Compatibility: /usr of the host, bound, has the very file that runs us."""
    def change(document):
        document["mounts"] += [
            bind_mount(os.path.realpath(path), path, "rbind", "ro")
            for path in ("/usr", "/lib", "/lib64") if os.path.exists(path)
        ]
        document["process"]["args"] = ["/usr/bin/python3", "-I", "-S", "-c", "print('here')"]

    done = run_cli("run", "--bundle", bundle(change), check=0)
    assert done.stdout == "here\n"


@pytest.mark.parametrize("user", [False, True])
def test_modes_of_host_devices_cannot_be_changed(bundle, user):
    """A mask is the host's /dev/null, and so are nodes in a user namespace: the same inode."""
    before = {name: os.stat(name).st_mode for name in ("/dev/null", "/dev/zero")}
    def change(document):
        document["process"]["args"] = [
            "/bin/sh", "-c", "chmod 600 /proc/keys; chown 1:1 /proc/keys;"
            + ("chmod 600 /dev/null /dev/zero;" if user else "")
            + "echo x > /proc/keys && echo x > /dev/null && cat /proc/keys && echo fine"]
        if user:
            document["linux"]["namespaces"].append({"type": "user"})

    try:
        done = run_cli("run", "--bundle", bundle(change), check=0)
        after = {name: os.stat(name).st_mode for name in before}
    finally:
        for name, mode in before.items():
            os.chmod(name, stat.S_IMODE(mode))
            os.chown(name, 0, 0)
    assert after == before
    assert done.stdout == "fine\n"
    assert "Read-only file system" in done.stderr


def test_a_bound_device_without_read_only_is_the_hosts(public_path):
    """The control: through a plain bind of a node its mode is changed everywhere."""
    node = public_path / "null"
    os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    target = public_path / "target"
    target.touch()

    def bind_and_change():
        clone = syscalls.open_tree(abi.AT_FDCWD, os.fsencode(node), abi.OPEN_TREE_CLONE)
        syscalls.move_mount_path(clone, abi.AT_FDCWD, os.fsencode(target))
        os.close(clone)
        os.chmod(target, 0o600)

    in_namespace(bind_and_change)
    assert stat.S_IMODE(node.stat().st_mode) == 0o600
