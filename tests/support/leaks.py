"""What a test may not leave behind: mounts, descriptors, processes, files, loops, cgroups."""

import gc
import glob
import os
import re
import time
from pathlib import Path

from tests.support.host import WORKER

KINDS = ("mounts", "descriptors", "processes", "files", "loops", "cgroups")
# Names that the package gives to what it makes outside of a root.
FILES = ("/run/sandboxfs*", "/run/sandboxfs/**", "/tmp/*sandboxfs*", "/var/tmp/*sandboxfs*",
         "/dev/shm/*sandboxfs*")
# What other workers' tests and benchmarks beside us make for themselves, and take away.
OTHERS = re.compile(r"/sandboxfs-(bench|behaviour|guest)-")
# In a path: the worker whose test's file it is (pytest's own directories, and ours).
_USERS = re.compile(r"/(?:popen|tests|sandboxfs-behaviour)-(gw\d+|main)[-/]")
# What ends by itself (a dying process, a loop device that clears itself) gets this long.
SETTLING_SECONDS = 3

State = dict[str, frozenset[str]]


def state() -> State:
    """Return what there is now, by kind."""
    return {
        "mounts": frozenset(Path("/proc/self/mountinfo").read_text("utf-8").splitlines()),
        "descriptors": frozenset(_descriptors()),
        "processes": frozenset(_children()),
        "files": frozenset(
            path
            for pattern in FILES
            for path in glob.glob(pattern, recursive=True)
            if not OTHERS.search(path)
        ),
        "loops": frozenset(_loops()),
        # As `tests.support.pods` names them; on cgroup v1 one in each hierarchy.
        "cgroups": frozenset(
            path for above in ("", "*/")
            for path in glob.glob(f"/sys/fs/cgroup/{above}sandboxfs-test-{WORKER}-*")
        ),
    }


def differences(before: State, allowed: tuple[str, ...] = ()) -> list[str]:
    """Return what changed since `before`, a line each; waits for what is about to go."""
    deadline = time.monotonic() + SETTLING_SECONDS
    found = _compare(before, state(), allowed)
    if found:
        gc.collect()
    while found and time.monotonic() < deadline:
        time.sleep(0.02)
        found = _compare(before, state(), allowed)
    return found


def _compare(before: State, after: State, allowed: tuple[str, ...]) -> list[str]:
    lines = []
    for kind in KINDS:
        if kind in allowed:
            continue
        lines += [f"{kind}: left: {each}" for each in sorted(after[kind] - before[kind])]
        # A process, file or loop device of the test before may have taken its time to go.
        if kind in ("mounts", "descriptors"):
            lines += [f"{kind}: gone: {each}" for each in sorted(before[kind] - after[kind])]
    return lines


def _descriptors() -> list[str]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(f"{name} -> {os.readlink('/proc/self/fd/' + name)}")
        except FileNotFoundError:  # the one that listdir itself used
            continue
    return found


def _children() -> list[str]:
    """Return our children, zombies and adopted orphans among them."""
    found = []
    for path in glob.glob("/proc/self/task/*/children"):
        try:
            pids = Path(path).read_text("ascii").split()
        except (FileNotFoundError, ProcessLookupError):  # a thread that ended meanwhile
            continue
        for pid in pids:
            try:
                # "12 (sleep) S 1 …": the name and the state
                words = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            name, _, rest = words.partition(" (")[2].rpartition(") ")
            # Its state changes while it lives; that it's a zombie is worth a word.
            found.append(f"{pid} ({name}){' zombie' if rest[0] == 'Z' else ''}")
    return found


def _loops() -> list[str]:
    found = []
    for path in glob.glob("/sys/block/loop*/loop/backing_file"):
        try:
            backing = Path(path).read_text("utf-8", "replace").strip()
        except OSError:  # detached meanwhile
            continue
        if any(user != WORKER for user in _USERS.findall(backing)):
            continue  # the machine's devices are seen by all: another worker's test has it
        found.append(f"{path.split('/')[3]}: {backing}")
    return found
