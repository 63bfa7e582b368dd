"""``sandboxfs validate FILE…``: every problem of config.json files, by their JSON pointers."""

import os
import sys

from sandboxfs.errors import SandboxError, SpecError
from sandboxfs.spec import load, schema

OK = 0


def add_arguments(parser):
    """Add this command's arguments to an argparse parser."""
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help="a config.json, or a bundle that holds one"
    )


def main(arguments):
    """Validate each file; returns the worst exit status, 65 for a problem in a document."""
    return max(_one(path, len(arguments.files) > 1) for path in arguments.files)


def _one(path, several):
    # With several files an origin is a URI reference: file#/pointer.
    prefix = f"{path}#" if several else ""
    try:
        spec = validate(path)
    except SandboxError as error:
        if not isinstance(error, SpecError):
            print(f"sandboxfs: {error}", file=sys.stderr)
            return error.exit_status
        for problem in error.problems:
            print(f"sandboxfs: {prefix}{problem}", file=sys.stderr)
        return error.exit_status
    for warning in spec.warnings:
        where = f"{path}: " if several else ""
        print(f"sandboxfs: warning: {where}{warning}", file=sys.stderr)
    print(f"{path}: valid")
    return OK


def validate(path):
    """Return the `Spec` of a file, or of a bundle's config.json; raise all its problems.

    Beyond the schema this looks at the words of mount options.
    """
    if os.path.isdir(path):
        spec = load.load(path, strict=True)
    else:
        spec = load.load(os.path.dirname(path) or ".", path, strict=True)
    problems = list(_option_problems(spec))
    if problems:
        raise schema.error(problems)
    return spec


def _option_problems(spec):
    from sandboxfs.spec import options

    for mount in spec.mounts:
        for index, word in enumerate(mount.options):
            pointer = f"/mounts/{mount.index}/options"
            try:
                options.parse([word], pointer)
            except SpecError as error:
                # Parsed alone, so that each is told: the index is the first one then.
                error.origin = f"{pointer}/{index}"
                yield error
