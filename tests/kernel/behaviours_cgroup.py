"""Labels, and `type: cgroup` on every kind of host."""

import os

from sandboxfs.kernel import abi
from tests.kernel.behaviours_table import behaviour
from tests.kernel.behaviours_tools import (
    config,
    fails,
    holds,
    inside,
    mount,
    mount_on,
    read,
    refused,
    rootfs,
    same,
    table,
    tmpfs,
)


def _labelled(plan):
    for step in plan:
        if step.name == "mount":
            step.label = "system_u:object_r:svirt_t:s0:c1,c2"


@behaviour
def a_label_is_a_context_of_file_systems_and_an_xattr_of_mqueue(engine):
    if os.path.exists("/sys/fs/selinux/enforce"):
        return
    # Without SELinux both are refused, which shows that they are set, and how.
    rootfs()
    error = refused(engine, config(tmpfs("/a")), change=_labelled)
    same((error["origin"], error["errno"]), ("mounts[0]", "EINVAL"))
    holds(error["line"], "context=system_u:object_r:svirt_t:s0:c1,c2")
    error = refused(engine, config(mount("/a", "mqueue")), change=_labelled)
    same((error["origin"], error["errno"]), ("mounts[0]", "ENOTSUP"))


# -- cgroup --------------------------------------------------------------------------------

CGROUP = mount("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid", "noexec", "nodev", "ro")
FLAGS = {"ro", "nosuid", "noexec", "nodev"}


def _own_cgroups():
    """Return [(controllers, path)] of /proc/self/cgroup."""
    lines = read("/proc/self/cgroup").decode().splitlines()
    return [tuple(line.split(":", 2)[1:]) for line in lines]


def _is_unified():
    found = [each.type for each in table() if each.mountpoint == b"/sys/fs/cgroup"]
    return bool(found) and found[-1] == b"cgroup2"


def _with_cgroup_namespace(*mounts):
    return config(*mounts, namespaces=[{"type": "mount"}, {"type": "cgroup"}])


def _check_unified(view):
    same(view.at("/sys/fs/cgroup").type, b"cgroup2")
    same(view.flags("/sys/fs/cgroup"), FLAGS)
    assert os.path.exists("/sys/fs/cgroup/cgroup.procs")


@behaviour
def on_a_unified_host_cgroup_is_cgroup2(engine):
    rootfs()
    if not _is_unified():
        mount_on("/sys/fs/cgroup", b"cgroup2")

    def check(view):
        _check_unified(view)
        same(view.at("/sys/fs/cgroup").root, b"/")

    inside(engine, _with_cgroup_namespace(CGROUP), check, unshare=abi.CLONE_NEWCGROUP)


@behaviour
def on_a_unified_host_without_a_cgroup_namespace_the_own_cgroup_is_bound(engine):
    rootfs()
    if not _is_unified():
        mount_on("/sys/fs/cgroup", b"cgroup2")
    (path,) = (path for names, path in _own_cgroups() if not names)

    def check(view):
        _check_unified(view)
        same(os.fsdecode(view.at("/sys/fs/cgroup").root), path)

    inside(engine, config(CGROUP), check)


def _check_split(view, hierarchies):
    """Assert a tmpfs with a mount a hierarchy, and links for those mounted together."""
    same((view.at("/sys/fs/cgroup").type, view.flags("/sys/fs/cgroup")), (b"tmpfs", FLAGS))
    for names, path in hierarchies:
        directory = names.removeprefix("name=") or "unified"
        record = view.at("/sys/fs/cgroup/" + directory)
        same(record.type, b"cgroup" if names else b"cgroup2", directory)
        same(view.flags("/sys/fs/cgroup/" + directory), FLAGS, directory)
        if path is not None:
            same(os.fsdecode(record.root), path, directory)
        if "," in directory:
            for name in directory.split(","):
                same(os.readlink("/sys/fs/cgroup/" + name), directory)
    fails("EROFS", os.mkdir, "/sys/fs/cgroup/new")


@behaviour
def on_a_split_host_there_is_a_mount_a_hierarchy(engine):
    if _is_unified():
        return  # the kernel of the guest has no version 1
    rootfs()
    mounted = {os.path.basename(each.mountpoint) for each in table()
               if each.type in (b"cgroup", b"cgroup2")}
    hierarchies = [(names, path) for names, path in _own_cgroups()
                   if os.fsencode(names.removeprefix("name=") or "unified") in mounted]
    assert hierarchies
    inside(engine, config(CGROUP), lambda view: _check_split(view, hierarchies))
    in_namespace = [(names, None) for names, _path in hierarchies]
    inside(engine, _with_cgroup_namespace(CGROUP),
           lambda view: _check_split(view, in_namespace), unshare=abi.CLONE_NEWCGROUP)


