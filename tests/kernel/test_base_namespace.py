"""The base namespace: the same view with and without, flat, and never a foreign one."""

import os
import subprocess
import threading
import time

import pytest

import sandboxfs
from sandboxfs.errors import MountError, UsageError
from sandboxfs.kernel import abi, mounttable, submounts, syscalls
from sandboxfs.process import base, base_pin, run
from tests.support import (
    LAUNCHER,
    UNPRIVILEGED,
    default_spec,
    in_namespace,
    minimal_spec,
    mount_tmpfs,
    parsed,
    reap_orphans,
    run_cli,
    set_propagation,
)

pytestmark = pytest.mark.needs("root", "overlay", "detached-nesting", "busybox", "launcher")
PLACE = "/run/sandboxfs/base-namespace"
USED, NOT_USED = "a copy of the base namespace", "a copy of the caller's"


def on_a_host(function, *arguments, **how):
    """Call `function` where /run is an empty, shared tmpfs of its own."""
    def called():
        mount_tmpfs("/run")
        set_propagation(abi.MS_SHARED)
        before = points()
        result = function(*arguments)
        run_cli("base-namespace", "remove", check=0)
        assert points() == before
        return result

    return in_namespace(called, **how)


def points():
    return [record.mountpoint for record in mounttable.read()]


def comparable(text):
    """Return the lines of a mount table without what is another one for each mount."""
    return [
        (record.mountpoint, record.root, record.type, record.source, record.attributes,
         record.propagation,
         [word for word in record.superblock_options.split(b",") if b"dir" not in word])
        for record in parsed(text)
    ]


def table_of(made, *options):
    done = run_cli("run", "--timing", *options, "--bundle", made, "--",
                   "/bin/cat", "/proc/self/mountinfo", check=0)
    return comparable(done.stdout), USED in done.stderr, done.stderr


# -- the view --------------------------------------------------------------------------------


def with_binds(document):
    sources = {"slave": ["rbind", "rslave"], "shared": ["bind", "shared"], "plain": ["rbind", "ro"]}
    document["mounts"] += [
        {"destination": f"/data/{name}", "type": "bind", "source": f"SOURCE/{name}",
         "options": options}
        for name, options in sources.items()
    ]


def read_only_with_console(document):
    document["root"]["readonly"] = True
    document["hostname"] = "inside"
    document["process"]["cwd"] = "/place/here"
    document["mounts"] += [
        {"destination": "/etc", "type": "tmpfs", "source": "t", "options": ["tmpcopyup", "ro"]},
        {"destination": "/etc/below", "type": "tmpfs", "source": "t"},
    ]


def with_cgroups(document):
    document["mounts"].append({
        "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
        "options": ["nosuid", "noexec", "nodev", "ro"]})
    document["linux"]["namespaces"].append({"type": "cgroup"})


def with_the_hosts_cgroups(document):
    with_cgroups(document)
    document["linux"]["namespaces"].pop()


def in_a_user_namespace(document):
    document["linux"]["namespaces"].append({"type": "user"})
    mapping = [{"containerID": 0, "hostID": 200000, "size": 65536}]
    document["linux"].update(uidMappings=mapping, gidMappings=mapping)


def with_the_hosts_sysfs(document):
    document["linux"]["namespaces"] = [
        entry for entry in document["linux"]["namespaces"] if entry["type"] != "network"
    ]


