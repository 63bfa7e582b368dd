"""Switching roots in private mount namespaces: what is refused here, deleting, finding INIT.

Real initramfs are booted in tests/boot; here no root is one, which is the point.
"""

import os
import shutil
import stat
from pathlib import Path

import pytest

from sandboxfs.boot import deletion, kept, place, switch
from sandboxfs.boot.init import check_init
from sandboxfs.errors import BootError
from sandboxfs.kernel import abi, syscalls
from tests.support import (
    bind,
    in_namespace,
    mount_tmpfs,
    points,
    run_cli,
    set_propagation,
    snapshot,
    table,
)

pytestmark = pytest.mark.needs("root")


def new_root(path):
    """Mount a tmpfs at `path` that busybox can live in."""
    path.mkdir()
    mount_tmpfs(path)
    for name in ("bin", "sbin", "dev", "proc", "sys"):
        (path / name).mkdir()
    shutil.copy("/usr/bin/busybox", path / "bin/busybox")
    for link, target in (("bin/sh", "busybox"), ("sbin/init", "../bin/busybox")):
        (path / link).symlink_to(target)
    return path


def pivot_to_tmpfs(path):
    """Make a tmpfs this process's root, as a live system's is, with a `new_root` at /new."""
    path.mkdir()
    mount_tmpfs(path)
    (path / "precious").mkdir()
    (path / "precious" / "file").write_text("precious\n")
    new_root(path / "new")
    os.chdir(path)
    syscalls.pivot_root(b".", b".")
    syscalls.umount2(b".", abi.MNT_DETACH)
    os.chdir("/")


def refused(*words, **how):
    """Try to enter a root that would have the old one's content deleted; returns the error."""
    with pytest.raises(BootError) as caught:
        switch.enter(*words, delete=True, **how)
    return str(caught.value)


# -- the refusal -------------------------------------------------------------------------------


def test_the_root_of_this_machine_is_never_deleted(tmp_path):
    def body():
        new_root(tmp_path / "new")
        before = table()
        text = refused(os.fspath(tmp_path / "new"), "/sbin/init", [])
        assert "the root is no initramfs but " in text
        assert points(table()) == points(before)
        assert not place.look().is_initramfs

    in_namespace(body)


@pytest.mark.parametrize("words", [[], ["--force"], ["--force", "--preserve", "/etc"]])
def test_neither_is_it_by_the_command(words, tmp_path):
    def body():
        new_root(tmp_path / "new")
        done = run_cli("switch-root", *words, tmp_path / "new", "/bin/sh", "-c", "echo switched")
        assert done.returncode == 125
        assert done.stdout == ""
        return done.stderr

    text = in_namespace(body)
    assert "the root is no initramfs but " in text or (not words and "not process 1" in text)
    assert os.path.exists("/etc/passwd")


@pytest.mark.parametrize("propagation", [abi.MS_PRIVATE, abi.MS_SHARED])
def test_a_tmpfs_root_is_not_an_initramfs(propagation, tmp_path):
    def body():
        pivot_to_tmpfs(tmp_path / "root")
        set_propagation(propagation)
        before = snapshot("/"), [mount.id for mount in place.look().records]
        text = refused("/new", "/sbin/init", [])
        assert "the root is no initramfs but tmpfs (none)" in text
        assert (snapshot("/"), [mount.id for mount in place.look().records]) == before
        assert Path("/precious/file").read_text() == "precious\n"

    in_namespace(body, check_descriptors=False)  # their names change with the root


def test_a_directory_that_one_was_chrooted_into_is_not_an_initramfs(tmp_path):
    def body():
        root = tmp_path / "root"
        root.mkdir()
        new_root(root / "new")
        os.chroot(root)
        os.chdir("/")
        assert "a directory that this process was chrooted into" in refused(
            "/new", "/sbin/init", []
        )

    in_namespace(body)


def test_a_detached_tree_as_root_is_not_an_initramfs(tmp_path):
    """chroot into a tree that is mounted nowhere: its mount is its own parent, too."""
    def body():
        new = new_root(tmp_path / "new")
        clone = syscalls.open_tree(abi.AT_FDCWD, os.fsencode(new), abi.OPEN_TREE_CLONE)
        os.fchdir(clone)
        os.chroot(".")
        os.close(clone)
        found = place.look()
        assert found.root is None
        assert not found.is_initramfs

    in_namespace(body)


