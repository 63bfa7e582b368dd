"""Runs inside a machine, as its process 1: command lines that must be refused.

Each is run in this process by the program's own entry; after it the mount table, the number of
files and blocks of the root and what else is cheap to tell are compared with what was there before;
after the last one every file is.  Reads its cases from /attempts, a JSON list of
[name, words, how]; how: ``""``, ``"child"`` (not process 1), ``"user"`` (uid 1000),
``"chroot PATH"``, ``"after COMMAND"`` (run first).  What it prints is parsed by `machine.Outcome`.

Arguments: a word that is added to the names, or ``""``, and the command line that it becomes
in the end.
"""

import json
import os
import sys

sys.path[:0] = ["/sandboxfs"]

from sandboxfs.__main__ import main  # noqa: E402

# Loaded now: in a chroot there is nothing to load it from.
from sandboxfs.cli import report, switch_root  # noqa: E402, F401


def files(root):
    """Return what there is below a directory on its own device."""
    found = {}
    device = os.lstat(root).st_dev
    waiting = [root]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                if status.st_dev != device:
                    # What is mounted has a life of its own: /proc counts processes in its links.
                    found[entry.path] = tuple(status)[:3]
                    continue
                found[entry.path] = (*tuple(status)[:7], status.st_mtime_ns)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
    return found


def mounts():
    """Return the lines of the mount table, in any order."""
    with open("/proc/self/mountinfo") as table:
        return sorted(table)


def state():
    """Return all that a refused switch may not change."""
    usage = os.statvfs("/")
    descriptors = len(os.listdir("/proc/self/fd"))
    return usage.f_ffree, usage.f_bfree, mounts(), os.getcwd(), sys.path[:], descriptors


def attempt(words):
    """Run one command line; returns its exit status."""
    before = state()
    status = main(["switch-root", *words])
    after = state()
    same = "unchanged" if before == after else "CHANGED"
    print(f"status {status}, {same}", flush=True)
    if before != after:
        for one, other in zip(before, after, strict=True):
            if one != other:
                print("before:", one, "after:", other, sep="\n", flush=True)


def elsewhere(how, words):
    """Run one command line in a child that is somebody or somewhere else."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    if how == "user":
        os.setgid(1000)
        os.setuid(1000)
    elif how.startswith("chroot "):
        os.chroot(how.split(" ")[1])
        os.chdir("/")
        print("status", main(["switch-root", *words]), flush=True)
        os._exit(0)
    attempt(words)
    os._exit(0)


def run():
    """Run all cases."""
    sys.stderr = sys.stdout
    with open("/attempts") as file:
        cases = json.load(file)
    place = f", {sys.argv[1]}" if sys.argv[1] else ""
    everything = files("/")
    for name, words, how in cases:
        print(f"== {name}{place}", flush=True)
        if how.startswith("after "):
            os.system(how.removeprefix("after "))
            attempt(words)
        elif how:
            elsewhere(how, words)
        else:
            attempt(words)
    os.system("umount /whole 2>/dev/null")
    print(f"== every file{place}")
    now = files("/")
    print("unchanged" if now == everything else "CHANGED", flush=True)
    print(*(f"{path}\n" for path in {*now, *everything} if now.get(path) != everything.get(path)))


run()
os.execvp(sys.argv[2], sys.argv[2:])
