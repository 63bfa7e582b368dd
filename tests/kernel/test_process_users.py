"""User namespaces: maps, who builds where, and flags that can't be taken off from inside."""

import os
import subprocess
from pathlib import Path

import pytest

from sandboxfs.process.credentials import NAMES
from tests.support import LAUNCHER, RANGED, UNPRIVILEGED, needs, run, run_cli

pytestmark = pytest.mark.needs("root", "overlay", "busybox", "launcher", "user-namespaces")

EVERYTHING = {
    kind: list(NAMES)
    for kind in ("bounding", "effective", "permitted", "inheritable", "ambient")
}
RANGE = [{"containerID": 0, "hostID": 300000, "size": 65536}]


def own_id(number):
    return [{"containerID": 0, "hostID": number, "size": 1}]


def with_user(document, mappings):
    document["linux"]["namespaces"].append({"type": "user"})
    document["linux"]["uidMappings"] = mappings
    document["linux"]["gidMappings"] = mappings


def rootless(document):
    """Leave out what an unprivileged user with one id can't have."""
    for mount in document["mounts"]:
        mount["options"] = [word for word in mount["options"] if not word.startswith("gid=")]


def script(document, text):
    document["process"]["args"] = ["/bin/sh", "-c", text]


@pytest.fixture(scope="module")
def prober(tmp_path_factory):
    """The static program that tries to loosen every mount; returns its content."""
    needs("gcc")
    binary = tmp_path_factory.mktemp("prober") / "prober"
    subprocess.run(
        ["gcc", "-static", "-O1", "-D_GNU_SOURCE", "-o", binary,
         Path(__file__).with_name("mount_prober.c")],
        check=True,
    )
    return binary.read_bytes()


def attempts(output):
    found = [line.split() for line in output.splitlines()]
    assert found
    assert all(len(fields) == 3 for fields in found)
    return found


def probe(bundle, prober, mappings, change=None, uid=None):
    """Run the prober with all capabilities; returns its attempts."""

    def configure(document):
        with_user(document, mappings)
        document["process"].update(args=["/bin/prober"], capabilities=EVERYTHING)
        document["root"]["readonly"] = True
        document["mounts"].append({
            "destination": "/etc", "source": "/etc", "options": ["rbind", "ro", "nosuid", "nodev"],
        })
        if change is not None:
            change(document)

    made = bundle(configure)
    (made.rootfs / "bin/prober").write_bytes(prober)
    (made.rootfs / "bin/prober").chmod(0o755)
    return attempts(run_cli("run", "--bundle", made, uid=uid, check=0).stdout)


def test_no_flag_comes_off_a_tree_from_outside(bundle, prober):
    found = probe(bundle, prober, RANGE)
    remounts = [fields for fields in found if fields[0] != "umount"]
    points = {fields[1] for fields in remounts}
    assert {"/", "/etc", "/proc", "/sys", "/dev", "/sys/firmware", "/proc/bus"} <= points
    assert {fields[2] for fields in remounts} == {"EPERM"}
    # Locked together with the others a mount can't go; the kernel calls that EINVAL.
    assert {fields[2] for fields in found if fields[0] == "umount"} == {"EINVAL"}


def test_control_flags_come_off_a_tree_built_inside(bundle, prober):
    found = probe(bundle, prober, own_id(UNPRIVILEGED), rootless, UNPRIVILEGED)
    results = {(fields[0], fields[1]): fields[2] for fields in found}
    assert results["ro", "/"] == "OK"
    assert results["nosuid", "/proc"] == "OK"
    assert results["umount", "/sys"] == "OK"
    # What was locked by the host stays locked: the bind's own flags don't come off alone.
    assert "OK" in {fields[2] for fields in found if fields[0] == "umount"}


def test_maps_and_ids_of_a_tree_from_outside(bundle):
    def change(document):
        with_user(document, RANGE)
        document["process"]["user"] = {"uid": 10, "gid": 20, "additionalGids": [30]}
        document["process"]["cwd"] = "/home/made"
        script(document, "cat /proc/self/uid_map /proc/self/gid_map; id -u; id -G; "
               "stat -c %u:%g /home/made / /dev/null; cat /proc/self/setgroups")

    done = run_cli("run", "--bundle", bundle(change), check=0)
    lines = done.stdout.splitlines()
    assert [line.split() for line in lines[:2]] == [["0", "300000", "65536"]] * 2
    assert lines[2:4] == ["10", "20 30"]
    # Made for the container's root; what belongs to ids that aren't mapped is nobody's.
    assert lines[4] == "0:0"
    assert lines[-1] == "allow"


def test_root_over_the_whole_range_by_default(bundle):
    def change(document):
        document["linux"]["namespaces"].append({"type": "user"})
        script(document, "cat /proc/self/uid_map; readlink /proc/self/ns/user")

    lines = run_cli("run", "--bundle", bundle(change), check=0).stdout.splitlines()
    assert lines[0].split() == Path("/proc/self/uid_map").read_text().split()
    assert lines[1] != os.readlink("/proc/self/ns/user")


def test_settings_of_a_tree_from_outside(bundle):
    def change(document):
        with_user(document, RANGE)
        document.update(hostname="inside")
        document["linux"]["sysctl"] = {"net.ipv4.ip_forward": "1", "kernel.shm_rmid_forced": "1"}
        document["process"]["oomScoreAdj"] = 77
        script(document, "hostname; cat /proc/sys/net/ipv4/ip_forward "
               "/proc/sys/kernel/shm_rmid_forced /proc/self/oom_score_adj; echo $$; "
               "ip -o addr show lo | grep -c 127.0.0.1")

    done = run_cli("run", "--bundle", bundle(change), check=0)
    assert done.stdout.split() == ["inside", "1", "1", "77", "1", "1"]


