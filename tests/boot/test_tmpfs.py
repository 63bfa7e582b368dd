"""``switch-root --to-tmpfs``: a machine that takes its initramfs along."""

import json
import re
from pathlib import Path

import pytest

from tests.boot import machine

pytestmark = [pytest.mark.boot, pytest.mark.needs("guest")]

# Some 20 where nothing else runs.
SECONDS = 150
TREES = Path(__file__).with_name("trees.py").read_text("utf-8")

# Fills the initramfs, fails in all ways there are, then goes.  What is compared is written to
# the serial console as one digest a file system, and kept for the comparison afterwards.
FIRST = """#!/usr/bin/python3 -IB
import json, os, pickle, subprocess, sys, time
sys.path[:0] = ["/test", "/sandboxfs"]
from sandboxfs.__main__ import main
from sandboxfs.boot import switch, tmpfs
from sandboxfs.cli import main as _commands, switch_root
from sandboxfs.errors import BootError
from trees import description, differences, make_tree

sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
PARAMETERS = json.load(open("/test/parameters"))
MOUNTS = (b"dev", b"proc", b"sys", b"run", b"covered")

def run(arguments, environment=()):
    # Under emulation starting an interpreter takes a second: the command runs in a fork.
    sys.stdout.flush()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        os.environ.update(environment)
        sys.stderr = open(2, "w", closefd=False)
        status = main(list(arguments))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    os.close(writer)
    return child, open(reader, errors="backslashreplace")

def section(name, *arguments, environment=()):
    print("==", name)
    child, output = run(arguments, environment)
    with output:
        text = output.read()
    print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(text, end="")

def look():
    return description("/", MOUNTS)

def compare(name, before):
    print("==", name)
    for line in differences(before, look()):
        print(line)

print("== early mounts", main(["early-mounts"]))
os.mkdir("/tree")
make_tree("/tree", PARAMETERS["attributes"])
os.mkdir("/covered")
with open("/covered/below", "w") as file:
    file.write("below")
subprocess.run(["/bin/sh", "-c", "mount -t tmpfs covered /covered"], check=True)
with open("/covered/above", "w") as file:
    file.write("above")
open("/tree/a/sparse", "rb").read()  # on a ramfs, reading fills holes
before = look()
table = open("/proc/self/mountinfo").read()
with open("/run/before", "wb") as file:
    pickle.dump(before, file)

TO_TMPFS = ("switch-root", "--to-tmpfs", "--force")
section("not process 1", "switch-root", "--to-tmpfs", "/test/second")
section("no init", *TO_TMPFS, "/test/missing")
section("no program", *TO_TMPFS, "/test/parameters")
section("too small", *TO_TMPFS, "--size", "20M", "/test/second")
section("no size", *TO_TMPFS, "--size", "many", "/test/second")
os.mkdir("/shown")
subprocess.run(["/bin/sh", "-c", "mount --bind /test /shown"], check=True)
section("shown elsewhere", *TO_TMPFS, "/test/second")
subprocess.run(["/bin/sh", "-c", "umount /shown && rmdir /shown"], check=True)
section("on a mount", *TO_TMPFS, "/covered/above")
os.utime("/", ns=(0, before[b""]["mtime"]))
print("== switch fails")
failing = os.fork()
if failing == 0:
    # All is moved by then.
    def enter(stage, *arguments, **options):
        print(sorted(os.listdir("/")) == [stage[1:], "covered", "dev", "proc", "sys"]
              or os.listdir("/"), os.path.exists(stage + "/tree/a/long"))
        raise BootError("", "enter", "", "can't")

    switch.enter = enter
    try:
        tmpfs.to_tmpfs("/test/second", force=True)
    except BootError as error:
        print(error)
    sys.stdout.flush()
    os._exit(0)
os.waitpid(failing, 0)
section("witness", *TO_TMPFS, "/bin/echo", "--size", "executed",
        environment={"SANDBOXFS_SWITCHED": "1"})
compare("unchanged after refusals", before)

# It fits when it is measured; then somebody else writes.
print("== race")
size = sum(entry["pages"] for entry in {
    str(entry.get("same", name)): entry for name, entry in before.items() if "pages" in entry
}.values()) * 4096
race, output = run([*TO_TMPFS, "--size", str(size + (2 << 20)), "/test/second"])
while not any(name.startswith(".sandboxfs-root") for name in os.listdir("/")):
    time.sleep(0.001)
with open("/late", "wb") as late:
    late.write(os.urandom(5 << 20))
print(output.read(), "status", os.waitstatus_to_exitcode(os.waitpid(race, 0)[1]))
print(len(open("/late", "rb").read()))
os.unlink("/late")
os.utime("/", ns=(0, before[b""]["mtime"]))
compare("unchanged after a race", before)
print("== mounts unchanged", open("/proc/self/mountinfo").read() == table)

print("== switching")
os.execv("/bin/sandboxfs", ["sandboxfs", "switch-root", "--to-tmpfs", "/test/second", "one",
                            "--size"])
"""

