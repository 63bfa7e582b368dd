"""What is wrong in a document: every refusal points at its value and says what is allowed."""

import json

import pytest

from sandboxfs.errors import SpecError
from sandboxfs.spec import check_settings, load, values
from tests.support import containerd_spec

UINT64 = 2**64 - 1


def changed(*path, value):
    """Return containerd's default spec with `value` at `path` (missing objects are made)."""
    # By way of text: the three capability sets of that spec are one list.
    document = json.loads(json.dumps(containerd_spec()))
    owner = document
    for part in path[:-1]:
        owner = owner[part] if isinstance(owner, list) else owner.setdefault(part, {})
    owner[path[-1]] = value
    return document


def problems(document):
    with pytest.raises(SpecError) as caught:
        load.load("/bundle", text=json.dumps(document))
    assert caught.value.exit_status == 65
    return {problem.origin: problem for problem in caught.value.problems}


def problem(document, origin):
    """Return the only problem of `document`, which has to be at `origin`."""
    found = problems(document)
    assert list(found) == [origin]
    assert "\n" not in found[origin].line()
    return found[origin].line()


def loaded(document):
    return load.load("/bundle", text=json.dumps(document))


def with_mount(**fields):
    document = containerd_spec()
    document["mounts"] = [fields]
    return document


# -- the rows of the table of bad documents -------------------------------------------------


@pytest.mark.parametrize(("text", "line"), [
    ('{"ociVersion": "1.0.2", "root": {"path": "a", "path": "b"}}',
     "/root/path: stands twice in one object"),
    ('{"ociVersion": "1.0.2", "root": {"path": "a"}, "ROOT": {"path": "b"}}',
     "/ROOT: is another spelling of root"),
    ('{"ociVersion": "1.0.2", "ROOT": {"path": "b"}}', "/ROOT: is another spelling of root"),
    ('{"ociVersion": "1.0.2", "root": {"path": "a\\u0000b"}}',
     '/root/path: "a\\x00b": holds a NUL'),
    ('{"ociVersion": "1.0.2"} x',
     "config.json: line 1 column 25: nothing may follow the JSON value"),
    ('\ufeff{"ociVersion": "1.0.2"}',
     "config.json: begins with a byte order mark; plain UTF-8 is allowed"),
    ('{"ociVersion": "1.0.2", "x": NaN}', "/x: NaN: is no JSON number"),
    (b'{"ociVersion": "1.0.2\xff"}', "config.json: byte 21 is no UTF-8: invalid start byte"),
    ('{"ociVersion": "1.0.2", "x": "\\udfff"}',
     "/x: holds half of a surrogate pair, which is no character"),
    ('{"ociVersion": "1.0.2", "mounts": [{"destination": "/a", "options": "ro"}]}',
     '/mounts/0/options: "ro": an array is allowed'),
    ('{"ociVersion": "1.0.2", "mounts": [{"destination": "/proc/1", "type": "tmpfs"}]}',
     ('/mounts/0/destination: "/proc/1": over or inside /proc only proc itself is allowed, and '
     "the files cpuinfo, diskstats, loadavg, meminfo, slabinfo, stat, swaps, "
     "sys/crypto/fips_enabled, sys/kernel/ns_last_pid, uptime")),
    ('{"ociVersion": "1.0.2", "linux": {"devices": [{"type": "z", "path": "/dev/z"}]}}',
     '/linux/devices/0/type: "z": allowed: c, b, u, p'),
    (('{"ociVersion": "1.0.2", "linux": {"devices": [{"type": "c", "path": "/dev/z", '
     '"major": 1099511627776, "minor": 0}]}}'),
     "/linux/devices/0/major: 1099511627776: a whole number from 0 to 4095 is allowed"),
    ('{"ociVersion": "1.0.2", "linux": {"rootfsPropagation": "weird"}}',
     ('/linux/rootfsPropagation: "weird": allowed: private, rprivate, shared, rshared, slave, '
     "rslave, unbindable, runbindable")),
    (('{"ociVersion": "1.0.2", "annotations": '
     '{"dev.sandboxfs.overlay.size": "99999999999999999999"}}'),
     ('/annotations/dev.sandboxfs.overlay.size: "99999999999999999999": more than 2^63 - 1 '
     "bytes; a size is a number of bytes, or one with K, M, G or T (1024), or 1% to 100%")),
    ('{"a":' * 200_000, "config.json: is nested too deeply to be read"),
    ('{"ociVersion": "1.0.2", "x": "' + "y" * (50 << 20) + '"}',
     "config.json: is larger than 16 MiB, the most that is read"),
], ids=[
    "a key twice", "ROOT beside root", "ROOT instead of root", "NUL", "trailing garbage", "BOM",
    "NaN", "no UTF-8", "lone surrogate", "options is a string", "tmpfs on proc/1",
    "device type", "device number", "propagation", "size", "nesting", "50 MB",
])
def test_bad_documents(text, line):
    with pytest.raises(SpecError) as caught:
        load.load(text=text)
    assert caught.value.line() == line
    assert caught.value.exit_status == 65


