"""``sandboxfs bench``: the benchmarks of the checkout this runs from."""

import os
import subprocess
import sys

from sandboxfs.errors import UsageError


def add_arguments(parser):
    """Add this command's arguments to an argparse parser."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="which; by default all")
    parser.add_argument("--rounds", metavar="N", help="rounds of each; they have defaults")
    parser.add_argument("--json", metavar="FILE", help="write all results to FILE")
    parser.add_argument("--plot", metavar="FILE", help="draw the times to FILE (needs matplotlib)")
    parser.add_argument("--strict", action="store_true", help="exit 1 when a target is missed")


def main(arguments):
    """Run them in an interpreter of their own; returns their exit status."""
    package = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    checkout = os.path.dirname(package)
    if not os.path.isfile(os.path.join(checkout, "benchmarks", "__main__.py")):
        raise UsageError("", "bench", "", "the benchmarks are part of a checkout, not of what "
                         "pip installs", hint="git clone the source, and make bench")
    words = list(arguments.names)
    for name in ("rounds", "json", "plot"):
        value = getattr(arguments, name)
        if value is not None:
            words += [f"--{name}", os.path.abspath(value) if name != "rounds" else value]
    words += ["--strict"] if arguments.strict else []
    own = os.path.join(checkout, ".venv", "bin", "python")
    python = own if os.access(own, os.X_OK) else sys.executable
    done = subprocess.run([python, "-m", "benchmarks", *words], cwd=checkout, check=False)
    return done.returncode
