"""Many binds in one spec: the cost of one more must not depend on how many there are."""

import contextlib
import statistics
from pathlib import Path

from benchmarks import bundle, floor, measure, process
from benchmarks.build import python_rounds

ROUNDS = 45
FEW = 200
COUNTS = (0, 10, 50, 200, 1000)
BUILD = "build() + pivot(), in a child"
IN_PROCESS, FLOOR = "build(), in process", "floor, in process"


def run(directory, rounds=ROUNDS, counts=COUNTS):
    """Measure; returns a `Report`."""
    report = measure.Report("binds", "Bind mounts in one spec, by their number")
    bundles = {}
    for count in counts:
        entries = bundle.binds(Path(directory) / "sources", count)
        bundles[count] = bundle.make(Path(directory) / f"binds{count}", entries)
    program = floor.compiled(directory)
    few = [count for count in counts if count <= FEW]
    many = [count for count in counts if count > FEW]
    with process.Peers(directory, report) as peers, contextlib.ExitStack() as servers:
        everybody = {}
        for count, made in bundles.items():
            ours = servers.enter_context(measure.Server(python_rounds(made)))
            lowest = servers.enter_context(measure.Server(
                [program, made / "rootfs"],
                environment={"FLOOR_BINDS": str(Path(directory) / "sources"),
                             "FLOOR_COUNT": str(count)}))
            everybody[count] = {
                FLOOR: lowest.contestant(b"b"), IN_PROCESS: ours.contestant(b"b"),
                BUILD: ours.contestant(b"f"), "parse": ours.contestant(b"l"),
                "plan": ours.contestant(b"p"),
                "sandboxfs run": process.sandboxfs_run(directory, made),
                **peers.contestants(made),
            }
        # Counts that are compared share their rounds; 1,000 binds take some tools seconds.
        for group, fewer in ((few, rounds), (many, max(5, rounds // 3))):
            together = {
                f"{name}, {count}": contestant
                for count in group for name, contestant in everybody[count].items()
            }
            # As in the bench `build`: what builds in a process is warm, whole commands aren't.
            warmed = {name for name in together if name.startswith((FLOOR, IN_PROCESS, BUILD))}
            report.add(measure.interleaved(
                together, fewer, warm_up=1, warmed=warmed) if together else {})
    per_mount(report, list(everybody[counts[0]]), counts)
    for count in counts:
        if count:
            report.target(f"{count} binds, build() against the floor",
                          report.ratio(f"{IN_PROCESS}, {count}", f"{FLOOR}, {count}"), 1.3)
    most = max(counts)
    if f"crun run, {most}" in report.rows:
        report.target(f"{most} binds, sandboxfs run against crun run",
                      report.ratio(f"sandboxfs run, {most}", f"crun run, {most}"), 1.0)
    return report


def per_mount(report, names, counts):
    """Add what one bind costs above a spec without any, and the target.

    A difference is that of one round, where there is one: what slows the machine for seconds is in
    both then.
    """
    def cost(name, count):
        without, with_binds = report.taken[f"{name}, 0"], report.taken[f"{name}, {count}"]
        if len(without) == len(with_binds):
            each = map(int.__sub__, with_binds, without)
            return statistics.median(each) / count
        return (statistics.median(with_binds) - statistics.median(without)) / count

    for name in names:
        costs = ", ".join(
            f"{count}: {cost(name, count) / 1000:.1f}" for count in counts if count
        )
        report.notes.append(f"{name}, µs per bind, above none: {costs}")
    if 50 in counts and 200 in counts:
        for name in (BUILD, "sandboxfs run"):
            report.target(f"per bind with 200 against 50, {name}",
                          cost(name, 200) / cost(name, 50), 1.2)
