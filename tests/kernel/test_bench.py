"""The benchmarks run, and say what they found."""

import json
import sys

import pytest

from tests.support import CHECKOUT, reap_orphans, run, run_cli


@pytest.mark.needs("root", "overlay", "busybox")
def test_a_bench_writes_its_times_and_targets(tmp_path):
    done = run(sys.executable, "-m", "benchmarks", "warm", "--rounds", "2", "--json",
               tmp_path / "out", cwd=CHECKOUT, timeout=120, check=0)
    reap_orphans()  # bwrap's own, in a pid namespace that ends later
    (report,) = json.loads((tmp_path / "out").read_text("utf-8"))["reports"]
    assert report["name"] == "warm"
    assert {"Sandbox.run", "Pool.run"} <= set(report["times_ns"])
    assert all(entry["met"] == (entry["value"] <= entry["at_most"])
               for entry in report["targets"])
    assert "a root of a pool and /bin/true against spawning /bin/true" in done.stdout


@pytest.mark.needs("launcher")
def test_bench_passes_its_words_on():
    done = run_cli("bench", "nonsense", check=2)
    assert "unknown bench nonsense" in done.stderr


def test_a_picture_is_drawn(tmp_path):
    """Where matplotlib is there; without it one line says what to install."""
    code = f"""
from benchmarks import measure, plot
report = measure.Report("one", "Title")
report.add({{"sandboxfs run": [1e6, 2e6, 3e6], "bwrap": [2e6, 3e6, 4e6]}})
plot.draw({str(tmp_path / "picture.svg")!r}, [report])
"""
    done = run(sys.executable, "-c", code, cwd=CHECKOUT)
    if done.returncode:
        assert "--plot needs matplotlib: pip install sandboxfs[bench]" in done.stderr
    else:
        assert "<svg" in (tmp_path / "picture.svg").read_text("utf-8")
