"""Namespaces of every type, new and joined."""

import os
import signal
from pathlib import Path

import pytest

from sandboxfs.kernel import abi
from sandboxfs.process.namespaces import FILES, FLAGS
from tests.support import LAUNCHER, UNPRIVILEGED, in_namespace, needs, run, run_cli

pytestmark = pytest.mark.needs("root", "overlay", "busybox", "launcher")

TYPES = ["pid", "network", "ipc", "uts", "cgroup", "time", "mount"]
RANGE = [{"containerID": 0, "hostID": 300000, "size": 65536}]
SHOW = "".join(f"readlink /proc/self/ns/{FILES[kind]};" for kind in [*TYPES, "user"])


def document_for(document, script, entries):
    document["process"]["args"] = ["/bin/sh", "-c", script]
    document["linux"]["namespaces"] = entries


def shown(output):
    return dict(zip([*TYPES, "user"], output.split(), strict=True))


def own(pid="self"):
    return {kind: os.readlink(f"/proc/{pid}/ns/{FILES[kind]}") for kind in [*TYPES, "user"]}


@pytest.mark.parametrize("user", [False, True])
def test_every_type_new(bundle, user):
    needs("time-namespaces", "cgroup-namespaces")

    def change(document):
        entries = [{"type": kind} for kind in TYPES + ["user"] * user]
        document_for(document, SHOW, entries)
        if user:
            document["linux"].update(uidMappings=RANGE, gidMappings=RANGE)

    found = shown(run_cli("run", "--bundle", bundle(change), check=0).stdout)
    before = own()
    for kind in TYPES:
        assert found[kind] != before[kind], kind
    assert (found["user"] != before["user"]) == user


def test_what_is_not_listed_is_shared(bundle):
    found = shown(run_cli("run", "--bundle", bundle(
        lambda document: document_for(document, SHOW, [{"type": "mount"}])
    ), check=0).stdout)
    before = own()
    assert {kind for kind in found if found[kind] != before[kind]} == {"mount"}


class Other:
    """A process with namespaces of its own, as pid 1 of its pid namespace."""

    def __init__(self, user):
        flags = sum(FLAGS[kind] for kind in TYPES if kind != "time")
        self.reader, writer = os.pipe()
        go_reader, go_writer = os.pipe()
        self.outer = os.fork()
        if self.outer == 0:
            try:
                self.live(flags, user, writer, go_reader)
            finally:
                os._exit(1)
        os.close(writer)
        os.close(go_reader)
        if user:
            os.read(self.reader, 1)
            for kind in ("uid", "gid"):
                Path(f"/proc/{self.outer}/{kind}_map").write_text("0 300000 65536\n")
        os.write(go_writer, b"1")
        os.close(go_writer)
        self.pid = int(os.read(self.reader, 32))

    def live(self, flags, user, writer, go_reader):
        from sandboxfs.kernel.syscalls import prctl, unshare

        prctl(1, 9)
        if user:
            unshare(abi.CLONE_NEWUSER)
            os.write(writer, b"u")
        os.read(go_reader, 1)
        if user:
            os.setresuid(0, 0, 0)
        unshare(flags | abi.CLONE_NEWTIME)
        inner = os.fork()
        if inner == 0:
            prctl(1, 9)
            signal.pause()
        os.write(writer, str(inner).encode())
        os.waitpid(inner, 0)

    def end(self):
        os.kill(self.pid, 9)
        os.waitpid(self.outer, 0)
        os.close(self.reader)


@pytest.fixture(params=[False, True], ids=["host", "user"])
def other(request):
    needs("time-namespaces", "cgroup-namespaces", "user-namespaces")
    process = Other(request.param)
    yield process, request.param
    process.end()


@pytest.mark.parametrize("mount", [False, True], ids=["own-mounts", "its-mounts"])
def test_every_type_joined(bundle, other, mount):
    process, user = other
    wanted = own(process.pid)

    def change(document):
        kinds = [kind for kind in TYPES if kind != "mount" or mount] + ["user"] * user
        entries = [{"type": kind, "path": f"/proc/{process.pid}/ns/{FILES[kind]}"}
                   for kind in kinds]
        if not mount:
            entries.append({"type": "mount"})
        document_for(document, SHOW + "echo $$ >&2", entries)

    done = run_cli("run", "--bundle", bundle(change), check=0)
    found = shown(done.stdout)
    for kind in found:
        if kind == "mount" and not mount:
            assert found[kind] not in (wanted[kind], own()[kind])
        else:
            assert found[kind] == wanted[kind], kind
    # Inside the joined pid namespace, where 1 is somebody else.
    assert int(done.stderr) > 1


