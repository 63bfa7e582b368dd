"""Moving a tree between file systems, emptying the first: on this machine's kernel."""

import errno
import mmap
import os
import pty
import resource
import select
import signal

import pytest

from sandboxfs.boot import copy, tmpfs
from sandboxfs.boot.content import CHUNK, Torn
from sandboxfs.boot.progress import Progress
from sandboxfs.errors import BootError
from sandboxfs.kernel import abi, fscontext, syscalls
from tests.boot.trees import description, differences, make_tree, used
from tests.support import attach, bind, in_namespace

SOURCE, DESTINATION = "/mnt/source", "/mnt/destination"
LISTED = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
SIZE = 18 << 20


def mounted(path, type=b"tmpfs", **options):
    os.makedirs(path, exist_ok=True)
    settings = [fscontext.string(key.encode(), value.encode()) for key, value in options.items()]
    attach(fscontext.create(type, settings, 0), path)


def here(function, *arguments, **how):
    """Run a test's body in a namespace in which /mnt is empty memory."""

    def body():
        mounted("/mnt")
        return function(*arguments)

    return in_namespace(body, **how)


def move(skipped=(), moved=lambda size: None):
    """Move SOURCE's files, without what is mounted on them, to DESTINATION."""
    clone = syscalls.open_tree(abi.AT_FDCWD, SOURCE.encode(), abi.OPEN_TREE_CLONE)
    source = os.open(".", LISTED, dir_fd=clone)
    destination = os.open(DESTINATION, LISTED)
    try:
        copy.move_tree(source, destination, skipped, moved)
    finally:
        for fd in (clone, source, destination):
            os.close(fd)


def needed():
    source = os.open(SOURCE, LISTED)
    try:
        return copy.measure(source)
    finally:
        os.close(source)


@pytest.mark.needs("root")
def test_everything_about_a_tree_survives():
    def body():
        mounted(SOURCE)
        mounted(DESTINATION)
        make_tree(SOURCE)
        before, size = description(SOURCE), used(SOURCE)
        need = needed()
        assert (need.size, need.names, need.busy) == (size, inodes(SOURCE), 0)
        assert differences(before, description(SOURCE)) == []
        moved = []
        came_from = os.getcwd()
        move(moved=moved.append)
        assert differences(before, description(DESTINATION)) == []
        assert os.listdir(SOURCE) == []
        assert (used(SOURCE), used(DESTINATION)) == (0, size)
        assert size - 64 * 1024 < sum(moved) <= size
        assert os.getcwd() == came_from

    here(body)


def inodes(path):
    status = os.statvfs(path)
    return status.f_files - status.f_ffree


@pytest.mark.needs("root")
def test_a_ramfs_is_moved_with_its_holes():
    def body():
        mounted(SOURCE, b"ramfs")
        mounted(DESTINATION)
        make_tree(SOURCE, attributes=False)
        need = needed()
        move()
        assert used(DESTINATION) == need.size < SIZE + (1 << 20)
        sparse = f"{DESTINATION}/a/sparse"
        assert os.stat(sparse).st_size == 8 << 20
        with open(sparse, "rb") as file:
            file.seek(4 << 20)
            assert file.read(5) == b"data\0"

    here(body)


# From nothing to nearly enough; names without pages are the inodes' part.
@pytest.mark.parametrize("room", [
    {"size": "64k"}, {"size": "5m"}, {"size": "7m"}, {"size": "13m"}, {"size": "17m"},
    {"nr_inodes": "4"}, {"nr_inodes": "12"}, {"nr_inodes": "20"}, {"nr_inodes": "27"},
], ids=lambda room: "-".join(room.values()))  # fmt: skip
@pytest.mark.parametrize("type", [b"tmpfs", b"ramfs"], ids=bytes.decode)
@pytest.mark.needs("root")
def test_without_room_everything_is_back_in_its_place(room, type):
    def body():
        mounted(SOURCE, type)
        mounted(DESTINATION, **room)
        make_tree(SOURCE, attributes=type == b"tmpfs")
        description(SOURCE)  # on a ramfs, reading fills holes
        before = description(SOURCE)
        with pytest.raises(OSError, match="No space left") as failure:
            move()
        assert failure.value.errno == errno.ENOSPC
        assert not isinstance(failure.value, Torn)
        assert differences(before, description(SOURCE)) == []
        assert os.listdir(DESTINATION) == []
        assert used(DESTINATION) == 0

    here(body)