def test_errors_of_a_build_outside_are_told(bundle):
    def change(document):
        with_user(document, RANGE)
        document["mounts"].append({"destination": "/x", "type": "nosuchfs", "source": "x"})

    done = run_cli("run", "--bundle", bundle(change), check=125)
    assert done.stderr.startswith("sandboxfs: mounts[7]: fsopen ")


@pytest.mark.parametrize("uid", [0, 1])
def test_an_id_that_is_not_mapped_is_named(bundle, uid):
    def change(document):
        with_user(document, [{"containerID": 5, "hostID": 300000, "size": 10}])
        document["process"]["user"] = {"uid": uid, "gid": 5}

    done = run_cli("run", "--bundle", bundle(change), check=125)
    assert done.stderr.startswith(f"sandboxfs: process.user.uid: setresuid {uid}: EINVAL: ")


# -- without privileges --------------------------------------------------------------------


def test_ones_own_id_needs_nobodys_help(bundle):
    def change(document):
        rootless(document)
        with_user(document, own_id(UNPRIVILEGED))
        document.update(hostname="mine")
        script(document, "id -u; cat /proc/self/setgroups; hostname; touch /etc/x && echo wrote; "
               "echo $$")

    made = bundle(change)
    os.chown(made.rootfs / "etc", UNPRIVILEGED, UNPRIVILEGED)
    done = run_cli("run", "--bundle", made, uid=UNPRIVILEGED, check=0)
    assert done.stdout.split() == ["0", "deny", "mine", "wrote", "1"]


def test_the_user_namespace_is_made_although_not_listed(bundle):
    def change(document):
        rootless(document)
        script(document, "cat /proc/self/uid_map")

    done = run_cli("run", "--bundle", bundle(change), uid=UNPRIVILEGED, check=0)
    assert done.stdout.split() == ["0", str(UNPRIVILEGED), "1"]


def test_groups_without_a_range_are_refused(bundle):
    def change(document):
        rootless(document)
        with_user(document, own_id(UNPRIVILEGED))
        document["process"]["user"]["additionalGids"] = [0]

    done = run_cli("run", "--bundle", bundle(change), uid=UNPRIVILEGED, check=125)
    assert "process.user.additionalGids: setgroups" in done.stderr
    assert "/etc/subgid" in done.stderr


def test_ranges_through_newuidmap(bundle, subordinate_ids):
    needs("newuidmap")
    ranged = [{"containerID": 0, "hostID": RANGED, "size": 1},
              {"containerID": 1, "hostID": 200000, "size": 65536}]

    def change(document):
        with_user(document, ranged)
        document["process"]["user"] = {"uid": 1000, "gid": 1001, "additionalGids": [5]}
        script(document, "id -u; id -G; cat /proc/self/uid_map")

    done = run_cli("run", "--bundle", bundle(change), uid=RANGED, check=0)
    assert done.stdout.split() == [
        "1000", "1001", "5", "0", str(RANGED), "1", "1", "200000", "65536",
    ]


def test_a_range_that_nobody_granted(bundle, subordinate_ids):
    def change(document):
        rootless(document)
        with_user(document, RANGE)

    done = run_cli("run", "--bundle", bundle(change), uid=RANGED, check=125)
    assert done.stderr == (
        "sandboxfs: linux.uidMappings[0]: newuidmap 300000-365535: EPERM: /etc/subuid grants "
        "ranged no such range\n"
        "  hint: root can add a line to /etc/subuid: ranged:300000:65536\n"
    )


@pytest.mark.parametrize("kind", ["upper", "lower", "view below"])
def test_what_a_view_of_locked_mounts_can_not_have_is_refused(public_path, kind):
    """Over `/` an unprivileged root is a skeleton of many overlays: never an option ignored."""
    (public_path / "of-the-layer").touch()
    public_path.chmod(0o777)
    before = sorted(os.listdir(public_path))
    arguments = {
        "upper": ("--overlay", f"dir={public_path}:keep"),
        "lower": ("--lower", public_path),
        "view below": ("--rootfs", public_path, "--lower", "/"),
    }[kind]
    done = run_cli("run", *arguments, "--", "ls", "/of-the-layer", uid=UNPRIVILEGED, check=125)
    assert "locked together" in done.stderr
    assert "  hint: " in done.stderr
    assert sorted(os.listdir(public_path)) == before


def test_a_limit_beyond_the_callers_soft_one(bundle):
    def change(document):
        with_user(document, RANGE)
        document["process"]["rlimits"] = [{"type": "RLIMIT_NOFILE", "soft": 600, "hard": 600}]
        script(document, "ulimit -n")

    made = bundle(change)
    # The soft limit of 300 is what the payload would be left with.
    done = run("/bin/sh", "-c", 'ulimit -S -n 300; exec "$@"', "-", LAUNCHER, "run", "--bundle",
               made, check=0)
    assert done.stdout == "600\n"


@pytest.mark.parametrize("uid", [0, UNPRIVILEGED])
def test_an_upper_on_disk_is_removed_by_whoever_waits(bundle, public_path, uid):
    upper = public_path / "upper"
    upper.mkdir()
    upper.chmod(0o777)

    def change(document):
        rootless(document)
        script(document, "mkdir -p /root/a/b; touch /root/a/b/c; exit 9")

    made = bundle(change)
    os.chown(made.rootfs / "root", uid, uid)
    arguments = ("run", "--bundle", made, "--overlay", f"dir={upper}")
    run_cli(*arguments, uid=uid, check=9)
    assert os.listdir(upper) == []
    run_cli(*arguments, "--", "/bin/missing", uid=uid, check=127)
    assert os.listdir(upper) == []