@pytest.mark.parametrize("kind", ["network", "pid", "user"])
def test_one_type_joined(bundle, other, kind):
    process, _user = other
    if kind == "user" and own(process.pid)["user"] == own()["user"]:
        kind = "ipc"

    def change(document):
        entries = [{"type": each} for each in ("mount", "uts")]
        entries.append({"type": kind, "path": f"/proc/{process.pid}/ns/{FILES[kind]}"})
        document_for(document, SHOW, entries)
        if kind not in ("network", "user"):
            return
        # A sysfs of this network namespace, or a mqueue of the host's, is not ours to mount.
        document["mounts"] = [mount for mount in document["mounts"]
                              if mount["type"] in ("proc", "tmpfs", "devpts")]

    found = shown(run_cli("run", "--bundle", bundle(change), check=0).stdout)
    assert found[kind] == own(process.pid)[kind]


@pytest.mark.parametrize("other", [False], indirect=True, ids=["host"])
def test_nobody_in_a_joined_pid_namespace_may_trace_the_child(bundle, other, tmp_path):
    """It is not dumpable (ptrace(2)) from its first moment on: the parent isn't when it clones."""
    needs("strace")
    process, _user = other
    made = bundle(lambda document: document_for(document, SHOW, [
        {"type": "mount"}, {"type": "pid", "path": f"/proc/{process.pid}/ns/pid"},
    ]))
    log = tmp_path / "log"
    run("strace", "-f", "-qq", "-e", "trace=prctl,clone3,execve", "-o", log,
        LAUNCHER, "run", "--bundle", made.path, check=0)
    calls = [line.split(None, 1)[1] for line in log.read_text().splitlines()]
    clone = next(at for at, call in enumerate(calls) if call.startswith("clone3("))
    dumpable = [call for call in calls[:clone] if "PR_SET_DUMPABLE" in call]
    assert dumpable
    assert "SUID_DUMP_DISABLE" in dumpable[-1]
    # The parent is what it was, afterwards.
    assert "SUID_DUMP_USER" in [call for call in calls if "PR_SET_DUMPABLE" in call][-1]


def test_our_own_mount_namespace_is_refused(bundle):
    made = bundle(lambda document: document_for(
        document, SHOW, [{"type": "mount", "path": f"/proc/{os.getpid()}/ns/mnt"}]
    ))
    done = run_cli("run", "--bundle", made, check=125)
    assert "linux.namespaces[0]: setns " in done.stderr
    assert "own mount namespace" in done.stderr


@pytest.mark.parametrize(("kind", "path", "words"), [
    ("network", "/proc/self/ns/uts", "is a uts namespace, not a network one"),
    ("network", "/etc/passwd", "is no namespace file"),
    ("network", "/nonexistent", "ENOENT"),
    ("pid", "/dev/null", "is no namespace file"),
])
def test_paths_that_are_no_such_namespace(bundle, kind, path, words):
    made = bundle(lambda document: document_for(
        document, SHOW, [{"type": "mount"}, {"type": kind, "path": path}]
    ))
    done = run_cli("run", "--bundle", made, check=125)
    assert done.stderr.startswith("sandboxfs: linux.namespaces[1]: open ")
    assert words in done.stderr


def test_joining_needs_privileges_in_the_namespace(bundle):
    needs("user-namespaces")

    def change(document):
        for mount in document["mounts"]:
            mount["options"] = [word for word in mount["options"] if not word.startswith("gid=")]
        document_for(document, SHOW, [
            {"type": "mount"}, {"type": "user"}, {"type": "pid"},
            {"type": "network", "path": "/proc/self/ns/net"},
        ])

    done = run_cli("run", "--bundle", bundle(change), uid=UNPRIVILEGED, check=125)
    assert done.stderr.startswith("sandboxfs: linux.namespaces[3]: setns /proc/self/ns/net: EPERM")
    assert "hint" in done.stderr


@pytest.mark.parametrize("user", [False, True])
def test_time_offsets(bundle, user):
    needs("time-namespaces")

    def change(document):
        document_for(document, "cat /proc/uptime /proc/self/timens_offsets",
                     [{"type": kind} for kind in ["mount", "pid", "time"] + ["user"] * user])
        document["linux"]["timeOffsets"] = {
            "boottime": {"secs": 5_000_000}, "monotonic": {"secs": 7, "nanosecs": 9},
        }
        document["mounts"] = [mount for mount in document["mounts"] if mount["type"] == "proc"]
        if user:
            document["linux"].update(uidMappings=RANGE, gidMappings=RANGE)

    lines = run_cli("run", "--bundle", bundle(change), check=0).stdout.splitlines()
    assert float(lines[0].split()[0]) > 5_000_000
    assert [line.split() for line in lines[1:]] == [
        ["monotonic", "7", "9"], ["boottime", "5000000", "0"],
    ]


