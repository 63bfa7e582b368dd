"""Every decision of the plan, one by one: pure, no mount anywhere."""

import json

import pytest

from sandboxfs.errors import SpecError
from sandboxfs.kernel import abi
from sandboxfs.plan import from_spec, survey
from sandboxfs.plan.operations import (
    Bind,
    Cgroup,
    Console,
    Directory,
    Filesystem,
    Mask,
    Node,
    Overlay,
    PlainRoot,
    Replica,
    Seal,
    Symlink,
    Tmp,
)
from sandboxfs.spec import load

USER = survey.Facts(uid=1000, gid=1000, privileged=False)
PROC = {"destination": "/proc", "type": "proc", "source": "proc"}


def plan(facts=None, **parts):
    """Return the plan of a minimal spec with some parts replaced."""
    linux = {"namespaces": [{"type": "pid"}, {"type": "mount"}]}
    linux.update(parts.pop("linux", {}))
    document = {
        "ociVersion": "1.0.2",
        "process": {"args": ["/bin/true"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "root": {"path": "/rootfs"},
        "mounts": [],
        "linux": linux,
    }
    document.update(parts)
    return from_spec.plan(load.load(text=json.dumps(document)), facts or survey.Facts())


def of(result, kind):
    return [step for step in result if type(step) is kind]


def notes(result):
    return {note.origin: note.text for note in result.notes}


def bind(source, destination, *options, **more):
    return {"source": source, "destination": destination, "type": "bind",
            "options": ["rbind", *options], **more}


def tmpfs(destination, *options):
    return {"destination": destination, "type": "tmpfs", "source": "tmpfs",
            "options": list(options)}


# -- namespaces -----------------------------------------------------------------------------


def test_a_mount_namespace_is_made_although_not_listed():
    result = plan(linux={"namespaces": [{"type": "pid"}]})
    assert result.new_namespace("mount")
    assert "reaches the host" in notes(result)["linux.namespaces"]


def test_without_privileges_a_user_namespace_is_made_with_one_id():
    result = plan(USER)
    (mapping,) = result.user.uid_mappings
    assert (mapping.container_id, mapping.host_id, mapping.size) == (0, 1000, 1)
    assert not result.user.outside
    assert "may not mount" in notes(result)["linux.namespaces"]


def test_root_gets_the_identity_over_all_ids_and_builds_from_outside():
    result = plan(linux={"namespaces": [{"type": "user"}, {"type": "mount"}]})
    (mapping,) = result.user.uid_mappings
    assert (mapping.container_id, mapping.host_id, mapping.size) == (0, 0, 4294967295)
    assert result.user.outside


def test_time_offsets_need_a_time_namespace():
    with pytest.raises(SpecError, match="time namespace"):
        plan(linux={"timeOffsets": {"monotonic": {"secs": 5}}})


# -- the root -------------------------------------------------------------------------------


def test_the_default_root_is_an_overlay_with_a_tmpfs_upper():
    (overlay,) = of(plan(), Overlay)
    assert overlay.upper is None
    assert overlay.size is None
    assert not overlay.userxattr


def test_user_namespaces_keep_the_marks_in_user_xattrs():
    (overlay,) = of(plan(USER), Overlay)
    assert overlay.userxattr


def test_half_of_the_memory_limit_is_the_uppers_size():
    result = plan(linux={"resources": {"memory": {"limit": 1 << 20}}})
    assert of(result, Overlay)[0].size == str(1 << 19)
    assert "half" in notes(result)["overlay.size"]


def test_a_size_of_its_own_wins():
    result = plan(linux={"resources": {"memory": {"limit": 1 << 20}}},
                  annotations={"dev.sandboxfs.overlay.size": "3M"})
    assert of(result, Overlay)[0].size in ("3M", "3m", str(3 << 20))


@pytest.mark.parametrize("engine", ["auto", "detached", "attached"])
def test_the_engine_is_the_one_that_is_asked_for(engine):
    assert plan(annotations={"dev.sandboxfs.engine": engine}).engine == engine
    assert plan().engine == "auto"


def test_overlay_none_is_the_rootfs_itself_and_says_so():
    result = plan(annotations={"dev.sandboxfs.overlay": "none"})
    assert of(result, PlainRoot)[0].path == "/rootfs"
    assert not of(result, Overlay)
    assert "made in it" in notes(result)["overlay"]


@pytest.mark.parametrize(("text", "keep"), [("dir=/upper", False), ("dir=/upper:keep", True)])
def test_overlay_on_a_directory(text, keep):
    (overlay,) = of(plan(annotations={"dev.sandboxfs.overlay": text}), Overlay)
    assert (overlay.upper, overlay.keep) == ("/upper", keep)


def test_the_root_is_sealed_when_asked():
    assert of(plan(root={"path": "/rootfs", "readonly": True}), Seal)
    assert not of(plan(), Seal)


# -- mounts ---------------------------------------------------------------------------------


def test_the_order_of_the_spec_is_kept():
    mounts = [tmpfs("/b"), tmpfs("/a"), PROC, tmpfs("/a/c")]
    destinations = [step.destination for step in of(plan(mounts=mounts), Filesystem)]
    assert destinations == ["/b", "/a", "/proc", "/a/c"]


@pytest.mark.parametrize("destination", ["/", "//", "/a/..", "/."])
def test_the_root_is_no_destination(destination):
    with pytest.raises(SpecError) as caught:
        plan(mounts=[tmpfs(destination)])
    assert "/mounts/0" in str(caught.value)


def test_a_relative_destination_is_taken_from_the_root():
    result = plan(mounts=[tmpfs("run")])
    assert "relative" in notes(result)["mounts[0]"]


def test_remount_is_folded_into_the_mount():
    result = plan(mounts=[tmpfs("/data", "noexec"), tmpfs("/data/", "remount", "ro", "exec")])
    (step,) = of(result, Filesystem)
    assert step.attributes == abi.MOUNT_ATTR_RDONLY
    assert "folded into mounts[0]" in notes(result)["mounts[1]"]


def test_remount_of_nothing_is_an_error():
    with pytest.raises(SpecError, match="remount"):
        plan(mounts=[tmpfs("/data", "remount", "ro")])


def test_an_unknown_word_is_an_error_on_a_bind_and_data_elsewhere():
    with pytest.raises(SpecError) as caught:
        plan(mounts=[bind("/srv", "/srv", "frobnicate")])
    assert caught.value.origin == "/mounts/0/options/1"
    (step,) = of(plan(mounts=[tmpfs("/data", "noswap", "size=1m")]), Filesystem)
    assert step.data == [("noswap", None), ("size", "1m")]


@pytest.mark.parametrize("word", ["size=1k,nr_inodes=3", "=x", "size=99999999999999999999",
                                  "size=x", "nr_inodes=-1"])
def test_words_that_cannot_be(word):
    with pytest.raises(SpecError) as caught:
        plan(mounts=[tmpfs("/data", word)])
    assert caught.value.origin == "/mounts/0/options/0"


def test_a_label_may_hold_a_comma():
    (step,) = of(plan(mounts=[tmpfs("/data", "context=a:b:c:s0,c1")]), Filesystem)
    assert step.data == [("context", "a:b:c:s0,c1")]


def test_words_without_effect_are_said():
    result = plan(mounts=[tmpfs("/data", "iversion", "mand")])
    assert result.warnings == ["mounts[0]: mand: mandatory locks are gone from Linux; no effect"]
    assert "no effect" in notes(result)["mounts[0]"]


def test_read_only_mounts_know_what_lies_inside():
    result = plan(mounts=[bind("/srv", "/data", "ro"), tmpfs("/data/a"), tmpfs("/data/a/b"),
                          tmpfs("/database")])
    assert of(result, Bind)[0].nested == ("a", "a/b")


def test_a_superblock_of_a_device_is_read_only_too():
    result = plan(mounts=[{"destination": "/d", "type": "ext4", "source": "/dev/x",
                           "options": ["ro"]}, tmpfs("/t", "ro")])
    disk, memory = of(result, Filesystem)
    assert disk.flags == ["ro"]
    assert memory.flags == []


def test_mounts_below_a_shared_bind_come_last():
    result = plan(mounts=[bind("/srv", "/data", "rshared"), tmpfs("/data/x"), tmpfs("/other")])
    kinds = [(type(step), getattr(step, "destination", "")) for step in result]
    assert kinds.index((Filesystem, "/data/x")) > kinds.index((Filesystem, "/other"))
    assert "peers" in notes(result)["mounts[1]"]


def test_idmap_without_any_mapping():
    with pytest.raises(SpecError, match="mappings"):
        plan(mounts=[bind("/srv", "/data", "idmap")])


def test_idmap_with_the_containers_user_namespace():
    result = plan(mounts=[bind("/srv", "/data", "ridmap")],
                  linux={"namespaces": [{"type": "user"}]})
    (step,) = of(result, Bind)
    assert (step.idmap, step.idmap_recursive) == ("container", True)


def test_a_tmpfs_belongs_to_the_containers_root():
    maps = [{"containerID": 0, "hostID": 100000, "size": 1000}]
    linux = {"namespaces": [{"type": "user"}], "uidMappings": maps, "gidMappings": maps}
    result = plan(mounts=[tmpfs("/a"), tmpfs("/b", "uid=5", "gid=6")], linux=linux)
    first, second = of(result, Filesystem)
    assert first.data == [("uid", "100000"), ("gid", "100000")]
    assert second.data == [("uid", "100005"), ("gid", "100006")]
    with pytest.raises(SpecError, match="isn't mapped"):
        plan(mounts=[tmpfs("/c", "uid=5000")], linux=linux)


def test_pseudo_file_systems_fall_back_where_the_namespace_is_the_hosts():
    sysfs = {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]}
    (step,) = of(plan(USER, mounts=[sysfs]), Filesystem)
    assert step.fallback_bind == "/sys"
    assert step.tree_attributes == abi.MOUNT_ATTR_RDONLY
    own = {"namespaces": [{"type": "network"}, {"type": "mount"}]}
    (step,) = of(plan(USER, mounts=[sysfs], linux=own), Filesystem)
    assert step.fallback_bind is None


def test_cgroups_are_fresh_in_a_namespace_of_their_own():
    mounts = [{"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup"}]
    assert not of(plan(mounts=mounts), Cgroup)[0].new_namespace
    linux = {"namespaces": [{"type": "cgroup"}]}
    assert of(plan(mounts=mounts, linux=linux), Cgroup)[0].new_namespace


def test_overlay_binds_is_for_writable_binds():
    result = plan(mounts=[bind("/a", "/a"), bind("/b", "/b", "ro")],
                  annotations={"dev.sandboxfs.overlay.binds": "true"})
    assert [step.overlay for step in of(result, Bind)] == [True, False]


# -- hints ----------------------------------------------------------------------------------


def hint(share, options="size=1m", type="tmpfs"):
    prefix = "dev.gvisor.spec.mount.cache."
    return {prefix + "source": "/var/cache", prefix + "type": type, prefix + "share": share,
            prefix + "options": options}


def test_a_container_hint_is_a_tmpfs_of_its_own():
    result = plan(mounts=[bind("/var/cache", "/cache", "noexec")], annotations=hint("container"))
    (step,) = of(result, Filesystem)
    assert step.type == "tmpfs"
    assert step.data == [("size", "1048576")]
    assert step.attributes == (
        abi.MOUNT_ATTR_NOSUID | abi.MOUNT_ATTR_NODEV | abi.MOUNT_ATTR_NOEXEC
    )


def test_a_shared_hint_leaves_the_mount_alone():
    result = plan(mounts=[bind("/var/cache", "/cache")], annotations=hint("shared"))
    assert of(result, Bind)
    assert "left as it is" in " ".join(notes(result).values())


def test_a_pod_hint_is_the_pods_volume_in_a_pod_only():
    annotations = hint("pod")
    alone = plan(mounts=[bind("/var/cache", "/cache")], annotations=annotations)
    assert of(alone, Filesystem)
    annotations["io.kubernetes.cri.sandbox-id"] = "p1"
    (step,) = of(plan(mounts=[bind("/var/cache", "/cache")], annotations=annotations), Replica)
    assert (step.hint, step.pod) == ("cache", "p1")


def test_a_mount_may_not_be_looser_than_its_hint():
    with pytest.raises(SpecError, match="looser"):
        plan(mounts=[bind("/var/cache", "/cache", "rw")],
             annotations=hint("container", "size=1m,ro"))


# -- after the mounts -----------------------------------------------------------------------


def test_tmp_is_mounted_by_rule():
    (step,) = of(plan(), Tmp)
    assert not step.always


@pytest.mark.parametrize(("mounts", "annotation", "reason"), [
    ([tmpfs("/tmp/")], "auto", "mounts[0] mounts it"),
    ([tmpfs("/tmp/cache")], "auto", "/tmp/cache is mounted inside"),
    ([], "keep", "tmp=keep"),
    ([tmpfs("/tmp")], "tmpfs", "mounts[0] mounts it"),
])
def test_tmp_is_left_alone(mounts, annotation, reason):
    result = plan(mounts=mounts, annotations={"dev.sandboxfs.tmp": annotation})
    assert not of(result, Tmp)
    assert reason in notes(result)["/tmp"]


def test_tmp_always():
    result = plan(mounts=[tmpfs("/tmp/cache")], annotations={"dev.sandboxfs.tmp": "tmpfs"})
    assert of(result, Tmp)[0].always


def test_the_default_devices_and_links():
    result = plan()
    assert [step.path for step in of(result, Node)] == [
        "/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"]
    assert "/dev/ptmx" in [step.path for step in of(result, Symlink)]
    assert not any(step.by_bind for step in of(result, Node))
    assert all(step.by_bind for step in of(plan(USER), Node))


def test_a_device_of_the_spec_replaces_the_default_one():
    device = {"path": "/dev/null", "type": "c", "major": 1, "minor": 3, "fileMode": 0o600}
    nodes = of(plan(linux={"devices": [device]}), Node)
    assert [step.mode for step in nodes if step.path == "/dev/null"] == [0o600]


def test_no_devices_in_the_hosts_own_dev():
    result = plan(mounts=[bind("/dev", "/dev")])
    assert not of(result, Node)
    assert not of(result, Symlink)
    assert "binds the host's" in notes(result)["/dev"]


def test_masks_terminal_and_cwd():
    process = {"args": ["/x"], "cwd": "/srv/work", "terminal": True, "user": {"uid": 0, "gid": 0}}
    result = plan(process=process, linux={"maskedPaths": ["/proc/keys"]})
    assert of(result, Mask)[0].origin == "linux.maskedPaths[0]"
    assert of(result, Directory)[0].path == "/srv/work"
    assert of(result, Console)


def test_rootfs_propagation():
    assert plan(linux={"rootfsPropagation": "rshared"}).operations[-1].propagation == (
        abi.MS_SHARED | abi.MS_REC)
    result = plan(linux={"rootfsPropagation": "rslave"})
    assert result.operations[-1].propagation == 0
    assert "linux.rootfsPropagation" in notes(result)


def test_a_label_without_selinux_is_a_warning():
    result = plan(linux={"mountLabel": "a:b:c:s0"}, mounts=[tmpfs("/t")])
    assert "SELinux" in result.warnings[0]
    assert of(result, Filesystem)[0].label is None
    labelled = plan(survey.Facts(selinux=True), linux={"mountLabel": "a:b:c:s0"},
                    mounts=[tmpfs("/t"), PROC])
    assert [step.label for step in of(labelled, Filesystem)] == ["a:b:c:s0", None]


def test_planning_touches_nothing():
    """Pure: the paths of this spec exist nowhere, and the plan is the same twice."""
    parts = {"mounts": [bind("/nowhere/at/all", "/x"), PROC]}
    assert plan(**parts).to_json() == plan(**parts).to_json()