def test_a_file_system_that_only_calls_itself_rootfs_is_not_an_initramfs(tmp_path):
    """The source of a mount is anybody's word; its type isn't."""
    def body():
        from sandboxfs.kernel import fscontext
        from tests.support import attach

        settings = [fscontext.string(b"source", b"rootfs")]
        root = tmp_path / "root"
        root.mkdir()
        attach(fscontext.create(b"tmpfs", settings, 0), root)
        new_root(root / "new")
        os.chdir(root)
        syscalls.pivot_root(b".", b".")
        syscalls.umount2(b".", abi.MNT_DETACH)
        os.chdir("/")
        assert "no initramfs but tmpfs (rootfs), mounted over the bottom" in refused(
            "/new", "/sbin/init", []
        )

    in_namespace(body, check_descriptors=False)


def test_what_is_mounted_at_proc_is_not_believed(tmp_path):
    """A mountinfo that says the root is an initramfs, where /proc could be anything."""
    def body():
        mount_tmpfs("/proc")
        Path("/proc/self").mkdir()
        Path("/proc/self/mountinfo").write_text("1 1 0:2 / / rw - rootfs rootfs rw\n")
        assert not place.look().is_initramfs
        with pytest.raises(BootError, match="the root is no initramfs"):
            switch.check_initramfs()

    in_namespace(body)


# -- what is allowed ----------------------------------------------------------------------------

SHOW = "cat /proc/self/mountinfo; echo $SANDBOXFS_SWITCHED $PWD"


def kept_switch(path, *words):
    """Run --keep in this namespace; returns the mountpoints that INIT sees."""
    done = run_cli("switch-root", "--keep", "--force", *words, path, "/bin/sh", "-c", SHOW, check=0)
    *lines, last = done.stdout.splitlines()
    assert last == "1 /"
    return [line.split()[4] for line in lines]


@pytest.mark.parametrize("propagation", [abi.MS_PRIVATE, abi.MS_SHARED])
def test_keep_pivots_and_takes_the_mounts_along(propagation, tmp_path):
    def body():
        set_propagation(propagation)
        new = new_root(tmp_path / "new")
        (new / "etc").mkdir()
        seen = kept_switch(new)
        assert "/" in seen
        assert "/proc" in seen
        assert "/dev/pts" in seen
        assert not [point for point in seen if point.startswith("/sbin")]

    before = points(table())
    in_namespace(body)
    assert points(table()) == before


def test_a_mount_that_holds_the_new_root_follows_it(tmp_path):
    def moved():
        base = Path("/mnt")
        mount_tmpfs(base)
        new = new_root(base / "new")
        (new / "mnt").mkdir()
        (base / "file").write_text("in the holder\n")
        script = "cat /mnt/file; cut -d' ' -f5 /proc/self/mountinfo"
        done = run_cli(
            "switch-root", "--keep", "--force", new, "/bin/busybox", "sh", "-c",
            script.replace("cut", "/bin/busybox cut").replace("cat", "/bin/busybox cat"), check=0,
        )
        return done.stdout.splitlines()

    first, *seen = in_namespace(moved)
    assert first == "in the holder"
    assert "/mnt" in seen


def test_the_witness_leaves_nothing_but_exec(tmp_path):
    done = run_cli(
        "switch-root", "--keep", "/nowhere", "/bin/echo", "--keep", "-x",
        env={"SANDBOXFS_SWITCHED": "1"}, check=0,
    )
    assert done.stdout == "--keep -x\n"
    assert done.stderr == (
        "sandboxfs: SANDBOXFS_SWITCHED is set: the root was switched, now /bin/echo\n"
    )


def test_an_init_that_is_not_there_undoes_what_was_done(tmp_path):
    """Covered by a mount that moves, it is missed only when everything has moved."""
    def body():
        new = new_root(tmp_path / "new")
        shutil.copy("/usr/bin/busybox", new / "sys/init")
        before = sorted(Path("/proc/self/mountinfo").read_text().splitlines())
        where = os.getcwd()
        with pytest.raises(BootError, match="INIT: find /sys/init: ENOENT"):
            switch.enter(os.fspath(new), "/sys/init", [], delete=False, warn=lambda text: None)
        assert sorted(Path("/proc/self/mountinfo").read_text().splitlines()) == before
        assert os.getcwd() == where
        import wave  # noqa: F401  # imports still work

    in_namespace(body)


