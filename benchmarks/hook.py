"""The hooks in a container's start: runc with and without them, and the hook process itself.

The process is measured where it works: a hook of runc's createContainer stage spawns it, beside
a bare interpreter in the same place, and leaves the nanoseconds in a file.
"""

import copy
import shutil
from pathlib import Path

from benchmarks import bundle, measure
from benchmarks.build import CHECKOUT, interpreter
from benchmarks.process import launcher, name_of

ROUNDS = 40
ENVIRONMENT = ["PATH=/usr/sbin:/usr/bin"]
STAGES = ("createRuntime", "createContainer", "poststop")
BARE = "python3 -I -S -c pass, as hook"
HOOK = "hook createContainer"
WITH_FILE = "hook createContainer --config FILE"
PLAIN, ONE, ALL = "runc run", "runc run, createContainer", "runc run, all three hooks"


def run(directory, rounds=ROUNDS):
    """Measure; returns a `Report`."""
    report = measure.Report("hook", "The hooks in runc's start of /bin/true")
    runc = shutil.which("runc", path="/usr/sbin:/usr/bin")
    if runc is None:
        report.notes.append("runc is not installed")
        return report
    work = _Work(Path(directory), runc)
    report.add(measure.interleaved(work.contestants(), rounds))
    report.target(f"{HOOK} against {BARE}", report.ratio(HOOK, BARE), 2.5)
    report.target(f"{WITH_FILE} against {BARE}", report.ratio(WITH_FILE, BARE), 3.2)
    plain = report.rows[PLAIN]["median"]
    for name in (ONE, ALL):
        more = report.rows[name]["median"] - plain
        share = more / report.rows[name]["median"]
        report.notes.append(f"{name}: {more / 1e6:.1f} ms more, {share:.0%} of the whole")
    return report


class _Work:
    """The bundles, one a contestant, since each has hooks of its own."""

    def __init__(self, directory, runc):
        self.directory = directory
        self.runc = runc
        self.launcher = str(launcher(directory))
        self.elapsed = directory / "elapsed"
        self.policy = directory / "policy.toml"
        self.policy.write_text('[overlay]\nmode = "tmpfs"\n', encoding="utf-8")

    def contestants(self):
        """Return {name: function}."""
        hook = [self.launcher, "hook"]
        bare = [interpreter(), "-I", "-S", "-c", "pass"]
        create = [*hook, "createContainer"]
        return {
            PLAIN: self.container("plain", {}),
            ONE: self.container("one", {"createContainer": create}),
            ALL: self.container("all", {stage: [*hook, stage] for stage in STAGES}),
            BARE: self.timed("bare", bare),
            HOOK: self.timed("hook", create),
            WITH_FILE: self.timed("file", [*create, "--config", str(self.policy)]),
        }

    def container(self, name, hooks):
        """Return what starts a container with these hooks ({stage: command}), measured whole."""
        made = bundle.make(self.directory / name)
        content = copy.deepcopy(bundle.document())
        content["hooks"] = {
            stage: [{"path": command[0], "args": command, "env": ENVIRONMENT}]
            for stage, command in hooks.items()
        }
        bundle.write(made, content)
        return measure.Spawned(
            [self.runc, "--root", self.directory / "runc", "run", "--bundle", made, name_of(made)]
        )

    def timed(self, name, command):
        """Return what starts a container and tells how long `command` took as its hook."""
        script = str(CHECKOUT / "benchmarks" / "hook_timer.py")
        start = self.container(name, {"createContainer": [
            interpreter(), "-I", "-S", "-B", script, str(self.elapsed), *command,
        ]})

        def once():
            start()
            return int(self.elapsed.read_bytes())

        return once
