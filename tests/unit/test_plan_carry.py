"""The hook's decisions, from a live table that nobody had to mount."""

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from sandboxfs.errors import HookError, SpecError
from sandboxfs.kernel import abi
from sandboxfs.kernel.mountinfo import MountRecord
from sandboxfs.plan import carry, show
from sandboxfs.plan.live import Live
from sandboxfs.plan.operations import (
    Attach,
    Carry,
    Filesystem,
    ReadonlyMount,
    ReadonlyPath,
    SetAside,
)
from sandboxfs.plan.survey import Facts
from sandboxfs.spec import load
from tests.support import minimal_spec
from tests.support.specs import Document

SCHEMA = Path(__file__).parents[2] / "specs" / "schema" / "plan.schema.json"


def record(number: int, parent: int, path: str, type: str = "tmpfs", source: str = "t",
           attributes: int = 0, propagation: int = abi.MS_PRIVATE) -> MountRecord:
    made = MountRecord()
    made.id = made.old_id = number
    made.parent_id = made.old_parent_id = parent
    made.mountpoint, made.type, made.source = map(os.fsencode, (path, type, source))
    made.root, made.device, made.superblock_options = b"/", (0, number), b"rw"
    made.attributes, made.propagation = attributes, propagation
    made.peer_group = made.master = 0
    return made


def planned(
    records: list[MountRecord], document: Document | None = None,
    root: MountRecord | None = None, annotations: dict[str, str] | None = None,
    is_runc: bool = False,
) -> Any:
    """Return the plan of a table below a rootfs whose mount has the id 1."""
    document = document or minimal_spec()
    document.setdefault("annotations", {}).update(annotations or {})
    spec = load.from_document(document, "/bundle")
    top = {each.mountpoint: each.id for each in records}
    places = {mount.index: top[mount.destination.encode()] for mount in carry.wanted_places(spec)
              if mount.destination.encode() in top}
    live = Live("/bundle/rootfs", root or record(1, 0, "/", "ext4"), records, places)
    live.is_runc = is_runc
    return carry.plan(spec, live, Facts(), "an-id")


def mounts(*entries: tuple[str, str, str, list[str]], **more: Any) -> Document:
    document: Document = {**minimal_spec(), **more}
    document["mounts"] = [
        {"destination": destination, "type": type, "source": source, "options": options}
        for destination, type, source, options in entries
    ]
    return document


def names(plan: Any) -> list[str]:
    return [step.name for step in plan]


def carried(plan: Any) -> dict[str, tuple[str, ...]]:
    return {step.destination: step.below for step in plan if type(step) is Carry}


def volume(name: str, source: str, **fields: str) -> dict[str, str]:
    fields = {"source": source, "type": "tmpfs", "share": "container", **fields}
    return {f"dev.sandboxfs.mount.{name}.{key}": value for key, value in fields.items()}


def test_a_tree_is_carried_by_its_top():
    plan = planned([record(2, 1, "/dev"), record(3, 2, "/dev/pts"), record(4, 1, "/proc"),
                    record(5, 4, "/proc/bus"), record(6, 5, "/proc/bus/x")])
    assert names(plan) == ["lower", "overlay", "carry", "carry", "tmp", "attach"]
    assert carried(plan) == {"/dev": ("/dev/pts",), "/proc": ("/proc/bus", "/proc/bus/x")}
    assert [step.origin for step in plan] == [
        "root.path", "overlay", "runtime", "runtime", "/tmp", "root.path"]


def test_of_a_stack_only_the_top_and_what_is_seen():
    plan = planned([record(2, 1, "/a"), record(3, 2, "/a/hidden"), record(4, 2, "/a"),
                    record(5, 4, "/a"), record(6, 5, "/a/seen"), record(7, 1, "/b/c"),
                    record(8, 1, "/b")])
    assert carried(plan) == {"/a": ("/a/seen",), "/b": ()}
    assert [step.mount for step in plan if type(step) is Carry] == [5, 8]


def test_origins_are_the_spec_s_where_it_says_so():
    plan = planned(
        [record(2, 1, "/data"), record(3, 1, "/null")],
        mounts(("/data/", "tmpfs", "t", []), ("//data/../data", "tmpfs", "t", [])))
    assert [step.origin for step in plan if type(step) is Carry] == ["mounts[1]", "runtime"]


def test_what_is_unbindable_is_named_not_split():
    plan = planned([record(2, 1, "/a"), record(3, 2, "/a/b", propagation=abi.MS_UNBINDABLE),
                    record(4, 1, "/c", propagation=abi.MS_UNBINDABLE)])
    assert {step.destination: step.unbindable for step in plan if type(step) is Carry} == {
        "/a": ("/a/b",), "/c": ("/c",)}


