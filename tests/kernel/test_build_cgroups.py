"""The cgroup mounts of a new cgroup namespace: prepared, and what they depend on asked again."""

import os
from pathlib import Path

import pytest

import sandboxfs
from sandboxfs.build import cgroups, preparation
from sandboxfs.build.assemble import assemble
from sandboxfs.build.gather import gather
from sandboxfs.kernel import abi, fscontext, mountinfo, mounttable, syscalls
from sandboxfs.plan.from_spec import plan as plan_of
from sandboxfs.spec import load
from tests.support import in_namespace, minimal_spec

pytestmark = pytest.mark.needs("root", "overlay", "detached-nesting")

POINT = b"/sys/fs/cgroup"


@pytest.fixture
def plan(bundle):
    document = minimal_spec()
    document["linux"]["namespaces"].append({"type": "cgroup"})
    document["mounts"] = [
        {"destination": "/sys", "type": "sysfs", "source": "sysfs"},
        {"destination": os.fsdecode(POINT), "type": "cgroup", "source": "cgroup",
         "options": ["nosuid", "noexec", "nodev", "ro"]},
        {"destination": "/after", "type": "tmpfs", "source": "tmpfs"},
    ]
    made = bundle(document)
    (made.rootfs / "sys").mkdir(exist_ok=True)
    return plan_of(load.load(made.path))


@pytest.fixture
def point(tmp_path):
    path = tmp_path / "point"
    path.mkdir()
    return path


def seen(plan, point):
    """Build, attach, and return what is mounted on the cgroup directory and below, and outcomes."""
    root = sandboxfs.build(plan)
    with root:
        root.attach(point)
        table = mountinfo.parse(Path("/proc/self/mountinfo").read_bytes())
        syscalls.umount2(os.fsencode(point), abi.MNT_DETACH)
        start = os.fsencode(point) + POINT
        mounts = {
            each.mountpoint.removeprefix(start): (each.type, each.root, each.superblock_options)
            for each in mounttable.parents_first(table) if each.mountpoint.startswith(start)
        }
        return mounts, [(each[1], each[2]) for each in root.outcomes if each[0] is not None
                        and each[0].name == "cgroup"]


def use_as_unified():
    mount = fscontext.create(b"cgroup2", [], 0)
    syscalls.move_mount_path(mount, abi.AT_FDCWD, POINT)
    os.close(mount)


def build(plan, point, *steps):
    """Return what `seen` does, in a new cgroup namespace, after each of the steps."""
    def act():
        syscalls.unshare(abi.CLONE_NEWCGROUP)
        found = []
        for step in steps:
            step()
            found.append(seen(plan, point))
        return found

    return in_namespace(act)


@pytest.mark.parametrize("ahead", [True, False])
def test_what_was_made_ahead_is_told_of_when_links_led_elsewhere(bundle, ahead):
    """A cgroup mount that a link leads elsewhere takes the long way; what follows was made."""
    document = minimal_spec()
    document["linux"]["namespaces"].append({"type": "cgroup"})
    document["mounts"] = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
        {"destination": "/l/x", "type": "cgroup", "source": "cgroup"},
        {"destination": "/dev/cg", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
        {"destination": "/new/deep/dir", "type": "cgroup", "source": "cgroup"},
    ]
    made = bundle(document)
    (made.rootfs / "c").mkdir()
    (made.rootfs / "l").symlink_to("c")
    plan = plan_of(load.load(made.path))

    def act():
        syscalls.unshare(abi.CLONE_NEWCGROUP)
        materials = gather(plan)
        umask = os.umask(0)
        try:
            if ahead:
                assert preparation.go_ahead(plan)
            root = assemble(plan, materials, umask_is_clear=True)
        finally:
            os.umask(umask)
        with root:
            return [(each[0].destination, each[1]) for each in root.outcomes
                    if hasattr(each[0], "destination")]

    found = in_namespace(act)
    assert ("/dev/cg", "tmpfs") in found
    assert len([each for each in found if each == ("/dev/cg", "tmpfs")]) == 1


def nothing():
    """Leave it as it is."""


def the_long_way(monkeypatch):
    monkeypatch.setattr(cgroups, "prepare", lambda _preparation, _operation: None)


def test_prepared_calls_mount_what_the_long_way_mounts(plan, point, monkeypatch):
    with monkeypatch.context() as patch:
        the_long_way(patch)
        (expected,) = build(plan, point, nothing)
    assert expected[0]
    assert expected[1]
    plan.compiled = None
    # All of it by prepared calls, the second build as well, and nothing asked of mountinfo.
    monkeypatch.setattr(cgroups, "mount", None)
    assert build(plan, point, nothing, nothing, nothing) == [expected] * 3


def test_no_mount_table_is_read_where_a_hierarchy_is_mounted_anew(plan, point, monkeypatch):
    the_long_way(monkeypatch)
    monkeypatch.setattr(cgroups, "_host_mountpoints", None)
    (found,) = build(plan, point, nothing)
    assert b"" in found[0]


def test_the_mount_table_is_read_once_where_hierarchies_are_bound(plan, point, monkeypatch):
    (step,) = [each for each in plan.operations if each.name == "cgroup"]
    step.new_namespace = False
    reads, real = [], cgroups._host_mountpoints

    def counted():
        reads.append(1)
        return real()

    monkeypatch.setattr(cgroups, "_host_mountpoints", counted)

    def act():
        found = seen(plan, point)
        return found, len(reads)

    found, count = in_namespace(act)
    assert {word for word, _source in found[1]} == {"bind"}
    assert count == 1


def test_a_cgroup_may_have_any_name():
    text = "3:pids:/a\x0bb\u2028c:d\n0::/\n".encode()
    assert cgroups.memberships(text) == [("pids", "/a\x0bb\u2028c:d"), ("", "/")]


def test_a_host_that_uses_cgroups_in_another_way_since_is_noticed(plan, point):
    before, after, again = build(plan, point, nothing, use_as_unified, nothing)
    assert after == again == ({b"": (b"cgroup2", b"/", after[0][b""][2])}, [("cgroup2", "")])
    # On a unified host nothing has changed.
    if len(cgroups.memberships()) > 1 and before != after:
        assert before[0][b""][0] == b"tmpfs"
        assert len(before[0]) == len(cgroups.memberships()) + 1


def test_a_hierarchy_that_came_since_is_mounted(plan, point, monkeypatch):
    if len(cgroups.memberships()) == 1:
        return  # version 1 isn't in use
    real = cgroups.table

    def without_the_first():
        _first, *others = real().splitlines(keepends=True)
        return b"".join(others)

    with monkeypatch.context() as patch:
        patch.setattr(cgroups, "table", without_the_first)
        sandboxfs.build(plan).close()
    (all_of_them,) = build(plan, point, nothing)
    plan.compiled = None
    assert build(plan, point, nothing) == [all_of_them]
    assert len(all_of_them[0]) == len(real().splitlines()) + 1
