"""What operators do: install, restart, uninstall, restart, with the engines themselves."""

import http.client
import json
import os
import socket
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import prctl
import pytest
import yaml

from tests.support import (
    CHECKOUT,
    LAUNCHER,
    differences,
    in_namespace,
    reap_orphans,
    run,
    run_cli,
)
from tests.support.fakes import on_fake_host
from tests.support.machine import Machine

pytestmark = pytest.mark.needs("root")

# Where the engines are: on this machine, or in the tree of another Debian.
TREES = [pytest.param(str(CHECKOUT / ".cache/trees" / name / "root"), id=name,
                      marks=pytest.mark.needs(f"tree-{name}")) for name in ("trixie", "sid")]
ROOTS = [pytest.param("/", id="host", marks=pytest.mark.needs(
    "containerd", "crun", "podman", "runc")), *TREES]
CONTAINERD = Path("/etc/containerd/config.toml")
DEBIAN = """\
version = 2

[plugins]
  [plugins."io.containerd.grpc.v1.cri"]
    [plugins."io.containerd.grpc.v1.cri".cni]
      bin_dir = "/usr/lib/cni"
      conf_dir = "/etc/cni/net.d"
"""
OTHER = DEBIAN + """\
[plugins."io.containerd.grpc.v1.cri".containerd]
  default_runtime_name = "other"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.other]
  runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.other.options]
    BinaryName = "/usr/sbin/runc"
"""


def on_a_machine(function: Callable[..., object], *arguments: object, root: str = "/") -> object:
    """Call ``function(machine, *arguments)`` where everything may be changed."""
    return in_namespace(lambda: function(Machine(root), *arguments), timeout=240)


def cli(*words: str | Path, check: int | None = 0) -> str:
    """Run the command line; returns what it printed, both streams."""
    done = run_cli(*words, check=check, timeout=120)
    return done.stdout + done.stderr


def assert_as_before(machine: Machine, before: dict) -> None:
    assert differences(before, machine.configuration()) == []


# -- containerd -------------------------------------------------------------------------------


def names_of(machine: Machine) -> dict:
    """Return name → settings of the CRI's runtimes, as containerd itself has read them."""
    dump = tomllib.loads(machine.run("containerd", "config", "dump").stdout)
    plugins = dump["plugins"]
    plugin = plugins.get("io.containerd.cri.v1.runtime") or plugins["io.containerd.grpc.v1.cri"]
    return plugin["containerd"]["runtimes"]


def containerd_and_back(machine: Machine, config: str | None, *options: str) -> None:
    if config is None:
        CONTAINERD.unlink()
    else:
        CONTAINERD.write_text(config, "utf-8")
        CONTAINERD.chmod(0o640)
        os.chown(CONTAINERD, 0, 4)
    before = machine.configuration()
    cli("install", "--for", "containerd", *options)
    loaded = machine.cri()
    assert set(loaded.values()) == {"ok"}
    ours = names_of(machine)["sandboxfs"]
    if "--hooks" in options:
        assert ours["base_runtime_spec"] == "/etc/containerd/sandboxfs-base-spec.json"
    else:
        program = ours["options"]["BinaryName"]
        assert program == "/usr/local/libexec/sandboxfs/containerd/runc"
        assert os.access(program, os.X_OK)
    between = machine.configuration()
    assert "written" not in cli("install", "--for", "containerd", *options)
    assert_as_before(machine, between)
    cli("uninstall", "--for", "containerd", *[each for each in options if each == "--hooks"])
    assert_as_before(machine, before)
    assert machine.cri() == loaded


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("config", [
    pytest.param(DEBIAN.rstrip("\n"), id="no-newline"),
    pytest.param(OTHER, id="other-default"),
    pytest.param("", id="empty"),
    pytest.param(None, id="none"),
])
def test_containerd_with_the_runtime_and_back(root, config):
    on_a_machine(containerd_and_back, config, root=root)


@pytest.mark.parametrize("root", ROOTS)
def test_containerd_with_the_hooks_and_back(root):
    on_a_machine(containerd_and_back, DEBIAN, "--hooks", root=root)


def test_a_base_spec_that_is_named_stays(tmp_path):
    """The plugin isn't loaded if a base spec that it was told of isn't there."""
    def inside(machine: Machine) -> None:
        dest = Path("/usr/local/libexec/hooks")
        printed = cli("hooks", "install", "--for", "containerd", "--dest", dest)
        CONTAINERD.write_text(DEBIAN + printed.split("and restart it.\n")[1], "utf-8")
        installed = machine.configuration()
        told = cli("hooks", "uninstall", "--for", "containerd", "--dest", dest, check=125)
        assert f"{CONTAINERD} names {dest}/sandboxfs-base-spec.json" in told
        assert_as_before(machine, installed)
        assert set(machine.cri().values()) == {"ok"}
        # What --force is warned of.
        cli("hooks", "uninstall", "--for", "containerd", "--dest", dest, "--force")
        assert "error" in machine.cri().values()

    on_a_machine(inside)