def test_a_volume_is_not_mounted_over_procfs():
    document = mounts(("/data", "bind", "/src", ["bind"]))
    with pytest.raises(HookError, match=r"mounts\[0\].*/data.*leads into procfs"):
        planned([record(2, 1, "/data", type="proc")], document, annotations=volume("v", "/src"))
    planned([record(2, 1, "/data", type="ext4")], document, annotations=volume("v", "/src"))


def test_a_volume_takes_a_mount_s_place_and_splits_what_it_lies_in():
    plan = planned(
        [record(2, 1, "/out"), record(3, 2, "/out/data"), record(4, 3, "/out/data/in"),
         record(5, 4, "/out/data/in/most"), record(6, 2, "/out/other"), record(7, 1, "/far")],
        mounts(("/out/data", "bind", "/src", ["bind", "ro"])),
        annotations=volume("v", "/src", options="size=1M,noexec"))
    assert carried(plan) == {"/out": ("/out/other",), "/out/data/in": ("/out/data/in/most",),
                             "/far": ()}
    assert {step.destination: (step.split, step.aside) for step in plan if type(step) is Carry} == {
        "/out": (True, None), "/out/data/in": (False, "/out/data"), "/far": (False, None)}
    (aside,) = [step for step in plan if type(step) is SetAside]
    assert (aside.destination, aside.mount, aside.over) == ("/out/data", 3, "/out")
    assert names(plan).index("set aside") < names(plan).index("mount")
    (made,) = [step for step in plan if type(step) is Filesystem]
    order = [step.destination for step in plan if hasattr(step, "destination")]
    assert order.index("/out") < order.index("/out/data") < order.index("/out/data/in")
    assert (made.type, made.data, made.origin) == ("tmpfs", [("size", "1048576")], "mounts[0]")
    assert made.attributes == (abi.MOUNT_ATTR_RDONLY | abi.MOUNT_ATTR_NOSUID
                               | abi.MOUNT_ATTR_NODEV | abi.MOUNT_ATTR_NOEXEC)


def test_what_lies_on_the_root_itself_is_left_where_it_is():
    plan = planned([record(2, 1, "/data"), record(3, 2, "/data/in")],
                   mounts(("/data", "bind", "/src", ["bind"])), annotations=volume("v", "/src"))
    assert names(plan) == ["lower", "overlay", "mount", "carry", "tmp", "attach"]
    assert plan.operations[3].aside is None


def test_a_volume_that_a_later_mount_hides_is_left_alone():
    plan = planned(
        [record(2, 1, "/data"), record(3, 2, "/data")],
        mounts(("/data", "tmpfs", "mine", []), ("/data", "tmpfs", "other", [])),
        annotations=volume("v", "mine"))
    assert carried(plan) == {"/data": ()}
    assert any("a later mount hides this one" in note.text for note in plan.notes)


def test_a_looser_mount_than_its_hint_is_refused():
    with pytest.raises(SpecError, match="looser than hint v allows"):
        planned([record(2, 1, "/data")], mounts(("/data", "tmpfs", "mine", ["exec"])),
                annotations=volume("v", "mine", options="noexec"))


def test_flags_that_runc_would_take_from_a_volume_are_asked_for():
    """After the hooks it remounts a read-only tmpfs with the flags of its entry alone."""
    records, annotations = [record(2, 1, "/data")], volume("v", "mine", options="noexec")
    for words in (["ro"], ["ro", "nosuid", "nodev"]):
        with pytest.raises(SpecError, match=r"has to say (nosuid, nodev, )?noexec"):
            planned(records, mounts(("/data", "tmpfs", "mine", words)), annotations=annotations)
    every = ["ro", "nosuid", "nodev", "noexec"]
    planned(records, mounts(("/data", "tmpfs", "mine", every)), annotations=annotations)
    planned(records, mounts(("/data", "bind", "mine", ["bind", "ro"])), annotations=annotations)


def test_a_pod_s_volume_is_recognised_by_its_source():
    document = mounts(("/data", "tmpfs", "mine", []))
    annotations = {**volume("v", "mine", share="pod"), "io.kubernetes.cri.sandbox-id": "p"}
    records = [record(2, 1, "/data", source="t"), record(3, 2, "/data", source="sandboxfs:v")]
    plan = planned(records, document, annotations=annotations)
    assert [step.mount for step in plan if type(step) is Carry] == [3]
    for wrong in (record(3, 2, "/data", source="sandboxfs:w"),
                  record(3, 2, "/data", "ext4", "sandboxfs:v")):
        with pytest.raises(HookError, match="register sandboxfs as createRuntime"):
            planned([records[0], wrong], document, annotations=annotations)
    with pytest.raises(HookError, match="the runtime has mounted nothing there"):
        planned([record(2, 1, "/else")], document, annotations=annotations)


