"""``sandboxfs base-namespace``: pin a nearly empty mount namespace that `run` starts from."""

import os

from sandboxfs.errors import SandboxError, UsageError
from sandboxfs.process import base_pin

_PATH = f"/run/sandboxfs/{base_pin.NAME}"


def add_arguments(parser):
    """Add this command's arguments to an argparse parser."""
    parser.add_argument("action", choices=("create", "remove", "status"),
                        help="pin one, take it away, or say whether there is one that can be used")


def main(arguments):
    """Do it; returns the exit status: of `status` 1 where there is none to use."""
    if os.geteuid():
        raise UsageError("", f"base-namespace {arguments.action}", "", "is root's to do",
                         hint="an unprivileged run makes a mount namespace of its own anyway")
    return {"create": _create, "remove": _remove, "status": _status}[arguments.action]()


def _create():
    made = base_pin.create()
    print(f"{_PATH}: " + ("pinned" if made else "is there, and in order"))
    return 0


def _remove():
    print(f"{_PATH}: " + ("removed" if base_pin.remove() else "there is none"))
    return 0


def _status():
    try:
        fd, why = base_pin.status()
    except SandboxError as error:
        fd, why = -1, error.line()
    if fd >= 0:
        os.close(fd)
        print(f"{_PATH}: in order, run starts from it")
        return 0
    print(f"not used: {why}" if why else f"{_PATH}: there is none")
    return 1