SECOND = """#!/usr/bin/python3 -IB
import json, os, pickle, subprocess, sys, time
sys.path.insert(0, "/test")
from trees import description, differences

sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
print("== arguments", sys.argv[1:], os.getpid(), os.environ["SANDBOXFS_SWITCHED"])
print("== differences")
with open("/run/before", "rb") as file:
    before = pickle.load(file)
for line in differences(before, description("/", (b"dev", b"proc", b"sys", b"run", b"covered"))):
    print(line)
print("== mounts")
print(open("/proc/self/mountinfo").read(), end="")
print("== covered", os.listdir("/covered"))
subprocess.run(["/bin/sh", "-c", "umount /covered"], check=True)
print("== below", os.listdir("/covered"))
print("== pivot", subprocess.run(["/bin/sh", "-c",
    "mkdir /new && mount -t tmpfs new /new && mkdir /new/old && unshare -m /bin/sh -c "
    "'cd /new && pivot_root . old && ls old/test'"],
    capture_output=True, text=True).stdout.split())
print("== end")
os.execv("/bin/poweroff", ["poweroff", "-f"])
"""


def booted(attributes, **how):
    parameters = {"attributes": attributes}
    files = {
        "/test/trees.py": TREES, "/test/second": SECOND, "/test/parameters": json.dumps(parameters),
    }
    outcome = machine.boot(FIRST, files, memory=768, timeout=SECONDS, **how)
    assert "end" in outcome.sections, outcome.output[-6000:]
    return outcome.sections


# As Metropolis did it: process 1 itself, with nothing mounted, executes itself again.
BARE = """#!/bin/sh
if [ -z "$SANDBOXFS_SWITCHED" ]; then
    echo == bare $(ls /proc) $(ls /dev)
    exec sandboxfs switch-root --to-tmpfs /init again
fi
echo "== process $$ $1"
ls -l /bin/busybox
mount -t proc proc /proc
echo "== mounts"
cat /proc/self/mountinfo
echo "== end"
poweroff -f
"""


def test_a_bare_initramfs_executes_itself_again_from_a_tmpfs():
    outcome = machine.boot(BARE, timeout=SECONDS)
    assert rest(outcome.sections, "bare") == "console urandom"
    assert rest(outcome.sections, "process") == "1 again"
    assert " / / rw,relatime - tmpfs root " in outcome.sections["mounts"]
    assert "end" in outcome.sections


# Fills half of the memory, most of it with one file, and has somebody look at it all the time.
LARGE = """#!/usr/bin/python3 -IB
import fcntl, json, os, time

reader, writer = os.pipe()
os.set_inheritable(reader, True)
with open("/large", "wb") as file:
    for piece in range(PIECES):
        file.write(bytes([piece + 1]) * (1 << 20))
    print("== leases")
    try:
        print(not fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK))
    except OSError as error:
        print(error)
os.mkdir("/links")
for number in range(20):
    with open(f"/links/{number}", "wb") as file:
        file.write(os.urandom(1 << 20))
    os.mkdir(f"/links/{number}.d")
    os.link(f"/links/{number}", f"/links/{number}.d/again")
os.system("mount -t proc proc /proc")
# In an initramfs there is nothing that could be dropped: what is free tells it.
meminfo = os.open("/proc/meminfo", os.O_RDONLY)
def free():
    return int(os.pread(meminfo, 4096, 0).split(b"MemFree:")[1].split()[0]) * 1024
stopped, stop = os.pipe()
os.set_inheritable(stop, True)
if os.fork() == 0:
    os.close(stop)
    os.set_blocking(stopped, False)
    before = least = free()
    samples = 0
    while True:
        least = min(least, free())
        samples += 1
        time.sleep(0.005)
        try:
            os.read(stopped, 1)
            break
        except BlockingIOError:
            pass
    os.write(writer, json.dumps({"peak": before - least, "samples": samples}).encode())
    os._exit(0)
os.close(stopped)
print("== switching", flush=True)
started = str(time.monotonic())
os.execv("/bin/sandboxfs", ["sandboxfs", "switch-root", "--to-tmpfs", "--size", "90%", "/second",
                            str(reader), str(stop), started])
"""

LARGE_SECOND = """#!/usr/bin/python3 -IB
import json, os, sys, time
reader, stop, started = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
took = time.monotonic() - started
os.close(stop)
told = json.loads(os.read(reader, 4096))
status = os.statvfs("/")
told["tree"] = (status.f_blocks - status.f_bfree) * status.f_frsize
told["seconds"] = took
print("== memory")
print(json.dumps(told))
print("== content")
with open("/large", "rb") as file:
    print(all(file.read(1 << 20) == bytes([piece + 1]) * (1 << 20) for piece in range(PIECES)),
          file.read() == b"", os.stat("/links/7.d/again").st_nlink)
print("== end", flush=True)
os.execv("/bin/poweroff", ["poweroff", "-f"])
"""