@pytest.mark.parametrize("change", [
    lambda document: None, with_binds, read_only_with_console, with_cgroups,
    with_the_hosts_cgroups, in_a_user_namespace, with_the_hosts_sysfs,
], ids=["plain", "binds", "read-only", "cgroup", "host-cgroup", "user", "host-sysfs"])
def test_the_mount_table_is_the_same_with_and_without(bundle, public_path, change):
    document = default_spec()
    change(document)
    for name in ("slave", "shared", "plain"):
        (public_path / name / "below").mkdir(parents=True)
    for mount in document["mounts"]:
        mount["source"] = mount["source"].replace("SOURCE", str(public_path))
    made = bundle(document)
    (made.rootfs / "etc" / "copied").write_text("content")

    def both():
        set_propagation(abi.MS_SHARED)
        mount_tmpfs(public_path / "slave" / "below")
        without = table_of(made)
        run_cli("base-namespace", "create", check=0)
        with_it = table_of(made, "--verify")
        syscalls.umount2(os.fsencode(public_path / "slave" / "below"), abi.MNT_DETACH)
        return without, with_it

    without, with_it = on_a_host(both)
    assert (without[1], with_it[1]) == (False, True)
    assert NOT_USED in without[2]
    assert with_it[0] == without[0]


def test_a_bind_that_is_a_slave_still_receives_what_the_host_mounts(bundle, public_path):
    source = public_path / "source"
    (source / "below").mkdir(parents=True)
    document = default_spec("/bin/sh", "-c", "echo up; read x; cat /data/below/file")
    document["mounts"].append({"destination": "/data", "type": "bind", "source": str(source),
                               "options": ["rbind", "rslave"]})
    made = bundle(document)

    def mounted_while_it_runs():
        set_propagation(abi.MS_SHARED)
        run_cli("base-namespace", "create", check=0)
        inside = subprocess.Popen([LAUNCHER, "run", "--bundle", made], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, text=True)
        assert inside.stdout.readline() == "up\n"
        mount_tmpfs(source / "below")
        (source / "below" / "file").write_text("from the host")
        said = inside.communicate("\n")[0]
        syscalls.umount2(os.fsencode(source / "below"), abi.MNT_DETACH)
        return said

    assert on_a_host(mounted_while_it_runs) == "from the host"


def test_what_is_missing_is_made_and_errors_keep_their_words(bundle):
    made = bundle(mountpoints=False)
    wrong = bundle(minimal_spec("/bin/true"), name="wrong")
    wrong.document["mounts"] = [{"destination": "/etc/passwd", "type": "tmpfs", "source": "t"}]
    wrong.write(wrong.document)

    def two():
        run_cli("base-namespace", "create", check=0)
        listing = run_cli("run", "--bundle", made, "--", "/bin/ls", "/", check=0).stdout
        return listing, run_cli("run", "--bundle", wrong, check=125).stderr

    listing, error = on_a_host(two)
    assert set(listing.split()) >= {"dev", "proc", "sys", "tmp"}
    assert error.startswith("sandboxfs: mounts[0]: mountpoint /etc/passwd: ENOTDIR: ")


def test_this_machines_root_is_carried_over_without_the_namespace(bundle):
    def listed():
        run_cli("base-namespace", "create", check=0)
        return run_cli("run", "--verify", "--", "/bin/sh", "-c",
                       f"ls {PLACE}; cat /proc/self/mountinfo", check=0).stdout

    assert "nsfs" not in on_a_host(listed)


@pytest.mark.parametrize("options", [["--overlay", "none"], ["--engine", "attached"]])
def test_what_needs_the_hosts_mounts_goes_the_plain_way(bundle, options):
    made = bundle()

    def tables():
        without = table_of(made, *options)
        run_cli("base-namespace", "create", check=0)
        return without, table_of(made, *options)

    without, with_it = on_a_host(tables)
    assert not with_it[1]
    assert "warning" not in with_it[2]
    assert with_it[0] == without[0]


@pytest.mark.needs("user-namespaces")
def test_an_unprivileged_user_goes_the_plain_way_silently(bundle, public_path):
    made = bundle()

    def as_somebody():
        run_cli("base-namespace", "create", check=0)
        refused = run_cli("base-namespace", "status", uid=UNPRIVILEGED)
        done = run_cli("run", "--timing", "--rootfs", made.rootfs, "--", "/bin/true",
                       uid=UNPRIVILEGED, check=0)
        return refused.returncode, refused.stderr, done.stderr

    status, refusal, timing = on_a_host(as_somebody)
    assert (status, "is root's to do" in refusal) == (2, True)
    assert NOT_USED in timing
    assert "warning" not in timing


