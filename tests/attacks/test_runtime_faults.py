"""Every system call of the runtime in front fails or is its last: no container, nothing left."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.attacks import inject
from tests.attacks.tools import ENGINES
from tests.support import untouched
from tests.support.front import RECORDED, front, recorder

pytestmark = pytest.mark.needs("root", "overlay", "busybox", "strace", "gcc")

RUNS = int(os.environ.get("SANDBOXFS_FAULT_RUNS", "80"))
CALLS = tuple(
    {*inject.CALLS, "chroot", "execve", "poll", "openat"} - {"pivot_root", "clone3", "execve"})


def outcome(fault: inject.Fault, command: list[str], before: list[str]) -> str | None:
    """Return what a run with a fault should not have done, or None."""
    done = inject.run_with(fault, command)
    words = f"{fault}: {done.returncode} {done.stderr.splitlines()}"
    if Path("/proc/self/mountinfo").read_text("utf-8").splitlines() != before:
        return f"{words}: another mount table"
    ran = "argument" in done.stdout
    if fault.kind == inject.KILL and done.returncode != RECORDED:
        return None  # before the runtime, or in it
    if done.returncode == RECORDED:
        # A call that isn't needed, or isn't made in each run, or cat's, which then says so.
        fine = done.stdout.count("overlay sandboxfs-runtime") == 1 or "cat: " in done.stderr
        return None if fine else f"{words}: no root"
    if ran:
        return f"{words}: a container on another root"
    # Before our own first call the interpreter speaks for itself, after our last one a shell.
    fine = done.returncode and done.stderr and "internal" not in done.stderr
    return None if fine else words


@pytest.mark.parametrize("engine", ENGINES)
def test_faults_of_a_create(bundle, public_path, engine) -> None:
    source = public_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "file").write_text("old\n")

    def change(document: dict[str, Any]) -> None:
        document["annotations"] = {
            "dev.sandboxfs.engine": engine, "dev.sandboxfs.overlay.binds": "true",
            "dev.sandboxfs.mount.v.source": "mine", "dev.sandboxfs.mount.v.type": "tmpfs",
            "dev.sandboxfs.mount.v.share": "container",
        }
        document["mounts"] += [
            {"destination": "/data", "type": "bind", "source": str(source),
             "options": ["rbind", "rw"]},
            {"destination": "/v", "type": "bind", "source": "mine", "options": ["rbind"]},
        ]

    made = bundle(change)
    real = recorder(public_path)
    # Tells besides what it finds at the rootfs's path.
    script = real.with_name("told")
    script.write_text(f'#!/bin/sh\n{real} "$@"\nstatus=$?\ncat /proc/self/mountinfo\n'
                      "exit $status\n")
    script.chmod(0o755)
    program = front(public_path, script)
    command = [str(program), "create", "--bundle", str(made.path), "id"]
    before = Path("/proc/self/mountinfo").read_text("utf-8").splitlines()
    with untouched(made.path, source):
        good = subprocess.run(command, env=inject.ENVIRONMENT, capture_output=True, text=True,
                              check=False)
        assert good.returncode == RECORDED, good.stderr
        assert good.stdout.count("overlay sandboxfs-runtime") == 1
        wrapped = ["sh", "-c", '"$@"; exit 0', "sh", *command]
        most = inject.occurrences(wrapped, public_path, CALLS)
        assert {"fsopen", "move_mount", "open_tree", "unshare", "poll"} <= most.keys()
        found = [each for fault in inject.sample(inject.faults(most), RUNS)
                 if (each := outcome(fault, command, before)) is not None]
    assert not found, "\n".join(found)


def test_a_change_in_the_moment_that_counts_begins_anew(bundle, public_path) -> None:
    """The call that gives a mount back to its peers is held up, and the host mounts meanwhile."""
    from sandboxfs.kernel import abi, syscalls
    from tests.support import mount_tmpfs

    made = bundle()
    busy = public_path / "busy"
    busy.mkdir()
    program = front(public_path, recorder(public_path))
    command = [str(program), "create", "--bundle", str(made.path), "id"]
    trace = public_path / "trace"
    plain = subprocess.run(["strace", "-o", trace, "-e", "trace=move_mount,unshare", *command],
                           env=inject.ENVIRONMENT, capture_output=True, check=False)
    assert plain.returncode == RECORDED
    calls = trace.read_text().splitlines()
    moves = [line for line in calls if line.startswith("move_mount")]
    assert len([line for line in calls if line.startswith("unshare")]) == 1
    at = len(moves)  # the last one sets the group
    process = subprocess.Popen(
        ["strace", "-o", trace, "-e", "trace=move_mount,unshare", "-e",
         f"inject=move_mount:delay_enter=300000:when={at}", *command],
        env=inject.ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        while process.poll() is None:
            mount_tmpfs(busy)
            syscalls.umount2(os.fsencode(busy), abi.MNT_DETACH)
        assert process.returncode == RECORDED
    calls = trace.read_text().splitlines()
    assert len([line for line in calls if line.startswith("unshare")]) >= 2, calls
