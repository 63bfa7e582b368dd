"""Every system call of a build fails or is the last: an error of one line, and nothing is left."""

import os
import subprocess
import sys

import pytest

from tests.attacks import inject
from tests.attacks.tools import ENGINES, bind_mount
from tests.support import CHECKOUT, LAUNCHER, leaks, minimal_spec, reap_orphans, run, untouched

pytestmark = pytest.mark.needs("root", "overlay", "busybox", "strace")

# Of some 700 to 1,000 each.
RUNS = int(os.environ.get("SANDBOXFS_FAULT_RUNS", "110"))


@pytest.fixture
def made(bundle, public_path):
    source = public_path / "source"
    source.mkdir()
    (source / "file").write_text("kept")

    def change(document):
        document["root"]["readonly"] = True
        document["mounts"] += [
            bind_mount(source, "/sealed", "ro"),
            {"destination": "/sealed/inner/new", "type": "tmpfs", "source": "tmpfs"},
            bind_mount(source / "file", "/etc/new/file"),
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
        ]
        document["linux"]["namespaces"].append({"type": "cgroup"})
        document["process"]["cwd"] = "/made"
        document["process"]["args"] = ["/bin/cat", "/proc/self/mountinfo"]

    return bundle(change, mountpoints=False)


def table(text: str) -> set[tuple[str, str, str]]:
    """Return (mountpoint, flags, type) of each line of mountinfo."""
    lines = [line.split() for line in text.splitlines()]
    return {(words[4], words[5], words[words.index("-") + 1]) for words in lines}


def wrong(fault, done, good) -> str | None:
    """Return what a run with a fault should not have done, or None."""
    words = f"{fault}: {done.returncode} {done.stderr!r}"
    if fault.kind == inject.KILL:
        # Of a helper's death its parent lives to tell.
        told = done.returncode == 125 and done.stderr.count("\n") == 1 and "died" in done.stderr
        return None if done.returncode in (137, -9) or told else words
    if done.returncode == 0:
        # There may be another way, if it leads to the same.
        extra = table(done.stdout) ^ table(good)
        nodes = {each for each in extra if each[0].startswith("/dev/")}
        return None if extra == (nodes if fault.call == "mknodat" else set()) else words
    lines = done.stderr.splitlines()
    # The last prlimit gives our caller's limit back, when the payload has spoken.
    silent = not done.stdout or fault.call == "prlimit64"
    fine = (
        silent and done.returncode in (125, 126) and lines and lines[0].startswith("sandboxfs: ")
        and len(lines) <= 2 and all(line.startswith("  hint: ") for line in lines[1:])
        and fault.kind in lines[0] and "internal error" not in done.stderr
    )
    return None if fine else words


def try_all(command, tmp_path, capsys, count):
    most = inject.occurrences(command, tmp_path)
    with capsys.disabled():
        print()
        chosen = inject.sample(inject.faults(most), count)
    assert {"fsopen", "move_mount", "openat2", "pivot_root"} <= most.keys()
    good = inject.run_with(inject.Fault("pivot_root", 99, "EIO"), command)
    assert good.returncode == 0, good.stderr
    before = leaks.state()
    found = []
    for fault in chosen:
        done = inject.run_with(fault, command)
        reap_orphans()
        found += [f"{fault}: {line}" for line in leaks.differences(before)]
        found += filter(None, [wrong(fault, done, good.stdout)])
    assert found == []


@pytest.mark.parametrize("engine", ENGINES)
def test_faults_of_a_run(made, public_path, tmp_path, capsys, engine):
    command = [LAUNCHER, "run", "--bundle", made, "--engine", engine]
    with untouched(made.path, public_path / "source"):
        try_all(command, tmp_path, capsys, RUNS)


@pytest.mark.parametrize("engine", ENGINES)
def test_faults_of_a_build(made, public_path, tmp_path, capsys, monkeypatch, engine):
    monkeypatch.setitem(inject.ENVIRONMENT, "PYTHONPATH", str(CHECKOUT))
    command = [sys.executable, "-B", "-m", "tests.attacks.build_once", made, engine]
    with untouched(made.path, public_path / "source"):
        try_all(command, tmp_path, capsys, RUNS)


def test_faults_with_an_upper_on_disk(made, public_path, tmp_path, capsys):
    """What was made on the host is removed, unless we are killed."""
    upper = public_path / "uppers"
    upper.mkdir()
    command = [LAUNCHER, "run", "--bundle", made, "--overlay", f"dir={upper}"]
    most = inject.occurrences(command, tmp_path)
    with capsys.disabled():
        print()
        chosen = inject.sample(inject.faults(most, inject.ERRORS), RUNS // 2)
    found = []
    for fault in chosen:
        done = inject.run_with(fault, command)
        left = os.listdir(upper)
        if left and fault.call not in ("unlinkat", "openat2"):
            found.append(f"{fault}: {done.returncode} {done.stderr!r} left {left}")
        for name in left:
            subprocess.run(["rm", "-rf", upper / name], check=True)
    assert found == []


@pytest.mark.parametrize("engine", ENGINES)
def test_faults_with_a_user_namespace(made, public_path, tmp_path, capsys, engine):
    """Four processes: each may be the one that fails or is killed."""
    made.document["linux"]["namespaces"].append({"type": "user"})
    made.write(made.document)
    command = [LAUNCHER, "run", "--bundle", made, "--engine", engine]
    with untouched(made.path, public_path / "source"):
        try_all(command, tmp_path, capsys, RUNS // 2)


def test_the_injector_injects(made, tmp_path):
    """The control: a fault that is asked for does happen, and a kill does kill."""
    command = [LAUNCHER, "run", "--bundle", made]
    done = inject.run_with(inject.Fault("pivot_root", 1, "EIO"), command)
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith("sandboxfs: pivot: pivot_root /: EIO: ")
    done = inject.run_with(inject.Fault("pivot_root", 1, inject.KILL), command)
    assert (done.returncode, done.stdout) == (137, "")
    done = inject.run_with(inject.Fault("pivot_root", 2, "EIO"), command)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_no_operation_of_the_plan_asked_for_is_worded_too(bundle):
    made = bundle(minimal_spec())
    done = run("strace", "-f", "-o", os.devnull, "-e", "inject=pipe2:error=EPERM",
               LAUNCHER, "run", "--bundle", made.path, check=125)
    assert done.stderr.splitlines()[-1] == "sandboxfs: run: start: EPERM: Operation not permitted"