def test_who_may_not_join_it_goes_the_plain_way_silently(bundle):
    """setns(2) to a mount namespace wants CAP_SYS_CHROOT, which a run doesn't otherwise need."""
    made = bundle()
    chroot = 1 << 18

    def without_it():
        plan = sandboxfs.plan(sandboxfs.load(made))
        plan.process.capabilities = {}
        fd = base.create()
        try:
            marks = []
            assert run.run(plan, marks=[("start", 0.0)], base=fd) == 0
            effective, permitted, inheritable = syscalls.capget()
            syscalls.capset(effective & ~chroot, permitted & ~chroot, inheritable & ~chroot)
            marks = [("start", 0.0)]
            assert run.run(plan, marks=marks, base=fd) == 0
            return [phase for phase, _moment in marks]
        finally:
            os.close(fd)

    assert "base" not in in_namespace(without_it)


def test_the_copy_does_not_grow_with_the_host(bundle):
    """What the child detaches at the end is what it copied: counted while it still has it."""
    made = bundle()

    def counted():
        fd = base.create()
        mount_tmpfs("/mnt")
        for number in range(300):
            os.mkdir(f"/mnt/{number}")
            mount_tmpfs(f"/mnt/{number}")
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            own = base.prepare(sandboxfs.plan(sandboxfs.load(made)), fd)
            assert own.enter()
            os.write(writer, b"%d" % len(syscalls.listmount()))
            os._exit(0)
        os.waitpid(child, 0)
        count = int(os.read(reader, 16))
        for each in (fd, reader, writer):
            os.close(each)
        return count, len(syscalls.listmount())

    inside, outside = in_namespace(counted)
    assert outside > 300
    assert inside <= 3


# -- create, remove, status ------------------------------------------------------------------


def test_create_status_and_remove():
    def life():
        words = [run_cli("base-namespace", verb) for verb in
                 ("status", "create", "create", "status", "remove", "remove", "status")]
        return [(done.returncode, done.stdout.partition(": ")[2].strip()) for done in words]

    assert on_a_host(life) == [
        (1, "there is none"), (0, "pinned"), (0, "is there, and in order"),
        (0, "in order, run starts from it"), (0, "removed"), (0, "there is none"),
        (1, "there is none"),
    ]


def test_only_its_own_directory_is_left_and_only_for_root():
    def life():
        run_cli("base-namespace", "create", check=0)
        mode = os.stat(PLACE).st_mode & 0o777
        private = [record.propagation for record in mounttable.read()
                   if record.mountpoint.startswith(PLACE.encode())]
        run_cli("base-namespace", "remove", check=0)
        return mode, private, os.listdir("/run/sandboxfs")

    assert on_a_host(life) == (0o700, [abi.MS_PRIVATE] * 2, ["lock"])


def test_a_namespace_that_is_made_at_once_by_many_is_one():
    def together():
        started = [
            subprocess.Popen([LAUNCHER, "base-namespace", "create"], stdout=subprocess.PIPE,
                             text=True) for _each in range(4)
        ]
        return sorted(each.communicate()[0].partition(": ")[2] for each in started)

    assert on_a_host(together) == ["is there, and in order\n"] * 3 + ["pinned\n"]


def test_a_copy_of_the_hosts_namespace_has_no_pin_and_says_so(bundle):
    """A service with mounts of its own sees the place, not the namespace."""
    made = bundle()

    def elsewhere():
        run_cli("base-namespace", "create", check=0)
        return in_namespace(
            lambda: run_cli("run", "--timing", "--bundle", made, check=0).stderr)

    error = on_a_host(elsewhere)
    assert "the base namespace is left alone" in error
    assert NOT_USED in error


