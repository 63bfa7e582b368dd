"""Whether what was seen of a directory's mounts still holds: told by the kernel, or asked again."""

import os

import pytest

from sandboxfs.kernel import abi, submount_watch, syscalls
from sandboxfs.kernel.submount_watch import Watch
from tests.support import in_namespace, mount_tmpfs
from tests.support.host import bind

pytestmark = pytest.mark.needs("root", "listmount")
KEY = b"the lower"


def watched(tmp_path, change, count=0):
    """Return [known before, known after a change, bare after it, known at last].

    count: of mounts in other directories.
    """

    def inside():
        mount_tmpfs(tmp_path)
        os.chdir(tmp_path)
        for name in ("lower/x", "a/b/c", "other"):
            os.makedirs(name)
        mount_tmpfs("a/b/c")
        for number in range(count):
            os.makedirs(f"many/{number}")
            bind("other", f"many/{number}")
        watch, lower = Watch(), os.open("lower", abi.O_PATH)
        try:
            assert not watch.knows(KEY)
            assert watch.is_bare(lower, KEY)
            before = watch.knows(KEY)
            undo = change()
            after = watch.knows(KEY)
            bare = watch.is_bare(lower, KEY)
            return [before, after, bare, watch.knows(KEY)], undo
        finally:
            watch.close()
            os.close(lower)

    return in_namespace(inside)[0]


@pytest.mark.parametrize("change", [
    lambda: os.mkdir("lower/new"),
    lambda: os.rename("other", "another"),
    lambda: os.rename("lower/x", "y"),
    lambda: None,
])
def test_nothing_that_concerns_mounts_is_forgotten(tmp_path, change):
    assert watched(tmp_path, change) == [True, True, True, True]


@pytest.mark.parametrize("change", [
    lambda: mount_tmpfs("lower/x"),
    lambda: mount_tmpfs("lower"),
    lambda: bind("other", "lower/x"),
    lambda: os.rename("a", "lower/a"),
    lambda: os.rename("a/b", "lower/b"),
], ids=["mount", "on itself", "bind", "renamed into it", "its parent renamed into it"])
def test_a_mount_that_comes_below_is_seen(tmp_path, change):
    assert watched(tmp_path, change) == [True, False, False, False]


MANY = 300


def rename_files(count):
    for number in range(count):
        with open(f"lower/x/{'n' * 200}{number}", "wb") as file:
            os.rename(file.name, f"other/{number}")


@pytest.mark.parametrize(("change", "known"), [
    (lambda: os.mkdir("lower/new"), True),
    (lambda: rename_files(3), True),
    (lambda: rename_files(1000), False),  # too many to be read
    (lambda: os.rename("other", "another"), False),
    (lambda: (rename_files(3), os.rename("lower/x", "y")), False),
], ids=["made", "files", "many files", "directory", "files and a directory"])
def test_among_many_mounts_directories_that_are_renamed_are_told_of(tmp_path, change, known):
    assert watched(tmp_path, change, MANY) == [True, known, True, True]


@pytest.mark.parametrize("change", [
    lambda: mount_tmpfs("lower/x"),
    lambda: mount_tmpfs("lower"),
    lambda: bind("other", "lower/x"),
    lambda: os.rename("a", "lower/a"),
    lambda: (rename_files(3), os.rename("a/b", "lower/b")),
    lambda: os.rename("many", "lower/many"),
], ids=["mount", "on itself", "bind", "renamed", "its parent renamed", "many renamed"])
def test_among_many_mounts_one_that_comes_below_is_seen(tmp_path, change):
    assert watched(tmp_path, change, MANY) == [True, False, False, False]


def test_among_many_mounts_without_the_right_to_watch_nothing_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(submount_watch, "_fanotify_init", lambda *_arguments: -1)
    assert watched(tmp_path, lambda: None, MANY) == [False, False, True, False]


def set_nosuid():
    here = os.open(".", abi.O_PATH)
    syscalls.mount_setattr(here, abi.MOUNT_ATTR_NOSUID)
    os.close(here)


@pytest.mark.parametrize("change", [
    lambda: mount_tmpfs("other"),
    lambda: syscalls.umount2(b"a/b/c", 0),
    lambda: os.rename("a", "z"),
    set_nosuid,
], ids=["elsewhere", "unmounted", "renamed", "flags"])
def test_after_another_change_it_is_looked_at_again(tmp_path, change):
    assert watched(tmp_path, change) == [True, False, True, True]


def test_a_forked_child_takes_nothing_from_its_parent(tmp_path):
    def inside():
        mount_tmpfs(tmp_path)
        os.makedirs(tmp_path / "lower/x")
        watch, lower = Watch(), os.open(tmp_path / "lower", abi.O_PATH)
        watch.knows(KEY)
        assert watch.is_bare(lower, KEY)
        mount_tmpfs(tmp_path / "lower/x")
        child = os.fork()
        if child == 0:
            os._exit(0 if not watch.knows(KEY) and not watch.is_bare(lower, KEY) else 1)
        assert os.waitpid(child, 0)[1] == 0
        told = watch.knows(KEY)
        watch.close()
        os.close(lower)
        return told

    assert in_namespace(inside) is False


def test_its_descriptors_go_with_it():
    before = set(os.listdir("/proc/self/fd"))
    watch = Watch()
    watch.knows(KEY)
    assert len(os.listdir("/proc/self/fd")) > len(before)
    del watch
    assert set(os.listdir("/proc/self/fd")) == before


def test_many_of_them_leave_the_users_other_processes_some(tmp_path):
    """A user has 128 inotify and 128 fanotify groups; what isn't watched is looked at again."""
    def groups():
        links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                 if os.path.exists(f"/proc/self/fd/{fd}")]
        return len([each for each in links if "notify" in each])

    def inside():
        mount_tmpfs(tmp_path)
        os.chdir(tmp_path)
        os.makedirs("lower/x")
        os.makedirs("a/b/c")
        mount_tmpfs("a/b/c")
        lower = os.open("lower", abi.O_PATH)
        before, watches, known = groups(), [Watch() for _each in range(20)], []
        for watch in watches:
            watch.knows(KEY)
            assert watch.is_bare(lower, KEY)
            known.append(watch.knows(KEY))
        most = groups() - before
        mount_tmpfs("lower/x")
        seen = [watch.knows(KEY) or watch.is_bare(lower, KEY) for watch in watches]
        for watch in watches:
            watch.close()
        syscalls.umount2(b"lower/x", abi.MNT_DETACH)
        again = Watch()
        again.knows(KEY)
        assert again.is_bare(lower, KEY)
        assert again.knows(KEY), "those that were closed count no more"
        again.close()
        os.close(lower)
        return most, sum(known), any(seen)

    limit = submount_watch._MOST_GROUPS
    assert in_namespace(inside) == (limit, limit, False)
