"""``sandboxfs validate FILE…``: every problem of config.json files, by their JSON pointers."""

import os

from sandboxfs.cli import report
from sandboxfs.errors import MountError, SandboxError, SpecError
from sandboxfs.spec import load, schema

OK = 0


def add_arguments(parser):
    """Add this command's arguments to an argparse parser."""
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help="a config.json, or a bundle that holds one"
    )


def main(arguments):
    """Validate each file; returns the worst exit status, 65 for a problem in a document."""
    log_format = f"--log-format={getattr(arguments, 'log_format', 'text')}"
    several = len(arguments.files) > 1
    return max(_one(path, several, [log_format]) for path in arguments.files)


def _one(path, several, log_format):
    try:
        spec = validate(path)
    except SandboxError as error:
        if several and isinstance(error, SpecError):
            # Which file's pointer it is: a URI reference, file#/pointer.
            for problem in error.problems:
                problem.origin = f"{path}#{problem.origin}"
        return report.failure(error, log_format)
    for warning in spec.warnings:
        where = f"{path}: " if several else ""
        report.warning(f"{where}{warning}", log_format == ["--log-format=json"])
    print(f"{path}: valid")
    return OK


def validate(path):
    """Return the `Spec` of a file, or of a bundle's config.json; raise all its problems.

    Beyond the schema this looks at the words of mount options, and at what fits together.
    """
    if os.path.isdir(path):
        spec = load.load(path, strict=True)
    else:
        spec = load.load(os.path.dirname(path) or ".", path, strict=True)
    problems = list(_option_problems(spec)) or _contradictions(spec)
    if problems:
        raise schema.error(problems)
    return spec


def _contradictions(spec):
    """Return the rule between parts of the document that its plan breaks, as a list."""
    from sandboxfs.plan import from_spec, survey

    try:
        from_spec.plan(spec, survey.Facts())
    except SpecError as error:
        return error.problems
    except MountError:
        pass  # a matter of this machine
    return []


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