def test_unknown_properties_are_ignored():
    document = containerd_spec()
    for owner in (
        document, document["process"], document["root"], document["mounts"][0],
        document["linux"], document["linux"]["namespaces"][0],
    ):
        owner["org.example.unknown"] = {"PATH": [None]}
    assert loaded(document).root_path == "rootfs"


def test_many_mounts_just_load():
    document = containerd_spec()
    document["mounts"] = [
        {"destination": f"/m/{number}", "type": "tmpfs", "source": "tmpfs"}
        for number in range(100_000)
    ]
    assert len(loaded(document).mounts) == 100_000


@pytest.mark.parametrize("owner", ["annotations", "linux.sysctl"])
def test_maps_have_keys_of_the_users_own(owner):
    """Two spellings of one key are two keys there."""
    document = changed(*owner.split("."), value={})
    if owner == "annotations":
        document["annotations"] = {"root": "1", "ROOT": "2", "Root": "3"}
        assert loaded(document).annotations["ROOT"] == "2"
    else:
        document["linux"]["sysctl"] = {"net.a": "1", "net.A": "2"}
        assert loaded(document).sysctl == {"net.a": "1", "net.A": "2"}


# -- single values -------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "value"), [
    ("ociVersion", 1), ("hostname", "x" * 65), ("hostname", "é" * 33), ("domainname", "x" * 65),
    ("root.path", ""), ("root.path", "x" * 256), ("root.path", "/x" * 2048),
    ("root.readonly", "true"), ("root.readonly", 1),
    ("process.args", []), ("process.args", "sh"), ("process.args.0", 1), ("process.cwd", ""),
    ("process.cwd", "tmp"), ("process.cwd", "/proc/self/fd/7"), ("process.cwd", "/proc/1/cwd"),
    ("process.cwd", "/dev/fd/3"), ("process.cwd", "/proc/./thread-self/fd/8/../.."),
    ("process.cwd", "/proc/1/task/1/root"), ("process.env.0", "PATH"), ("process.env.0", "=x"),
    ("process.terminal", None), ("process.oomScoreAdj", 1001), ("process.oomScoreAdj", 1.0),
    ("process.user.uid", -1), ("process.user.uid", 2**32 - 1), ("process.user.umask", 0o1000),
    ("process.user.gid", "0"), ("process.user.uid", True),
    ("process.capabilities.bounding.0", "CHOWN"),
    ("process.capabilities.bounding.0", "CAP_EVERYTHING"),
    ("process.rlimits.0.type", "NOFILE"), ("process.rlimits.0.soft", -1),
    ("process.rlimits.0.soft", 2**64), ("process.noNewPrivileges", 0),
    ("mounts.1.destination", ""), ("mounts.1.destination", "/"), ("mounts.1.destination", "/x/.."),
    ("mounts.1.destination", "."), ("mounts.1.destination", "/" + "x" * 256),
    ("mounts.1.source", "x" * 256), ("mounts.1.type", 0), ("mounts.1.options.0", ""),
    ("mounts.1.options.0", "a\0"), ("mounts.1.options.0", 1), ("mounts.1", "tmpfs"),
    ("linux.namespaces.0.type", "net"), ("linux.namespaces.0.path", "ns"),
    ("linux.maskedPaths.0", "proc"), ("linux.maskedPaths.0", "/"), ("linux.readonlyPaths.0", ""),
    ("linux.cgroupsPath", 1), ("linux.mountLabel", []), ("linux", []),
    ("linux.resources.memory.limit", "1G"), ("linux.resources.memory.limit", 2**63),
    ("annotations", {"a": 1}), ("linux.sysctl", {"net.x": 1}),
])
def test_single_values(path, value):
    parts = [int(part) if part.isdigit() else part for part in path.split(".")]
    origin = "/" + path.replace(".", "/")
    if isinstance(value, dict):
        origin += "/" + next(iter(value))
    line = problem(changed(*parts, value=value), origin)
    assert line.startswith(f"{origin}: ")


