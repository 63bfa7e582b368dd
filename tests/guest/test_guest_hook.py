"""The hook, and the runtime in front, on a kernel without detached trees (Linux 6.1)."""

import json
import shutil
import subprocess

import pytest

from tests.guest import guest

pytestmark = [pytest.mark.guest, pytest.mark.needs("guest")]

SCRIPT = r"""
import json, os, shutil, subprocess
from pathlib import Path
from runpy import run_path

# Libraries came under the names of their files: the loader asks for the shorter ones.
for file in Path("/usr/lib").glob("*/*.so.*"):
    stem, _, version = file.name.partition(".so.")
    short = file.with_name(f"{stem}.so.{version.split('.')[0]}")
    if not short.exists():
        short.symlink_to(file.name)

hook = Path("/tmp/hook")
hook.write_text(
    "#!/usr/bin/python3 -ISB\n"
    "import sys; sys.path[:0] = ['/guest/checkout']\n"
    "from sandboxfs.__main__ import main; sys.exit(main())\n")
hook.chmod(0o755)


# What the front starts; the front itself is a program of the host's.
MAIN = ("import sys; sys.path[:0] = ['/guest/checkout']; "
        "from sandboxfs.runtime.main import main; main()")


def bundle(name, readonly, hooks):
    path = Path("/tmp", name)
    root = path / "rootfs"
    for each in ("bin", "dev", "etc", "proc", "sys", "tmp", "run"):
        (root / each).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin/busybox")
    os.symlink("busybox", root / "bin/sh")
    specs = run_path("/guest/checkout/tests/support/specs.py")
    script = ("PATH=/bin; b=busybox; $b touch /x; $b touch /tmp/y; $b stat -c %n /x /tmp/y;"
              "$b cat /proc/self/mountinfo")
    document = specs["default_spec"]("/bin/sh", "-c", script)
    document["root"]["readonly"] = readonly
    document["annotations"] = {
        "dev.sandboxfs.mount.v.source": "mine", "dev.sandboxfs.mount.v.type": "tmpfs",
        "dev.sandboxfs.mount.v.share": "container", "dev.sandboxfs.mount.v.options": "size=64k"}
    document["mounts"] += [
        {"destination": "/v", "type": "tmpfs", "source": "mine", "options": ["noexec"]},
        {"destination": "/v/inner", "type": "tmpfs", "source": "inner"}]
    document["hooks"] = {} if not hooks else {
        stage: [{"path": str(hook), "args": ["sandboxfs", "hook", stage], "env": ["PATH=/bin"]}]
        for stage in ("createRuntime", "createContainer", "poststop")}
    (path / "config.json").write_text(json.dumps(document))
    return path


from sandboxfs.kernel import features
print("DETACHED", features.detached_trees(), flush=True)
before = Path("/proc/self/mountinfo").read_text()
for name, command in RUNTIMES.items():
    front = ["/usr/bin/python3", "-ISBc", MAIN, command[0], name, "", "00", *command[1:]]
    for way, words, marked in (("hooks", command, ""), ("front", front, "\1")):
        for readonly in (False, True):
            path = bundle(f"{name}-{way}-{readonly}", readonly, way == "hooks")
            done = subprocess.run([*words, "run", "-b", str(path), path.name],
                                  env={f"{marked}PATH": "/bin:/usr/bin:/usr/sbin"},
                                  capture_output=True, text=True)
            print("RESULT", json.dumps({
                "name": path.name, "status": done.returncode, "output": done.stdout,
                "errors": done.stderr, "x": (path / "rootfs/x").exists(),
                "log": Path("/run/sandboxfs/hook.log").exists()}), flush=True)
print("SAME", Path("/proc/self/mountinfo").read_text() == before, flush=True)
"""


def libraries(program: str) -> list[str]:
    done = subprocess.run(["ldd", program], capture_output=True, text=True, check=True)
    return [word for word in done.stdout.split() if word.startswith("/")]


def test_runc_and_crun_get_the_root_by_the_engine_that_the_kernel_can_do() -> None:
    found = {name: shutil.which(name, path="/usr/sbin:/usr/bin") for name in ("runc", "crun")}
    programs = {name: path for name, path in found.items() if path}
    assert sorted(programs) == ["crun", "runc"], "tools/setup test installs both"
    runtimes = {
        "runc": [programs["runc"], "--root", "/tmp/state-runc"],
        "crun": [programs["crun"], "--root", "/tmp/state-crun", "--cgroup-manager=disabled"],
    }
    added = [*programs.values(), *libraries(programs["runc"]), *libraries(programs["crun"])]
    outcome = guest.boot(
        {"code": f"RUNTIMES = {runtimes!r}\n{SCRIPT}", "arguments": ["-c"]}, 200,
        list(dict.fromkeys(added)))
    assert outcome.status == 0, outcome.output
    # How the attached engine names its layers, and how the other one does.
    lower = "lowerdir+=/" if "DETACHED True\n" in outcome.output else "lowerdir=/proc/self/fd/"
    results = {}
    for line in outcome.output.splitlines():
        if line.startswith("RESULT "):
            result = json.loads(line.removeprefix("RESULT "))
            results[result["name"]] = result
    assert sorted(results) == [
        f"{name}-{way}-{readonly}" for name in ("crun", "runc") for way in ("front", "hooks")
        for readonly in (False, True)]
    assert "SAME True\n" in outcome.output, "a mount was left on the host"
    for name, result in results.items():
        assert result["status"] == 0, result
        assert not result["x"], "the rootfs was written"
        assert not result["log"], "nothing went wrong"
        rows = [line.split() for line in result["output"].splitlines() if " - " in line]
        table = {row[4]: row for row in rows}
        root = table["/"]
        assert root[root.index("-") + 1] == "overlay"
        assert lower in root[-1]
        sealed = name.endswith("True")
        assert root[5].split(",")[0] == ("ro" if sealed else "rw")
        assert ("/x" in result["output"].split()[:2]) is not sealed
        assert "/tmp/y" in result["output"].split()
        assert set(table["/v"][5].split(",")) >= {"nosuid", "nodev", "noexec"}
        assert "size=64k" in table["/v"][-1]
        assert "inner" in table["/v/inner"]
        assert {"/proc", "/dev", "/dev/pts", "/sys", "/proc/kcore"} <= table.keys()
        assert len(rows) == len({row[4] for row in rows}), "nothing is stacked or left"
