"""Too few descriptors, too little memory, many at once, mounts that are shared with others.

Not here: fs.mount-max, which is a limit of the whole machine and no namespace's own.
"""

import os
import subprocess

import pytest

import sandboxfs
from sandboxfs.kernel import abi, syscalls
from tests.attacks.tools import ENGINES, bind_mount, planned
from tests.support import (
    LAUNCHER,
    default_spec,
    in_namespace,
    mount_tmpfs,
    run,
    run_cli,
    set_propagation,
    table,
    untouched,
)

pytestmark = pytest.mark.needs("root", "overlay", "busybox")


def explained(done):
    """Return whether a failed run says why in one line, with at most a hint."""
    lines = done.stderr.splitlines()
    return (
        done.returncode == 125 and len(lines) in (1, 2) and lines[0].startswith("sandboxfs: ")
        and "internal error" not in lines[0]
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_any_number_of_descriptors(bundle, public_path, engine):
    """Below what the interpreter itself needs nothing of ours runs, which is an error as well."""
    document = default_spec()
    del document["process"]["rlimits"]
    made = bundle(document)
    command = f"{LAUNCHER} run --bundle {made.path} --engine {engine} --overlay dir={public_path}/u"
    (public_path / "u").mkdir()
    reached = []
    with untouched(made.path):
        for limit in (*range(3, 60, 2), 80, 120):
            done = run("/bin/sh", "-c", f"ulimit -n {limit}; exec {command}")
            reached.append(done.returncode == 0)
            assert done.returncode == 0 or limit < 6 or explained(done), (limit, done.stderr)
            assert done.returncode == 0 or limit < 6 or "EMFILE" in done.stderr, done.stderr
            assert os.listdir(public_path / "u") == []
    assert reached == sorted(reached), "it worked with fewer and not with more"
    assert reached[-1]
    assert not reached[0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", ["1", "4096", "8K", "12K", "16K", "20K", "64K"])
def test_an_upper_that_is_too_small(bundle, public_path, engine, size):
    source = public_path / "file"
    source.write_bytes(b"x" * 20000)

    def change(document):
        document["mounts"] += [
            bind_mount(source, f"/made/for/it/{number}") for number in range(5)]
        document["process"]["args"] = ["/bin/sh", "-c", "dd if=/dev/zero of=/full bs=64k; true"]

    made = bundle(change)
    with untouched(made.path, source):
        done = run_cli("run", "--bundle", made, "--engine", engine, "--overlay-size", size,
                       "--overlay-binds")
    assert done.returncode == 0 or (explained(done) and "ENOSPC" in done.stderr), done.stderr


@pytest.mark.parametrize("options", [["nr_inodes=1"], ["nr_inodes=2"], ["size=4096"]])
def test_a_mount_that_is_too_small_for_what_goes_into_it(bundle, options):
    def change(document):
        document["mounts"] += [
            {"destination": "/small", "type": "tmpfs", "source": "tmpfs", "options": options},
            {"destination": "/small/a/b/c", "type": "tmpfs", "source": "tmpfs"},
        ]

    done = run_cli("run", "--bundle", bundle(change))
    assert done.returncode == 0 or (explained(done) and "ENOSPC" in done.stderr), done.stderr
    assert (done.returncode == 0) is (options == ["size=4096"])


def test_fifty_at_once(bundle):
    made = bundle(default_spec("/bin/sh", "-c", "touch /x; echo $$"))
    command = [LAUNCHER, "run", "--bundle", made.path]
    with untouched(made.path):
        running = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _number in range(50)
        ]
        results = [(*each.communicate(timeout=60), each.returncode) for each in running]
    assert results == [("1\n", "", 0)] * 50


def shared_parents(bundle, engine):
    """Build and pivot in a copy of a namespace in which everything is shared."""
    mount_tmpfs("/mnt")
    set_propagation(abi.MS_SHARED)
    before = [(each.mountpoint, each.type) for each in table()]
    child = os.fork()
    if child == 0:
        try:
            syscalls.unshare(abi.CLONE_NEWNS)  # a copy: its mounts are peers of ours
            root = sandboxfs.build(planned(bundle, engine=engine))
            root.pivot()
            os._exit(0 if os.path.isdir("/bin") and not os.path.isdir("/mnt") else 2)
        finally:
            os._exit(1)
    _pid, status = os.waitpid(child, 0)
    after = [(each.mountpoint, each.type) for each in table()]
    return os.waitstatus_to_exitcode(status), before == after, len(before)


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_propagates_out_of_a_copy_of_shared_mounts(bundle, engine):
    """A library's caller who forgot to make its mounts private or slave."""
    status, same, count = in_namespace(shared_parents, bundle(), engine)
    assert (status, same) == (0, True)
    assert count > 5


def detach_old_root(bundle):
    """The control: pivot_root and umount2 as they are, where everything is shared."""
    mount_tmpfs("/mnt")
    set_propagation(abi.MS_SHARED)
    before = len(table())
    child = os.fork()
    if child == 0:
        try:
            syscalls.unshare(abi.CLONE_NEWNS)
            root = sandboxfs.build(planned(bundle))
            syscalls.move_mount_path(root.fd, abi.AT_FDCWD, b"/")
            os.fchdir(root.fd)
            syscalls.pivot_root(b".", b".")
            syscalls.umount2(b".", abi.MNT_DETACH)
        except OSError:
            pass  # pivot_root refuses a shared root; the move has been seen already
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return before, len(table())


def test_the_propagation_is_real(bundle):
    before, after = in_namespace(detach_old_root, bundle())
    assert before != after


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_from_shared_mounts_leaves_them_alone(bundle, engine):
    made = bundle()

    def run_it():
        set_propagation(abi.MS_SHARED)
        before = [str(each.mountpoint) for each in table()]
        done = run_cli("run", "--bundle", made, "--engine", engine)
        return done.returncode, before == [str(each.mountpoint) for each in table()]

    assert in_namespace(run_it) == (0, True)
