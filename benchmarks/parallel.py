"""Several builders at once: how many containers a second, with 1, 2, 4 and 8 of them."""

import threading
import time
from pathlib import Path

import sandboxfs
from benchmarks import bundle, measure, process
from sandboxfs.harness import client

SECONDS = 2.0
BUILDERS = (1, 2, 4, 8)


def run(directory, rounds=1, builders=BUILDERS):
    """Measure; returns a `Report` without targets."""
    report = measure.Report("parallel", "Builders at once: /bin/true in a busybox bundle")
    made = bundle.make(Path(directory) / "bundle")
    spawned = process.sandboxfs_run(directory, made)
    try:
        with sandboxfs.Sandbox(made) as box:
            ways = {"Sandbox.run": lambda: box.run(["/bin/true"], check=True),
                    "sandboxfs run": spawned}
            for name, work in ways.items():
                for count in builders:
                    measure.progress(f"{name}, {count} builders")
                    rates = [throughput(work, count) for _round in range(rounds)]
                    report.values[f"{name}, {count} builders"] = {
                        "per second": round(max(rates), 1)}
    finally:
        measure.progress("")
        client.stop()
    return report


def throughput(work, builders):
    """Return how many times a second `work()` is done by so many threads."""
    done = [0] * builders
    end = time.perf_counter() + SECONDS

    def build(number):
        while time.perf_counter() < end:
            work()
            done[number] += 1

    threads = [threading.Thread(target=build, args=(number,)) for number in range(builders)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - started)