def test_an_impossible_time_offset(bundle):
    needs("time-namespaces")

    def change(document):
        document_for(document, "true", [{"type": kind} for kind in ("mount", "time")])
        document["linux"]["timeOffsets"] = {"boottime": {"secs": -(1 << 40)}}
        document["mounts"] = []

    done = run_cli("run", "--bundle", bundle(change), check=125)
    assert done.stderr.startswith("sandboxfs: linux.timeOffsets: write ")
    assert "ERANGE" in done.stderr


def test_lo_is_up_in_a_new_network_namespace(bundle):
    made = bundle(lambda document: document_for(
        document, "ip -o addr", [{"type": "mount"}, {"type": "network"}]
    ))
    made.document["mounts"] = [
        mount for mount in made.document["mounts"] if mount["type"] in ("proc", "tmpfs")
    ]
    made.write(made.document)
    output = run_cli("run", "--bundle", made, check=0).stdout
    assert "127.0.0.1/8" in output


def test_settings_are_written_in_the_containers_namespaces(bundle):
    before = Path("/proc/sys/net/ipv4/ip_forward").read_text()
    values = {"net.ipv4.ip_forward": "0" if before.strip() == "1" else "1",
              "net/ipv4/conf/lo/rp_filter": "2", "kernel.msgmax": "4321"}

    def change(document):
        document["linux"]["sysctl"] = values
        document["process"]["args"] = [
            "/bin/cat", "/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv4/conf/lo/rp_filter",
            "/proc/sys/kernel/msgmax",
        ]

    done = run_cli("run", "--bundle", bundle(change), check=0)
    assert done.stdout.split() == list(values.values())
    assert Path("/proc/sys/net/ipv4/ip_forward").read_text() == before


def test_a_setting_that_does_not_exist(bundle):
    made = bundle(lambda document: document["linux"].update(sysctl={"net.nothing.like": "1"}))
    done = run_cli("run", "--bundle", made, check=125)
    assert done.stderr.startswith(
        "sandboxfs: linux.sysctl.net.nothing.like: open /proc/sys/net/nothing/like: ENOENT: "
    )


def test_network_devices_are_moved_with_their_addresses(bundle):
    needs("network-devices")

    def configure(document):
        document["linux"]["netDevices"] = {"moved0": {"name": "eth0"}, "moved1": {}}
        document["process"]["args"] = ["/bin/ip", "-o", "addr"]

    made = bundle(configure)

    def body():
        from pyroute2 import IPRoute

        with IPRoute() as route:
            route.link("add", ifname="moved0", kind="veth", peer="moved1")
            (index,) = route.link_lookup(ifname="moved0")
            route.addr("add", index=index, address="10.9.8.7", prefixlen=24)
        done = run_cli("run", "--bundle", made)
        with IPRoute() as route:
            left = route.link_lookup(ifname="moved0") + route.link_lookup(ifname="moved1")
        return done.returncode, done.stdout, done.stderr, left

    code, output, error, left = in_namespace(body, namespaces=abi.CLONE_NEWNET)
    assert code == 0, error
    assert "eth0" in output
    assert "10.9.8.7/24" in output
    assert "moved1" not in output or "moved0" not in output
    assert left == []


def test_a_network_device_that_is_not_there(bundle):
    made = bundle(lambda document: document["linux"].update(netDevices={"nope0": {}}))
    done = run_cli("run", "--bundle", made, check=125)
    assert done.stderr.startswith("sandboxfs: linux.netDevices.nope0: move nope0: ENODEV: ")


def test_a_library_caller_keeps_its_own_namespaces(bundle):
    """Joining sets what the next child gets, in the caller: it must be undone."""
    needs("time-namespaces")
    made = bundle(lambda document: document_for(
        document, "true", [{"type": "mount"}, {"type": "time"}]
    ))
    made.document["linux"]["timeOffsets"] = {"boottime": {"secs": 5}}
    made.document["mounts"] = []
    made.write(made.document)

    def body():
        from sandboxfs.plan.from_spec import plan
        from sandboxfs.process.run import run
        from sandboxfs.spec.load import load

        names = ["time_for_children", "pid_for_children", "time"]
        before = [os.readlink(f"/proc/self/ns/{name}") for name in names]
        status = run(plan(load(str(made.path))))
        return status, before == [os.readlink(f"/proc/self/ns/{name}") for name in names]

    assert in_namespace(body) == (0, True)


def test_mounts_of_the_run_stay_inside(bundle):
    before = Path("/proc/self/mountinfo").read_text()
    run_cli("run", "--bundle", bundle(), check=0)
    assert Path("/proc/self/mountinfo").read_text() == before
