"""What doctor finds, on this kernel and where something was taken away."""

import argparse
import json
import os

import pytest

from sandboxfs.cli import doctor
from sandboxfs.kernel import abi, features, probe
from tests.support.commands import run_cli
from tests.support.host import bind, mount_tmpfs
from tests.support.namespace import RANGED, UNPRIVILEGED, in_namespace

NAMES = [name for name, _title, _lost in doctor.TABLE]


def findings():
    return {entry["name"]: entry for entry in doctor.examine(features.Features())}


def exit_status(capsys):
    status = doctor.main(argparse.Namespace(json=True))
    return status, json.loads(capsys.readouterr().out)


def test_every_feature_has_a_row_and_a_price():
    properties = [name for name, value in vars(features.Features).items()
                  if isinstance(value, property)]
    assert sorted(NAMES) == sorted(properties)
    assert all(lost.endswith(".") for _name, _title, lost in doctor.TABLE)
    assert set(doctor.REQUIRED) <= set(NAMES)


@pytest.mark.needs("root", "detached-nesting", "overlay", "listmount", "user-namespaces")
def test_what_this_machine_can_do_is_found():
    found = in_namespace(findings)
    for name in (*doctor.REQUIRED, "overlay", "overlay_by_descriptor", "detached_trees",
                 "statmount", "idmapped_mounts", "device_nodes", "user_namespaces",
                 "overlay_in_user_namespace", "user_attributes", "mount_max"):
        assert found[name]["found"], found[name]
        assert found[name]["lost"] is None


@pytest.mark.needs("root", "squashfs", "erofs-file")
def test_the_smallest_images_mount():
    assert features.Features().squashfs.found
    assert features.Features().erofs_file.found


@pytest.mark.needs("root", "erofs-file")
@pytest.mark.parametrize("first", ["/tmp", "/var/tmp"])
def test_erofs_images_are_found_to_mount_where_temporary_files_lie_in_memory(
    public_path, first
):
    """The kernel takes no image on a tmpfs; those on this machine's disks it takes."""
    def check():
        bind(public_path, "/mnt")  # a mount of the disk that stays in sight
        for directory in ("/var/tmp", "/tmp") if first == "/tmp" else ("/var/tmp",):
            mount_tmpfs(directory)
        os.chdir("/tmp")
        found = findings()
        return found["erofs_file"], found["squashfs"]

    erofs, squashfs = in_namespace(check)
    assert erofs["found"], erofs
    refused = "not of an image in /var/tmp" + (", /tmp" if first == "/tmp" else "")
    assert erofs["detail"].startswith(refused)
    assert squashfs["found"] == features.Features().squashfs.found


@pytest.mark.needs("root")
def test_where_all_files_lie_in_memory_no_erofs_image_mounts_without_a_loop_device():
    def check():
        mount_tmpfs("/mnt")
        for name in ("tmp", "proc", "var"):
            os.mkdir(f"/mnt/{name}")
        os.mkdir("/mnt/var/tmp")
        bind("/proc", "/mnt/proc")
        os.chdir("/mnt")
        features.syscalls.pivot_root(b".", b".")
        features.syscalls.umount2(b".", abi.MNT_DETACH)
        os.chdir("/")
        return findings()["erofs_file"]

    erofs = in_namespace(check, check_descriptors=False)
    assert not erofs["found"]
    assert erofs["lost"]
    assert "image in /var/tmp" in erofs["detail"]


@pytest.mark.needs("root")
@pytest.mark.parametrize("mounted", [features._mount_squashfs, features._mount_erofs])
def test_an_image_that_is_broken_does_not_mount(mounted, monkeypatch):
    monkeypatch.setattr(features, "squashfs_image", lambda: b"\0" * 4096)
    monkeypatch.setattr(features, "erofs_image", lambda: b"\0" * 4096)
    assert not probe.apart(mounted)


@pytest.mark.needs("root", "user-namespaces")
def test_where_user_namespaces_are_used_up_nothing_can_be_built(capfd):
    def check():
        # The sysctl belongs to this user namespace alone.
        with open("/proc/sys/user/max_user_namespaces", "w", encoding="ascii") as file:
            file.write("0")
        os.setresgid(1000, 1000, 1000)
        os.setresuid(1000, 1000, 1000)
        status = doctor.main(argparse.Namespace(json=False))
        return status, findings()

    status, found = in_namespace(check, mappings=[(0, 100000, 65536)])
    assert status == 1
    for name in ("mount_namespace", "user_namespaces", "overlay_in_user_namespace"):
        assert not found[name]["found"]
        assert found[name]["lost"]
    assert "ENOSPC" in found["mount_namespace"]["detail"]
    # Not tried is no answer: nothing is said to be lost by it.
    assert found["overlay"]["detail"].startswith(probe.NOT_TRIED)
    assert found["overlay"]["lost"] is None
    assert found["openat2"]["found"]