IMPORTS = 'version = 3\nimports = ["/etc/containerd/conf.d/*.toml"]\n'


@pytest.mark.parametrize("root", TREES[1:])
@pytest.mark.parametrize("options", [[], ["--hooks"]], ids=["runtime", "hooks"])
def test_containerd_2_with_a_file_of_our_own_and_back(root, options):
    def inside(machine: Machine) -> None:
        containerd_and_back(machine, IMPORTS, *options)
        assert not Path("/etc/containerd/conf.d").exists()

    on_a_machine(inside, root=root)


@pytest.mark.needs("containerd", "runc")
def test_who_lives_in_containerd_is_named(bundle):
    made = bundle()

    def inside(machine: Machine) -> None:
        prctl.set_child_subreaper(1)
        cli("install", "--for", "containerd")
        program = "/usr/local/libexec/sandboxfs/containerd/runc"
        with machine.service("/run/containerd/containerd.sock", "containerd"):
            machine.run("ctr", "run", "--detach", "--runc-binary", program, "--rootfs",
                        str(made.rootfs), "living", "/bin/sh", "-c", "sleep 100")
            installed = machine.configuration()
            told = cli("uninstall", "--for", "containerd", check=125)
            assert "container living of containerd lives (namespace default)" in told
            assert_as_before(machine, installed)
            machine.run("ctr", "task", "kill", "-s", "KILL", "living")
            machine.run("ctr", "task", "rm", "-f", "living", check=None)
            cli("uninstall", "--for", "containerd")
        reap_orphans()

    on_a_machine(inside)


def test_what_kubernetes_starts_on_a_node():
    """The commands of the DaemonSet, as they are, without the way into the node's namespace."""
    (_namespace, daemonset) = yaml.safe_load_all(
        (CHECKOUT / "deploy/daemonset.yaml").read_text("utf-8"))
    (container,) = daemonset["spec"]["template"]["spec"]["containers"]
    environment = {each["name"]: each["value"] for each in container["env"]}
    nsenter = ["nsenter", "-t", "1", "-m", "--"]
    start = [*container["command"], *container["args"]]
    ready = container["readinessProbe"]["exec"]["command"]
    stop = container["lifecycle"]["preStop"]["exec"]["command"]
    assert all(each[:5] == nsenter for each in (start, ready, stop))

    def inside(machine: Machine) -> None:
        def done(command: list[str], check: int = 0) -> str:
            words = [word.replace("exec sleep infinity", "") for word in command[5:]]
            return run(*words, env=environment | {"PATH": "/usr/local/sbin:/usr/bin:/bin"},
                       check=check, timeout=60).stdout

        Path("/opt/sandboxfs/bin").mkdir(parents=True)
        Path("/opt/sandboxfs/bin/sandboxfs").symlink_to(LAUNCHER)
        # There is no systemd here: what it is asked is noted.
        systemctl = Path("/usr/local/sbin/systemctl")
        systemctl.write_text('#!/bin/sh\necho "$@" >> /run/asked\n', "utf-8")
        systemctl.chmod(0o755)
        before = machine.configuration()
        done(ready, check=1)
        done(start)
        done(ready)
        assert "sandboxfs" in names_of(machine)
        done(start)
        assert Path("/run/asked").read_text("utf-8") == "restart containerd\n"
        done(stop)
        assert Path("/run/asked").read_text("utf-8") == "restart containerd\n" * 2
        done(ready, check=1)
        assert_as_before(machine, before)

    on_a_machine(inside)


# -- podman -------------------------------------------------------------------------------------


def podman(machine: Machine, *words: str) -> str:
    return machine.run("podman", *words).stdout.strip()


def podmans_runtime(machine: Machine) -> str:
    return podman(machine, "info", "--format", "{{.Host.OCIRuntime.Path}}")


def prepared_for_podman(machine: Machine) -> None:
    machine.unify()
    Path("/etc/containers/storage.conf").write_text('[storage]\ndriver = "vfs"\n'
        'graphroot = "/var/lib/containers/storage"\nrunroot = "/run/containers/storage"\n', "utf-8")
    drop_ins = Path("/etc/containers/containers.conf.d")
    drop_ins.mkdir()
    (drop_ins / "10-tests.conf").write_text(
        '[engine]\nlock_type = "file"\ncgroup_manager = "cgroupfs"\nevents_logger = "none"\n'
        '[containers]\ncgroups = "disabled"\nlog_driver = "none"\nnetns = "none"\n', "utf-8")