@pytest.mark.parametrize(("path", "value"), [
    ("hostname", ""), ("hostname", "x" * 64), ("root.path", "x" * 255), ("process.cwd", "/proc"),
    ("process.cwd", "/proc/self"), ("process.cwd", "/dev"), ("process.cwd", "/a/../b"),
    ("process.env.0", "A="), ("process.env.0", "A=b=c\n"), ("process.oomScoreAdj", -1000),
    ("process.user.uid", 2**32 - 2), ("process.rlimits.0.hard", UINT64),
    ("mounts.1.source", ""), ("mounts.1.type", ""), ("mounts.1.destination", "dev\nx"),
    ("mounts.1.destination", "/" + "/".join(["x" * 255] * 15)),
    ("linux.namespaces.0.path", ""), ("linux.namespaces.0.path", "/proc/1/ns/pid"),
    ("linux.rootfsPropagation", "rslave"), ("linux.resources.memory.limit", -1),
])
def test_values_at_the_limit_are_fine(path, value):
    parts = [int(part) if part.isdigit() else part for part in path.split(".")]
    loaded(changed(*parts, value=value))


def test_what_is_missing_is_named():
    document = containerd_spec()
    del document["ociVersion"], document["root"]["path"], document["process"]["cwd"]
    document["mounts"] = [{}]
    document["linux"]["devices"] = [{"type": "c", "path": "/x"}, {"type": "p", "path": "/y"}]
    assert set(problems(document)) == {
        "/ociVersion", "/root/path", "/process/cwd", "/mounts/0/destination",
        "/linux/devices/0/major", "/linux/devices/0/minor",
    }


def test_a_folded_letter_is_a_spelling_too():
    """Go's decoder takes U+017F for an s and U+212A for a k."""
    line = problem(changed("moun\u0074\u017f", value=[]), "/mount\u017f")
    assert line.endswith("is another spelling of mounts")


def test_errors_are_cut_and_stay_one_line():
    line = problem(changed("hostname", value="a\n" * 5000), "/hostname")
    assert "\n" not in line
    assert len(line) < 200


@pytest.mark.parametrize("depth", [1, 300, 500, 800, 900, 950, 990, 5000])
def test_a_deep_value_is_refused_by_one_rule_or_the_other(depth):
    """How deep is too deep depends on the interpreter and on who calls; never a traceback."""
    deep = containerd_spec()
    deep["hostname"] = 0
    text = json.dumps(deep).replace('"hostname": 0', '"hostname": ' + "[" * depth + "]" * depth)
    with pytest.raises(SpecError, match=r"hostname: an array|too deeply to be read"):
        load.load(text=text)


# -- rules between values ------------------------------------------------------------------


@pytest.mark.parametrize(("fields", "fine"), [
    ({"destination": "/proc", "type": "proc"}, True),
    ({"destination": "proc", "type": "proc"}, True),
    ({"destination": "/proc", "type": "tmpfs"}, False),
    ({"destination": "/./x/..//proc", "type": "tmpfs"}, False),
    ({"destination": "/proc"}, False),
    ({"destination": "/proc", "type": "bind", "source": "/proc", "options": ["rbind"]}, True),
    ({"destination": "/proc", "type": "proc", "source": "/home", "options": ["bind"]}, False),
    ({"destination": "/proc", "options": ["remount", "ro"]}, True),
    ({"destination": "/proc/1", "type": "tmpfs"}, False),
    ({"destination": "/proc/self/fd", "type": "bind", "source": "/x"}, False),
    ({"destination": "/proc/sys", "type": "proc"}, False),
    ({"destination": "/proc/cpuinfo", "type": "bind", "source": "/x"}, True),
    ({"destination": "/proc/sys/kernel/ns_last_pid", "type": "bind", "source": "/x"}, True),
    ({"destination": "/proc/cpuinfo/..", "type": "tmpfs"}, False),
    ({"destination": "/proc/../data", "type": "tmpfs"}, True),
    ({"destination": "/procs", "type": "tmpfs"}, True),
    ({"destination": "/x/proc/1", "type": "tmpfs"}, True),
])
def test_mounts_over_and_inside_proc(fields, fine):
    document = with_mount(**fields)
    if fine:
        assert loaded(document).mounts[0].destination == fields["destination"]
    else:
        assert "inside /proc only" in problem(document, "/mounts/0/destination")


