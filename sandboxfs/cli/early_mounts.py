"""``sandboxfs early-mounts``: the basic mounts of an init."""

from sandboxfs.boot import make_early_mounts
from sandboxfs.boot.early_mounts import CGROUP_MODES
from sandboxfs.cli import report


def add_arguments(parser):
    """Add this command's arguments to an argparse parser."""
    parser.add_argument(
        "--cgroup", choices=CGROUP_MODES, default="v2",
        help="v2: one hierarchy (default); v1: one for each enabled controller",
    )


def main(arguments):
    """Mount what can be mounted, name what can't; returns 1 if there was such a thing."""
    failures = make_early_mounts(arguments.cgroup)
    how = ["--log-format", arguments.log_format]
    for failure in failures:
        report.failure(failure, how)
    return 1 if failures else 0
