"""From a running program: a warm `Sandbox` against spawning bwrap, a `Pool` against a spawn.

Everything is called from this one Python process, by `subprocess.run` or by what stands for it.
"""

import shutil
import subprocess
import time
from pathlib import Path

import sandboxfs
from benchmarks import bundle, measure, process
from sandboxfs.harness import client

ROUNDS = 100
TRUE = ["/bin/true"]
SANDBOX, POOL = "Sandbox.run", "Pool.run"
BWRAP, SPAWN = "subprocess.run of bwrap", "subprocess.run of /bin/true"
READY = 4


def run(directory, rounds=ROUNDS):
    """Measure; returns a `Report`."""
    report = measure.Report("warm", "From a running program: /bin/true in a busybox bundle")
    made = bundle.make(Path(directory) / "bundle")
    bwrap = shutil.which("bwrap", path="/usr/bin:/usr/sbin")
    try:
        with (
            sandboxfs.Sandbox(made) as box,
            sandboxfs.Pool(sandboxfs.plan(sandboxfs.load(made)), size=READY) as pool,
        ):
            contestants = {
                SPAWN: timed(lambda: subprocess.run(TRUE, check=True)),
                SANDBOX: timed(lambda: box.run(TRUE, check=True)),
                POOL: timed(lambda: pool.run(TRUE, check=True)),
            }
            if bwrap is None:
                report.notes.append("bwrap is not installed")
            else:
                command = process.bwrap_command(bwrap, made)
                contestants[BWRAP] = timed(lambda: subprocess.run(command, check=True))
            report.add(measure.interleaved(contestants, rounds, pause=0.01))
    finally:
        client.stop()
    if bwrap is not None:
        report.target("a warm Sandbox.run against spawning bwrap",
                      report.ratio(SANDBOX, BWRAP), 0.45)
    report.target("a root of a pool and /bin/true against spawning /bin/true",
                  report.ratio(POOL, SPAWN), 1.5)
    return report


def timed(call):
    """Return a function that calls `call` and returns its nanoseconds."""
    def once():
        started = time.perf_counter_ns()
        call()
        return time.perf_counter_ns() - started

    return once
