"""Interleaved measurement: every contestant once a round, so that what slows one slows all.

A contestant is anything with `once()` that returns nanoseconds.  Those that have to live in
another process (other namespaces, no heap of ours to copy at fork) are a `Server`: one byte in,
one line with the nanoseconds out.
"""

import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time

from sandboxfs.kernel import abi, syscalls

PRIVATE = abi.CLONE_NEWNS | abi.CLONE_NEWNET | abi.CLONE_NEWIPC | abi.CLONE_NEWUTS
WARM_UP_ROUNDS = 3
SETTLE_SECONDS = 0.003


class Failed(Exception):
    """A contestant didn't do its work; what it wrote to stderr says why."""


class Server:
    """A child process that measures itself on request."""

    def __init__(self, command, namespaces=PRIVATE, prepare=None, environment=None):
        """Start `command`, in new namespaces (CLONE_NEW* flags) where `prepare()` was run."""

        def enter():
            # A build of a thousand mounts holds more descriptors than the usual soft limit.
            most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
            if namespaces:
                enter_private(namespaces)
            if prepare:
                prepare()

        self.command = command
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
            preexec_fn=enter,  # noqa: PLW1509  # the benches have no threads
        )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def ask(self, byte):
        """Send a command; return the line it is answered with (bytes)."""
        self.process.stdin.write(byte)
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"{self.command[0]} ended with {self.process.wait()}")
        return line

    def lines(self, byte):
        """Send a command; return the lines of its answer, up to a lone full stop."""
        lines = [self.ask(byte)]
        while lines[-1] != b".\n":
            line = self.process.stdout.readline()
            if not line:
                raise Failed(f"{self.command[0]} ended with {self.process.wait()}")
            lines.append(line)
        return [line.rstrip(b"\n") for line in lines[:-1]]

    def contestant(self, byte):
        """Return a function that has the server measure `byte` once."""
        return lambda: int(self.ask(byte))


class Spawned:
    """A program whose whole run is measured, from posix_spawn(3) to its end."""

    def __init__(self, command, environment=None, quiet=True):
        self.command = [os.fspath(word) for word in command]
        self.environment = environment or {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        self.actions = [(os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0)]
        if quiet:
            self.actions.append((os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0))

    def __call__(self):
        started = time.perf_counter_ns()
        child = os.posix_spawn(
            self.command[0], self.command, self.environment, file_actions=self.actions
        )
        _, status = os.waitpid(child, 0)
        elapsed = time.perf_counter_ns() - started
        if status:
            raise Failed(f"{' '.join(self.command)}: wait status {status:#x}")
        return elapsed


def enter_private(namespaces):
    """Move this process into new namespaces, nothing it mounts reaching the old ones."""
    syscalls.unshare(namespaces)
    if namespaces & abi.CLONE_NEWNS:
        root = os.open("/", abi.O_PATH | os.O_CLOEXEC)
        syscalls.mount_setattr(root, propagation=abi.MS_PRIVATE, recursive=True)
        os.close(root)


def interleaved(contestants, rounds, warm_up=WARM_UP_ROUNDS, warmed=(), pause=SETTLE_SECONDS):
    """Return {name: list of nanoseconds}, each contestant measured once in every round.

    contestants: dict from name to a function that returns nanoseconds.  The order within a
    round is shuffled, so that nobody always follows the same one, and each gets a pause first:
    the kernel takes trees of mounts down after whoever dropped them has gone on.
    pause: seconds before each, for those who prepare the next one behind.
    warmed: names of those that go once untimed right before, so that what is measured is work and
    not how cold the pause and the others have left the processor's caches.
    """
    names = list(contestants)
    taken = {name: [] for name in names}
    order = random.Random(1)
    for number in range(-warm_up, rounds):
        progress(f"round {max(number, 0) + 1} of {rounds}, {len(names)} contestants")
        order.shuffle(names)
        for name in names:
            time.sleep(pause)
            if name in warmed:
                contestants[name]()
            elapsed = contestants[name]()
            if number >= 0:
                taken[name].append(elapsed)
    progress("")
    return taken


def progress(text):
    """Show where a bench is, in one line of a terminal; nothing where stderr is no terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def summary(taken):
    """Return {name: {"median", "lower", "upper", "fastest"}} in nanoseconds."""
    result = {}
    for name, values in taken.items():
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        result[name] = {
            "median": median, "lower": lower, "upper": upper, "fastest": min(values),
            "rounds": len(values),
        }
    return result


class Report:
    """The results of one bench: `rows` of times, `targets` to be met, `notes` in words."""

    def __init__(self, name, title):
        self.name = name
        self.title = title
        self.rows = {}
        self.taken = {}
        self.values = {}
        self.targets = []
        self.notes = []

    def add(self, taken):
        """Add what `interleaved` returned."""
        self.taken.update(taken)
        self.rows.update(summary(taken))

    def ratio(self, name, base):
        """Return how many times `base` `name` takes: the median of what each round says.

        A machine may have two speeds, and change between them every few seconds.  The median of
        some rounds is one of the two then, by chance, and so is their quotient; in one round both
        mostly had the same.  Without common rounds: the quotient of the medians.
        """
        times, bases = self.taken[name], self.taken[base]
        if len(times) != len(bases):
            return self.rows[name]["median"] / self.rows[base]["median"]
        return statistics.median(map(float.__truediv__, map(float, times), map(float, bases)))

    def target(self, text, value, at_most):
        """Note a ratio that should be at most so much."""
        self.targets.append({"target": text, "value": value, "at_most": at_most,
                             "met": value <= at_most})

    def to_json(self):
        """Return everything as plain data."""
        return {"name": self.name, "title": self.title, "times_ns": self.rows,
                "values": self.values, "targets": self.targets, "notes": self.notes}

    def table(self):
        """Return the report as text."""
        width = max((len(name) for name in self.rows), default=0) + 2
        lines = [f"{self.title}", ""]
        if self.rows:
            lines.append(f"  {'':{width}}{'fastest':>10}{'median':>12}{'quartiles':>26}")
        for name, row in self.rows.items():
            quartiles = f"{shown(row['lower'])} … {shown(row['upper'])}"
            fastest, median = shown(row["fastest"]), shown(row["median"])
            lines.append(f"  {name:{width}}{fastest:>10}{median:>12}{quartiles:>26}")
        longest = max((len(name) for name in self.values), default=0) + 2
        for name, values in self.values.items():
            shown_values = ", ".join(f"{value:,} {unit}" for unit, value in values.items())
            lines.append(f"  {name:{longest}}{shown_values:>20}")
        if self.targets:
            lines.append("")
        for entry in self.targets:
            word = "met" if entry["met"] else "MISSED"
            numbers = f"{entry['value']:.2f} (at most {entry['at_most']})"
            lines.append(f"  {entry['target']}: {numbers} {word}")
        lines += ["", *(f"  {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines) + "\n"


def shown(nanoseconds):
    """Return a time as people read it."""
    if nanoseconds < 1_000_000:
        return f"{nanoseconds / 1000:.0f} µs"
    return f"{nanoseconds / 1e6:.2f} ms"


def machine():
    """Return what the results were measured on."""
    return {
        "kernel": os.uname().release.partition("-")[0], "cpus": os.cpu_count(),
        "python": sys.version.split()[0], "load": os.getloadavg()[0],
    }


def write_json(path, reports):
    """Write all reports to a file."""
    content = {"machine": machine(), "reports": [report.to_json() for report in reports]}
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
