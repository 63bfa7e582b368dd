"""Errors: what they say, and that nothing is left whatever fails.

`refused` itself compares descriptors, mounts and files before and after.
"""

import os
import resource
import stat

from sandboxfs.build import assemble
from tests.kernel.behaviours_table import behaviour
from tests.kernel.behaviours_tools import (
    USER,
    bind,
    config,
    fails,
    holds,
    inside,
    mount,
    mount_on,
    refused,
    rootfs,
    same,
    tmpfs,
    tree,
    write,
)


def _line(engine, document, **how):
    return refused(engine, document, **how)["line"]


@behaviour
def an_error_of_the_machine_is_one_line_with_all_that_is_known(engine):
    rootfs({"file": b""})
    tree("source", {})
    here = os.getcwd()
    same(_line(engine, config(bind("/a", "nowhere"))),
         f"mounts[0]: open_tree {here}/nowhere: ENOENT: No such file or directory")
    same(_line(engine, config(root="nowhere")),
         f"root.path: open {here}/nowhere: ENOENT: No such file or directory")
    same(_line(engine, config(tmpfs("/a", "mode=rwx"))).split(":")[:4],
         ["mounts[0]", " fsconfig mode=rwx /a", " EINVAL", " Invalid argument"])
    same(_line(engine, config(bind("/file", "source"))),
         f"mounts[0]: mountpoint /file: ENOTDIR: the source {here}/source is a directory, and "
         "what exists at the destination is a file")


@behaviour
def an_error_stays_one_line_whatever_a_path_holds(engine):
    rootfs()
    line = _line(engine, config(bind("/a", "no\nwhere\x1b[31m")))
    assert line.isprintable(), line
    holds(line, "no\\nwhere\\x1b[31m", "ENOENT")


@behaviour
def an_error_of_the_document_names_every_fault(engine):
    rootfs()
    error = refused(engine, config(tmpfs("/"), mount("/a", 7)))
    same(error["kind"], "SpecError")


@behaviour
def a_failure_at_each_mount_leaves_nothing(engine):
    rootfs()
    tree("source", {})
    good = [tmpfs("/a", "ro"), bind("/a/b", "source", "ro"), mount("/proc", "proc"),
            tmpfs("/c", "tmpcopyup"), bind("/d", "source", "rbind", "rshared")]
    for place in range(len(good) + 1):
        mounts = [*good[:place], tmpfs("/bad", "nonsense=1"), *good[place:]]
        error = refused(engine, config(*mounts, readonly=True))
        same(error["origin"], f"mounts[{place}]")


@behaviour
def a_failure_after_the_mounts_leaves_nothing(engine):
    rootfs({"dev/null/": 0, "work": b""})
    same(refused(engine, config(tmpfs("/a")))["origin"], "default")
    same(refused(engine, config(tmpfs("/dev"), process={"cwd": "/work"}))["origin"],
         "process.cwd")


@behaviour
def a_failure_with_images_and_submounts_leaves_nothing(engine):
    from tests.kernel.behaviours_images import SQUASHFS, image_file

    image_file(SQUASHFS, "image.squashfs")
    rootfs()
    mount_on("rootfs/data")
    error = refused(engine, config(tmpfs("/bad", "nonsense=1")),
                    overrides={"lower": "image.squashfs", "overlay.binds": "true"})
    same(error["origin"], "mounts[0]")


@behaviour
def too_few_descriptors_are_a_clear_error_at_any_number(engine):
    rootfs()
    tree("source", {})
    document = config(tmpfs("/a"), bind("/b", "source"), tmpfs("/dev"), readonly=True)

    def limited(spare):
        def prepare():
            numbers = {int(name) for name in os.listdir("/proc/self/fd")}
            while len(numbers) <= max(numbers):  # no gaps, so that the limit is what is left
                numbers.add(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
            limit = len(numbers) + spare
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

        return prepare

    # Looking at what is open takes one of them.
    for spare in range(2, 100, 2):
        try:
            error = refused(engine, document, prepare=limited(spare))
        except AssertionError as failure:
            holds(str(failure), "it was built")
            break
        same(error["errno"], "EMFILE", f"with {spare}")
        holds(error["hint"], "RLIMIT_NOFILE")
    assert 6 < spare < 60, spare


@behaviour
def a_full_upper_is_an_error_that_names_what_was_being_made(engine):
    rootfs()
    write("source", bytes(1 << 16))
    error = refused(engine, config(tmpfs("/a"), bind("/b", "source")),
                    overrides={"overlay.size": "8192", "overlay.binds": "true"})
    same((error["origin"], error["target"], error["errno"]), ("mounts[1]", "/b", "ENOSPC"))


@behaviour
def a_prepared_mount_that_fails_once_is_made_anew_with_all_that_goes_into_it(engine):
    rootfs({"tmp/": 0})

    def fail_once():
        from sandboxfs.build import calls

        original, failed = calls.syscall, []

        def failing(number, *arguments):
            if number == calls.abi.SYS_move_mount and not failed:
                failed.append(arguments)
                return -1
            return original(number, *arguments)

        calls.syscall = failing

    def check(view):
        same(view.points(), ["/", "/dev", "/dev/shm", "/tmp"])
        same(stat.S_ISCHR(os.lstat("/dev/null").st_mode), True)
        same(os.readlink("/dev/fd"), "/proc/self/fd")

    # With a mode of their own: the prepared calls don't look at mountpoints.
    document = config(tmpfs("/dev", "mode=755"), tmpfs("/dev/shm", "mode=1777"))
    inside(engine, document, check, prepare=fail_once)


@behaviour
def an_error_of_any_kind_inside_the_build_leaves_nothing(engine):
    rootfs()

    class Interrupted(BaseException):
        pass

    def interrupt():
        def raising(*_arguments):
            raise Interrupted

        assemble._STEPS[assemble.kinds.Tmp] = raising

    try:
        refused(engine, config(tmpfs("/a")), prepare=interrupt)
    except AssertionError as failure:
        holds(str(failure), "Interrupted")


@behaviour
def a_build_without_privileges_is_a_clear_error(engine):
    rootfs()

    def drop():
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)

    error = refused(engine, config(tmpfs("/a")), prepare=lambda: None, user=None,
                    change=lambda plan: drop())
    same(error["errno"], "EPERM")


@behaviour
def nothing_of_the_builder_is_seen_by_who_runs_inside(engine):
    rootfs()

    def check(view):
        view.root.close()
        os.close(view.proc)
        # The old root is gone: no path, no working directory leads there.
        same(sorted(os.listdir("/../..")), sorted(os.listdir("/")))
        same(os.getcwd(), "/")
        fails("ENOENT", os.stat, os.fsdecode(b"/proc/self"))
        same(os.listdir("/proc"), [])

    inside(engine, config(), check)