@pytest.mark.parametrize("type", ["tmpfs", "ramfs"])
def test_the_memory_in_use_peaks_near_one_copy(type, record_property):
    """On a ramfs, more than half of the memory is taken: there is no room for two trees."""
    pieces, memory, line = (110, 460, "") if type == "tmpfs" else (170, 400, "rootfstype=ramfs")
    first, second = (
        text.replace("PIECES", str(pieces)) for text in (LARGE, LARGE_SECOND)
    )
    outcome = machine.boot(
        first, {"/second": second}, timeout=SECONDS, memory=memory, command_line=line
    )
    if type == "ramfs" and outcome.sections["leases"] != "True\n":
        # Nothing tells whether somebody uses a file, so none gives its pages back while it moves.
        assert ": ENOMEM: moving " in outcome.sections["switching"]
        assert "nothing was moved\n" in outcome.sections["switching"]
        return
    assert "end" in outcome.sections, outcome.output[-3000:]
    assert outcome.sections["content"] == "True True 2\n"
    told = json.loads(outcome.sections["memory"])
    for name, value in told.items():
        record_property(name, value)
    print(f"tree {told['tree'] >> 20} MiB, {told['peak'] / (1 << 20):.1f} MiB above it at the peak "
          f"({told['samples']} samples), moved in {told['seconds']:.1f} s, "
          f"boot {outcome.seconds:.1f} s")
    assert told["samples"] > 20
    # Two pieces on their way, and the interpreter with its libraries, which is in use.
    assert told["peak"] < 30 << 20
    assert told["tree"] > 150 << 20


def rest(sections, start):
    """Return what stands behind the one section line that begins so."""
    found = [name for name in sections if name.startswith(start)]
    assert len(found) == 1, f"{start!r}: {found} of {list(sections)}"
    return found[0].removeprefix(start).strip()


# By default the kernel makes the initramfs a tmpfs; with root= or rootfstype= a ramfs.
@pytest.fixture(scope="module", params=["tmpfs", "ramfs"])
def machines(request):
    """Return the sections of a machine that went from its initramfs, of a kind, to a tmpfs."""
    if request.param == "tmpfs":
        return booted(True)
    return booted(False, command_line="rootfstype=ramfs")


REFUSALS = {
    "not process 1": r"switch-root: not process 1, but \d+: INIT would be no init\n  hint: .*",
    "no init": "INIT: find /test/missing: ENOENT: No such file or directory",
    "no program": "INIT: find /test/parameters: EACCES: not executable\n  hint: .*",
    "too small": r"--size: switch-root --to-tmpfs: ENOSPC: the files take \d{8,9} bytes "
    r"\(\d+\.\d MiB\), and the tmpfs may hold 20971520; nothing was moved\n"
    r"  hint: --size \d+M, or more .*",
    "shown elsewhere": "switch-root /: files of the initramfs are shown by other mounts too: "
    "/shown\n  hint: .*",
    "on a mount": "INIT: find /covered/above: ENOENT: No such file or directory",
    "no size": "--size: many: a size is a number of bytes, .*",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_says_why(case, machines):
    status = 2 if case == "no size" else 125
    assert re.fullmatch(f"status {status}\nsandboxfs: {REFUSALS[case]}\n", machines[case])


def test_a_refusal_changes_nothing(machines):
    assert machines["unchanged after refusals"] == ""
    assert rest(machines, "mounts unchanged") == "True"


def test_if_the_switch_itself_fails_the_files_come_back(machines):
    """`unchanged after refusals` has seen that they are what they were."""
    assert re.search(r"\nTrue True\nenter: can't\n$", machines["switch fails"])


def test_with_the_witness_only_init_is_executed(machines):
    assert machines["witness"].startswith("status 0\n")
    assert machines["witness"].endswith("now /bin/echo\n--size executed\n")


def test_every_file_is_there_afterwards_as_it_was(machines):
    assert machines["differences"] == ""
    assert rest(machines, "arguments") == "['one', '--size'] 1 1"


def test_the_root_is_a_tmpfs_and_all_mounts_came_along(machines):
    table = {line.split()[4]: line for line in machines["mounts"].splitlines()}
    assert sorted(table) == [
        "/", "/covered", "/dev", "/dev/pts", "/proc", "/sys", "/sys/fs/cgroup",
    ]
    assert " - tmpfs root rw" in table["/"]


def test_what_a_mount_covers_came_along_under_it(machines):
    assert rest(machines, "covered") == "['above']"
    assert rest(machines, "below") == "['below']"


def test_there_is_a_progress_bar_on_the_console(machines):
    shown = machines["switching"]
    assert re.search(r"\rmoving to a tmpfs: \d+\.\d of \d+\.\d MiB, +\d+% \[#* *\]", shown)
    assert re.search(r" 100% \[#+\]", shown) or re.search(r" 9\d% \[#+ *\]", shown)
    assert "warning" not in shown


def test_pivot_root_works_afterwards(machines):
    assert rest(machines, "pivot") == "['parameters', 'second', 'trees.py']"


def test_a_race_that_runs_out_of_space_loses_nothing(machines):
    told = machines["race"]
    assert "ENOSPC: the files take " in told
    assert "there came more meanwhile, and all is back in its place" in told
    assert f"status 125\n{5 << 20}\n" in told
    assert machines["unchanged after a race"] == ""