@pytest.mark.parametrize("fields", [
    {"type": "bind"}, {"options": ["rbind"]}, {"type": "none", "options": ["bind"]},
    {"type": "bind", "source": ""},
])
def test_a_bind_needs_a_source(fields):
    assert "a bind needs one" in problem(
        with_mount(destination="/b", **fields), "/mounts/0/source"
    )


def test_a_relative_destination_is_a_warning():
    spec = loaded(with_mount(destination="data", type="tmpfs"))
    assert spec.warnings == [
        ('mounts[0]: destination "data" is relative, taken from / (deprecated by the '
        "specification)")
    ]


def test_a_namespace_twice():
    document = containerd_spec()
    document["linux"]["namespaces"].append({"type": "ipc", "path": "/proc/1/ns/ipc"})
    assert "stands twice" in problem(document, "/linux/namespaces/5/type")


@pytest.mark.parametrize("key", ["hostname", "domainname"])
def test_names_need_a_uts_namespace(key):
    document = changed(key, value="box")
    assert loaded(document).warnings == []
    document["linux"]["namespaces"] = [{"type": "mount"}]
    assert problem(document, f"/{key}") == f'/{key}: "box": needs a uts namespace'


def with_mappings(uids, gids=None, user=True):
    document = containerd_spec()
    document["linux"]["uidMappings"] = [_range(*entry) for entry in uids]
    document["linux"]["gidMappings"] = [
        _range(*entry) for entry in (uids if gids is None else gids)
    ]
    if user:
        document["linux"]["namespaces"].append({"type": "user"})
    return document


def _range(container, host, size):
    return {"containerID": container, "hostID": host, "size": size}


def test_mappings_of_the_user_namespace():
    spec = loaded(with_mappings([(0, 0, 2**32 - 1)]))
    (mapping,) = spec.uid_mappings
    assert (mapping.container_id, mapping.host_id, mapping.size) == (0, 0, 2**32 - 1)
    assert len(loaded(with_mappings([(i, 2 * i, 1) for i in range(340)])).gid_mappings) == 340


@pytest.mark.parametrize(("ranges", "origin", "told"), [
    ([(0, 0, 0)], "/linux/{}/0/size", "from 1"),
    ([(0, 0, 2**32)], "/linux/{}/0/size", "4294967295"),
    ([(-1, 0, 1)], "/linux/{}/0/containerID", "from 0"),
    ([(1, 0, 2**32 - 1)], "/linux/{}/0", "the last id"),
    ([(0, 2**32 - 2, 2)], "/linux/{}/0", "the last id"),
    ([(0, 0, 10), (9, 100, 1)], "/linux/{}/1", "overlaps"),
    ([(0, 5, 10), (100, 0, 6)], "/linux/{}/0", "overlaps"),
    ([(i, i, 1) for i in range(341)], "/linux/{}", "at most 340"),
])
def test_mappings_that_are_none(ranges, origin, told):
    found = problems(with_mappings(ranges))
    assert list(found) == [origin.format("uidMappings"), origin.format("gidMappings")]
    assert all(told in entry.line() for entry in found.values())


def test_mappings_come_together_and_need_a_user_namespace():
    assert "come together" in problem(with_mappings([(0, 0, 1)], []), "/linux/gidMappings")
    assert "user namespace" in problem(
        with_mappings([(0, 0, 1)], user=False), "/linux/uidMappings"
    )


def test_mappings_of_a_mount():
    one = [_range(0, 1000, 1)]
    bind = {"destination": "/b", "type": "bind", "source": "/b"}
    spec = loaded(with_mount(**bind, uidMappings=one, gidMappings=one))
    assert spec.mounts[0].uid_mappings[0].host_id == 1000
    assert list(problems(with_mount(**bind, uidMappings=one))) == ["/mounts/0/gidMappings"]
    assert list(problems(with_mount(**bind, gidMappings=one))) == ["/mounts/0/uidMappings"]
    assert "overlaps" in problem(
        with_mount(**bind, uidMappings=one * 2, gidMappings=one), "/mounts/0/uidMappings/1"
    )