# -- stale and foreign ones ------------------------------------------------------------------


def pin(namespace):
    """Put another namespace's file where ours is pinned."""
    syscalls.umount2(f"{PLACE}/namespace".encode(), abi.MNT_DETACH)
    if namespace is not None:
        clone = syscalls.open_tree(namespace, b"", abi.OPEN_TREE_CLONE | abi.AT_EMPTY_PATH)
        syscalls.move_mount_path(clone, abi.AT_FDCWD, f"{PLACE}/namespace".encode())
        os.close(clone)


def unpinned():
    pin(None)


def of_the_network():
    fd = os.open("/proc/self/ns/net", os.O_RDONLY)
    pin(fd)
    os.close(fd)


def another_base():
    fd = base_pin.later_than_ours()
    pin(fd)
    os.close(fd)


def filled():
    fd = os.open(f"{PLACE}/namespace", os.O_RDONLY)
    child = os.fork()
    if child == 0:
        syscalls.setns(fd, abi.CLONE_NEWNS)
        mount_tmpfs("/proc")
        mount_tmpfs("/sys")
        os._exit(0)
    os.waitpid(child, 0)
    os.close(fd)


def open_for_others():
    os.chmod(PLACE, 0o755)


def state_of_somebody_else():
    os.chown("/run/sandboxfs", UNPRIVILEGED, UNPRIVILEGED)


def a_plain_directory():
    syscalls.umount2(PLACE.encode(), abi.MNT_DETACH)


FAULTS = [
    (unpinned, "is no namespace file"),
    (of_the_network, "is a namespace of another type"),
    (another_base, "is another namespace than the one that was pinned"),
    (filled, "mounts, and should be nearly empty"),
    (open_for_others, "nothing of ours is mounted there"),
    (a_plain_directory, "nothing of ours is mounted there"),
]


@pytest.mark.parametrize(("spoil", "words"), FAULTS, ids=[each[0].__name__ for each in FAULTS])
def test_one_that_is_stale_or_foreign_is_never_used(bundle, spoil, words):
    made = bundle()

    def spoiled():
        run_cli("base-namespace", "create", check=0)
        spoil()
        done = run_cli("run", "--timing", "--bundle", made, check=0)
        status = run_cli("base-namespace", "status", check=1).stdout
        if spoil is open_for_others:
            refused = run_cli("base-namespace", "create", check=125).stderr
            os.chmod(PLACE, 0o700)
            assert "isn't ours" in refused
        again = run_cli("base-namespace", "create", check=0)
        used = run_cli("run", "--timing", "--bundle", made, check=0).stderr
        return done.stderr, status, again.stdout, used

    error, status, again, used = on_a_host(spoiled)
    assert "sandboxfs: warning: the base namespace is left alone: " in error
    assert words in error
    assert NOT_USED in error
    assert words in status
    assert "pinned" in again or spoil is open_for_others
    assert USED in used


def test_a_state_directory_of_somebody_else_is_not_believed(bundle):
    made = bundle()

    def spoiled():
        run_cli("base-namespace", "create", check=0)
        state_of_somebody_else()
        error = run_cli("run", "--timing", "--bundle", made, check=0).stderr
        refused = [run_cli("base-namespace", verb, check=125).stderr
                   for verb in ("create", "remove")]
        os.chown("/run/sandboxfs", 0, 0)
        return error, refused

    error, refused = on_a_host(spoiled)
    assert NOT_USED in error
    assert "belongs to user" in error
    assert all("belongs to user" in each for each in refused)


