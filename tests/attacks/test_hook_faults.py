"""Every system call of the hook fails or is its last: the runtime's root is as it was.

Each run has a copy of the prepared mount namespace to itself, whose shared mounts are peers of
the prepared one's: what reaches that is seen there.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sandboxfs.kernel import abi, syscalls
from tests.attacks import inject
from tests.attacks.tools import ENGINES
from tests.support import in_namespace, parsed, table, untouched
from tests.support.hooks import Runtime

pytestmark = pytest.mark.needs("root", "overlay", "busybox", "strace")

# Of some 600 each.
RUNS = int(os.environ.get("SANDBOXFS_FAULT_RUNS", "80"))
CALLS = tuple(call for call in inject.CALLS if call not in ("pivot_root", "clone3", "setns"))
ALONE = ("unshare", "-m", "--propagation", "unchanged", "sh", "-c")

Rows = list[tuple[Any, ...]]


class Outcome:
    """One run: its status, its one line, and the table below the rootfs afterwards."""

    def __init__(self, runtime: Runtime, text: str) -> None:
        errors, _, rest = text.partition("\nstatus ")
        status, _, mounts = rest.partition("\n")
        self.lines = errors.splitlines()
        self.status = int(status)
        self.rows = rows(runtime, parsed(mounts))


def rows(runtime: Runtime, records: list[Any]) -> Rows:
    return sorted(
        (each.mountpoint, each.type, each.root, each.attributes, each.propagation,
         each.master, each.peer_group, each.source)
        for each in records if runtime.contains(each.mountpoint)
    )


def bare(of: Rows) -> Rows:
    """Without what a kill may leave changed of the runtime's mounts.

    That is their propagation, where those are that had to be set aside, and what shuts the
    rootfs's own when all is done.
    """
    shut = abi.MOUNT_ATTR_RDONLY | abi.MOUNT_ATTR_NOEXEC
    return [(*row[1:3], row[3] & ~shut, row[7]) for row in of]


def tried(runtime: Runtime, state: Path, words: list[str]) -> Outcome:
    script = (f'"$@" < {state} 2>&1 >/dev/null; code=$?; echo; echo status $code; '
              "cat /proc/self/mountinfo")
    done = subprocess.run(
        [*ALONE, script, "sh", *words], env=inject.ENVIRONMENT, capture_output=True, text=True,
        timeout=60, check=True,
    )
    return Outcome(runtime, done.stdout)


def strace(fault: inject.Fault, command: list[str]) -> list[str]:
    return ["strace", "-f", "-qq", "-e", f"trace={fault.call}", "-o", "/dev/null", "-e",
            fault.expression(), *command]


def wrong(fault: inject.Fault, done: Outcome, before: Rows, good: Rows) -> str | None:
    """Return what a run should not have done, or None."""
    words = f"{fault}: {done.status} {done.lines}"
    if fault.kind == inject.KILL:
        # Nobody comes after it to take away what is attached; it dies with the namespace.
        kept = [row for row in bare(before) if row not in bare(done.rows)]
        return f"{words}: gone: {kept}" if kept or done.status not in (0, 137) else None
    if done.status == 0:
        return None if done.rows == good else f"{words}: another root: {difference(done, good)}"
    if done.rows != before:
        return f"{words}: left changed: {difference(done, before)}"
    fine = (done.status == 125 and len(done.lines) == 1 and fault.kind in done.lines[0]
            and done.lines[0].startswith("sandboxfs: ") and "internal" not in done.lines[0])
    return None if fine else words


def difference(done: Outcome, wanted: Rows) -> list[Any]:
    return [row for row in [*done.rows, *wanted]
            if (row in done.rows) != (row in wanted)]


def try_all(runtime: Runtime, directory: Path) -> list[str]:
    state = directory / "state.json"
    state.write_text(runtime.state(), "utf-8")
    before = tried(runtime, state, ["true"]).rows
    outside = [repr(record) for record in table()]
    good = tried(runtime, state, runtime.command())
    assert (good.status, good.lines) == (0, []), good.lines
    most = inject.occurrences([*ALONE, f'exec "$@" < {state}', "sh", *runtime.command()], directory)
    most = {call: count for call, count in most.items() if call in CALLS}
    assert {"fsopen", "move_mount", "openat2", "open_tree"} <= most.keys()
    found = []
    for fault in inject.sample(inject.faults(most), RUNS):
        done = tried(runtime, state, strace(fault, runtime.command()))
        found += filter(None, [wrong(fault, done, before, comparable(good.rows))
                               if done.status else
                               wrong(fault, comparable_outcome(done), before,
                                     comparable(good.rows))])
        if [repr(record) for record in table()] != outside:
            found.append(f"{fault}: reached the other mount namespace")
            break
    return found


def comparable(of: Rows) -> Rows:
    """Without the numbers of peer groups that are new in each run."""
    return [(*row[:6], bool(row[6]), row[7]) for row in of]


def comparable_outcome(done: Outcome) -> Outcome:
    done.rows = comparable(done.rows)
    return done


@pytest.mark.parametrize("engine", ENGINES)
def test_faults_of_create_container(bundle, public_path, capsys, engine):
    source = public_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "file").touch()

    def change(document):
        document["root"]["readonly"] = True
        document["process"]["cwd"] = "/made"
        document["annotations"] = {
            "dev.sandboxfs.engine": engine, "dev.sandboxfs.overlay.binds": "true",
            "dev.sandboxfs.mount.v.source": "mine", "dev.sandboxfs.mount.v.type": "tmpfs",
            "dev.sandboxfs.mount.v.share": "container",
            "dev.sandboxfs.mount.w.source": "nested", "dev.sandboxfs.mount.w.type": "tmpfs",
            "dev.sandboxfs.mount.w.share": "container",
        }
        document["mounts"] += [
            {"destination": "/data", "type": "bind", "source": str(source), "options": ["rbind"]},
            {"destination": "/data/deep", "type": "tmpfs", "source": "mine", "options": []},
            {"destination": "/peers", "type": "bind", "source": str(source),
             "options": ["bind", "ro", "rshared"]},
            # What is made anew in what is moved: it is set aside.
            {"destination": "/out", "type": "tmpfs", "source": "out", "options": ["private"]},
            {"destination": "/out/v", "type": "tmpfs", "source": "nested", "options": []},
            {"destination": "/out/v/in", "type": "tmpfs", "source": "in", "options": []},
            {"destination": "/out/file", "type": "bind", "source": str(source / "file"),
             "options": ["bind"]},
            # What a runtime has yet to make read-only.
            {"destination": "/late", "type": "tmpfs", "source": "late", "options": ["ro"]},
        ]

    prepared = bundle(change)

    def body():
        runtime = Runtime(prepared, propagation=abi.MS_SHARED)
        fd = os.open(f"{prepared.rootfs}/late", os.O_PATH)
        syscalls.mount_setattr(fd, 0, abi.MOUNT_ATTR_RDONLY)
        os.close(fd)
        return try_all(runtime, public_path)

    with untouched(source), capsys.disabled():
        print()
        found = in_namespace(body, timeout=600)
    assert found == []


def test_faults_with_an_upper_on_disk(bundle, public_path, capsys):
    """The directory that was made on the host is removed, unless we are killed."""
    place = public_path / "uppers"
    place.mkdir()
    policy = public_path / "policy.toml"
    policy.write_text("[annotations]\nhost-paths = true\n", "utf-8")
    prepared = bundle(lambda document: document.update(
        annotations={"dev.sandboxfs.overlay": f"dir={place}"}))

    def body():
        runtime = Runtime(prepared)
        state = public_path / "state.json"
        state.write_text(runtime.state(), "utf-8")
        command = runtime.command("createContainer", "--config", str(policy))
        most = inject.occurrences([*ALONE, f'exec "$@" < {state}', "sh", *command], public_path)
        subprocess.run(["rm", "-rf", place / "hook-test"], check=True)
        found = []
        wanted = [call for call in most if call in (*CALLS, "mkdirat")]
        for fault in inject.sample(
            inject.faults({call: most[call] for call in wanted}, inject.ERRORS), RUNS // 3
        ):
            done = tried(runtime, state, strace(fault, command))
            left = os.listdir(place)
            if left and done.status and fault.call not in ("unlinkat", "openat2", "fchmodat2"):
                found.append(f"{fault}: {done.status} {done.lines} left {left}")
            for name in left:
                subprocess.run(["rm", "-rf", place / name], check=True)
        return found

    with capsys.disabled():
        print()
        found = in_namespace(body, timeout=600)
    assert found == []


def test_the_injector_reaches_the_hook(bundle, public_path):
    """The control: a fault that is asked for happens, at the very attach and after it."""
    prepared = bundle()

    def body():
        runtime = Runtime(prepared, propagation=abi.MS_SHARED)
        state = public_path / "state.json"
        state.write_text(runtime.state(), "utf-8")
        before = tried(runtime, state, ["true"]).rows
        done = tried(runtime, state,
                     strace(inject.Fault("mount_setattr", 1, "EIO"), runtime.command()))
        assert done.status == 125
        assert done.lines[0].endswith("mount_setattr " + str(prepared.rootfs)
                                      + ": EIO: Input/output error"), done.lines
        assert done.rows == before
        most = inject.occurrences(
            [*ALONE, f'exec "$@" < {state}', "sh", *runtime.command()], public_path)
        # The last of these calls verifies what is attached already.
        done = tried(runtime, state, strace(inject.Fault("statx", most["statx"], "EIO"),
                                            runtime.command()))
        assert done.status == 125
        assert "verify" in done.lines[0] or "statx" in done.lines[0], done.lines
        assert done.rows == before

    in_namespace(body)