@behaviour
def a_mount_in_the_tmpfs_of_read_only_hierarchies_gets_its_mountpoint(engine):
    if _is_unified():
        return
    rootfs()

    def check(view):
        same(view.at("/sys/fs/cgroup/new").type, b"tmpfs")
        same((view.at("/sys/fs/cgroup").type, view.flags("/sys/fs/cgroup")), (b"tmpfs", FLAGS))
        fails("EROFS", os.mkdir, "/sys/fs/cgroup/another")

    inside(engine, _with_cgroup_namespace(CGROUP, tmpfs("/sys/fs/cgroup/new")), check,
           unshare=abi.CLONE_NEWCGROUP)


@behaviour
def cgroups_have_the_propagation_that_was_asked_for(engine):
    rootfs()
    for word in ("shared", "rshared"):
        cgroups = mount("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid", "noexec", "nodev", word)

        def check(view, word=word):
            below = [each for each in view.table()
                     if each.mountpoint.startswith(b"/sys/fs/cgroup")]
            assert below
            for each in below:
                is_shared = word == "rshared" or each.mountpoint == b"/sys/fs/cgroup"
                same(bool(each.propagation & abi.MS_SHARED), is_shared, each.mountpoint)

        inside(engine, _with_cgroup_namespace(cgroups), check, unshare=abi.CLONE_NEWCGROUP)


@behaviour
def cgroups_that_are_bound_take_any_atime_option(engine):
    rootfs()
    for word in ("noatime", "strictatime", "relatime"):
        cgroups = mount("/sys/fs/cgroup", "cgroup", "cgroup", "ro", word)

        def check(view, word=word):
            below = [each for each in view.table()
                     if each.mountpoint.startswith(b"/sys/fs/cgroup")]
            assert below
            for each in below:
                flags = view.flags(os.fsdecode(each.mountpoint))
                same(flags & {"noatime"}, {"noatime"} & {word}, each.mountpoint)

        inside(engine, config(cgroups), check)


@behaviour
def what_covers_cgroups_covers_them(engine):
    rootfs()
    cgroups = mount("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid", "noexec", "nodev")
    document = _with_cgroup_namespace(
        mount("/proc", "proc", "proc"), tmpfs("/dev", "mode=755"),
        mount("/sys", "sysfs", "sysfs"), cgroups)

    def read_only(view):
        for each in view.table():
            if each.mountpoint.startswith(b"/sys/fs/cgroup"):
                fails("EROFS", os.mkdir, os.path.join(os.fsdecode(each.mountpoint), "new"))

    def masked(view):
        same(os.listdir("/sys/fs"), [])
        same(view.at("/sys/fs").type, b"tmpfs")

    document["linux"]["readonlyPaths"] = ["/sys/fs"]
    inside(engine, document, read_only, unshare=abi.CLONE_NEWCGROUP)
    document["linux"] |= {"readonlyPaths": [], "maskedPaths": ["/sys/fs"]}
    inside(engine, document, masked, unshare=abi.CLONE_NEWCGROUP)


@behaviour
def type_cgroup2_is_a_file_system_of_its_own(engine):
    rootfs()

    def check(view):
        same(view.at("/sys/fs/cgroup").type, b"cgroup2")

    inside(engine, _with_cgroup_namespace(mount("/sys/fs/cgroup", "cgroup2", "cgroup2")), check,
           unshare=abi.CLONE_NEWCGROUP)


@behaviour
def a_mount_in_read_only_cgroups_makes_no_cgroup_of_the_machine(engine):
    rootfs()
    if not _is_unified():
        mount_on("/sys/fs/cgroup", b"cgroup2")
    (path,) = (path for names, path in _own_cgroups() if not names)
    name = f"sandboxfs-behaviour-{os.getpid()}"
    inside_of = tmpfs("/sys/fs/cgroup/" + name)
    fresh = mount("/sys/fs/cgroup", "cgroup2", "cgroup", "ro")

    def check(view):
        same(view.at("/sys/fs/cgroup/" + name).type, b"tmpfs")
        fails("EROFS", os.mkdir, "/sys/fs/cgroup/new")

    made = ["/sys/fs/cgroup/" + name, f"/sys/fs/cgroup{path.rstrip('/')}/{name}"]
    try:
        for document, flags in (
            (config(CGROUP, inside_of), 0), (config(fresh, inside_of), 0),
            (_with_cgroup_namespace(CGROUP, inside_of), abi.CLONE_NEWCGROUP),
        ):
            inside(engine, document, check, unshare=flags)
            same([each for each in made if os.path.exists(each)], [])
    finally:
        for each in made:
            if os.path.exists(each):
                os.rmdir(each)
