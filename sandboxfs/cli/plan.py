"""`sandboxfs plan`: print what `run` would do; nothing is mounted."""

import os
import sys

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


def print_plan(spec, arguments):
    """Print the plan of a loaded spec, as text or (`--json`) as JSON; returns 0."""
    plan = from_spec.plan(spec)
    plan.engine = getattr(arguments, "engine", None) or "auto"
    sys.stdout.write(show.to_json(plan) if arguments.json else show.to_text(plan, missing(plan)))
    return 0