def test_a_shared_root_is_shared_again_after_a_failure(tmp_path):
    def body():
        set_propagation(abi.MS_SHARED)
        new = new_root(tmp_path / "new")
        shutil.copy("/usr/bin/busybox", new / "sys/init")
        with pytest.raises(BootError, match="INIT: find /sys/init: ENOENT"):
            switch.enter(os.fspath(new), "/sys/init", [], delete=False, warn=lambda text: None)
        return [mount.propagation for mount in table() if mount.mountpoint == b"/"]

    assert in_namespace(body) == [abi.MS_SHARED]


def test_a_detached_root_is_detached_again_after_a_failure(tmp_path):
    def body():
        new = new_root(tmp_path / "new")
        before = sorted(Path("/proc/self/mountinfo").read_text().splitlines())
        for init in ("/nothing", "/sys/init"):
            clone = syscalls.open_tree(abi.AT_FDCWD, os.fsencode(new), abi.OPEN_TREE_CLONE)
            with pytest.raises(BootError, match=f"INIT: find {init}: ENOENT"):
                switch.enter(clone, init, [], delete=False, warn=lambda text: None)
            os.close(clone)
        assert sorted(Path("/proc/self/mountinfo").read_text().splitlines()) == before

    in_namespace(body)


def test_user_root_has_nothing_to_do_where_the_root_has_a_parent():
    done = in_namespace(
        lambda: run_cli("switch-root", "--user-root", "--force", "/bin/echo", "init")
    )
    assert done.stdout == "init\n"
    assert "pivot_root works without --user-root" in done.stderr


def test_the_first_process_of_another_pid_namespace_is_not_the_machines():
    def body():
        assert os.getpid() == 1
        with pytest.raises(BootError, match="not process 1, but the first of a pid namespace"):
            switch.check_first_process()
        switch.check_first_process(force=True)

    in_namespace(body, namespaces=abi.CLONE_NEWPID)


