"""``python -m benchmarks [NAME…]``: measure, print tables, write JSON.

Names: build, warm, process, busy, binds, parallel, memory, hook_ctr, hook, front, view, start; all
of them
without one.  As root.
"""

import argparse
import importlib
import os
import sys
import tempfile

from benchmarks import measure

NAMES = (
    "build", "warm", "process", "busy", "binds", "parallel", "memory", "hook_ctr", "hook", "front",
    "view", "start",
)


def main(words=None):
    """Run the benches; returns 0, or 1 when a target was missed and `--strict` asked for it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--rounds", type=int, help="rounds of each bench; they have defaults")
    parser.add_argument("--json", metavar="FILE", help="write all results to FILE")
    parser.add_argument("--plot", metavar="FILE", help="draw the times to FILE (SVG, PNG); needs "
                        "matplotlib, the extra `bench`")
    parser.add_argument("--markdown", metavar="FILE", help="write the targets, and what else is to "
                        "be reported, to FILE as a table")
    parser.add_argument("--strict", action="store_true", help="exit 1 when a target is missed")
    options = parser.parse_args(words)
    for name in ("json", "plot", "markdown"):
        if getattr(options, name):
            setattr(options, name, os.path.abspath(getattr(options, name)))
    unknown = [name for name in options.names if name not in NAMES]
    if unknown:
        parser.error(f"unknown bench {unknown[0]}; there are {', '.join(NAMES)}")
    if os.geteuid():
        parser.error("the benchmarks need root: they mount")
    reports = []
    for name in options.names or NAMES:
        bench = importlib.import_module(f"benchmarks.{name}")
        with tempfile.TemporaryDirectory(prefix="sandboxfs-bench-") as directory:
            report = bench.run(directory, **({"rounds": options.rounds} if options.rounds else {}))
        reports.append(report)
        sys.stdout.write(report.table() + "\n")
        sys.stdout.flush()
    if options.json:
        measure.write_json(options.json, reports)
    if options.markdown:
        from benchmarks import markdown

        markdown.write(options.markdown, reports)
    if options.plot:
        from benchmarks import plot

        plot.draw(options.plot, reports)
    missed = any(not entry["met"] for report in reports for entry in report.targets)
    return 1 if missed and options.strict else 0


if __name__ == "__main__":
    sys.exit(main())
