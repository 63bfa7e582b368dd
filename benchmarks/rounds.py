"""The Python side of the build benches: answers like floor.c, started as bare as the launcher.

    python3 -I -S -B …/rounds.py CHECKOUT BUNDLE      (or - for the default spec over /)

Commands: `b`, `f`, `m` as in floor.c; `l` load the spec, `p` plan it, `c` close a built root;
"""

import os
import sys

sys.path.insert(0, sys.argv[1])

from time import perf_counter_ns as now

from sandboxfs.build.assemble import assemble, build, prepare
from sandboxfs.build.gather import gather
from sandboxfs.kernel import abi
from sandboxfs.plan.from_spec import plan
from sandboxfs.process.namespaces import fork_into
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


def in_child(the_plan, after=None):
    """Fork as `run` does: what can be done before is; returns the child's pid."""
    materials = gather(the_plan)
    ready = prepare(the_plan, materials, umask_is_clear=True)
    child = fork_into(abi.CLONE_NEWNS)
    if child == 0:
        try:
            os.umask(0)
            assemble(the_plan, materials, umask_is_clear=True, prepared=ready).pivot()
            if after is not None:
                after()
            os._exit(0)
        except BaseException as error:  # noqa: BLE001  # this process must end here
            os.write(2, f"rounds: {error}\n".encode())
            os._exit(1)
    materials.close()
    the_plan.compiled.calls.append(ready.calls)  # the child's copy did the work
    return child


def forked(the_plan):
    start = now()
    wait(in_child(the_plan))
    return now() - start


def mount_table(the_plan):
    wait(in_child(the_plan, show))
    return "."


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
