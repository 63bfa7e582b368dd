"""Many binds in one spec: the cost of one more must not depend on how many there are."""

from pathlib import Path

from benchmarks import bundle, measure, process
from benchmarks.build import python_rounds

ROUNDS = 30
COUNTS = (0, 10, 50, 200, 1000)
BUILD = "build() + pivot(), forked"


def run(directory, rounds=ROUNDS, counts=COUNTS):
    """Measure; returns a `Report`."""
    report = measure.Report("binds", "Bind mounts in one spec, by their number")
    bundles = {}
    for count in counts:
        entries = bundle.binds(Path(directory) / "sources", count)
        bundles[count] = bundle.make(Path(directory) / f"binds{count}", entries)
    with process.Peers(directory, report) as peers:
        for count, made in bundles.items():
            with measure.Server(python_rounds(made)) as ours:
                contestants = {
                    BUILD: ours.contestant(b"f"), "parse": ours.contestant(b"l"),
                    "plan": ours.contestant(b"p"),
                    "sandboxfs run": process.sandboxfs_run(directory, made),
                    **peers.contestants(made),
                }
                # A run with 1,000 binds takes seconds with some tools.
                fewer = rounds if count <= 200 else max(5, rounds // 4)
                taken = measure.interleaved(contestants, fewer, warm_up=1)
            report.add({f"{name}, {count}": values for name, values in taken.items()})
    per_mount(report, list(contestants), counts)
    return report


def per_mount(report, names, counts):
    """Add what one bind costs above a spec without any, and the target."""
    def cost(name, count):
        none = report.rows[f"{name}, 0"]["median"]
        return (report.rows[f"{name}, {count}"]["median"] - none) / count

    for name in names:
        costs = ", ".join(
            f"{count}: {cost(name, count) / 1000:.1f}" for count in counts if count
        )
        report.notes.append(f"{name}, µs per bind, above none: {costs}")
    if 50 in counts and 200 in counts:
        for name in (BUILD, "sandboxfs run"):
            report.target(f"per bind with 200 against 50, {name}",
                          cost(name, 200) / cost(name, 50), 1.2)
