"""The runtimes, unmodified as Debian has them, behind one method: run this container.

What they keep lies in directories of the tests'.  crun and podman refuse a hybrid cgroup
hierarchy, so they run where cgroup2 alone lies over /sys/fs/cgroup (`Unified`).
"""

import itertools
import json
import os
import pty
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import prctl

from sandboxfs.kernel import abi, fscontext, syscalls
from tests.runtimes.container import END, Container, Volume
from tests.runtimes.registration import Hooks
from tests.support import RANGED, attach, run
from tests.support.commands import ENVIRONMENT
from tests.support.host import WORKER
from tests.support.namespace import KEPT, children

Done = subprocess.CompletedProcess[str]
_numbers = itertools.count()


class Unified:
    """A process that keeps a mount namespace like the tests', with cgroup2 alone.

    All its mounts are peers of the tests', so what propagates from there is seen here; only
    /sys/fs/cgroup is its own.
    """

    def __init__(self) -> None:
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._enter(writer)
            finally:
                os._exit(1)
        os.close(writer)
        KEPT.add(self.pid)
        try:
            told = os.read(reader, 1000)
            assert told == b"ready", told.decode()
        finally:
            os.close(reader)

    @staticmethod
    def _enter(writer: int) -> None:
        # Not our descriptors: pipes of pytest's would be kept open.
        os.dup2(writer, 3)
        os.closerange(4, 1 << 16)
        prctl.set_pdeathsig(signal.SIGKILL)
        try:
            syscalls.unshare(abi.CLONE_NEWNS)
            own = syscalls.open_tree(abi.AT_FDCWD, b"/sys/fs/cgroup", 0)
            syscalls.mount_setattr(own, propagation=abi.MS_PRIVATE)
            attach(fscontext.create(b"cgroup2", [], 0), "/sys/fs/cgroup")
        except BaseException as error:  # noqa: BLE001 - told to the parent
            os.write(3, repr(error).encode())
            os._exit(1)
        os.write(3, b"ready")
        os.closerange(0, 1 << 16)
        while True:
            signal.pause()

    def command(self, *options: str) -> list[str]:
        """Return the words that run a command there."""
        return ["nsenter", f"--mount=/proc/{self.pid}/ns/mnt", *options, "--"]

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        KEPT.remove(self.pid)


def new_id() -> str:
    """Return an id that no other container of the machine has."""
    return f"tests-{WORKER}-{os.getpid()}-{next(_numbers)}"


