"""Image files as lowers.  Two small ones are part of this file: the guest has no tools."""

import base64
import os
import time
import zlib

from sandboxfs.build import images
from sandboxfs.kernel import abi, fscontext
from tests.kernel.behaviours_table import behaviour
from tests.kernel.behaviours_tools import (
    attach,
    config,
    inside,
    mode_of,
    owner_of,
    read,
    refused,
    rootfs,
    same,
    tmpfs,
    tree,
    write,
)

# Both hold dev/, empty/, etc/image ("from an image\n"), etc/owned (of 1234:4321), proc/ and
# link -> etc/image; the root is 0751 and belongs to 7:8.  Made by mkfs.erofs -T0 and by
# mksquashfs -all-time 0 -no-xattrs -comp gzip; written as zlib, base85.
EROFS = (
    "c-muN7zLwX6pU2x=;7A~9IZ8{n1O5_1{DSlENU2WYiFd?eik5p>Bz>A1?B$-0uap(b%_d8JcNM>&JG2#HKFWqAX^*Cjs"
    "miEq3n1d+XTu^0-9z9Wv2nf_4M>oQp-|v3rZ?eOOkUk^Rf$y@{@79@2w*fgEW%+kUb4^hXj)QBq4U-)X#*ZUz<q%wn+M"
    "!k@Um-Yk;KR5Xd%wvW<aJWCUef0NFruGjkKuQ}fI7Qd6MjFKJ|C;6pN>1<CxhqWoNi#5@JCCNAvZ1Jciiq@NW?Ut)PE0"
    "OEt~;ldyP{}(bca3bkvLy`wZkUrRM2IAv~9ZBAdK=_V=Q7{Td!6+C7qhJ(_Gynjr+ETF"
)
SQUASHFS = (
    "c-qS-E-dC?fB_~3Mj*+^AjoiliIsr`$bJZw>0^Y@ZBY6@6qG>aZ$N1WsC)*LPAkgKRY=TJ$jnVlPvy!l&r40=N@A$Em7"
    "G#>`UC^30h_RZF|#3i1drnR7T0;5iJUR>S{X$@I6jqJXcc+!$&CwV(%p>Wg|qC857+Ook-pM9$6-#?q&4$r&Ym%^D~G|"
    "li}~sTxr&n~cuJ+%CppGBR8DYYkgVc95CXQNfk8~6j3G%)LEG5e(AKoEQSi)3{qx?wiH)n0S}yzWXs%4<a$r*q@Xg9|^"
    "h{+A;8B?uHEB;n<J3k;j$)(FoA`}3Ft*N=<m&n~nXxC0pF^M_0qRc?25?X@=t2D{2eL1rfq_-yF2hpU1tm;V;ux0lJH2"
    "cVkYWgrU~cw+suO7dk(Yo$`%r*^fgQ*Og?<4e!zdU9qhJ(_f>AIEM!_f;1*2dTjDk@>LjVB8b83z<"
)


def image_file(text, path):
    """Write an image to a file; returns the path."""
    write(path, zlib.decompress(base64.b85decode(text)), 0o444)
    return path


def mount_image(text, type, path):
    """Mount an image through a loop device that goes with the mount."""
    fd = os.open(image_file(text, path + ".image"), os.O_RDONLY | os.O_CLOEXEC)
    loop, device = images._loop_device(fd)
    settings = [fscontext.string(b"source", device), fscontext.flag(b"ro")]
    os.mkdir(path)
    attach(fscontext.create(type, settings, abi.MOUNT_ATTR_RDONLY), path)
    os.close(loop)
    os.close(fd)


def _backing(name, blocks):
    """Return the file behind a loop device, or None."""
    try:
        fd = os.open(f"{name}/loop/backing_file", os.O_RDONLY, dir_fd=blocks)
    except OSError:
        return None
    try:
        return os.read(fd, 4096)
    except OSError:  # it is going
        return None
    finally:
        os.close(fd)


# A case runs in a process of its own, its checks in children of that.
_HERE = os.urandom(6).hex()


def _loops():
    """Return the loop devices over files of this case's name: others use some, too."""
    blocks = os.open("/sys/block", os.O_RDONLY | os.O_CLOEXEC)
    try:
        files = [_backing(name, blocks) for name in os.listdir(blocks)]
    finally:
        os.close(blocks)
    return sorted(file for file in files if file and os.fsencode(_name()) in file)


