"""Memory: the peak of each program, and what 100 live sandboxes take."""

import os
import subprocess
import threading
import time
from pathlib import Path

import sandboxfs
from benchmarks import bundle, measure, process
from sandboxfs.harness import client
from sandboxfs.kernel import abi

LIVE = 100


def run(directory, rounds=1, live=LIVE):
    """Measure; returns a `Report` without targets."""
    report = measure.Report("memory", "Memory of /bin/true in a busybox bundle")
    made = bundle.make(Path(directory) / "bundle")
    peers = process.Peers(directory, report)
    commands = {"sandboxfs run": [process.launcher(directory), "run", "--bundle", made]}
    if peers.runc:
        commands["runc run"] = [peers.runc, "--root", peers.state / "runc", "run", "--bundle",
                                made, process.name_of(made)]
    if peers.crun:
        commands["crun run"] = [peers.crun, "--root", peers.state / "crun",
                                "--cgroup-manager=disabled", "run", "--bundle", made,
                                process.name_of(made)]
    if peers.bwrap:
        commands["bwrap"] = process.bwrap_command(peers.bwrap, made)
    for name, command in commands.items():
        report.values[f"{name}, peak of its largest process"] = {
            "KiB": max(peak(command, directory, in_unified_cgroups if name == "crun run" else None)
                       for _round in range(rounds))}
    sandboxes(report, made, live)
    return report


def in_unified_cgroups():
    """Enter a mount namespace in which only cgroup2 is seen, as crun wants it."""
    measure.enter_private(abi.CLONE_NEWNS)
    process.unified_cgroups()


def peak(command, directory, prepare=None):
    """Return the peak resident KiB of a program and what it waited for (getrusage(2)).

    By busybox's `time`: what a process was before exec counts, and that one is small.
    prepare: called in the process that becomes `time`.
    """
    said = Path(directory) / "peak"
    subprocess.run(["busybox", "time", "-f", "%M", "-o", said, *command], check=True,
                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                   preexec_fn=prepare)
    # It takes the kernel's kilobytes for pages, and multiplies.
    return int(said.read_text("ascii").splitlines()[-1]) * 1024 // os.sysconf("SC_PAGE_SIZE")


def sandboxes(report, made, live):
    """Add what so many sandboxes take that run at once: shared pages counted once (PSS)."""
    try:
        with sandboxfs.Sandbox(made) as box:
            box.run(["/bin/true"], check=True)
            none = proportional(family(client.current().pid))
            reader, writer = os.pipe()  # each waits for its end
            threads = [
                threading.Thread(target=box.run, args=(["/bin/sh", "-c", "read x"],),
                                 kwargs={"stdin": reader})
                for _each in range(live)
            ]
            for thread in threads:
                thread.start()
            while box.status()["running"] < live:
                measure.progress(f"{box.status()['running']} of {live} sandboxes")
                time.sleep(0.05)
            time.sleep(0.5)
            pids = family(client.current().pid)
            report.values[f"{live} live sandboxes, all of it"] = {"KiB": proportional(pids)}
            report.values["the warm process, idle"] = {"KiB": none}
            os.close(writer)
            for thread in threads:
                thread.join()
            os.close(reader)
    finally:
        measure.progress("")
        client.stop()


def family(pid):
    """Return a process and all its descendants."""
    found = [pid]
    for each in found:
        try:
            with open(f"/proc/{each}/task/{each}/children", encoding="ascii") as file:
                found += [int(number) for number in file.read().split()]
        except FileNotFoundError:
            continue
    return found


def proportional(pids):
    """Return the proportional set size of processes in KiB (proc_pid_smaps_rollup(5))."""
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
                total += next(int(line.split()[1]) for line in file if line.startswith("Pss:"))
        except (FileNotFoundError, ProcessLookupError, StopIteration):
            continue
    return total
