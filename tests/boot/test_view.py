"""The view of an image, on this machine's kernel: what is wrong with it, and what goes where."""

import os
import shutil
import stat

import pytest

from sandboxfs.boot import image
from sandboxfs.errors import BootError
from tests.boot.images import make_image
from tests.support import (
    assert_mount,
    attach,
    in_namespace,
    mount_at,
    mount_tmpfs,
    table,
    untouched,
)

pytestmark = pytest.mark.needs("root", "mkfs.erofs", "mksquashfs")

STAGE = "/mnt"
FILES = {
    "etc/hosts": "of the image\n", "etc/real": "real\n", "ephemeral/shadowed": "image's\n",
}
LINKS = {
    "etc/machine-id": "machine-id.d/../up/id", "etc/up": "../ephemeral", "etc/to-real": "real",
    "etc/resolv.conf": "resolv.link", "etc/resolv.link": "/run/net/resolv.conf",
    "etc/circle": "circle", "etc/gone": "nothing/there", "etc/null": "/dev/null",
}


@pytest.fixture(scope="module")
def erofs(tmp_path_factory):
    work = tmp_path_factory.mktemp("view")
    directories = ("ephemeral", "run", "tmp", "etc/machine-id.d", "var/memory")
    return make_image(work, "erofs", "#!/bin/sh\n", directories, FILES, LINKS)


def viewed(path, look, moving=(), **options):
    """Make a view at STAGE in a namespace of its own; returns (what `look` does, warnings)."""

    def body():
        said = []
        mounted = image.mount_image(path)
        try:
            view = image.View(mounted, warn=said.append, **options)
            view.check()
            new = view.with_overlay()
            try:
                attach(new, STAGE)
            except OSError:
                os.close(new)
                raise
            view.furnish(STAGE, moving)
            return look(), said
        finally:
            os.close(mounted)

    with untouched(path.parent):
        return in_namespace(body)


def at(path):
    return STAGE + path


def write(path, text):
    with open(at(path), "w", encoding="utf-8") as file:
        file.write(text)


def read(path):
    with open(at(path), encoding="utf-8") as file:
        return file.read()


@pytest.mark.needs("erofs-file")
def test_a_file_is_mounted_without_a_loop_device_where_the_kernel_can(erofs):
    def look():
        record = assert_mount(table(), STAGE, type="erofs", flags={"ro"})
        assert_mount(table(), at("/tmp"), type="tmpfs", flags={"nodev", "noexec"})
        assert_mount(table(), at("/run"), type="tmpfs", flags={"nodev", "noexec"})
        assert_mount(table(), at("/ephemeral"), type="tmpfs", flags={"nodev"})
        with pytest.raises(OSError, match="Read-only"):
            write("/etc/real", "x")
        return record.source

    source, said = viewed(erofs, look)
    assert said == []
    assert source.startswith(b"/proc/self/fd/")


def test_an_image_in_memory_is_mounted_one_way_or_the_other(erofs):
    """As in an initramfs; a loop device is the fallback where EROFS doesn't take such a file."""

    def body():
        mount_tmpfs(STAGE)
        shutil.copy(erofs, at("/image"))
        mounted = image.mount_image(at("/image"))
        os.unlink(at("/image"))
        try:
            with open("etc/real", opener=lambda path, flags: os.open(
                path, flags, dir_fd=mounted), encoding="utf-8") as file:
                return file.read()
        finally:
            os.close(mounted)

    assert in_namespace(body) == "real\n"


def test_links_are_followed_inside_the_image_and_their_directories_made(erofs):
    def look():
        assert not os.path.lexists(at("/ephemeral/id"))
        write("/etc/up/id", "id")
        write("/run/net/resolv.conf", "net")
        return sorted(os.listdir(at("/ephemeral"))), read("/etc/hosts")

    (names, hosts), said = viewed(erofs, look)
    assert (names, hosts, said) == (["etc", "id"], "of the image\n", [])


def test_a_link_to_a_file_of_the_image_has_that_file_bound(erofs):
    def look():
        write("/etc/to-real", "changed")
        mode = stat.S_IMODE(os.stat(at("/etc/real")).st_mode)
        return read("/etc/real"), read("/ephemeral/etc/to-real"), mode

    found, said = viewed(erofs, look, ephemeral_files=["/etc/to-real", "etc/../etc/real"])
    assert found == ("changed", "changed", 0o640)
    assert said == []


