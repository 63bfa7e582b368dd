"""The runtimes, unmodified as Debian has them, behind one method: run this container.

What they keep lies in directories of the tests'.  crun and podman refuse a hybrid cgroup
hierarchy, so they run where cgroup2 alone lies over /sys/fs/cgroup (`spaces`).
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

from tests.runtimes.container import END, Container, Volume
from tests.runtimes.registration import Hooks
from tests.runtimes.spaces import HAS_FRONT, Space
from tests.support import RANGED, differences, run, snapshot
from tests.support.commands import ENVIRONMENT
from tests.support.host import WORKER
from tests.support.namespace import KEPT, children

Done = subprocess.CompletedProcess[str]
_numbers = itertools.count()


class Front:
    """Stands where hooks do: the container is run by the runtime in front instead."""


FRONT = Front()
By = Hooks | Front | None


def new_id() -> str:
    """Return an id that no other container of the machine has."""
    return f"tests-{WORKER}-{os.getpid()}-{next(_numbers)}"


class Runtime:
    """What the runtimes have in common.

    home: a directory for what it keeps, open to all; removed by whoever made it.  name: what the
    tests call it.  space: where it runs.
    """

    # The OCI runtime behind it.
    program = "runc"
    # Whether a failed hook's words reach the caller (crun sends them to /dev/null).
    tells = True
    # Whether it may end before it has shown everything that the payload printed.
    loses_output = False
    # Where our hooks keep what they keep.
    state = "/run/sandboxfs"
    uid: int | None = None

    def __init__(self, home: Path, name: str, space: Space) -> None:
        self.name = name
        self.space = space
        self.home = home / name
        self.home.mkdir(mode=0o755)
        # The name of the file decides how engines use it.
        self.front = self.home / "front" / self.program
        # What the last container changed in the image, where only the engine sees it.
        self.changes: list[str] = []
        if HAS_FRONT:
            self.front.parent.mkdir(mode=0o755)
            space.sandboxfs("runtime", "wrap", self.program, self.front)

    def behind(self, by: "By") -> str:
        """Return the program that is to be used as runtime."""
        return str(self.front) if by is FRONT else self.program

    def pins_the_rootfs(self) -> bool:
        """Return whether the runtime pivots into what it opened before the hooks (PR 5190)."""
        if self.program != "runc":
            return False
        version = tuple(int(each) for each in self.space.versions()["runc"].split("."))
        return (1, 3, 6) <= version < (1, 4) or version >= (1, 4, 3)

    def run(
        self, container: Container, rootfs: Path, hooks: By = None, *,
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
        self, container: Container, rootfs: Path, hooks: By = None
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
        self, container: Container, rootfs: Path, hooks: By, id: str
    ) -> Iterator[list[str]]:
        """Write what the runtime reads; the value is the command that runs the container."""
        bundle = self.home / f"bundle-{id}"
        bundle.mkdir(mode=0o755)
        try:
            document = container.document(rootfs)
            document["linux"]["cgroupsPath"] = f"/{id}"
            if isinstance(hooks, Hooks):
                document["hooks"] = hooks.section
            (bundle / "config.json").write_text(json.dumps(document), "utf-8")
            yield self.command(bundle, container, id, hooks)
        finally:
            shutil.rmtree(bundle)

    def command(self, bundle: Path, container: Container, id: str, by: By) -> list[str]:
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
    # Words between the program and the command.
    options: tuple[str, ...] = ()

    def words(self, *words: str, by: By = None) -> list[str]:
        """Return the command that runs it with these words."""
        return [*self.space.command(), self.behind(by), "--root", f"{self.home}/state",
                *self.options, *words]

    def command(self, bundle: Path, container: Container, id: str, by: By) -> list[str]:
        return self.words("run", "--bundle", str(bundle), id, by=by)

    def removal(self, id: str) -> list[list[str]]:
        return [self.words("delete", "--force", id)]

    def exec(self, id: str, *words: str) -> list[str]:
        return self.words("exec", id, *words)

    def kept(self) -> list[str]:
        return _listed(self.home / "state")


class Crun(Runc):
    program = "crun"
    tells = False
    options = ("--cgroup-manager=disabled",)


class Containerd(Runtime):
    """A private instance without CRI; `ctr` runs the document through the shim and runc."""

    loses_output = True

    def __init__(self, home: Path, name: str, space: Space) -> None:
        super().__init__(home, name, space)
        self.socket = self.home / "socket"
        configuration = self.home / "config.toml"
        configuration.write_text(self.configuration(), "utf-8")
        with open(self.home / "log", "wb") as log:
            self.process = subprocess.Popen(
                [*space.command(), "setpriv", "--pdeathsig", "KILL",
                 "containerd", "--config", configuration],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=ENVIRONMENT,
            )
        KEPT.add(self.process.pid)
        try:
            wait_until_it_answers(self.process, self.socket, self.home / "log")
        except BaseException:
            self.close()
            raise

    def configuration(self) -> str:
        """Return what config.toml says."""
        return _CONTAINERD.format(home=self.home, socket=self.socket)

    def ctr(self, *words: str) -> list[str]:
        return [*self.space.command(), "ctr", "--address", str(self.socket), *words]

    def command(self, bundle: Path, container: Container, id: str, by: By) -> list[str]:
        more = ["--tty"] if container.terminal else []
        if by is FRONT:
            more.append(f"--runc-binary={self.front}")
        return self.ctr("run", "--rm", *more, "--config", f"{bundle}/config.json", id)

    def removal(self, id: str) -> list[list[str]]:
        return [self.ctr("tasks", "delete", "--force", id), self.ctr("containers", "delete", id)]

    def exec(self, id: str, *words: str) -> list[str]:
        return self.ctr("tasks", "exec", "--exec-id", new_id(), id, *words)

    def kept(self) -> list[str]:
        tasks = _listed(self.home / "root/io.containerd.runtime.v2.task/default")
        return tasks + _listed(self.home / "state/io.containerd.runtime.v2.task/default")

    def close(self) -> None:
        end(self.process)


_CONTAINERD = """
version = 2
root = "{home}/root"
state = "{home}/state"
disabled_plugins = [
    "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime",
    "io.containerd.internal.v1.opt", "io.containerd.nri.v1.nri",
    "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
]
[grpc]
  address = "{socket}"
