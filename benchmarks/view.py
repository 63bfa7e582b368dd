"""The view of a busy `/`: a throw-away root over a host with many mounts.

The mounts are made in a mount namespace of the bench's own: binds of one directory, below a
tmpfs that lies over /mnt.  Each of them becomes an overlay in the view.
"""

import os

from benchmarks import measure, process
from benchmarks.build import python_rounds
from sandboxfs.kernel import abi, fscontext, syscalls

ROUNDS = 15
COUNTS = (0, 100, 1000, 5000)
UNPRIVILEGED_COUNT = 100
NOBODY = 65534


def run(directory, rounds=ROUNDS, counts=COUNTS):
    """Measure; returns a `Report`."""
    report = measure.Report("view", "A throw-away view of / by the number of mounts below it")
    servers = {count: server(count) for count in counts}
    try:
        for count, each in servers.items():
            fewer = rounds if count < 1000 else max(3, rounds // 3)
            try:
                report.add(measure.interleaved({
                    f"build(), {count} mounts": each.contestant(b"b"),
                    f"build() + pivot(), in a child, {count} mounts": each.contestant(b"f"),
                }, fewer, warm_up=1))
            except measure.Failed as error:
                report.notes.append(f"{count} mounts: FAILED, {error}")
    finally:
        for each in servers.values():
            each.__exit__()
    whole_processes(report, directory, rounds)
    none = report.rows["build(), 0 mounts"]["median"]
    for count in counts:
        if count and f"build(), {count} mounts" in report.rows:
            cost = (report.rows[f"build(), {count} mounts"]["median"] - none) / count
            report.notes.append(f"{count} mounts: {cost / 1000:.1f} µs each, above none")
    return report


def server(count):
    """Return a server that builds the default spec over `/` with `count` mounts below it."""
    return measure.Server(python_rounds("-"), measure.PRIVATE, lambda: mounts(count))


def mounts(count):
    """Make `count` mounts in this (private) mount namespace."""
    if not count:
        return
    top = fscontext.create(b"tmpfs", [fscontext.string(b"mode", b"755")], 0)
    syscalls.move_mount_path(top, abi.AT_FDCWD, b"/mnt")
    os.mkdir("source", dir_fd=top)
    source = os.open("source", abi.O_PATH | os.O_DIRECTORY, dir_fd=top)
    for number in range(count - 1):
        name = b"%d" % number
        os.mkdir(name, dir_fd=top)
        clone = syscalls.open_tree(source, b"", abi.OPEN_TREE_CLONE | abi.AT_EMPTY_PATH)
        syscalls.move_mount_path(clone, top, name)
        os.close(clone)
    os.close(source)
    os.close(top)


def whole_processes(report, directory, rounds):
    """Add `sandboxfs run -- /bin/true`, as root on an idle host and as nobody on a busy one."""
    with (
        spawner(directory, lambda: mounts(0)) as idle,
        spawner(directory, lambda: mounts(UNPRIVILEGED_COUNT)) as busy,
        spawner(directory, as_nobody) as nobody,
    ):
        report.add(measure.interleaved({
            "sandboxfs run -- /bin/true, 0 mounts": idle.contestant(b"r"),
            f"sandboxfs run -- /bin/true, {UNPRIVILEGED_COUNT} mounts": busy.contestant(b"r"),
            f"the same as nobody, {UNPRIVILEGED_COUNT} mounts": nobody.contestant(b"r"),
        }, rounds, warm_up=1))


def spawner(directory, prepare):
    """Return a server that runs `sandboxfs run -- /bin/true` where `prepare()` was called."""
    launcher = process.launcher(directory)
    return measure.Server(
        process.spawner([launcher, "run", "--", "/bin/true"]), abi.CLONE_NEWNS, prepare
    )


def as_nobody():
    """Become a user without any privilege, on a host with some mounts."""
    mounts(UNPRIVILEGED_COUNT)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    os.chdir("/")
