"""``sandboxfs verify``: a running container's mount table, compared with the plan."""

import errno
import os

from sandboxfs.build.verify import verify_process
from sandboxfs.errors import MountError, UsageError
from sandboxfs.plan import from_spec
from sandboxfs.spec import load


def add_arguments(parser):
    """Add this command's arguments to an argparse parser."""
    parser.add_argument(
        "--bundle", metavar="DIR", default=".", help="the container's bundle, by default here"
    )
    parser.add_argument(
        "--pid", type=int, required=True, help="a process of the container, as seen from here"
    )


def main(arguments):
    """Print every difference, then notes; returns 1 if there is a difference, else 0.

    SpecError for the bundle's document; MountError for a process that can't be read.
    """
    pid = arguments.pid
    if pid <= 0:
        raise UsageError("--pid", "", str(pid), "not the number of a process")
    plan = from_spec.plan(load.load(arguments.bundle))
    try:
        comparison = verify_process(plan, pid)
    except OSError as error:
        raise _worded(error, pid) from error
    for line in comparison.differences:
        print(line)
    for line in comparison.notes:
        print(f"note: {line}")
    return 1 if comparison.differences else 0


def _worded(error, pid):
    number = error.errno or 0
    hint, text = None, os.strerror(number)
    if number in (errno.ESRCH, errno.ENOENT):
        text = "no such process"
    elif number in (errno.EACCES, errno.EPERM):
        hint = "the root of another user's process is root's to see"
    return MountError("--pid", "read the mounts of process", str(pid), text, number, hint)