def test_a_pod_s_volume_without_a_pod_is_the_container_s():
    plan = planned([record(2, 1, "/data")], mounts(("/data", "tmpfs", "mine", [])),
                   annotations=volume("v", "mine", share="pod"))
    assert [step.name for step in plan][2] == "mount"


def test_what_is_made_anew_below_a_shared_mount_is_refused():
    records = [record(2, 1, "/data", propagation=abi.MS_SHARED), record(3, 2, "/data/v")]
    document = mounts(("/data/v", "tmpfs", "mine", []))
    with pytest.raises(HookError, match="/data: is a shared mount") as caught:
        planned(records, document, annotations=volume("v", "mine"))
    assert "host" in caught.value.text
    # A slave doesn't tell its master.
    records[0].propagation = abi.MS_SLAVE
    planned(records, document, annotations=volume("v", "mine"))


def test_overlays_over_binds_and_what_came_with_them():
    plan = planned(
        [record(2, 1, "/rw"), record(3, 2, "/rw/came"), record(4, 2, "/rw/own"),
         record(5, 1, "/ro", attributes=abi.MOUNT_ATTR_RDONLY), record(6, 1, "/fs")],
        mounts(("/rw", "bind", "/src", ["rbind"]), ("/rw/own", "tmpfs", "t", []),
               ("/ro", "bind", "/src", ["bind", "ro"]), ("/fs", "tmpfs", "t", [])),
        annotations={"dev.sandboxfs.overlay.binds": "true"})
    assert {step.destination: step.overlay for step in plan if type(step) is Carry} == {
        "/rw": True, "/rw/came": True, "/rw/own": False, "/ro": False, "/fs": False}


@pytest.mark.parametrize(("path", "mode", "made"), [
    ("/data", "auto", True), ("/tmp", "auto", False), ("/tmp/x", "auto", False),
    ("/data", "keep", False), ("/tmp/x", "tmpfs", True), ("/tmp", "tmpfs", False),
    ("/tmpx", "auto", True),
])
def test_tmp(path, mode, made):
    plan = planned([record(2, 1, path)], annotations={"dev.sandboxfs.tmp": mode})
    assert ("tmp" in names(plan)) is made
    assert any(note.origin == "/tmp" for note in plan.notes) is not made


@pytest.mark.parametrize(("terminal", "is_runc", "dev", "sealed"), [
    (False, True, [], True), (True, True, [], False), (True, False, [], True),
    (True, True, ["/dev"], True), (True, True, ["/dev/console"], True),
    (True, True, ["/dev/pts"], False),
])
def test_a_read_only_root_is_sealed_unless_a_console_is_to_come(terminal, is_runc, dev, sealed):
    document = minimal_spec()
    document["root"]["readonly"] = True
    document["process"]["terminal"] = terminal
    records = [record(number, 1, path) for number, path in enumerate(["/proc", *dev], 2)]
    plan = planned(records, document, is_runc=is_runc)
    assert ("seal" in names(plan)) is sealed


def test_overlay_none():
    none = {"dev.sandboxfs.overlay": "none"}
    document = minimal_spec()
    document["root"]["readonly"] = True
    document["process"]["cwd"] = "/made"
    plan = planned([record(2, 1, "/proc")], document, annotations=none)
    assert names(plan) == ["rootfs", "carry", "attach"]
    assert plan.operations[0].submounts is False
    assert not carry.changes_anything(plan)
    # What the runtime has yet to do to the rootfs, it wouldn't do to what is made of it.
    document["mounts"] = [{"destination": "/v", "type": "tmpfs", "source": "mine", "options": []}]
    plan = planned([record(2, 1, "/v")], document, annotations={**none, **volume("v", "mine")})
    assert names(plan) == ["rootfs", "mount", "directory", "seal", "attach"]
    assert carry.changes_anything(plan)


@pytest.mark.parametrize(("options", "live", "made"), [
    (["ro"], 0, True), (["rro"], 0, True), (["ro", "rw"], 0, False), (["rw", "ro"], 0, True),
    (["ro"], abi.MOUNT_ATTR_RDONLY, False), ([], 0, False),
])
def test_what_a_runtime_has_yet_to_make_read_only(options, live, made):
    plan = planned([record(2, 1, "/data", attributes=live)],
                   mounts(("/data/", "bind", "/src", ["bind", *options])))
    found = [(step.path, step.mount, step.origin) for step in plan if type(step) is ReadonlyMount]
    assert found == ([("/data", 2, "mounts[0]")] if made else [])