def _name():
    """Return a name that no other process running this table has."""
    return f"root-{_HERE}.squashfs"


def _image_is_the_root(engine, text, name, document=None):
    image_file(text, name)

    def check(view):
        same((mode_of("/"), owner_of("/")), (0o751, (7, 8)))
        same(read("/link"), b"from an image\n")
        same(owner_of("/etc/owned"), (1234, 4321))
        write("/etc/image", b"inside")
        write("/etc/new", b"inside")
        same(read("/etc/image"), b"inside")
        same(view.at("/").type, b"overlay")

    inside(engine, config(tmpfs("/made/point"), root=name), check)


@behaviour
def an_erofs_image_is_a_root(engine):
    _image_is_the_root(engine, EROFS, "root.erofs")


@behaviour
def a_squashfs_image_is_a_root(engine):
    _image_is_the_root(engine, SQUASHFS, "root.squashfs")


@behaviour
def an_image_may_have_any_name(engine):
    for name in ("a:b,c", "a\\b", "a\nb", "ä", "directory/image"):
        _image_is_the_root(engine, EROFS, name)
        _image_is_the_root(engine, SQUASHFS, name + ".s")


@behaviour
def images_and_directories_stack(engine):
    image_file(EROFS, "one.erofs")
    image_file(SQUASHFS, "two.squashfs")
    rootfs({"etc/image": b"from the root"})
    tree("last", {"etc/image": b"from the last", "etc/only": b"last"})

    def check(view):
        same(read("/etc/image"), b"from the root")
        same((read("/etc/only"), read("/etc/owned")), (b"last", b"owned\n"))
        same(os.readlink("/link"), "etc/image")

    inside(engine, config(), check, overrides={"lower": ["one.erofs", "two.squashfs", "last"]})
    tree("empty", {"dev/": 0})

    def below(view):
        same(read("/etc/image"), b"from an image\n")

    lowers = {"lower": ["two.squashfs", "rootfs"]}
    inside(engine, config(root="empty"), below, overrides=lowers)


@behaviour
def an_image_can_be_a_read_only_root(engine):
    image_file(EROFS, "root.erofs")

    def check(view):
        same(view.flags("/"), {"ro"})
        write("/made/point/file")

    inside(engine, config(tmpfs("/made/point"), root="root.erofs", readonly=True), check)


@behaviour
def the_loop_device_of_an_image_goes_with_the_root(engine):
    before = _loops()
    image_file(SQUASHFS, _name())

    name = os.fsencode(_name())
    blocks = os.open("/sys/block", os.O_RDONLY | os.O_CLOEXEC)

    def check(view):
        files = [_backing(block, blocks) for block in os.listdir(blocks)]
        return sum(name in file for file in files if file) - len(before)

    same(inside(engine, config(root=_name()), check), 1, "loop devices meanwhile")
    _wait_for(lambda: _loops() == before)


def _wait_for(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "it didn't come to pass"
        time.sleep(0.02)


@behaviour
def a_file_that_is_no_image_is_refused(engine):
    write("root.tar", bytes(4096))
    error = refused(engine, config(root="root.tar"))
    same((error["origin"], error["operation"]), ("root.path", "open"))
    same(error["text"], "neither a directory nor an EROFS or squashfs image")
    write("root.empty", b"")
    refused(engine, config(root="root.empty"))


@behaviour
def a_broken_image_is_refused_and_its_loop_device_goes(engine):
    before = _loops()
    content = bytearray(zlib.decompress(base64.b85decode(SQUASHFS)))
    content[28:32] = b"\xff\xff\xff\xff"  # the version
    write(_name(), bytes(content))
    error = refused(engine, config(root=_name()))
    same((error["origin"], error["errno"], error["operation"]),
         ("root.path", "EINVAL", "fsconfig FSCONFIG_CMD_CREATE"))
    _wait_for(lambda: _loops() == before)


@behaviour
def a_lower_that_is_neither_directory_nor_file_is_refused_without_opening_it(engine):
    os.mkfifo("root")
    error = refused(engine, config(root="root"))
    same((error["origin"], error["text"]),
         ("root.path", "neither a directory nor an image file"))