class Runtime:
    """What the runtimes have in common.

    home: a directory for what it keeps, open to all; removed by whoever made it.
    """

    name = ""
    # Whether a failed hook's words reach the caller (crun sends them to /dev/null).
    tells = True
    # Whether it may end before it has shown everything that the payload printed.
    loses_output = False
    # Where our hooks keep what they keep.
    state = "/run/sandboxfs"
    uid: int | None = None

    def __init__(self, home: Path) -> None:
        self.home = home / self.name
        self.home.mkdir(mode=0o755)

    def run(
        self, container: Container, rootfs: Path, hooks: Hooks | None = None, *,
        id: str | None = None, timeout: float = 60,
    ) -> Done:
        """Run a container to its end; returns its exit status and what it printed.

        When this returns, everything that the runtime started has ended, too.
        """
        before, name = children(), id or new_id()
        container.waits = container.terminal or self.loses_output
        try:
            with self.prepared(container, rootfs, hooks, name) as command:
                if container.terminal:
                    return on_a_terminal(command, self.environment(), timeout)
                if container.waits:
                    return answered(command, self.environment(), timeout)
                return run(*command, timeout=timeout, env=self.environment())
        except BaseException:
            # It may run still; the tests that follow shall not meet it.
            for words in self.removal(name):
                run(*words, env=self.environment())
            raise
        finally:
            settle(before)

    def removal(self, id: str) -> list[list[str]]:
        """Return the commands that end and remove a container."""
        raise NotImplementedError

    @contextmanager
    def started(
        self, container: Container, rootfs: Path, hooks: Hooks | None = None
    ) -> Iterator["Running"]:
        """Run a container, whose script is short, until the block ends; the value is `Running`."""
        control = self.home / f"control-{new_id()}"
        control.mkdir(mode=0o777)
        control.chmod(0o777)
        name, script, before = new_id(), container.script, children()
        waits = "while [ ! -e /control/end ]; do sleep 0.02; done"
        container.script = f"{script}\ntouch /control/ready\n{waits}"
        container.mounts.append(Volume(control, "/control"))
        try:
            with self.prepared(container, rootfs, hooks, name) as command:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE, env={**ENVIRONMENT, **self.environment()}, cwd="/",
                )
                running = Running(self, name, process, control)
                try:
                    running.wait_until_ready()
                    yield running
                finally:
                    running.end()
        finally:
            settle(before)
            shutil.rmtree(control)

    @contextmanager
    def prepared(
        self, container: Container, rootfs: Path, hooks: Hooks | None, id: str
    ) -> Iterator[list[str]]:
        """Write what the runtime reads; the value is the command that runs the container."""
        bundle = self.home / f"bundle-{id}"
        bundle.mkdir(mode=0o755)
        try:
            document = container.document(rootfs)
            document["linux"]["cgroupsPath"] = f"/{id}"
            if hooks is not None:
                document["hooks"] = hooks.section
            (bundle / "config.json").write_text(json.dumps(document), "utf-8")
            yield self.command(bundle, container, id)
        finally:
            shutil.rmtree(bundle)

    def command(self, bundle: Path, container: Container, id: str) -> list[str]:
        raise NotImplementedError

    def prepare(self, image: Path) -> None:
        """Make in an image what the runtime makes in every one that lacks it."""

    def exec(self, id: str, *words: str) -> list[str]:
        """Return the command that runs another one in a running container."""
        raise NotImplementedError

    def environment(self) -> Mapping[str, str]:
        return {}

    def log(self) -> list[str]:
        """Return the lines of the hooks' log."""
        path = Path(self.state) / "hook.log"
        return path.read_text("utf-8").splitlines() if path.exists() else []

    def left(self) -> list[str]:
        """Return what is left of containers: state of the runtime's, cgroups."""
        names = [f"/sys/fs/cgroup/{each.name}/{cgroup.name}"
                 for each in Path("/sys/fs/cgroup").iterdir() if each.is_dir()
                 for cgroup in each.glob(f"tests-{WORKER}-{os.getpid()}-*")]
        return names + self.kept()

    def kept(self) -> list[str]:
        raise NotImplementedError

    def close(self) -> None:
        """Stop what was started for all containers."""


class Runc(Runtime):
    name = "runc"

    def command(self, bundle: Path, container: Container, id: str) -> list[str]:
        return ["runc", "--root", f"{self.home}/state", "run", "--bundle", str(bundle), id]

    def removal(self, id: str) -> list[list[str]]:
        return [["runc", "--root", f"{self.home}/state", "delete", "--force", id]]

    def exec(self, id: str, *words: str) -> list[str]:
        return ["runc", "--root", f"{self.home}/state", "exec", id, *words]

    def kept(self) -> list[str]:
        return _listed(self.home / "state")


class Crun(Runtime):
    name = "crun"
    tells = False

    def __init__(self, home: Path, unified: Unified) -> None:
        super().__init__(home)
        self.unified = unified

    def command(self, bundle: Path, container: Container, id: str) -> list[str]:
        return [*self.unified.command(), "crun", "--root", f"{self.home}/state",
                "--cgroup-manager=disabled", "run", "--bundle", str(bundle), id]

    def removal(self, id: str) -> list[list[str]]:
        return [[*self.unified.command(), "crun", "--root", f"{self.home}/state",
                 "--cgroup-manager=disabled", "delete", "--force", id]]

    def exec(self, id: str, *words: str) -> list[str]:
        return [*self.unified.command(), "crun", "--root", f"{self.home}/state",
                "--cgroup-manager=disabled", "exec", id, *words]

    def kept(self) -> list[str]:
        return _listed(self.home / "state")


