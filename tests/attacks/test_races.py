"""Somebody else renames in a volume while a root is built: nothing reaches the host."""

import errno
import os
import stat
from pathlib import Path

import pytest

import sandboxfs
from sandboxfs.errors import MountError
from sandboxfs.kernel import abi, features, resolve
from sandboxfs.kernel.maker import Maker
from tests.attacks.tools import ENGINES, attacker, bind_mount, entries, exchange, planned
from tests.support import in_namespace, minimal_spec

pytestmark = pytest.mark.needs("root", "overlay")

BUILDS = 150
MOST_ROUNDS = 200_000


@pytest.fixture
def volume(public_path):
    """A volume with a directory `a` and a symlink `b` to a directory of the host beside it."""
    path = public_path / "volume"
    path.mkdir()
    (path / "a").mkdir()
    outside = public_path / "outside"
    outside.mkdir()
    (path / "b").symlink_to(outside)
    return path


def swap(volume: Path):
    one, other = os.fsencode(volume / "a"), os.fsencode(volume / "b")
    return lambda _number: exchange(one, other)


def document_with(mounts):
    document = minimal_spec()
    document["mounts"] = mounts
    return document


def build_again_and_again(bundle, volume, engine):
    """Build with a fresh mountpoint below the raced name each time; returns the errors' numbers."""
    found = []
    for number in range(BUILDS):
        mounts = [
            bind_mount(volume, "/volume"),
            {"destination": f"/volume/a/{number}/deep", "type": "tmpfs"},
            bind_mount(bundle.path / "config.json", f"/volume/a/file{number}"),
        ]
        plan = planned(bundle, document_with(mounts), engine)
        try:
            sandboxfs.build(plan).close()
        except MountError as error:
            found.append(error.errno)
        else:
            found.append(0)
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_mountpoints_are_never_made_on_the_host(bundle, volume, engine):
    made = bundle(minimal_spec())
    with attacker(swap(volume)):
        numbers = in_namespace(
            build_again_and_again, made, volume, engine, check_descriptors=False, timeout=120
        )
    assert entries(volume.parent / "outside") == []
    # EAGAIN is tried again; what else may happen is that the name is the link, or no longer there.
    assert errno.EAGAIN not in numbers
    assert 0 in numbers


def test_the_race_is_real(volume):
    """The control: who checks and then makes a directory by its path makes some on the host."""
    outside = volume.parent / "outside"
    with attacker(swap(volume)):
        for number in range(MOST_ROUNDS):
            path = volume / "a"
            try:
                if os.path.realpath(path) == str(path):
                    os.mkdir(path / str(number))
            except OSError:
                continue
            if os.path.lexists(outside / str(number)):
                break
    assert entries(outside) != []


def resolve_dotdot(volume):
    """Walk through `..` below the raced name; returns how often, and how often it failed."""
    root = os.open(volume, os.O_PATH)
    rounds, failures = 0, []
    try:
        for _round in range(20_000):
            rounds += 1
            try:
                os.close(resolve.open_in_root(root, b"a/../a/../a/..", resolve.ANY))
            except OSError as error:
                failures.append(error.errno)
    finally:
        os.close(root)
    return rounds, failures


def test_eagain_under_attack_is_tried_again(volume):
    how, seen = resolve.ANY, 0
    root = os.open(volume, os.O_PATH)
    try:
        with attacker(swap(volume)):
            for _round in range(MOST_ROUNDS):
                try:
                    os.close(resolve.openat2(root, b"a/../a/../a/..", how))
                except BlockingIOError:
                    seen += 1
                    break
                except OSError:
                    continue
            _rounds, failures = resolve_dotdot(volume)
    finally:
        os.close(root)
    assert seen, "the kernel never answered EAGAIN: the test shows nothing"
    assert errno.EAGAIN not in failures


def test_what_this_kernel_can_do_does_not_depend_on_who_renames(volume):
    findings, refused = [], 0
    how = resolve.OpenHow(abi.O_PATH | os.O_CLOEXEC, 0, abi.RESOLVE_IN_ROOT)
    with attacker(swap(volume)):
        for _round in range(MOST_ROUNDS):
            findings.append(features.Features().openat2)
            try:
                os.close(resolve.openat2(abi.AT_FDCWD, b"/..", how))
            except BlockingIOError:
                refused += 1
            if refused == 20:
                break
    assert refused == 20, "the kernel hardly ever answered EAGAIN: the test shows nothing"
    assert all(findings), [found.detail for found in findings if not found]


def swap_nodes(volume: Path, victim: Path):
    """Put a link to the victim in the place of every node that appears."""
    link, node, aside = (os.fsencode(volume / name) for name in ("link", "node", "aside"))

    def step(_number):
        if not os.path.lexists(link):
            os.symlink(victim, link)
        if exchange(node, link):
            os.replace(link, aside)

    return step


@pytest.fixture
def victim(public_path):
    path = public_path / "victim"
    path.write_text("secret")
    path.chmod(0o600)
    return path


def build_nodes(bundle, volume):
    document = document_with([bind_mount(volume, "/volume")])
    document["linux"]["devices"] = [
        {"path": "/volume/node", "type": "c", "major": 1, "minor": 3, "fileMode": 0o666,
         "uid": 61234, "gid": 61234},
    ]
    os.umask(0o077)
    for _number in range(BUILDS):
        try:
            os.unlink(volume / "node")
        except FileNotFoundError:
            pass
        try:
            sandboxfs.build(planned(bundle, document)).close()
        except MountError:
            continue


def test_a_node_that_is_replaced_gives_nothing_away(bundle, volume, victim):
    made = bundle(minimal_spec())
    with attacker(swap_nodes(volume, victim)):
        in_namespace(build_nodes, made, volume, check_descriptors=False, timeout=120)
    found = victim.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o600, 0)


def test_the_race_for_a_node_is_real(volume, victim):
    """The control: who makes a node and then changes its mode by its name changes the victim's."""
    node = volume / "node"
    with attacker(swap_nodes(volume, victim)):
        for _round in range(MOST_ROUNDS):
            try:
                os.mknod(node, 0o600 | stat.S_IFIFO)
                os.chmod(node, 0o666)
            except OSError:
                pass
            try:
                os.unlink(node)
            except OSError:
                pass
            if victim.stat().st_mode & 0o077:
                break
    assert victim.stat().st_mode & 0o077


def make_and_give_away(volume):
    """Make mountpoints for another owner below a name that somebody replaces."""
    root = os.open(volume, os.O_PATH)
    maker = Maker(root, (61234, 61234))
    try:
        for _round in range(3000):
            try:
                os.close(maker.directory(b"node"))
            except OSError:
                pass
            try:
                os.rmdir(volume / "node")
            except OSError:
                pass
    finally:
        os.close(root)


def test_a_directory_that_is_replaced_is_not_given_away(volume, public_path):
    """Somebody else's closed directory, exchanged with a mountpoint, keeps owner and mode."""
    closed = volume / "closed"
    closed.mkdir(mode=0o700)
    os.chown(closed, 4321, 4321)
    node = os.fsencode(volume / "node")

    def step(_number):
        if exchange(node, os.fsencode(closed)):
            exchange(node, os.fsencode(closed))

    (closed / "file").touch()  # so that nobody removes it
    with attacker(step):
        in_namespace(make_and_give_away, volume, timeout=120)
    (found,) = (path for path in (closed, volume / "node") if (path / "file").exists())
    assert (found.stat().st_uid, stat.S_IMODE(found.stat().st_mode)) == (4321, 0o700)