def test_rlimits():
    limit = {"type": "RLIMIT_CORE", "soft": 0, "hard": UINT64}
    document = changed("process", "rlimits", value=[limit])
    assert loaded(document).process.rlimits == [("RLIMIT_CORE", 0, UINT64)]
    document["process"]["rlimits"] = [limit, limit]
    assert "stands twice" in problem(document, "/process/rlimits/1/type")
    document["process"]["rlimits"] = [{**limit, "soft": 5, "hard": 4}]
    assert "more than hard" in problem(document, "/process/rlimits/0/soft")


@pytest.mark.parametrize(("key", "path"), [
    ("net.ipv4.ip_forward", "net/ipv4/ip_forward"),
    ("net/ipv4/conf/eth0.1/forwarding", "net/ipv4/conf/eth0.1/forwarding"),
    ("net.ipv4.conf.eth0/1.forwarding", "net/ipv4/conf/eth0.1/forwarding"),
    ("kernel.shmmax", "kernel/shmmax"),
    ("kernel", None), ("", None), ("net..ipv4", None), (".net.ipv4", None), ("net.", None),
    ("net/../kernel/core_pattern", None), ("net/./x", None), ("/net/x", None),
    ("net.ipv4/../../kernel/core_pattern", None),
])
def test_paths_of_sysctls(key, path):
    assert check_settings.sysctl_path(key) == path


@pytest.mark.parametrize(("key", "namespace"), [
    ("kernel.shmmax", "ipc"), ("kernel/sem", "ipc"), ("fs.mqueue.msg_max", "ipc"),
    ("net.core.somaxconn", "network"), ("kernel.domainname", "uts"), ("kernel.hostname", "uts"),
    ("user.max_net_namespaces", "user"),
])
def test_sysctls_of_namespaces(key, namespace):
    document = changed("linux", "sysctl", value={key: "1"})
    document["linux"]["namespaces"] = [{"type": "mount"}, {"type": namespace}]
    assert loaded(document).sysctl == {key: "1"}
    document["linux"]["namespaces"].pop()
    assert problem(document, "/linux/sysctl/" + values.escaped(key)).endswith(
        f"needs a namespace of type {namespace}"
    )


@pytest.mark.parametrize("key", [
    "kernel.core_pattern", "vm.swappiness", "fs.file-max", "kernel.pid_max", "kernel.shm_x",
    "fs.mqueue", "net/../kernel/core_pattern", "network.x", "x",
])
def test_sysctls_of_the_host(key):
    problem(changed("linux", "sysctl", value={key: "1"}), "/linux/sysctl/" + values.escaped(key))


def test_a_host_name_by_two_ways():
    document = changed("linux", "sysctl", value={"kernel.hostname": "a"})
    document["hostname"] = "b"
    assert "/hostname already" in problem(document, "/linux/sysctl/kernel.hostname")


def test_time_offsets():
    document = changed("linux", "timeOffsets", value={"boottime": {"secs": -5}})
    assert "needs a time namespace" in problem(document, "/linux/timeOffsets")
    document["linux"]["namespaces"].append({"type": "time"})
    assert loaded(document).time_offsets == {"boottime": (-5, 0)}
    document["linux"]["timeOffsets"] = {"boottime": {"nanosecs": 10**9}, "realtime": {}}
    assert set(problems(document)) == {
        "/linux/timeOffsets/boottime/nanosecs", "/linux/timeOffsets/realtime",
    }
    document["linux"]["timeOffsets"] = {"monotonic": {"secs": 1}}
    document["linux"]["namespaces"][-1]["path"] = "/proc/1/ns/time"
    assert "joined" in problem(document, "/linux/timeOffsets")


def test_network_devices():
    document = changed("linux", "netDevices", value={"eth0": {"name": "ctr0"}, "eth1": {}})
    assert loaded(document).net_devices == {"eth0": "ctr0", "eth1": None}
    document["linux"]["netDevices"] = {"eth0": {"name": "eth1"}, "eth1": {}}
    assert "already" in problem(document, "/linux/netDevices/eth1")
    document["linux"]["netDevices"] = {"a/b": {}, "x" * 16: {}, "e": {"name": "e%d"}, "": {}}
    assert set(problems(document)) == {
        "/linux/netDevices/a~1b", "/linux/netDevices/" + "x" * 16, "/linux/netDevices/e/name",
        "/linux/netDevices/",
    }
    document["linux"]["netDevices"] = {"eth0": {}}
    document["linux"]["namespaces"] = [{"type": "mount"}]
    assert "network namespace" in problem(document, "/linux/netDevices")


