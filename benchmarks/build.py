"""The build against the floor: in one process, and with attach and pivot in a forked child."""

import re
import sys
from pathlib import Path

from benchmarks import bundle, floor, measure
from sandboxfs.kernel import abi

ROUNDS = 200
CHECKOUT = Path(__file__).resolve().parents[1]


def interpreter():
    """Return the interpreter that the launcher would name, not a virtual environment's link."""
    return str(Path(getattr(sys, "_base_executable", sys.executable)).resolve())


def python_rounds(path):
    """Return the command of the server that builds the bundle at `path`."""
    script = Path(__file__).with_name("rounds.py")
    return [interpreter(), "-I", "-S", "-B", str(script), str(CHECKOUT), str(path)]


def run(directory, rounds=ROUNDS):
    """Measure; returns a `Report`.  directory: an empty one to work in."""
    made = bundle.make(Path(directory) / "bundle")
    program = floor.compiled(directory)
    report = measure.Report("build", "Build of containerd's default spec against the floor in C")
    with (
        measure.Server([program, made / "rootfs"]) as lowest,
        measure.Server(python_rounds(made)) as ours,
    ):
        check_equal(lowest.lines(b"m"), ours.lines(b"m"))
        everybody = {
            "floor, in process": lowest.contestant(b"b"),
            "build(), in process": ours.contestant(b"b"),
            "floor, forked, pivoted": lowest.contestant(b"f"),
            "build() + pivot(), in a child": ours.contestant(b"f"),
            "parse": ours.contestant(b"l"),
            "plan": ours.contestant(b"p"),
            "drop a detached root": ours.contestant(b"c"),
        }
        report.add(measure.interleaved(everybody, rounds, warmed=everybody))
    with_cgroups(directory, program, report, rounds)
    report.target("build() against the floor",
                  report.ratio("build(), in process", "floor, in process"), 1.15)
    report.target("build() + attach + pivot in a forked child against the floor",
                  report.ratio("build() + pivot(), in a child", "floor, forked, pivoted"), 1.3)
    report.notes += ["both results have the same mounts, flags, file systems and devices",
                     "our child is made by vfork, as `run` makes it; the floor's by fork"]
    return report


def with_cgroups(directory, program, report, rounds):
    """Add the same with a cgroup mount, which is one mount a hierarchy on hybrid hosts."""
    with open("/proc/self/cgroup", encoding="utf-8") as file:
        hierarchies = [line.split(":")[1] for line in file]
    if any("," in names for names in hierarchies):
        report.notes.append("with cgroups: not measured, this host mounts controllers together")
        return
    made = bundle.make(Path(directory) / "cgroups")
    bundle.write(made, bundle.document_with_cgroups())
    namespaces = measure.PRIVATE | abi.CLONE_NEWCGROUP
    with (
        measure.Server([program, made / "rootfs", *hierarchies], namespaces) as lowest,
        measure.Server(python_rounds(made), namespaces) as ours,
    ):
        check_equal(lowest.lines(b"m"), ours.lines(b"m"))
        everybody = {
            "with cgroups: floor, in process": lowest.contestant(b"b"),
            "with cgroups: build(), in process": ours.contestant(b"b"),
            "with cgroups: floor, forked, pivoted": lowest.contestant(b"f"),
            "with cgroups: build() + pivot(), in a child": ours.contestant(b"f"),
        }
        report.add(measure.interleaved(everybody, rounds, warmed=everybody))
    for ours, lowest in (("build(), in process", "floor, in process"),
                         ("build() + pivot(), in a child", "floor, forked, pivoted")):
        ratio = report.ratio(f"with cgroups: {ours}", f"with cgroups: {lowest}")
        report.notes.append(f"with cgroups: {ours}, against the floor: {ratio:.2f}")


def check_equal(left, right):
    """Stop unless two answers of `m` describe the same root."""
    left, right = comparable(left), comparable(right)
    if left != right:
        lines = [f"only the floor:  {line}" for line in sorted(left - right)]
        lines += [f"only sandboxfs:  {line}" for line in sorted(right - left)]
        raise SystemExit("the floor builds something else:\n" + "\n".join(lines))


def comparable(lines):
    """Return the lines without what differs from mount to mount: ids, devices, layers' names."""
    result = set()
    for line in lines:
        text = line.decode()
        if not text.startswith("dev "):
            text = re.sub(r"^\d+ \d+ \d+:\d+ ", "", text)
            text = re.sub(r"(upper|work)dir=[^,]*", r"\1dir=", text)
        result.add(text)
    return result