def test_paths_that_a_runtime_has_yet_to_make_read_only():
    """Those of the root are bound anew: the runtime's binds show the rootfs itself."""
    document = mounts(("/proc", "proc", "proc", []))
    document["linux"]["readonlyPaths"] = ["/proc/sys", "/etc", "/proc/asound"]
    document["linux"]["maskedPaths"] = ["/proc/scsi", "/proc/kcore"]
    image, null = record(5, 1, "/etc", "ext4"), record(6, 2, "/proc/kcore")
    image.device, image.root, null.root = (0, 1), b"/etc", b"/null"
    plan = planned(
        [record(2, 1, "/proc", "proc"), record(3, 2, "/proc/sys", "proc"),
         record(4, 2, "/proc/scsi"), image, null], document)
    assert [(step.path, step.origin) for step in plan if type(step) is ReadonlyMount] == [
        ("/proc/sys", "linux.readonlyPaths[0]"), ("/proc/scsi", "linux.maskedPaths[0]")]
    assert [step.path for step in plan if type(step) is ReadonlyPath] == ["/etc"]


def test_a_dev_that_is_to_get_a_console_stays_writable():
    document = mounts(("/dev", "tmpfs", "tmpfs", ["ro"]))
    document["process"]["terminal"] = True
    assert "read-only mount" not in names(planned([record(2, 1, "/dev")], document))
    console = record(3, 2, "/dev/console")
    assert "read-only mount" in names(planned([record(2, 1, "/dev"), console], document))


def test_a_read_only_bind_gets_no_overlay_before_it_is_read_only():
    plan = planned([record(2, 1, "/data")], mounts(("/data", "bind", "/src", ["bind", "ro"])),
                   annotations={"dev.sandboxfs.overlay.binds": "true"})
    assert [step.overlay for step in plan if type(step) is Carry] == [False]


@pytest.mark.parametrize(("type", "source", "ours"), [
    ("overlay", "sandboxfs-runtime", True), ("overlay", "overlay", False),
    ("ext4", "sandboxfs-runtime", False),
])
def test_a_root_that_the_runtime_in_front_made_is_known(type, source, ours):
    assert Live("/r", record(1, 0, "/", type, source), [], {}).is_made_by_runtime() is ours


def test_overlay_dir_and_sizes():
    plan = planned([record(2, 1, "/proc")], annotations={"dev.sandboxfs.overlay": "dir=/up:keep"})
    overlay = plan.operations[1]
    assert (overlay.upper, overlay.keep, overlay.label) == ("/up", True, "an-id")
    document = minimal_spec()
    document["linux"] = {**document.get("linux", {}), "resources": {"memory": {"limit": 4096}}}
    assert planned([record(2, 1, "/proc")], document).operations[1].size == "2048"


@pytest.mark.parametrize("propagation", [abi.MS_PRIVATE, abi.MS_SHARED, abi.MS_SLAVE,
                                         abi.MS_SHARED | abi.MS_SLAVE, abi.MS_UNBINDABLE])
def test_the_attached_root_is_shared_where_the_rootfs_is(propagation):
    plan = planned([record(2, 1, "/proc")],
                   root=record(1, 0, "/", "ext4", propagation=propagation))
    attach = plan.operations[-1]
    assert type(attach) is Attach
    assert attach.propagation == propagation & abi.MS_SHARED


def test_as_text_and_as_json():
    plan = planned(
        [record(2, 1, "/a", propagation=abi.MS_SHARED | abi.MS_SLAVE), record(3, 2, "/a/b"),
         record(4, 1, os.fsdecode(b"/\xff\n")), record(5, 1, "/c"), record(6, 5, "/c/v")],
        mounts(("/c", "tmpfs", "c", ["ro"]), ("/c/v", "tmpfs", "mine", [])),
        annotations=volume("v", "mine"))
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text("utf-8"))).validate(
        show.to_dict(plan))
    text = str(plan)
    assert "tmpfs at /a" in text
    assert "with 1 mount below it" in text
    assert "set aside      /c/v, made anew" in text
    assert "read-only mount /c  [mounts[0]]" in text
    assert "attach         over /bundle/rootfs; verified there  [root.path]" in text
    assert all(line.isprintable() for line in text.splitlines())