@pytest.mark.parametrize("root", ROOTS)
def test_podman_with_the_runtime_and_back(root):
    program = "/usr/local/libexec/sandboxfs/podman/crun"

    def inside(machine: Machine) -> None:
        prepared_for_podman(machine)
        before = machine.configuration()
        assert podmans_runtime(machine) == "/usr/bin/crun"
        cli("install", "--for", "podman")
        assert podmans_runtime(machine) == program
        assert podman(machine, "--runtime", "crun", "info", "--format",
                      "{{.Host.OCIRuntime.Path}}") == "/usr/bin/crun"
        cli("uninstall", "--for", "podman")
        assert_as_before(machine, before)
        assert podmans_runtime(machine) == "/usr/bin/crun"

    on_a_machine(inside, root=root)


@pytest.mark.needs("podman", "crun")
def test_containers_of_podman_are_named_whether_they_live_or_not(bundle):
    rootfs = bundle().rootfs
    for name in ("etc/hosts", "etc/hostname", "run/.containerenv"):
        (rootfs / name).parent.mkdir(exist_ok=True)
        (rootfs / name).touch()

    def inside(machine: Machine) -> None:
        prctl.set_child_subreaper(1)
        prepared_for_podman(machine)
        cli("install", "--for", "podman")
        started = ["--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024", "--rootfs", str(rootfs),
                   "/bin/sh", "-c", "sleep 100"]
        podman(machine, "create", "--name=kept", *started)
        installed = machine.configuration()
        told = cli("uninstall", "--for", "podman", check=125)
        assert "container kept of podman was made with" in told
        podman(machine, "start", "kept")
        told = cli("uninstall", "--for", "podman", check=125)
        assert "lives (its conmon is process " in told
        assert_as_before(machine, installed)
        podman(machine, "rm", "--force", "--time=0", "kept")
        cli("uninstall", "--for", "podman")
        reap_orphans()

    on_a_machine(inside)


# -- Docker -------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", TREES)
@pytest.mark.parametrize("config", [None, '{"log-level": "warn"}'], ids=["none", "some"])
def test_docker_with_the_runtime_and_back(root, config):
    file = Path("/etc/docker/daemon.json")

    def known(machine: Machine) -> list[str]:
        with machine.service("/run/docker.sock", "dockerd", "--iptables=false", "--ip6tables=false",
                             "--bridge=none", "--storage-driver=vfs"):
            connection = http.client.HTTPConnection("docker")
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.connect("/run/docker.sock")
            connection.request("GET", "/info")
            with connection.getresponse() as answer:
                told = json.load(answer)
            connection.close()
        return sorted(told["Runtimes"])

    def inside(machine: Machine) -> None:
        if config is not None:
            file.write_text(config, "utf-8")
        before, runtimes = machine.configuration(), known(machine)
        cli("install", "--for", "docker")
        machine.run("dockerd", "--validate", "--config-file", str(file))
        assert known(machine) == sorted([*runtimes, "sandboxfs"])
        cli("uninstall", "--for", "docker")
        # dockerd has made /etc/docker/key.json or not, by its version.
        assert_as_before(machine, before)
        assert known(machine) == runtimes

    on_a_machine(inside, root=root)


# -- pods -----------------------------------------------------------------------------------------


@pytest.mark.needs("runc", "launcher")
def test_a_pod_with_volumes_of_ours_is_named(public_path):
    place = ["--for", "docker", "--dest", public_path / "ours",
             "--engine-config", public_path / "daemon.json"]

    def inside(host: object) -> None:
        one = host.container("one")
        one.hook("createRuntime", check=0)
        cli("install", *place)
        assert "pod named-p1 lives, 1 of its containers use its volumes" in (
            cli("uninstall", *place, check=125))
        one.kill()
        one.hook("poststop", check=0)
        cli("uninstall", *place)

    on_fake_host(inside)


# -- while containers start -----------------------------------------------------------------------


@pytest.mark.needs("runc")
def test_no_start_fails_while_the_program_is_replaced(bundle, public_path):
    made = bundle(lambda spec: spec["process"].update(args=["/bin/echo", "started"]))
    configs = [public_path / name for name in ("a.toml", "b.toml")]
    for config in configs:
        config.touch(0o644)
    program = "/usr/local/libexec/sandboxfs/podman/runc"
    starts = 60
    loop = (f"i=0; while [ $i -lt {starts} ]; do i=$((i+1)); "
            f"{program} --root /run/starts run -b {made.path} start$i </dev/null || "
            "echo failed; done")

    def inside(machine: Machine) -> None:
        cli("install", "--for", "podman", "--config", configs[0])
        with subprocess.Popen(["sh", "-c", loop], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True) as process:
            replaced = 0
            while process.poll() is None:
                replaced += 1
                told = cli("install", "--for", "podman", "--config", configs[replaced % 2])
                assert f"written   {program}" in told
            said = process.stdout.read()
        assert replaced >= 3
        assert said == "started\n" * starts

    on_a_machine(inside)
