"""The hook is killed at every system call, or a call fails: nothing is changed, nothing left."""

import os
import re
from collections import Counter

import pytest

from tests.attacks import inject
from tests.runtimes.container import PROBE, Container, Memory, View, Volume, differences
from tests.support import leaks, untouched

pytestmark = pytest.mark.needs("root", "overlay", "busybox", "launcher", "strace")

# Of some 600 kills and 300 errors for each runtime.
RUNS = int(os.environ.get("SANDBOXFS_FAULT_RUNS", "40"))
# The first is strace's own, before there is a hook; of the second nobody hears the end.
NEVER_RETURN = ("execve", "exit_group")
STRACE = ("/usr/bin/strace", "-f", "-qq")


def through_strace(hooks, trace, *options):
    return hooks.through(*STRACE, "-o", trace, *options)


def container(place) -> Container:
    outer = place.directory("outer", "inner/covered")
    return Container(
        PROBE, readonly=True, cwd="/work",
        mounts=[Volume(outer, "/outer", "ro"), Memory("/outer/inner", "size=64k")],
    )


def occurrences(trace: str) -> dict[str, int]:
    """Return how often one process made each call at most; `inject.occurrences` for a trace."""
    counted = Counter(re.findall(r"^(\d+) +([a-z]\w*)\(", trace, re.MULTILINE))
    most: dict[str, int] = {}
    for (_pid, call), count in counted.items():
        # strace shows calls that it has no name for (syscall_0x1c9), but can't be asked for them.
        if call not in NEVER_RETURN and not call.startswith("syscall_"):
            most[call] = max(most.get(call, 0), count)
    return most


@pytest.mark.parametrize("name", ["runc", "crun"])
def test_faults_of_the_hook(runtime_of, name, place, hooks, capsys):
    runtime = runtime_of(name)
    made = container(place)
    plain = View(runtime.run(made, place.rootfs).stdout)
    trace = place.path / "trace"
    good = runtime.run(made, place.rootfs, through_strace(hooks, trace, "-e", "trace=all"))
    assert differences(plain, View(good.stdout)) == []
    most = occurrences(trace.read_text("utf-8", "replace"))
    trace.unlink()
    assert {"fsopen", "fsmount", "move_mount", "openat2"} <= most.keys()
    ours = {call: count for call, count in most.items() if call in inject.CALLS}
    with capsys.disabled():
        print()
        # It is killed at any call, those of the interpreter among them.
        chosen = inject.sample(inject.faults(most, (inject.KILL,)), RUNS)
        chosen += inject.sample(inject.faults(ours, inject.ERRORS), RUNS)
    before = leaks.state()
    found = []
    with untouched(place.path):
        for fault in chosen:
            done = runtime.run(made, place.rootfs, through_strace(
                hooks, "/dev/null", "-e", f"trace={fault.call}", "-e", fault.expression()))
            found += [f"{fault}: {line}" for line in wrong(fault, done, plain, runtime)]
            found += [f"{fault}: {line}" for line in leaks.differences(before, ("files",))]
            found += [f"{fault}: left {line}" for line in runtime.left()]
    assert found == []


def wrong(fault, done, plain, runtime) -> list[str]:
    """Return what a run with a fault should not have done."""
    if done.returncode == 0:
        if fault.kind == inject.KILL:
            return ["the container started without its hook"]
        # There may be another way, if it leads to the same.
        return differences(plain, View(done.stdout))
    if done.stdout:
        return [f"failed, but its payload ran: {done.stdout}"]
    words = done.stderr
    if "Traceback" in words or "internal error" in words:
        return [words]
    if fault.kind != inject.KILL and runtime.tells and words.count("sandboxfs: ") != 1:
        return [f"not one line: {words}"]
    return []