"""


class Podman(Runtime):
    """podman with crun, by ``--rootfs`` and ``--hooks-dir``, without network and cgroups."""

    program = "crun"
    tells = False
    loses_output = True

    def __init__(self, home: Path, name: str, space: Space) -> None:
        super().__init__(home, name, space)
        # The other kind of locks lies in /dev/shm, for all instances of the machine.
        (self.home / "containers.conf").write_text('[engine]\nlock_type = "file"\n', "utf-8")

    def environment(self) -> Mapping[str, str]:
        return {"CONTAINERS_CONF": f"{self.home}/containers.conf"}

    @contextmanager
    def prepared(
        self, container: Container, rootfs: Path, hooks: By, id: str
    ) -> Iterator[list[str]]:
        directory = self.home / f"hooks-{id}"
        directory.mkdir(mode=0o755)
        try:
            if isinstance(hooks, Hooks):
                hooks.write_files(directory)
            yield [
                *self.entered(), *self.podman(f"--hooks-dir={directory}", by=hooks), "run", "--rm",
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
        return self.space.command()

    def podman(self, *options: str, by: By = None) -> list[str]:
        return [
            "podman", f"--runtime={self.behind(by)}", f"--root={self.home}/root",
            f"--runroot={self.home}/run",
            f"--tmpdir={self.home}/tmp", "--cgroup-manager=cgroupfs", "--events-backend=none",
            "--storage-driver=vfs", *options,
        ]

    def kept(self) -> list[str]:
        records = self.home / "root/vfs-containers/containers.json"
        kept = json.loads(records.read_text("utf-8")) if records.exists() else None
        return [each["id"] for each in kept or []] + _listed(self.home / "tmp/exits")


class RootlessPodman(Podman):
    """The same, started by the user `RANGED` (with the fixture's /etc/subuid)."""

    uid = RANGED
    state = f"/run/user/{RANGED}/sandboxfs"

    def __init__(self, home: Path, name: str, space: Space) -> None:
        super().__init__(home, name, space)
        # podman has one there of its own: podmans of several versions don't share a pause process.
        self.session = self.home / "session"
        self.session.mkdir(mode=0o700)
        hooks = Path(self.state).parent
        hooks.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in (self.home, self.session, hooks):
            os.chown(path, RANGED, RANGED)
        # Starts the process that keeps the user's namespaces between commands.
        command = [*self.entered(), *self.podman(), "ps"]
        run(*command, env=self.environment(), timeout=60, check=0)
        (pause,) = self.home.rglob("pause.pid")
        self.pause = int(pause.read_text("ascii"))
        KEPT.add(self.pause)

    def entered(self) -> list[str]:
        return self.space.command(f"--setuid={RANGED}", f"--setgid={RANGED}")

    def environment(self) -> Mapping[str, str]:
        return {
            **super().environment(), "HOME": str(self.home),
            "XDG_RUNTIME_DIR": str(self.session),
        }

    def close(self) -> None:
        os.kill(self.pause, signal.SIGKILL)
        os.waitpid(self.pause, 0)
        KEPT.remove(self.pause)


class Docker(Runtime):
    """A private dockerd; every container has an image of its own, imported from the rootfs.

    It takes no hooks.  What is asked of an image is asked of the container's layer, a directory
    of the vfs driver: `changes` is how that differed after the last container had run.
    """

    loses_output = True

    def __init__(self, home: Path, name: str, space: Space) -> None:
        super().__init__(home, name, space)
        runtimes = [f"--add-runtime=sandboxfs={self.front}"] if HAS_FRONT else []
        with open(self.home / "log", "wb") as log:
            self.process = subprocess.Popen(
                [*space.command(), "setpriv", "--pdeathsig", "KILL", "dockerd",
                 f"--host=unix://{self.home}/socket", f"--data-root={self.home}/data",
                 f"--exec-root={self.home}/exec", f"--pidfile={self.home}/pid",
                 "--iptables=false", "--ip6tables=false", "--bridge=none",
                 "--storage-driver=vfs", "--exec-opt=native.cgroupdriver=cgroupfs", *runtimes],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=ENVIRONMENT,
            )
        KEPT.add(self.process.pid)
        try:
            wait_until_it_answers(self.process, self.home / "socket", self.home / "log")
        except BaseException:
            self.close()
            raise

    def docker(self, *words: str) -> list[str]:
        return [*self.space.command(), "docker", f"--host=unix://{self.home}/socket", *words]

    def asked(self, *words: str) -> str:
        """Return what docker answers."""
        return run(*self.docker(*words), timeout=60, check=0).stdout.strip()

    @contextmanager
    def prepared(
        self, container: Container, rootfs: Path, hooks: By, id: str
    ) -> Iterator[list[str]]:
        assert not isinstance(hooks, Hooks), "docker takes no hooks"
        archive = self.home / f"{id}.tar"
        run("tar", "--create", f"--file={archive}", f"--directory={rootfs}", ".", check=0)
        self.asked("import", str(archive), id)
        archive.unlink()
        try:
            self.asked(
                "create", f"--name={id}", "--network=none", f"--cgroup-parent=/{id}",
                "--hostname=tests", "--log-driver=none",
                *(["--runtime=sandboxfs"] if hooks is FRONT else []),
                *container.docker_words(), id, "/bin/sh", "-c", container.command())
            number = self.asked("inspect", "--format={{.Id}}", id)
            layer = (self.home / "data/image/vfs/layerdb/mounts" / number / "mount-id").read_text()
            path = self.home / "data/vfs/dir" / layer
            before = snapshot(path)
            more = ["--interactive"] if container.waits else []
            yield self.docker("start", "--attach", *more, id)
            self.changes = differences(before, snapshot(path))
        finally:
            run(*self.docker("rm", "--force", id), timeout=60)
            self.asked("rmi", "--force", id)
            run(*self.space.command(), "rmdir", f"/sys/fs/cgroup/{id}")

    def removal(self, id: str) -> list[list[str]]:
        return [self.docker("rm", "--force", id)]

    def exec(self, id: str, *words: str) -> list[str]:
        return self.docker("exec", id, *words)

    def kept(self) -> list[str]:
        return _listed(self.home / "data/containers")

    def close(self) -> None:
        end(self.process)


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
    # crun keeps an empty directory for all containers.
    return [str(each) for each in directory.iterdir() if each.name != ".empty-directory"
            ] if directory.is_dir() else []


# -- processes -----------------------------------------------------------------------------


def wait_until_it_answers(
    process: subprocess.Popen[bytes], path: Path, log: Path, seconds: float = 30
) -> None:
    """Wait until a daemon that was just started listens on its socket."""
    deadline = time.monotonic() + seconds
    while True:
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(path))
            except OSError:
                words = log.read_text("utf-8")[-2000:]
                assert process.poll() is None, f"the daemon ended: {words}"
                assert time.monotonic() < deadline, f"the daemon doesn't answer: {words}"
            else:
                return
        time.sleep(0.01)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a daemon."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    KEPT.remove(process.pid)


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