@pytest.mark.needs("root")
def test_a_chrooted_process_cannot_pivot(tmp_path):
    def check():
        mount_tmpfs(tmp_path)
        os.mkdir(tmp_path / "root")
        os.chroot(tmp_path / "root")
        os.chdir("/")
        return findings()

    found = in_namespace(check)
    assert not found["pivot_root"]["found"]
    assert "EINVAL" in found["pivot_root"]["detail"]
    # There is no /proc and no place for a file, and every probe still answers.
    assert not found["cgroups"]["found"]
    assert found["detached_trees"]["found"]


@pytest.mark.needs("root")
def test_a_full_mount_namespace_is_told():
    def check():
        # fs.mount-max is the whole machine's: a limit is what the mounts are measured against.
        limit = features.Features().mount_max
        used, _, allowed = limit.detail.partition(" of ")
        return limit.found, int(used), int(allowed)

    found, used, allowed = in_namespace(check)
    with open("/proc/self/mountinfo", "rb") as table, \
            open("/proc/sys/fs/mount-max", encoding="ascii") as file:
        assert (used, allowed) == (len(table.readlines()), int(file.read()))
    assert found == (used < allowed * 9 // 10)


@pytest.mark.needs("root", "user-namespaces")
def test_an_unprivileged_user_is_answered_in_a_user_namespace():
    def check():
        os.setgroups([])
        os.setresgid(UNPRIVILEGED, UNPRIVILEGED, UNPRIVILEGED)
        os.setresuid(UNPRIVILEGED, UNPRIVILEGED, UNPRIVILEGED)
        # Changing ids closed /proc/self to us, as no exec has done here since.
        features.syscalls.prctl(4, 1)
        return findings()

    found = in_namespace(check)
    assert found["mount_namespace"]["detail"] == "in a user namespace"
    assert found["detached_trees"]["found"]
    assert not found["device_nodes"]["found"]
    assert not found["squashfs"]["found"]
    assert not found["id_ranges"]["found"]


def test_detached_trees_says_yes_unless_the_kernel_says_no():
    if os.geteuid() == 0:
        assert features.detached_trees() == features.Features().detached_trees.found
    # EPERM is no word about the kernel.
    assert in_namespace_without_capabilities(features.detached_trees)


def in_namespace_without_capabilities(function):
    if os.geteuid() != 0:
        return function()

    def check():
        os.setresuid(UNPRIVILEGED, UNPRIVILEGED, UNPRIVILEGED)
        return function()

    return in_namespace(check)


def test_a_probe_is_made_once(monkeypatch):
    asked = []
    monkeypatch.setattr(features, "_openat2", lambda: asked.append(1) or features.Finding(True))
    one = features.Features()
    assert one.openat2
    assert one.openat2
    assert asked == [1]
    assert features.Features().openat2
    assert asked == [1, 1]


def test_a_probe_that_hangs_is_ended(monkeypatch):
    import signal

    monkeypatch.setattr(probe, "LONGEST_PROBE", 0.1)
    finding = probe.in_child(signal.pause)
    assert not finding
    assert finding.detail == "the probe was killed"


@pytest.mark.needs("root", "launcher")
def test_the_command(public_path):
    done = run_cli("doctor", check=0)
    assert "Containers can be built and run here by root." in done.stdout
    told = json.loads(run_cli("doctor", "--json", check=0).stdout)
    assert told["possible"] is True
    assert [entry["name"] for entry in told["findings"]] == NAMES
    as_user = json.loads(run_cli("doctor", "--json", uid=UNPRIVILEGED, check=0).stdout)
    assert as_user["uid"] == UNPRIVILEGED
    assert as_user["possible"] is True


@pytest.mark.needs("root", "launcher", "newuidmap", "user-namespaces")
def test_ranges_of_ids_are_found_by_using_them(subordinate_ids):
    told = json.loads(run_cli("doctor", "--json", uid=RANGED, check=0).stdout)
    (entry,) = [each for each in told["findings"] if each["name"] == "id_ranges"]
    assert entry["found"], entry
    assert "user ids" in entry["detail"]


@pytest.mark.needs("root")
def test_mounts_of_probes_are_seen_nowhere():
    def check():
        with open("/proc/self/mountinfo", "rb") as file:
            before = file.read()
        findings()
        with open("/proc/self/mountinfo", "rb") as file:
            return before == file.read()

    # Even where everything is shared, as on most hosts.
    def shared():
        from tests.support.namespace import set_propagation

        set_propagation(abi.MS_SHARED)
        return check()

    assert in_namespace(shared)
