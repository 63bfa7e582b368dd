"""The Python side of the build benches: answers like floor.c, started as bare as the launcher.

    python3 -I -S -B …/rounds.py CHECKOUT BUNDLE      (or - for the default spec over /)

Commands: `b`, `f`, `m` as in floor.c; `l` load the spec, `p` plan it, `c` close a built root;
"""

import os
import sys

sys.path.insert(0, sys.argv[1])

from time import perf_counter_ns as now

from sandboxfs.build.assemble import build
from sandboxfs.kernel import abi, syscalls
from sandboxfs.plan.from_spec import plan
from sandboxfs.spec import load


def loaded():
    if sys.argv[2] == "-":
        from sandboxfs.spec import default

        return load.from_document(default.document("/"), "/")
    return load.load(sys.argv[2])


def one_load():
    start = now()
    loaded()
    return now() - start


def one_plan(spec):
    start = now()
    plan(spec)
    return now() - start


def one_build(the_plan):
    start = now()
    root = build(the_plan)
    elapsed = now() - start
    root.close()
    return elapsed


def one_close(the_plan):
    root = build(the_plan)
    start = now()
    root.close()
    return now() - start


def entered(the_plan):
    """What the child of a forked build does."""
    syscalls.unshare(abi.CLONE_NEWNS)
    slash = os.open("/", abi.O_PATH | os.O_CLOEXEC)
    syscalls.mount_setattr(slash, 0, 0, abi.MS_SLAVE, True)
    build(the_plan).pivot()


def forked(the_plan):
    start = now()
    child = os.fork()
    if child == 0:
        in_child(entered, the_plan)
    wait(child)
    return now() - start


def mount_table(the_plan):
    child = os.fork()
    if child == 0:
        in_child(lambda it: (entered(it), show()), the_plan)
    wait(child)
    return "."


def in_child(work, the_plan):
    try:
        work(the_plan)
        os._exit(0)
    except BaseException as error:  # noqa: BLE001  # this process must end here
        os.write(2, f"rounds: {error}\n".encode())
        os._exit(1)


def wait(child):
    if os.waitpid(child, 0)[1]:
        sys.exit("rounds: the forked build failed")


def show():
    """Write what floor.c's `show` writes."""
    with open("/proc/thread-self/mountinfo", "rb") as file:
        table = file.read()
    while table:
        table = table[os.write(1, table):]
    for name in [".", "..", *os.listdir("/dev")]:
        status = os.lstat(f"/dev/{name}")
        numbers = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        os.write(1, f"dev {name} {status.st_mode:o} {numbers}\n".encode())


def main():
    spec = loaded()
    the_plan = plan(spec)
    commands = {
        b"b": lambda: one_build(the_plan), b"f": lambda: forked(the_plan),
        b"m": lambda: mount_table(the_plan), b"l": one_load, b"p": lambda: one_plan(spec),
        b"c": lambda: one_close(the_plan),
    }
    while command := os.read(0, 1):
        os.write(1, f"{commands[command]()}\n".encode())


main()