def test_a_place_that_something_moves_to_is_not_covered(erofs):
    def look():
        root = mount_at(table(), STAGE)
        return [each.mountpoint.decode() for each in table() if each.parent_id == root.id]

    points, said = viewed(erofs, look, moving={"/run", "/tmp", "/ephemeral"})
    assert points == [at("/ephemeral"), at("/etc/hosts")]
    assert said == []


def test_another_ephemeral_directory(erofs):
    def look():
        write("/etc/hosts", "written")
        return read("/var/memory/etc/hosts"), read("/ephemeral/shadowed")

    found, _said = viewed(erofs, look, ephemeral="/var/memory")
    assert found == ("written", "image's\n")


def test_an_overlay_is_made_of_what_no_path_reaches(erofs):
    def look():
        write("/etc/real", "changed")
        os.mkdir(at("/new"))
        assert_mount(table(), STAGE, type="overlay", flags=set())
        status = os.stat(STAGE)
        others = [each for each in table() if each.type == b"erofs"]
        return others, stat.S_IMODE(status.st_mode), os.path.isdir(at("/made"))

    found, said = viewed(erofs, look, overlay="tmpfs", ephemeral="/made")
    assert found == ([], 0o755, True)
    assert said == []


@pytest.mark.parametrize(("options", "message"), [
    ({"ephemeral": "/nothing"}, "--ephemeral: find /nothing: not in the image"),
    ({"ephemeral": "/etc/hosts"}, "--ephemeral: find /etc/hosts: not a directory"),
    ({"ephemeral": "/tmp/x"}, "--ephemeral: switch-root /tmp/x: the root, /run and /tmp have"),
    ({"ephemeral": "//"}, "--ephemeral: switch-root /: the root, /run and /tmp have"),
    ({"ephemeral_files": ["/nothing"]}, "--ephemeral-file: find /nothing: not in the image"),
    ({"ephemeral_files": ["/etc"]}, "--ephemeral-file: find /etc: not a file, nor a symlink"),
    ({"ephemeral_files": ["/etc/gone"]}, "redirect /etc/gone: /etc/nothing/there: Read-only"),
    ({"ephemeral_files": ["/etc/circle"]}, "redirect /etc/circle: /etc/circle: Too many levels"),
], ids=str)  # fmt: skip
def test_what_the_image_does_not_have_is_refused(options, message, erofs):
    with pytest.raises(BootError) as failure:
        viewed(erofs, lambda: None, **options)
    assert message in str(failure.value)


def test_without_an_ephemeral_directory_nothing_can_be_redirected(tmp_path):
    bare = make_image(tmp_path, "squashfs", "#!/bin/sh\n", (), {"etc/hosts": "x\n"})
    with pytest.raises(BootError, match="no directory /ephemeral to redirect it to") as failure:
        viewed(bare, lambda: None, ephemeral_files=["/etc/hosts"])
    assert failure.value.hint == "--ephemeral DIR"
    points, said = viewed(bare, lambda: [each.mountpoint for each in table()])
    assert STAGE.encode() in points
    assert [line.split(":")[0] for line in said] == ["no tmpfs on /run", "no tmpfs on /tmp"]


@pytest.mark.parametrize(("name", "message"), [
    ("text", "no EROFS or squashfs image"), ("empty", "no EROFS or squashfs image"),
    ("directory", "neither a file nor a block device"),
    ("fifo", "neither a file nor a block device"), ("nothing", "ENOENT: No such file"),
])  # fmt: skip
def test_what_is_no_image_is_refused(name, message, tmp_path):
    (tmp_path / "text").write_text("text\n" * 1000)
    (tmp_path / "empty").write_text("")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(BootError, match=message) as failure:
        os.close(image.mount_image(tmp_path / name))
    assert str(failure.value).startswith(f"--image: open {str(tmp_path)[:20]}")


def test_half_an_image_is_refused_in_the_kernels_words(tmp_path):
    """Its superblock is right, what it leads to isn't there."""
    whole = make_image(tmp_path, "squashfs", "#!/bin/sh\n")
    half = tmp_path / "half"
    half.write_bytes(whole.read_bytes()[:4096])

    def body():
        os.close(image.mount_image(half))

    with pytest.raises(BootError, match="--image: fsconfig FSCONFIG_CMD_CREATE"):
        in_namespace(body)
