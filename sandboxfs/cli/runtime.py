"""``sandboxfs runtime wrap RUNTIME DEST``: write the program that stands in front of a runtime."""

import os
from errno import ENOENT
from stat import S_ISREG

from sandboxfs import archive, policy
from sandboxfs.cli import launcher
from sandboxfs.errors import MountError, UsageError
from sandboxfs.runtime import wrap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace


def add_arguments(parser: "ArgumentParser") -> None:
    """Add this command's arguments to an argparse parser."""
    parser.add_argument("action", choices=("wrap",), help="write the program")
    parser.add_argument("runtime", metavar="RUNTIME", help="the real runtime: an absolute path")
    parser.add_argument("dest", metavar="DEST", help="where the program goes; podman decides what "
                        "a runtime can do by this name, so end it in runc or crun")
    parser.add_argument("--config", metavar="FILE",
                        help=f"the operator's file, if it isn't {policy.FILE}")
    parser.add_argument("--force", action="store_true",
                        help="overwrite DEST even if it is something else")


def main(arguments: "Namespace") -> int:
    """Write the program; returns the exit status."""
    config = None if arguments.config is None else os.path.abspath(arguments.config)
    # Wrong now is wrong at every start of a container.
    policy.load(config)
    program = wrap.content(arguments.runtime, config)
    if not arguments.force:
        _refuse_others(arguments.dest)
    launcher.compile_package()
    archive.write()
    launcher.write_program(arguments.dest, program)
    return 0


def _refuse_others(path: str) -> None:
    try:
        # O_NONBLOCK: a FIFO at the path must not hang us.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == ENOENT and not os.path.islink(path):
            return
        raise MountError("", "open", path, errno=error.errno or 0) from error
    with open(fd, "rb") as file:
        if not S_ISREG(os.fstat(fd).st_mode) or not wrap.is_front(file.read()):
            raise UsageError("", "runtime wrap", path, "exists and is no program of sandboxfs",
                             hint="--force overwrites it")
