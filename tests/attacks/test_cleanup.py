"""What is removed is what was made, whatever a payload left in it."""

import os
import shutil

import pytest

from sandboxfs.build.copyup import copy_tree
from sandboxfs.build.upper import remove_tree
from tests.attacks.tools import ENGINES, entries
from tests.support import UNPRIVILEGED, bind, default_spec, in_namespace, mount_tmpfs, run_cli

pytestmark = pytest.mark.needs("root", "overlay", "busybox")

DEPTH = 3500


@pytest.fixture
def precious(public_path):
    path = public_path / "precious"
    (path / "directory").mkdir(parents=True)
    (path / "directory" / "file").write_text("kept")
    return path


def dig(path, depth=DEPTH):
    """Make a tree that is too deep for paths and for recursion."""
    here = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    for _level in range(depth):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


def remove(path):
    parent = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        remove_tree(parent, path.name)
    finally:
        os.close(parent)


def test_links_are_removed_and_not_followed(public_path, precious):
    tree = public_path / "tree"
    (tree / "inner").mkdir(parents=True)
    for place in (tree, tree / "inner"):
        (place / "to-a-directory").symlink_to(precious)
        (place / "to-a-file").symlink_to(precious / "directory" / "file")
        (place / "up").symlink_to("../..")
        os.mkfifo(place / "fifo")
        os.link(precious / "directory" / "file", place / "hard")
    remove(tree)
    assert entries(public_path) == ["precious", "precious/directory", "precious/directory/file"]
    assert (precious / "directory" / "file").read_text() == "kept"


def test_a_link_in_place_of_the_tree_is_refused(public_path, precious):
    (public_path / "tree").symlink_to(precious)
    with pytest.raises(OSError, match=r"symbolic links|Not a directory"):
        remove(public_path / "tree")
    assert entries(precious) == ["directory", "directory/file"]


def test_any_depth_and_many_directories(public_path):
    tree = public_path / "tree"
    tree.mkdir()
    for name in range(300):
        (tree / f"wide{name}").mkdir()
    dig(tree)
    remove(tree)
    assert entries(public_path) == []


def test_recursion_dies_at_that_depth(public_path):
    """The control (BuildKit's class): shutil.rmtree doesn't get to the end."""
    tree = public_path / "tree"
    tree.mkdir()
    dig(tree)
    with pytest.raises((RecursionError, OSError)):
        shutil.rmtree(tree)
    remove(tree)
    assert entries(public_path) == []


def mounted_below(public_path, precious, kind, action):
    tree = public_path / "tree"
    (tree / "inner").mkdir(parents=True)
    if kind == "bind":  # of the same file system, so the device is the same
        bind(precious, tree / "inner")
    else:
        mount_tmpfs(tree / "inner")
        (tree / "inner" / "file").touch()
    try:
        action(tree)
    except OSError as error:
        return str(error), entries(tree / "inner")
    return "", entries(precious)


@pytest.mark.parametrize(("kind", "kept"), [
    ("bind", ["directory", "directory/file"]), ("tmpfs", ["file"]),
])
def test_mounts_are_not_entered(public_path, precious, kind, kept):
    message, left = in_namespace(mounted_below, public_path, precious, kind, remove)
    assert "something is mounted there" in message
    assert left == kept


def test_others_enter_a_bind_of_the_same_device(public_path, precious):
    """The control: by the device's number alone a bind can't be told."""
    in_namespace(
        mounted_below, public_path, precious, "bind",
        lambda tree: shutil.rmtree(tree, ignore_errors=True),
    )
    assert entries(precious) == []


@pytest.mark.parametrize("engine", ENGINES)
def test_an_upper_on_disk_is_removed_whatever_is_in_it(bundle, public_path, precious, engine):
    upper = public_path / "uppers"
    upper.mkdir()
    script = f"""
        ln -s {precious} /link; ln -s / /root/up; mkfifo /fifo; mknod /node c 1 3
        mkdir /closed; touch /closed/file; chmod 0 /closed
        i=0; while [ $i -lt 1200 ]; do mkdir d && cd d || exit 3; i=$((i+1)); done
    """
    made = bundle(default_spec("/bin/sh", "-c", script))
    run_cli("run", "--bundle", made, "--overlay", f"dir={upper}", "--engine", engine, check=0)
    assert entries(upper) == []
    assert entries(precious) == ["directory", "directory/file"]


def test_an_upper_is_removed_when_the_build_fails(bundle, public_path):
    upper = public_path / "uppers"
    upper.mkdir()

    def change(document):
        document["mounts"].append(
            {"destination": "/x", "type": "no-such-type", "source": "none"})

    made = bundle(change)
    run_cli("run", "--bundle", made, "--overlay", f"dir={upper}", check=125)
    assert entries(upper) == []


def test_closed_directories_of_ones_own_are_removed(public_path):
    """As an unprivileged user: overlayfs leaves a work directory without mode bits."""
    public_path.chmod(0o777)

    tree = public_path / "tree"

    def as_user():
        os.setgroups([])
        os.setresgid(UNPRIVILEGED, UNPRIVILEGED, UNPRIVILEGED)
        os.setresuid(UNPRIVILEGED, UNPRIVILEGED, UNPRIVILEGED)
        (tree / "closed").mkdir(parents=True)
        (tree / "closed" / "file").touch()
        (tree / "closed").chmod(0)
        remove(tree)

    in_namespace(as_user)
    assert not tree.exists()


def test_copying_up_leaves_no_descriptor_and_takes_any_depth(public_path):
    tree, copy = public_path / "tree", public_path / "copy"
    for path in (tree, copy):
        path.mkdir()
    for number in range(20):
        (tree / f"file{number}").write_text("content")
        os.link(tree / f"file{number}", tree / f"link{number}")
    (tree / "link").symlink_to("/etc")
    dig(tree, 1200)

    def copy_it():
        source, destination = (os.open(path, os.O_RDONLY) for path in (tree, copy))
        copy_tree(source, destination)
        os.close(source)
        os.close(destination)

    in_namespace(copy_it)  # which looks for descriptors that are left
    assert len(os.listdir(copy)) == 42
    assert (copy / "file3").samefile(copy / "link3")
    remove(tree)
    remove(copy)