class Containerd(Runtime):
    """A private instance without CRI; `ctr` runs the document through the shim and runc."""

    name = "containerd"
    loses_output = True

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.socket = self.home / "socket"
        configuration = self.home / "config.toml"
        configuration.write_text(_CONTAINERD.format(home=self.home, socket=self.socket), "utf-8")
        with open(self.home / "log", "wb") as log:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "containerd", "--config", configuration],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=ENVIRONMENT,
            )
        KEPT.add(self.process.pid)
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.close()
            raise

    def _wait_until_it_answers(self, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while True:
            with socket.socket(socket.AF_UNIX) as client:
                try:
                    client.connect(str(self.socket))
                except OSError:
                    log = (self.home / "log").read_text("utf-8")[-2000:]
                    assert self.process.poll() is None, f"containerd ended: {log}"
                    assert time.monotonic() < deadline, f"containerd doesn't answer: {log}"
                else:
                    return
            time.sleep(0.01)

    def ctr(self, *words: str) -> list[str]:
        return ["ctr", "--address", str(self.socket), *words]

    def command(self, bundle: Path, container: Container, id: str) -> list[str]:
        tty = ["--tty"] if container.terminal else []
        return self.ctr("run", "--rm", *tty, "--config", f"{bundle}/config.json", id)

    def removal(self, id: str) -> list[list[str]]:
        return [self.ctr("tasks", "delete", "--force", id), self.ctr("containers", "delete", id)]

    def exec(self, id: str, *words: str) -> list[str]:
        return self.ctr("tasks", "exec", "--exec-id", new_id(), id, *words)

    def kept(self) -> list[str]:
        tasks = _listed(self.home / "root/io.containerd.runtime.v2.task/default")
        return tasks + _listed(self.home / "state/io.containerd.runtime.v2.task/default")

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        KEPT.remove(self.process.pid)


_CONTAINERD = """
version = 2
root = "{home}/root"
state = "{home}/state"
disabled_plugins = [
    "io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt",
    "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
]
[grpc]
  address = "{socket}"
"""


class Podman(Runtime):
    """podman with crun, by ``--rootfs`` and ``--hooks-dir``, without network and cgroups."""

    name = "podman"
    tells = False
    loses_output = True

    def __init__(self, home: Path, unified: Unified) -> None:
        super().__init__(home)
        self.unified = unified
        # The other kind of locks lies in /dev/shm, for all instances of the machine.
        (self.home / "containers.conf").write_text('[engine]\nlock_type = "file"\n', "utf-8")

    def environment(self) -> Mapping[str, str]:
        return {"CONTAINERS_CONF": f"{self.home}/containers.conf"}

    @contextmanager
    def prepared(
        self, container: Container, rootfs: Path, hooks: Hooks | None, id: str
    ) -> Iterator[list[str]]:
        directory = self.home / f"hooks-{id}"
        directory.mkdir(mode=0o755)
        try:
            if hooks is not None:
                hooks.write_files(directory)
            yield [
                *self.entered(), *self.podman(f"--hooks-dir={directory}"), "run", "--rm",
                "--network=none", "--cgroups=disabled", "--log-driver=none", "--hostname=tests",
                # The default, a million files, is more than a container in a container may have.
                "--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024", f"--name={id}",
                *container.words(), "--rootfs", str(rootfs), "/bin/sh", "-c", container.command(),
            ]
        finally:
            shutil.rmtree(directory)

    def prepare(self, image: Path) -> None:
        for name in ("etc/hosts", "etc/hostname", "run/.containerenv"):
            (image / name).touch(0o755)
        (image / "etc/mtab").symlink_to("/proc/mounts")

    def removal(self, id: str) -> list[list[str]]:
        return [[*self.entered(), *self.podman(), "rm", "--force", "--time=0", id]]

    def exec(self, id: str, *words: str) -> list[str]:
        return [*self.entered(), *self.podman(), "exec", id, *words]

    def entered(self) -> list[str]:
        return self.unified.command()

    def podman(self, *options: str) -> list[str]:
        return [
            "podman", "--runtime=crun", f"--root={self.home}/root", f"--runroot={self.home}/run",
            f"--tmpdir={self.home}/tmp", "--cgroup-manager=cgroupfs", "--events-backend=none",
            "--storage-driver=vfs", *options,
        ]

    def kept(self) -> list[str]:
        records = self.home / "root/vfs-containers/containers.json"
        kept = json.loads(records.read_text("utf-8")) if records.exists() else None
        return [each["id"] for each in kept or []] + _listed(self.home / "tmp/exits")


class RootlessPodman(Podman):
    """The same, started by the user `RANGED` (with the fixture's /etc/subuid)."""

    name = "podman-rootless"
    uid = RANGED
    state = f"/run/user/{RANGED}/sandboxfs"

    def __init__(self, home: Path, unified: Unified) -> None:
        super().__init__(home, unified)
        session = Path(f"/run/user/{RANGED}")
        session.mkdir(mode=0o700, parents=True)
        for path in (self.home, session):
            os.chown(path, RANGED, RANGED)
        # Starts the process that keeps the user's namespaces between commands.
        command = [*self.entered(), *self.podman(), "ps"]
        run(*command, env=self.environment(), timeout=60, check=0)
        self.pause = int((self.home / "tmp/pause.pid").read_text("ascii"))
        KEPT.add(self.pause)

    def entered(self) -> list[str]:
        return self.unified.command(f"--setuid={RANGED}", f"--setgid={RANGED}")

    def environment(self) -> Mapping[str, str]:
        return {
            **super().environment(), "HOME": str(self.home),
            "XDG_RUNTIME_DIR": f"/run/user/{RANGED}",
        }

    def close(self) -> None:
        os.kill(self.pause, signal.SIGKILL)
        os.waitpid(self.pause, 0)
        KEPT.remove(self.pause)


class Running:
    """A container that runs; `said` is what it printed, once it has ended."""

    def __init__(
        self, runtime: Runtime, id: str, process: subprocess.Popen[bytes], control: Path
    ) -> None:
        self.runtime = runtime
        self.id = id
        self.process = process
        self.control = control
        self.said = ""

    def wait_until_ready(self, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not (self.control / "ready").exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.end()
                raise AssertionError(f"the container did not start: {self.said}")
            time.sleep(0.005)

    def exec(self, script: str) -> tuple[int, str]:
        """Run another script in it; returns its exit status and what it printed.

        By a file: here, too, a runtime may end before it has shown everything.
        """
        before = children()
        output = self.control / "output"
        output.unlink(missing_ok=True)
        words = ["/bin/sh", "-c", f"{{ {script}\n}} >/control/output 2>&1"]
        try:
            done = run(*self.runtime.exec(self.id, *words), env=self.runtime.environment())
        finally:
            settle(before)
        return done.returncode, output.read_text("utf-8") if output.exists() else done.stderr

    def end(self) -> None:
        """Let it end; what it and its runtime printed is in `said`."""
        (self.control / "end").touch()
        if not self.said:
            self.said = b"".join(self.process.communicate(timeout=20)).decode() or "(nothing)"


def _listed(directory: Path) -> list[str]:
    return [str(each) for each in directory.iterdir()] if directory.is_dir() else []


# -- processes -----------------------------------------------------------------------------


def settle(before: set[int], seconds: float = 10) -> None:
    """Wait for what became our child since `before`: shims and monitors whose parents ended."""
    deadline = time.monotonic() + seconds
    while new := children() - before:
        for pid in new:
            try:
                done, _ = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                continue
            if not done and time.monotonic() > deadline:
                name = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                raise AssertionError(f"still runs after {seconds} s: {pid} {name}")
        time.sleep(0.002)


def on_a_terminal(
    command: Sequence[str], environment: Mapping[str, str], timeout: float
) -> Done:
    """Run a command on a terminal of ours; returns its status and all that it showed."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env={**ENVIRONMENT, **environment}, cwd="/",
        )
    finally:
        os.close(theirs)
    try:
        output = _conversation(process, ours, ours, timeout)
        return subprocess.CompletedProcess(command, process.wait(), output, "")
    finally:
        os.close(ours)


def answered(command: Sequence[str], environment: Mapping[str, str], timeout: float) -> Done:
    """Run a command with pipes, and answer its payload."""
    with tempfile.TemporaryFile() as stderr, subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
        env={**ENVIRONMENT, **environment}, cwd="/", bufsize=0,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        output = _conversation(process, process.stdin.fileno(), process.stdout.fileno(), timeout)
        status = process.wait()
        stderr.seek(0)
        words = stderr.read().decode("utf-8", "replace")
    return subprocess.CompletedProcess(command, status, output.replace(f"{END}\n", ""), words)


def _conversation(
    process: subprocess.Popen[bytes], writer: int, reader: int, timeout: float
) -> str:
    """Return what a process prints until its end; its payload's `END` is answered by a line."""
    seen, asked = b"", False
    deadline = time.monotonic() + timeout
    while select.select([reader], [], [], max(0, deadline - time.monotonic()))[0]:
        try:
            chunk = os.read(reader, 1 << 16)
        except OSError:  # EIO: nobody has the other end of the terminal any more
            chunk = b""
        if not chunk:
            return seen.decode("utf-8", "surrogateescape")
        seen += chunk
        if END.encode() in seen and not asked:
            asked = True
            os.write(writer, b"\n")
    process.kill()
    process.wait()
    raise AssertionError(f"still runs after {timeout} s; printed so far: {seen!r}")
