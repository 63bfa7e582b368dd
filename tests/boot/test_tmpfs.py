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
sys.path.insert(0, "/test")
from trees import description, differences, make_tree

sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
PARAMETERS = json.load(open("/test/parameters"))
MOUNTS = (b"dev", b"proc", b"sys", b"run", b"covered")

def command(*arguments, **how):
    return subprocess.run(["/bin/sandboxfs", *arguments], capture_output=True, text=True, **how)

def section(name, *arguments, **how):
    print("==", name)
    done = command(*arguments, **how)
    print(f"status {done.returncode}")
    print(done.stdout + done.stderr, end="")

def look():
    return description("/", MOUNTS)

def compare(name, before):
    print("==", name)
    for line in differences(before, look()):
        print(line)

print("== early mounts", command("early-mounts").returncode)
os.mkdir("/tree")
make_tree("/tree", PARAMETERS["attributes"])
with open("/tree/large", "wb") as file:
    for piece in range(PARAMETERS["large"]):
        file.write(os.urandom(1 << 20))
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
section("witness", *TO_TMPFS, "/bin/echo", "--size", "executed",
        env={**os.environ, "SANDBOXFS_SWITCHED": "1"})
compare("unchanged after refusals", before)

# It fits when it is measured; then somebody else writes.
print("== race")
size = sum(entry["pages"] for entry in {
    str(entry.get("same", name)): entry for name, entry in before.items() if "pages" in entry
}.values()) * 4096
race = subprocess.Popen(["/bin/sandboxfs", *TO_TMPFS, "--size", str(size + (2 << 20)),
                         "/test/second"], stderr=subprocess.PIPE, text=True)
while not any(name.startswith(".sandboxfs-root") for name in os.listdir("/")):
    time.sleep(0.001)
with open("/late", "wb") as late:
    late.write(os.urandom(5 << 20))
print(race.communicate()[1], "status", race.returncode)
print(len(open("/late", "rb").read()))
os.unlink("/late")
os.utime("/", ns=(0, before[b""]["mtime"]))
compare("unchanged after a race", before)
print("== mounts unchanged", open("/proc/self/mountinfo").read() == table)

# A child that looks at the memory all the time, and tells on the console's pipe.
reader, writer = os.pipe()
os.set_inheritable(reader, True)

# In an initramfs there is nothing that could be dropped: what is free tells it.
meminfo = os.open("/proc/meminfo", os.O_RDONLY)
free = int(os.pread(meminfo, 4096, 0).split(b"MemFree:")[1].split()[0]) * 1024
if os.fork() == 0:
    os.close(reader)
    os.chdir("/proc")
    least = free
    count = 0
    while True:
        text = os.pread(meminfo, 4096, 0)
        least = min(least, int(text.split(b"MemFree:")[1].split()[0]) * 1024)
        count += 1
        if os.path.exists("self/../../run/stop"):
            break
        time.sleep(0.01)
    os.write(writer, json.dumps({"free": free, "least": least, "samples": count}).encode())
    os._exit(0)
os.close(writer)
with open("/run/reader", "w") as file:
    file.write(str(reader))
print("== switching")
environment = {**os.environ, "STARTED": str(time.monotonic())}
os.execve("/bin/sandboxfs", ["sandboxfs", "switch-root", "--to-tmpfs", "/test/second", "one",
                             "--size"], environment)
"""

SECOND = """#!/usr/bin/python3 -IB
import json, os, pickle, subprocess, sys, time
took = time.monotonic() - float(os.environ["STARTED"])
sys.path.insert(0, "/test")
from trees import description, differences

sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
open("/run/stop", "w").close()
reader = int(open("/run/reader").read())
peak = json.loads(os.read(reader, 4096))
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
status = os.statvfs("/")
peak["tree"] = (status.f_blocks - status.f_bfree) * status.f_frsize
peak["seconds"] = took
print("== memory")
print(json.dumps(peak))
print("== pivot", subprocess.run(["/bin/sh", "-c",
    "mkdir /new && mount -t tmpfs new /new && mkdir /new/old && unshare -m /bin/sh -c "
    "'cd /new && pivot_root . old && ls old/test'"],
    capture_output=True, text=True).stdout.split())
print("== end")
os.execv("/bin/poweroff", ["poweroff", "-f"])
"""


def booted(attributes, **how):
    parameters = {"attributes": attributes, "large": 24}
    files = {
        "/test/trees.py": TREES, "/test/second": SECOND, "/test/parameters": json.dumps(parameters),
    }
    outcome = machine.boot(FIRST, files, memory=768, timeout=SECONDS, **how)
    assert "end" in outcome.sections, outcome.output[-6000:]
    return outcome.sections


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
    "no size": "--size: many: a size is a number of bytes, .*",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_says_why(case, machines):
    status = 2 if case == "no size" else 125
    assert re.fullmatch(f"status {status}\nsandboxfs: {REFUSALS[case]}\n", machines[case])


def test_a_refusal_changes_nothing(machines):
    assert machines["unchanged after refusals"] == ""
    assert rest(machines, "mounts unchanged") == "True"


def test_with_the_witness_only_init_is_executed(machines):
    assert machines["witness"].startswith("status 0\n--size executed\n")


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


def test_the_memory_in_use_peaks_near_one_copy(machines, record_property):
    memory = json.loads(machines["memory"])
    above = memory["free"] - memory["least"]
    record_property("tree", memory["tree"])
    record_property("peak", memory["tree"] + above)
    print(f"tree {memory['tree'] >> 20} MiB, peak {memory['tree'] + above >> 20} MiB, "
          f"{memory['samples']} samples in {memory['seconds']:.1f} s")
    assert memory["samples"] > 20
    # The pieces on their way, and the interpreter with its libraries, which is in use.
    assert above < 0.3 * memory["tree"]
    assert memory["tree"] > 64 << 20


def test_pivot_root_works_afterwards(machines):
    assert rest(machines, "pivot") == "['parameters', 'second', 'trees.py']"


def test_a_race_that_runs_out_of_space_loses_nothing(machines):
    told = machines["race"]
    assert "ENOSPC: the files take " in told
    assert "there came more meanwhile, and all is back in its place" in told
    assert f"status 125\n{5 << 20}\n" in told
    assert machines["unchanged after a race"] == ""
