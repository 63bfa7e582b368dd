"""Faults at system calls, by strace: what would fail if it failed, one occurrence at a time.

A first, traced run tells which calls are made and how often; then each occurrence can be made
to fail with an error, or to be the last thing its process does.  strace counts occurrences in
each process by itself.

By hand: ``python -m tests.attacks.inject COMMAND…`` prints what each fault leads to.
"""

import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.support.commands import ENVIRONMENT

# What a build asks of the kernel; reading files of our own and memory are not among it.
CALLS = (
    "fsopen", "fsconfig", "fsmount", "open_tree", "mount_setattr", "move_mount", "openat2",
    "mknodat", "symlinkat", "mkdirat", "pivot_root", "umount2", "unshare", "setns", "clone3",
    "fchdir", "chdir", "setsid", "setgroups", "setresuid", "setresgid", "capset", "prctl",
    "prlimit64", "close_range", "statx", "pipe2", "pidfd_open", "sethostname", "fchownat",
    "renameat2", "unlinkat", "setxattr",
)
ERRORS = ("EPERM", "ENOSPC", "ENOMEM", "EIO")
KILL = "KILL"
# pid, call; a call that strace has no name for is written syscall_0x…
_LINE = re.compile(r"(\d+) +([a-z]\w*)\(")

Command = Sequence[str | os.PathLike[str]]


class Fault:
    """`call` number `number` of a process fails with `kind`, an errno's name or `KILL`."""

    def __init__(self, call: str, number: int, kind: str) -> None:
        self.call = call
        self.number = number
        self.kind = kind

    def __str__(self) -> str:
        return f"{self.call}[{self.number}]={self.kind}"

    def expression(self) -> str:
        """Return it as strace's ``inject=`` has it."""
        what = "signal=SIGKILL" if self.kind == KILL else f"error={self.kind}"
        return f"inject={self.call}:{what}:when={self.number}"


def _strace(calls: Sequence[str], options: list[str], command: Command) -> list[str]:
    traced = "trace=" + ",".join(calls)
    return ["strace", "-f", "-qq", "-e", traced, *options, *map(os.fspath, command)]


def occurrences(
    command: Command, directory: Path, calls: Sequence[str] = CALLS
) -> dict[str, int]:
    """Return how often each call is made at most in one process of a run that goes well."""
    trace = directory / "trace"
    subprocess.run(
        _strace(calls, ["-o", str(trace)], command),
        env=ENVIRONMENT, capture_output=True, check=True,
    )
    counted = Counter(
        (match[1], match[2]) for line in trace.read_text("utf-8", "replace").splitlines()
        if (match := _LINE.match(line)) and match[2] in calls
    )
    most: dict[str, int] = {}
    for (_pid, call), count in counted.items():
        most[call] = max(most.get(call, 0), count)
    return most


def faults(most: dict[str, int], kinds: Sequence[str] = (*ERRORS, KILL)) -> list[Fault]:
    """Return every fault for what `occurrences` found."""
    return [
        Fault(call, number, kind)
        for call in sorted(most) for number in range(1, most[call] + 1) for kind in kinds
    ]


def sample(all_faults: list[Fault], count: int) -> list[Fault]:
    """Return `count` of the faults, at least one a call; prints the seed that was used.

    SANDBOXFS_FAULT_SEED repeats a sample.
    """
    seed = int(os.environ.get("SANDBOXFS_FAULT_SEED") or random.randrange(1 << 32))
    print(f"SANDBOXFS_FAULT_SEED={seed}: {count} of {len(all_faults)} faults")
    chosen = random.Random(seed)
    shuffled = chosen.sample(all_faults, len(all_faults))
    first = {fault.call: fault for fault in shuffled}
    rest = [fault for fault in shuffled if first[fault.call] is not fault]
    return [*first.values(), *rest][:max(count, len(first))]


def run_with(
    fault: Fault, command: Command, timeout: float = 30
) -> subprocess.CompletedProcess[str]:
    """Run a command with the fault; stderr is the command's alone."""
    options = ["-o", "/dev/null", "-e", fault.expression()]
    if fault.kind != KILL:
        options.append("--seccomp-bpf")  # stops at that call alone; it takes no SIGKILL
    return subprocess.run(
        _strace([fault.call], options, command), env=ENVIRONMENT, capture_output=True,
        text=True, errors="replace", timeout=timeout, check=False,
    )


def _all_results(command: list[str]) -> Iterator[str]:
    for fault in faults(occurrences(command, Path("/tmp"))):
        done = run_with(fault, command)
        yield f"{fault}: {done.returncode} {done.stderr.strip().splitlines()[:1]}"


if __name__ == "__main__":
    for line in _all_results(sys.argv[1:]):
        print(line, flush=True)
