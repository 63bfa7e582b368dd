"""The view of a machine that lives while it is built."""

import os

import pytest

import sandboxfs
from sandboxfs.build.assemble import assemble
from sandboxfs.build.gather import gather
from sandboxfs.kernel import abi, syscalls
from sandboxfs.spec.load import from_document
from tests.support import UNPRIVILEGED, in_namespace, minimal_spec, mount_tmpfs, run_cli


def build_while_entries_go(rootfs, engine):
    document = minimal_spec()
    document["root"]["path"] = str(rootfs)
    plan = sandboxfs.plan(from_document(document))
    plan.engine = engine
    materials = gather(plan)
    os.rmdir(rootfs / "directory")
    os.unlink(rootfs / "file")
    root = assemble(plan, materials)
    try:
        kept = os.open("kept/file", os.O_RDONLY, dir_fd=root.fd)
        os.close(kept)
        return [detail for _operation, kind, detail in root.outcomes if kind == "skipped"]
    finally:
        root.close()


@pytest.mark.needs("root", "overlay", "user-namespaces")
@pytest.mark.parametrize("engine", [
    pytest.param("detached", marks=pytest.mark.needs("detached-nesting")), "attached",
])
def test_what_is_removed_after_it_was_gathered_is_left_out(public_path, engine):
    rootfs = public_path / "rootfs"
    for name in ("directory", "kept", "mounted"):
        (rootfs / name).mkdir(parents=True)
    (rootfs / "file").touch()
    (rootfs / "kept" / "file").touch()
    os.chown(rootfs, UNPRIVILEGED, UNPRIVILEGED)
    # What lies mounted below is locked for another user: the root is built entry by entry.
    mount_tmpfs(rootfs / "mounted")
    try:
        left_out = in_namespace(build_while_entries_go, rootfs, engine, uid=UNPRIVILEGED)
    finally:
        syscalls.umount2(os.fsencode(rootfs / "mounted"), abi.MNT_DETACH)
    assert "/file: removed meanwhile" in left_out


@pytest.mark.needs("root", "busybox")
@pytest.mark.parametrize("engine", [
    pytest.param("detached", marks=pytest.mark.needs("detached-nesting")), "attached",
])
@pytest.mark.parametrize("overlay", [
    "none", pytest.param("tmpfs", marks=pytest.mark.needs("overlay")),
])
def test_this_machines_root_is_as_planned(overlay, engine):
    """The mounts of the spec go over what the machine has mounted there itself."""
    run_cli("run", "--rootfs", "/", "--overlay", overlay, "--engine", engine, "--verify",
            "--", "/bin/true", check=0)
