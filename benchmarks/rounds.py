"""The Python side of the build benches: answers like floor.c, started as bare as the launcher.

    python3 -I -S -B …/rounds.py CHECKOUT BUNDLE      (or - for the default spec over /)

Commands: `b`, `f`, `m` as in floor.c, with a child that is vforked; `l` load the spec, `p` plan it,
`c` close a built root.
"""

import os
import sys

sys.path.insert(0, sys.argv[1])

from time import perf_counter_ns as now

from sandboxfs.build.assemble import assemble, build, prepare
from sandboxfs.build.gather import gather
from sandboxfs.kernel import abi, submounts, vfork
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


class InChild:
    """The same in a child, made as `run` makes it; what can be done before is."""

    def __init__(self, the_plan):
        submounts.own_process = True  # as in `run`: no threads, no signal handlers
        self.plan = the_plan
        self.after = None
        self.materials = self.ready = None
        self.child = vfork.Child(self.live)

    def live(self, _errno):
        try:
            os.umask(0)
            assemble(self.plan, self.materials, umask_is_clear=True, prepared=self.ready).pivot()
            if self.after is not None:
                self.after()
        except BaseException as error:  # noqa: BLE001  # the child must end here
            os.write(2, f"rounds: {error}\n".encode())
            return 1
        return 0

    def once(self):
        """Build, enter and end; returns the nanoseconds from before the gathering to the end."""
        start = now()
        self.materials = gather(self.plan)
        self.ready = prepare(self.plan, self.materials, umask_is_clear=True)
        descriptors = list(self.materials.descriptors)
        child = self.child.start(abi.CLONE_NEWNS)
        for fd in descriptors:
            os.close(fd)
        wait(child)
        return now() - start

    def mount_table(self):
        self.after = show
        self.once()
        self.after = None
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
    in_child = InChild(the_plan)
    commands = {
        b"b": lambda: one_build(the_plan), b"f": in_child.once,
        b"m": in_child.mount_table, b"l": one_load, b"p": lambda: one_plan(spec),
        b"c": lambda: one_close(the_plan),
    }
    while command := os.read(0, 1):
        os.write(1, f"{commands[command]()}\n".encode())


main()