@pytest.mark.needs("root")
def test_never_much_more_memory_than_one_copy():
    """Long files and those with several names are where a copy would double."""

    def body():
        mounted(SOURCE)
        mounted(DESTINATION)
        with open(f"{SOURCE}/long", "wb") as file:
            file.writelines(os.urandom(1 << 20) for _piece in range(40))
        for number in range(40):
            with open(f"{SOURCE}/linked{number}", "wb") as file:
                file.write(os.urandom(1 << 20))
            os.mkdir(f"{SOURCE}/{number}")
            os.link(f"{SOURCE}/linked{number}", f"{SOURCE}/{number}/too")
        size = used(SOURCE)
        peak = 0

        def look(_size):
            nonlocal peak
            peak = max(peak, used(SOURCE) + used(DESTINATION))

        move(moved=look)
        assert used(DESTINATION) == size
        assert size <= peak <= size + CHUNK

    here(body)


@pytest.mark.needs("root")
def test_a_file_that_somebody_has_mapped_keeps_its_pages():
    def body():
        mounted(SOURCE)
        mounted(DESTINATION)
        content = os.urandom(1 << 20) * 9
        for name in ("mapped", "open"):
            with open(f"{SOURCE}/{name}", "wb") as file:
                file.write(content)
        with open(f"{SOURCE}/mapped", "rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        opened = os.open(f"{SOURCE}/open", os.O_RDONLY)
        assert needed().busy == 2 * len(content)
        move()
        assert mapping[:] == content
        assert os.pread(opened, len(content), 0) == content
        assert open(f"{DESTINATION}/mapped", "rb").read() == content
        mapping.close()
        os.close(opened)
        assert used(SOURCE) == 0

    here(body)


@pytest.mark.needs("root")
def test_what_is_mounted_is_neither_crossed_nor_removed():
    """What a mount covers moves; its mountpoint has to stay, and so do the way there and back."""

    def body(room):
        mounted(SOURCE)
        mounted(DESTINATION, **room)
        os.makedirs(f"{SOURCE}/deep/dev")
        for path in ("covered", "deep/beside", "z", "a", "deep/dev/node"):
            with open(f"{SOURCE}/{path}", "w") as file:
                file.write("own " + path)
        os.truncate(f"{SOURCE}/covered", 5 << 20)
        with open(f"{SOURCE}/covered", "r+b") as file:
            file.write(os.urandom(5 << 20))
        before = description(SOURCE)
        mounted(f"{SOURCE}/deep/dev")
        with open(f"{SOURCE}/deep/dev/foreign", "w") as file:
            file.write("stays")
        with open("/mnt/outside", "w") as file:
            file.write("stays")
        bind("/mnt/outside", f"{SOURCE}/covered")
        try:
            move()
            failed = False
        except OSError:
            failed = True
        assert open(f"{SOURCE}/deep/dev/foreign").read() == "stays"
        assert open(f"{SOURCE}/covered").read() == "stays"
        if not failed:
            assert sorted(os.listdir(SOURCE)) == ["covered", "deep"]
            assert os.listdir(f"{SOURCE}/deep") == ["dev"]
        for path in (f"{SOURCE}/deep/dev", f"{SOURCE}/covered"):
            syscalls.umount2(path.encode(), abi.MNT_DETACH)
        assert differences(before, description(SOURCE if failed else DESTINATION)) == []
        return failed

    assert here(body, {}) is False
    assert here(body, {"size": "4m"}) is True
    assert here(body, {"nr_inodes": "6"}) is True


@pytest.mark.needs("root")
def test_what_comes_up_meanwhile_moves_too():
    def body():
        mounted(SOURCE)
        mounted(DESTINATION)
        for name in ("one", "two", "three"):
            os.mkdir(f"{SOURCE}/{name}")
            with open(f"{SOURCE}/{name}/file", "w") as file:
                file.write(name)
        new = []

        def write(_size):
            # In a directory that may be finished, and gone, by now.
            for name in ("one", "two", "three"):
                os.makedirs(f"{SOURCE}/{name}/sub", exist_ok=True)
                path = f"{name}/sub/{len(new)}"
                if len(new) < 9:
                    with open(f"{SOURCE}/{path}", "w") as file:
                        file.write(path)
                    new.append(path)

        move(moved=write)
        assert len(new) == 9
        for path in (*new, "one/file", "two/file", "three/file"):
            assert open(f"{DESTINATION}/{path}").read() == path.removesuffix("/file")
        assert os.listdir(SOURCE) == []

    here(body)


@pytest.mark.needs("root")
def test_a_tree_that_grows_over_the_limit_is_back_in_its_place_with_what_is_new():
    def body():
        mounted(SOURCE)
        mounted(DESTINATION, size="20m")
        make_tree(SOURCE)
        before = description(SOURCE)
        pieces = []

        def grow(size):
            pieces.append(size)
            if len(pieces) == 3:
                with open(f"{SOURCE}/new", "wb") as file:
                    file.write(os.urandom(6 << 20))

        with pytest.raises(OSError, match="No space left"):
            move(moved=grow)
        os.truncate(f"{SOURCE}/new", 0)
        os.unlink(f"{SOURCE}/new")
        times = before[b""]
        os.utime(SOURCE, ns=(0, times["mtime"]))
        assert differences(before, description(SOURCE)) == []
        assert used(DESTINATION) == 0

    here(body)


@pytest.mark.needs("root")
def test_if_there_is_no_way_back_either_no_byte_is_lost():
    def body():
        mounted(SOURCE, size="30m")
        mounted(DESTINATION, size="16m")
        before = {}
        for number in range(20):
            before[f"{number}"] = os.urandom(1 << 20)
            with open(f"{SOURCE}/{number}", "wb") as file:
                file.write(before[f"{number}"])
        pieces = []

        def fill(size):
            pieces.append(size)
            if len(pieces) == 12:
                with pytest.raises(OSError, match="No space left"):
                    hog.writelines(bytes(1 << 20) for _piece in range(64))

        with (
            open(f"{SOURCE}/hog", "wb", 0) as hog,
            pytest.raises(Torn, match="moving back: ") as failure,
        ):
            move(("hog",), fill)
        assert failure.value.first.errno == failure.value.second.errno == errno.ENOSPC
        found = {}
        for place in (SOURCE, DESTINATION):
            for name in set(os.listdir(place)) & before.keys():
                with open(f"{place}/{name}", "rb") as file:
                    found[name] = file.read()
        assert found == before

    here(body)


@pytest.mark.needs("root")
def test_depth_takes_no_descriptors():
    def body():
        mounted(SOURCE)
        mounted(DESTINATION)
        depth = 3000
        fd = os.open(SOURCE, LISTED)
        for _level in range(depth):
            os.mkdir("d", dir_fd=fd)
            below = os.open("d", LISTED, dir_fd=fd)
            os.close(fd)
            fd = below
        os.close(os.open("bottom", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        assert needed().names == depth + 2
        move()
        fd = os.open(DESTINATION, LISTED)
        for _level in range(depth):
            below = os.open("d", LISTED, dir_fd=fd)
            os.close(fd)
            fd = below
        assert os.listdir(fd) == ["bottom"]
        os.close(fd)
        assert os.listdir(SOURCE) == []

    here(body)


@pytest.mark.needs("root")
def test_a_default_acl_is_not_handed_to_what_was_there_before_it():
    acl = bytes.fromhex("02000000 01000700ffffffff 04000500ffffffff 20000500ffffffff")
    mine = bytes.fromhex(
        "02000000 01000700ffffffff 02000700d2040000 04000500ffffffff 10000700ffffffff"
        "20000500ffffffff"
    )

    def body(room):
        mounted(SOURCE)
        mounted(DESTINATION, **room)
        os.mkdir(f"{SOURCE}/dir")
        for name in ("plain", "own"):
            with open(f"{SOURCE}/dir/{name}", "w") as file:
                file.write(name)
        os.mkdir(f"{SOURCE}/dir/below")
        os.setxattr(f"{SOURCE}/dir/own", "system.posix_acl_access", mine)
        os.setxattr(f"{SOURCE}/dir", "system.posix_acl_default", mine)
        with open(f"{SOURCE}/big", "wb") as file:
            file.write(bytes(1 << 20))
        before = description(SOURCE)
        try:
            move()
        except OSError:
            assert differences(before, description(SOURCE)) == []
            return False
        assert differences(before, description(DESTINATION)) == []
        return True

    assert acl != mine
    assert here(body, {}) is True
    assert here(body, {"size": "64k"}) is False


@pytest.mark.needs("root")
def test_a_tmpfs_gets_the_inodes_that_a_tree_needs():
    def body():
        need = copy.Need()
        usual = os.fstatvfs(fd := tmpfs._new_tmpfs(None, need)).f_files
        os.close(fd)
        need.names = usual + 1000
        room = os.fstatvfs(fd := tmpfs._new_tmpfs("1M", need))
        os.close(fd)
        assert room.f_ffree >= need.names
        need.size = (1 << 20) + 1
        with pytest.raises(BootError, match="ENOSPC: the files take 1048577 bytes") as failure:
            tmpfs._new_tmpfs("1M", need)
        assert failure.value.hint.startswith("--size 3M")
        need.size = 99999999999999
        with pytest.raises(BootError, match="ENOSPC: the files take 99999999999999 bytes"):
            tmpfs._new_tmpfs(None, need)

    here(body)


def test_memory_for_what_stays_in_use_is_asked_for_before():
    need = copy.Need()
    tmpfs._check_memory(need)
    need.busy = 1 << 50
    need.size = 1 << 51
    with pytest.raises(BootError, match="ENOMEM: moving 2147483648") as failure:
        tmpfs._check_memory(need)
    assert "1073741824.0 for files in use), and " in failure.value.text


def test_signals_wait_until_all_is_moved():
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_about: came.append("TERM"))
    try:
        with tmpfs._undisturbed():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGIO)
            assert came == []
        assert came == ["TERM"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_terminal_shows_how_far_it_is():
    master, slave = pty.openpty()
    with open(slave, "w") as terminal:
        progress = Progress("moving:", 10 << 20, terminal)
        for _piece in range(5):
            progress.advance(2 << 20)
            progress.drawn = float("-inf")
        progress.end()
        shown = b""
        while select.select([master], [], [], 0)[0]:
            shown += os.read(master, 4096)
    os.close(master)
    lines = shown.decode().split("\r")
    assert lines[1].startswith("moving: 2.0 of 10.0 MiB,  20% [###")
    assert "moving: 10.0 of 10.0 MiB, 100% [#" in shown.decode()
    assert shown.endswith(b"\r\n")
    assert all(len(line) < 80 for line in lines)


def test_what_is_no_terminal_shows_nothing(tmp_path):
    with open(tmp_path / "log", "w") as log:
        progress = Progress("moving:", 10, log)
        progress.advance(10)
        progress.end()
    assert (tmp_path / "log").read_text() == ""
