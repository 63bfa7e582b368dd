"""Words and paths that mean something to somebody else, and files that block who opens them."""

import json
import os

import pytest

from tests.attacks.tools import ENGINES, bind_mount
from tests.support import busybox_rootfs, default_spec, minimal_spec, run, run_cli, untouched

pytestmark = pytest.mark.needs("root", "overlay", "busybox")

NAMES = ["a:b", "a,b", "a\\:b", "a,upperdir=etc", "new\nline", "tab\tand space ", "=x", "percent%s",
         os.fsdecode(b"not-utf8-\xff")]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_any_path_is_only_a_path(public_path, engine, name):
    """As lower, as upper, as source and as destination of a bind (buildah CVE-2024-9407)."""
    directory = public_path / name
    directory.mkdir()
    root = busybox_rootfs(directory / "rootfs")
    extra, upper, source = (directory / each for each in ("extra", "upper", "source"))
    for each in (extra, upper, source):
        each.mkdir()
    (extra / "from-the-extra").touch()
    (source / "from-the-source").touch()
    document = minimal_spec(
        "/bin/sh", "-c", 'ls /from-the-extra "$1"; touch /written', "sh", f"/{name}")
    document["mounts"] = [bind_mount(source, f"/{name}", "ro")]
    if "\udcff" in name:  # which JSON can't say: on the command line alone
        document = minimal_spec("/bin/touch", "/written")
    (public_path / "config.json").write_text(json.dumps(document), "utf-8")
    with untouched(root, extra, source):
        done = run_cli(
            "run", "--config", public_path / "config.json", "--rootfs", root, "--lower", extra,
            "--overlay", f"dir={upper}:keep", "--engine", engine, check=0,
        )
    assert "\udcff" in name or "from-the-source" in done.stdout
    assert len(list(upper.glob("*/upper/written"))) == 1


@pytest.mark.parametrize("options", [
    ["size=1k,nr_inodes=3"], ["mode=755,uid=0"], ["bind,ro"], ["ro,rw"], ["=x"],
    ["size=99999999999999999999"], ["context=a", "size=1,mode=0"],
])
def test_one_word_is_one_option(bundle, options):
    def change(document):
        document["mounts"].append(
            {"destination": "/new", "type": "tmpfs", "source": "tmpfs", "options": options})

    done = run_cli("run", "--bundle", bundle(change), check=65)
    assert done.stderr.startswith("sandboxfs: /mounts/7/options/")


@pytest.mark.parametrize(
    "word", ["size=1k", "upperdir=/etc", "lowerdir=/", "uid=0", "x-mount.mkdir"]
)
def test_a_bind_takes_no_data(bundle, public_path, word):
    def change(document):
        document["mounts"].append(bind_mount(public_path, "/new", word))

    done = run_cli("run", "--bundle", bundle(change), check=65)
    assert done.stderr.startswith("sandboxfs: /mounts/7/options/1: ")


def test_data_reaches_the_kernel_word_by_word(bundle):
    """An unknown word is the kernel's to refuse, by its own message."""
    def change(document):
        document["mounts"].append({
            "destination": "/new", "type": "tmpfs", "source": "tmpfs", "options": ["no_such=1"]})

    done = run_cli("run", "--bundle", bundle(change), check=125)
    assert "Unknown parameter 'no_such'" in done.stderr


# -- blocking files ----------------------------------------------------------------------------


@pytest.fixture
def fifo(public_path):
    path = public_path / "fifo"
    os.mkfifo(path)
    return path


def quickly(*arguments, check):
    """Run with a time limit far below that of a hanging open."""
    return run_cli(*arguments, check=check, timeout=10)


def test_a_fifo_is_no_document(bundle, fifo):
    made = bundle()
    quickly("run", "--config", fifo, check=125)
    (made.path / "config.json").unlink()
    os.mkfifo(made.path / "config.json")
    done = quickly("run", "--bundle", made, check=125)
    assert "not a regular file" in done.stderr


def test_a_fifo_is_no_root(fifo):
    done = quickly("run", "--rootfs", fifo, "--", "/bin/true", check=125)
    assert "neither a directory nor an image file" in done.stderr
    quickly("run", "--rootfs", "/", "--lower", fifo, "--", "/bin/true", check=125)
    quickly("run", "--overlay", f"dir={fifo}", "--", "/bin/true", check=125)
    quickly("run", "--bundle", fifo, check=125)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_fifo_is_bound_without_being_opened(bundle, fifo, engine):
    def change(document):
        document["mounts"].append(bind_mount(fifo, "/fifo"))
        document["process"]["args"] = ["/bin/sh", "-c", "test -p /fifo"]

    made = bundle(change)
    quickly("run", "--bundle", made, "--engine", engine, check=0)
    quickly("run", "--bundle", made, "--engine", engine, "--overlay-binds", check=0)


def test_a_fifo_as_namespace_or_device(bundle, fifo):
    made = bundle()
    document = default_spec()
    document["linux"]["namespaces"][0]["path"] = str(fifo)
    made.write(document)
    done = quickly("run", "--bundle", made, check=125)
    assert "is no namespace file" in done.stderr
    document = default_spec()
    document["linux"]["namespaces"].append({"type": "user"})
    document["linux"]["devices"] = [
        {"path": str(fifo), "type": "c", "major": 1, "minor": 3}]
    made.write(document)
    done = quickly("run", "--bundle", made, check=125)
    assert "not the device c 1:3" in done.stderr


def test_fifos_in_the_image_are_not_opened(bundle):
    """Under a mask, in a copied directory, as mountpoint and as program."""
    def change(document):
        document["mounts"] += [
            {"destination": "/copied", "type": "tmpfs", "source": "tmpfs",
             "options": ["tmpcopyup"]},
            bind_mount("/etc/hostname", "/mountpoint"),
        ]
        document["linux"]["maskedPaths"].append("/masked")
        document["linux"]["readonlyPaths"].append("/sealed")
        document["process"]["args"] = ["/bin/sh", "-c", "test -p /copied/fifo && cat /masked"]

    made = bundle(change)
    (made.rootfs / "copied").mkdir()
    for name in ("copied/fifo", "masked", "sealed", "mountpoint", "program"):
        os.mkfifo(made.rootfs / name)
    quickly("run", "--bundle", made, check=0)
    quickly("run", "--bundle", made, "--", "/program", check=126)


@pytest.mark.needs("strace")
def test_a_blocking_open_does_block(fifo):
    """The control: whoever opens the FIFO to read hangs."""
    done = run("timeout", "1", "cat", fifo)
    assert done.returncode == 124
