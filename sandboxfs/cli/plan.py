"""`sandboxfs plan`: print what `run` would do; nothing is mounted."""

import os
import sys

from sandboxfs.cli import run
from sandboxfs.plan import from_spec, show
from sandboxfs.plan.operations import Bind, Lower, PlainRoot


def missing(plan):
    """Return {operation: remark} for sources that this machine doesn't have now."""
    marks = {}
    for operation in plan.operations:
        path = None
        if isinstance(operation, (Lower, PlainRoot)):
            path = operation.path
        elif isinstance(operation, Bind):
            path = operation.source
        if path is not None and not os.path.lexists(path):
            marks[operation] = "missing on this machine now"
    return marks


def add_arguments(parser):
    """Add what `run` takes, too, as far as it shapes the plan."""
    parser.add_argument("--json", action="store_true", help="the plan as JSON")
    for name in run.VALUES:
        if name != "log-format":
            parser.add_argument(f"--{name}", action="append", metavar=name.upper(),
                                help="as for run")
    for name in ("overlay-binds", "strict"):
        parser.add_argument(f"--{name}", action="store_true", help="as for run")
    parser.add_argument("command", nargs="*", metavar="CMD", help="after --: as for run")


def main(arguments):
    """Print the plan of what the command line names; returns 0."""
    words = []
    for name in run.VALUES:
        for value in getattr(arguments, name.replace("-", "_"), None) or ():
            if name != "log-format":
                words.append(f"--{name}={value}")
    words += [f"--{name}" for name in ("overlay-binds", "strict")
              if getattr(arguments, name.replace("-", "_"))]
    plan = from_spec.plan(run.load(run.parse([*words, "--", *arguments.command])))
    sys.stdout.write(show.to_json(plan) if arguments.json else show.to_text(plan, missing(plan)))
    return 0