def test_what_somebody_else_mounted_there_is_not_unmounted():
    def foreign():
        os.makedirs(PLACE, 0o700)
        os.chmod("/run/sandboxfs", 0o700)
        mount_tmpfs(PLACE, mode="0755")
        errors = [run_cli("base-namespace", verb, check=125).stderr
                  for verb in ("create", "remove")]
        there = points()[-1]
        syscalls.umount2(PLACE.encode(), abi.MNT_DETACH)
        return errors, there

    errors, there = on_a_host(foreign)
    assert all("what is mounted there isn't ours" in each for each in errors)
    assert there == PLACE.encode()


def test_a_create_that_is_killed_leaves_nothing(bundle):
    """At whatever moment: what is mounted is complete, or isn't there."""
    def killed():
        results = set()
        for delay in range(0, 60, 6):
            started = subprocess.Popen([LAUNCHER, "base-namespace", "create"],
                                       stdout=subprocess.DEVNULL)
            time.sleep(delay / 1000)
            started.kill()
            started.wait()
            fd, why = base_pin.status()
            if fd >= 0:
                os.close(fd)
            results.add("pinned" if fd >= 0 else why)
            run_cli("base-namespace", "remove", check=0)
        return results

    left = on_a_host(killed)
    reap_orphans()
    empty = f"{PLACE}: nothing of ours is mounted there"
    assert left <= {None, "pinned", empty}


def test_it_is_made_without_anything_of_the_host():
    def made():
        fd = base.create()
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            syscalls.setns(fd, abi.CLONE_NEWNS)
            names = sorted(os.listdir("/")) + os.listdir("/proc")
            try:
                os.mkdir("/x")
                names.append("written")
            except OSError:
                pass
            os.write(writer, repr(names).encode())
            os._exit(0)
        os.waitpid(child, 0)
        said = os.read(reader, 4096)
        fault = base.fault(fd)
        for each in (fd, reader, writer):
            os.close(each)
        return said, fault

    assert in_namespace(made) == (b"['proc', 'sys']", None)


def test_a_process_with_threads_that_makes_one_is_fine():
    """It is made in a forked child, which touches nothing a thread could hold."""
    def threaded():
        stop = threading.Event()
        thread = threading.Thread(target=stop.wait)
        thread.start()
        try:
            fd = base.create()
            os.close(fd)
        finally:
            stop.set()
            thread.join()

    in_namespace(threaded)


def test_without_detached_trees_there_is_none(monkeypatch):
    from sandboxfs.kernel import features

    monkeypatch.setattr(features, "detached_trees", lambda: False)
    with pytest.raises(MountError, match="attached nowhere"):
        base.create()


def test_the_command_is_roots():
    done = run_cli("base-namespace", "create", uid=UNPRIVILEGED)
    assert done.returncode == UsageError.exit_status


@pytest.mark.parametrize("own_process", [True, False], ids=["ours alone", "a program's"])
def test_asking_from_inside_of_a_directory_leaves_root_and_directory_alone(
    public_path, own_process
):
    """Submounts are asked for so, by whoever was started wherever."""
    (public_path / "lower").mkdir()
    (public_path / "closed").mkdir(mode=0o700)

    def asked():
        submounts.own_process = own_process
        os.chdir(public_path)
        fd = os.open("lower", os.O_PATH)
        before = os.stat("/"), os.getcwd()
        empty = submounts.below(fd)
        mount_tmpfs(public_path / "lower")
        under = [record.mountpoint for record in submounts.below(fd)]
        assert (os.stat("/"), os.getcwd()) == before
        os.chdir("closed")
        os.rmdir(public_path / "closed")
        gone = submounts.below(fd)
        os.close(fd)
        return empty, under, len(gone)

    assert in_namespace(asked, check_descriptors=False) == ([], [b""], 1)


def test_who_may_not_enter_the_working_directory_can_run(bundle, public_path):
    made = bundle()
    closed = public_path / "closed"
    closed.mkdir(mode=0o700)
    user = f"setpriv --reuid {UNPRIVILEGED} --clear-groups"
    script = f"cd {closed} && exec {user} {LAUNCHER} run --rootfs {made.rootfs} -- /bin/true"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
