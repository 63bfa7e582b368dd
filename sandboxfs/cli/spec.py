"""``sandboxfs spec``: print the config.json that `run` uses without a bundle."""

import json
import sys

from sandboxfs.spec import default


def add_arguments(parser):
    """Add this command's arguments to an argparse parser."""
    parser.add_argument(
        "--rootless", action="store_true",
        help="with a user namespace whose root is the user who runs this",
    )
    parser.add_argument(
        "--rootfs", metavar="DIR", default="/", help="the root, this machine's own by default"
    )


def main(arguments):
    """Print the document to stdout; returns the exit status."""
    # As everywhere: who isn't root can't do without a user namespace.
    rootless = True if arguments.rootless else None
    document = default.document(arguments.rootfs, rootless=rootless)
    json.dump(document, sys.stdout, indent=4, ensure_ascii=True)
    sys.stdout.write("\n")
    return 0
