"""The view of a machine that lives while it is built."""

import os

import pytest

import sandboxfs
from sandboxfs.build.assemble import assemble
from sandboxfs.build.gather import gather
from sandboxfs.kernel import abi, syscalls
from sandboxfs.spec.load import from_document
from tests.support import (
    UNPRIVILEGED,
    default_spec,
    in_namespace,
    minimal_spec,
    mount_tmpfs,
    run_cli,
)

ENGINES = [pytest.param("detached", marks=pytest.mark.needs("detached-nesting")), "attached"]


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
@pytest.mark.parametrize("engine", ENGINES)
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
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("overlay", [
    "none", pytest.param("tmpfs", marks=pytest.mark.needs("overlay")),
])
def test_this_machines_root_is_as_planned(overlay, engine):
    """The mounts of the spec go over what the machine has mounted there itself."""
    run_cli("run", "--rootfs", "/", "--overlay", overlay, "--engine", engine, "--verify",
            "--", "/bin/true", check=0)


@pytest.mark.needs("root", "overlay", "busybox")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("way", ["/data", "/link"])
def test_mountpoints_in_a_read_only_bind_are_made_unless_a_link_hides_them(
    bundle, public_path, engine, way
):
    source = public_path / "source"
    (source / "there").mkdir(parents=True)
    document = default_spec("/bin/ls", "/data")
    document["mounts"] += [
        {"destination": "/data", "source": str(source), "options": ["rbind", "ro"]},
        {"destination": f"{way}/there", "type": "tmpfs", "source": "tmpfs"},
        {"destination": f"{way}/missing", "type": "tmpfs", "source": "tmpfs"},
    ]
    made = bundle(document)
    (made.rootfs / "link").symlink_to("/data")
    done = run_cli("run", "--engine", engine, "--bundle", made)
    if way == "/data":
        assert (done.returncode, done.stdout) == (0, "missing\nthere\n")
    else:
        assert done.returncode == 125
        assert "mountpoint /link/there: EROFS: lies in a read-only mount" in done.stderr
        assert "without a symlink" in done.stderr
    assert os.listdir(source) == ["there"]
