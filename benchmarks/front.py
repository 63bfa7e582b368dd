"""The runtime in front of a runtime: what it adds to a container's start, and to all else.

Against a program that does nothing in the runtime's place, against runc with and without it, and
with runc and crun on hosts of 0 and 5,000 mounts.
"""

import statistics
from pathlib import Path
from typing import Any

from benchmarks import bundle, measure, process, view
from benchmarks.build import interpreter
from benchmarks.hook import ALL, PLAIN, _Work
from sandboxfs.kernel import abi
from sandboxfs.runtime import wrap

ROUNDS = 40
COUNTS = (0, 5000)
BARE = process.BARE
TRUE = "/bin/true, as a runtime"
CREATE, STATE = f"create, in front of {TRUE}", f"state, in front of {TRUE}"
FRONT = "runc run, with the runtime in front"


def run(directory: str, rounds: int = ROUNDS) -> Any:
    """Measure; returns a `Report`."""
    report = measure.Report("front", "The runtime in front of a runtime")
    place = Path(directory)
    made = bundle.make(place / "bundle")
    true = written(place, "/bin/true")
    contestants = {
        BARE: measure.Spawned([interpreter(), "-I", "-S", "-c", "pass"]),
        TRUE: measure.Spawned(["/bin/true", "state", "id"]),
        STATE: measure.Spawned([true, "state", "id"]),
        CREATE: measure.Spawned([true, "create", "--bundle", made, "id"]),
    }
    with process.Peers(directory, report) as peers:
        if peers.runc:
            work = _Work(place, peers.runc)
            hooks = work.contestants()
            contestants[PLAIN], contestants[ALL] = hooks[PLAIN], hooks[ALL]
            contestants[FRONT] = measure.Spawned(
                [written(place, peers.runc), "--root", peers.state / "front", "run", "--bundle",
                 made, process.name_of(made)])
        report.add(measure.interleaved(contestants, rounds))
        bare = report.rows[BARE]["median"]
        report.target(f"what create takes more, against {BARE}",
                      added(report, CREATE) / bare, 1.5)
        report.target("what every other command takes more, in ms", added(report, STATE) / 1e6, 1)
        if peers.runc:
            report.target("runc run: what the front adds, against what three hooks add",
                          added(report, FRONT, PLAIN) / added(report, ALL, PLAIN), 1)
        growth(place, peers, report, made, rounds)
    return report


def added(report: Any, name: str, base: str = TRUE) -> float:
    """Return how many nanoseconds more than `base` a contestant takes: the median of rounds."""
    return statistics.median(map(float.__sub__, map(float, report.taken[name]),
                                 map(float, report.taken[base])))


def written(place: Path, runtime: str) -> Path:
    """Write a program in front of `runtime`."""
    from sandboxfs import archive

    archive.write()
    program = place / f"front-{Path(runtime).name}"
    program.write_bytes(wrap.content(runtime))
    program.chmod(0o755)
    return program


def growth(place: Path, peers: Any, report: Any, made: Path, rounds: int) -> None:
    """Report what starts take by the mounts of the host, without and with the front."""
    servers, contestants = [], {}
    try:
        for count in COUNTS:
            for name, options in (("runc", []), ("crun", ["--cgroup-manager=disabled"])):
                runtime = getattr(peers, name)
                if not runtime:
                    continue
                for front in (False, True):
                    program = written(place, runtime) if front else runtime
                    title = f"{name} run{', with the front' if front else ''}, {count} mounts"
                    identity = f"{process.name_of(made)}-{count}-{front:d}"
                    command = [program, "--root", peers.state / name, *options, "run", "--bundle",
                               made, identity]
                    servers.append(measure.Server(
                        process.spawner(command), abi.CLONE_NEWNS, prepared(count)))
                    contestants[title] = servers[-1].contestant(b"r")
        report.add(measure.interleaved(contestants, rounds))
    finally:
        for server in servers:
            server.__exit__()


def prepared(count: int) -> Any:
    """Return what makes a host of so many mounts, where crun starts as well."""
    def prepare() -> None:
        process.unified_cgroups()
        view.mounts(count)

    return prepare