# -- what is left to a runtime ----------------------------------------------------------------


@pytest.mark.parametrize(("path", "value", "pointer"), [
    ("linux.resources", {"memory": {"limit": 4096}}, "/linux/resources/memory"),
    ("linux.resources", {"pids": {"limit": 10}}, "/linux/resources/pids"),
    ("linux.resources", {"unified": {"memory.high": "1G"}}, "/linux/resources/unified"),
    ("linux.resources", {"devices": [{"allow": False}]}, "/linux/resources/devices"),
    ("linux.seccomp", {"defaultAction": "SCMP_ACT_ERRNO"}, "/linux/seccomp"),
    ("linux.intelRdt", {"closID": "x"}, "/linux/intelRdt"),
    ("linux.personality", {"domain": "LINUX32"}, "/linux/personality"),
    ("process.apparmorProfile", "docker-default", "/process/apparmorProfile"),
    ("process.selinuxLabel", "l", "/process/selinuxLabel"),
    ("process.ioPriority", {"class": "IOPRIO_CLASS_IDLE"}, "/process/ioPriority"),
    ("process.scheduler", {"policy": "SCHED_IDLE"}, "/process/scheduler"),
    ("process.execCPUAffinity", {"initial": "0"}, "/process/execCPUAffinity"),
    ("hooks", {"poststop": [{"path": "/bin/true"}]}, "/hooks"),
    ("linux.resources", {"memory": {"limit": -1}, "pids": {"limit": 0}, "cpu": {}}, None),
    ("linux.resources", {"devices": [{"allow": True}]}, None),
    ("linux.cgroupsPath", "/x", None),
    ("linux.seccomp", {}, None),
    ("process.apparmorProfile", "unconfined", None),
    ("process.selinuxLabel", "", None),
    ("hooks", {"poststop": []}, None),
])
def test_what_run_does_not_apply_is_named(path, value, pointer):
    document = changed("linux", "resources", value={})
    owner = document
    for part in path.split(".")[:-1]:
        owner = owner[part]
    owner[path.split(".")[-1]] = value
    assert loaded(document).not_applied == ([pointer] if pointer else [])


def test_the_memory_limit_is_read():
    assert loaded(changed("linux", "resources", value={})).memory_limit is None
    document = changed("linux", "resources", "memory", value={"limit": 1 << 30})
    assert loaded(document).memory_limit == 1 << 30


def test_bits_of_the_type_in_a_mode_have_no_effect():
    device = {"type": "c", "path": "/dev/x", "major": 1, "minor": 3, "fileMode": 0o20666}
    (found,) = loaded(changed("linux", "devices", value=[device])).devices
    assert (found.mode, found.uid, found.gid) == (0o666, None, None)


def test_annotations_reach_the_spec():
    document = changed("annotations", value={
        "dev.sandboxfs.overlay": "dir=up", "dev.sandboxfs.typo": "x",
        **{
            f"dev.gvisor.spec.mount.v.{field}": value
            for field, value in (("source", "/s"), ("type", "tmpfs"), ("share", "container"))
        },
    })
    spec = loaded(document)
    assert spec.overrides.overlay_path == "/bundle/up"
    assert [hint.name for hint in spec.hints] == ["v"]
    assert spec.warnings == ["annotation dev.sandboxfs.typo: unknown, ignored"]
    document["annotations"]["dev.sandboxfs.tmp"] = "maybe"
    document["annotations"]["dev.gvisor.spec.mount.v.type"] = "ext4"
    assert set(problems(document)) >= {
        "/annotations/dev.sandboxfs.tmp", "/annotations/dev.gvisor.spec.mount.v.type",
    }


@pytest.mark.parametrize(("path", "cleaned"), [
    ("/", "/"), ("", "/"), ("a", "/a"), ("//a//b/", "/a/b"), ("/a/./b/../c", "/a/c"),
    ("/../..", "/"), ("/...", "/..."), ("/a/...", "/a/..."),
])
def test_clean(path, cleaned):
    assert values.clean(path) == cleaned