def test_the_library_has_what_the_commands_have():
    from sandboxfs import boot

    for name in boot.__all__:
        assert callable(getattr(boot, name)), name
    assert boot.is_initramfs() is False
    with pytest.raises(ValueError, match="'v3' is none of v2, v1, none"):
        boot.make_early_mounts("v3")
    with pytest.raises(BootError, match="not process 1"):
        boot.switch_root("/nowhere")
    with pytest.raises(BootError, match="open /nowhere: ENOENT"):
        boot.switch_root("/nowhere", keep=True, force=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        boot.nothing  # noqa: B018


# -- deleting -----------------------------------------------------------------------------------


def emptied(path, kept=()):
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return deletion.delete_below(fd, kept)
    finally:
        os.close(fd)


def test_a_tree_of_everything_is_deleted(tmp_path):
    deep = tmp_path
    for _level in range(5):
        deep = deep / "d"
        deep.mkdir()
        (deep / "file").write_text("x")
        os.mkfifo(deep / "fifo")
        (deep / "\nodd\udcff").mkdir()
        (deep / "link").symlink_to("/etc")
        (deep / "link to here").symlink_to(".")
        os.mknod(deep / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.link(deep / "file", tmp_path / "hard link")
    deep.chmod(0)
    assert emptied(tmp_path) == []
    assert list(tmp_path.iterdir()) == []
    assert os.path.exists("/etc/passwd")


def test_a_tree_is_as_deep_as_it_likes(tmp_path):
    """Deeper than Python recurses, and than a process may have files open."""
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    for _level in range(1500):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    assert emptied(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_mounts_are_not_crossed_even_of_the_same_device(tmp_path):
    def body():
        tree, outside = tmp_path / "tree", tmp_path / "outside"
        for directory in (tree / "a/mounted", tree / "a/bound", tree / "gone", outside):
            directory.mkdir(parents=True)
        (tree / "a/file").write_text("a file with a bind on it")
        (outside / "file").write_text("outside")
        mount_tmpfs(tree / "a/mounted")
        (tree / "a/mounted/file").write_text("mounted")
        bind(outside, tree / "a/bound")
        bind(outside / "file", tree / "a/file")
        assert emptied(tree) == []
        assert sorted(path.name for path in tree.rglob("*")) == [
            "a", "bound", "file", "file", "file", "mounted",
        ]
        assert (outside / "file").read_text() == "outside"

    in_namespace(body)


def test_symlinks_are_deleted_and_not_followed(tmp_path):
    (tmp_path / "tree").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("outside")
    (tmp_path / "tree/link").symlink_to(tmp_path / "outside")
    (tmp_path / "tree/relative").symlink_to("../outside")
    assert emptied(tmp_path / "tree") == []
    assert list((tmp_path / "tree").iterdir()) == []
    assert (tmp_path / "outside/file").read_text() == "outside"


def test_what_is_kept_is_kept_with_all_it_holds(tmp_path):
    (tmp_path / "a/b/c").mkdir(parents=True)
    (tmp_path / "a/b/c/file").write_text("kept")
    (tmp_path / "a/gone").write_text("gone")
    (tmp_path / "gone").mkdir()
    assert emptied(tmp_path, {deletion.identity(os.lstat(tmp_path / "a/b"))}) == []
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "c", "file"]


def test_what_a_bind_shows_is_kept_although_another_mount_hides_its_place(tmp_path):
    """That other one moves to the new root before anything is deleted."""
    def body():
        pivot_to_tmpfs(tmp_path / "root")
        for directory in ("run/image", "run/other", "bound"):
            Path("/", directory).mkdir(parents=True)
        Path("/run/image/file").write_text("in use")
        bind("/run/image", "/bound")
        mount_tmpfs("/run")
        Path("/run/image").mkdir()  # not the one that is in use
        warnings = []
        old = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
        spared = kept.identities(old, place.look(), (), warnings.append)
        syscalls.umount2(b"/run", abi.MNT_DETACH)
        assert deletion.delete_below(old, spared) == []
        os.close(old)
        assert Path("/bound/file").read_text() == "in use"
        assert sorted(os.listdir("/run")) == ["image"]
        assert warnings == []

    in_namespace(body, check_descriptors=False)  # their names change with the root


def test_what_cannot_be_deleted_is_told(tmp_path):
    """An immutable file: the rest goes, the error says which stayed."""
    def body():
        import fcntl

        mount_tmpfs(tmp_path)
        (tmp_path / "d").mkdir()
        (tmp_path / "d/stuck").write_text("stuck")
        (tmp_path / "other").write_text("other")
        fs_ioc_setflags, immutable = 0x40086602, 0x10
        with open(tmp_path / "d/stuck", "rb") as file:
            fcntl.ioctl(file, fs_ioc_setflags, immutable.to_bytes(8, "little"))
        left = emptied(tmp_path)
        assert [path for path, _ in left] == ["d/stuck"]
        assert os.listdir(tmp_path) == ["d"]

    in_namespace(body)


def test_layers_of_overlays_are_found_in_their_options():
    options = rb"rw,lowerdir=/a:/b\134:c::/data\054x,upperdir=/up\040per,workdir=/w,index=off"
    assert kept._layers(options) == [b"/a", b"/b:c", b"/data,x", b"/up per", b"/w"]
    assert kept._layers(b"rw,lowerdir+=/one,lowerdir+=/two,datadir+=/three") == [
        b"/one", b"/two", b"/three",
    ]


# -- INIT ---------------------------------------------------------------------------------------


def checked(root, init):
    fd = os.open(root, os.O_PATH | os.O_DIRECTORY)
    try:
        check_init(fd, init)
    finally:
        os.close(fd)


def test_init_and_its_interpreters_are_found_in_the_new_root(tmp_path):
    new = tmp_path / "new"
    (new / "bin").mkdir(parents=True)
    shutil.copy("/usr/bin/busybox", new / "bin/busybox")
    (new / "bin/sh").symlink_to("/bin/busybox")  # absolute: in the root it is looked up in
    (new / "script").write_text("#!/bin/sh -x\n")
    (new / "script").chmod(0o700)
    (new / "through").symlink_to("../../../script")
    for init in ("/bin/busybox", "/bin/sh", "/script", "/through", "through", b"/bin/sh"):
        checked(new, init)


def test_a_dynamic_program_needs_its_loader(tmp_path):
    shutil.copy("/usr/bin/python3", tmp_path / "python")
    with pytest.raises(BootError, match=r"INIT's interpreter: find /lib.*ENOENT") as caught:
        checked(tmp_path, "/python")
    assert caught.value.hint == "/python is there; the interpreter or loader it names is not"


def test_scripts_that_name_each_other_end(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).write_text(f"#!/{other}\n")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(BootError, match="ELOOP: interpreters of interpreters"):
        checked(tmp_path, "/a")


def test_a_fifo_as_init_hangs_nobody(tmp_path):
    os.mkfifo(tmp_path / "init", 0o755)
    with pytest.raises(BootError, match="EACCES: not a file"):
        checked(tmp_path, "/init")
