"""``sandboxfs run``: parsed by hand, since argparse costs more than the container does."""

import sys
from time import time

from sandboxfs.errors import SandboxError, UsageError
from sandboxfs.kernel import system as os
from sandboxfs.spec.model import Process

VALUES = ("bundle", "config", "rootfs", "overlay", "overlay-size", "tmp", "lower", "engine",
          "log-format")
FLAGS = ("overlay-binds", "strict", "verify", "timing", "debug")
# Options that are annotations too (dev.sandboxfs.KEY).
_OVERRIDES = {"overlay": "overlay", "overlay-size": "overlay.size", "tmp": "tmp",
              "engine": "engine", "lower": "lower", "overlay-binds": "overlay.binds"}


_PIN = "/run/sandboxfs/base-namespace"


class Options:
    """A parsed command line.

    values: dict from option to its text.  flags: set of names.  overrides: list of
    (annotation key, text, option) in the order given.  command: list of str, may be empty.
    """

    __slots__ = ("command", "flags", "overrides", "values")

    def __init__(self):
        self.values = {}
        self.flags = set()
        self.overrides = []
        self.command = []


def parse(arguments):
    """Return the `Options` of a command line; UsageError names what can't be used.

    The first word that is no option begins the command; ``--`` ends the options too.
    """
    options = Options()
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            options.command = list(rest)
            break
        if not argument.startswith("-") or argument == "-":
            options.command = [argument, *rest]
            break
        name, equals, value = argument[2:].partition("=")
        if argument in ("-h", "--help"):
            options.flags.add("help")
        elif argument.startswith("--") and name in FLAGS and not equals:
            _set(options, name, None)
        elif argument.startswith("--") and name in VALUES:
            if not equals:
                value = next(rest, None)
                if value is None:
                    raise UsageError("", "", argument, "needs a value", hint=_HINT)
            _set(options, name, value)
        else:
            text = "takes no value" if name in FLAGS else "no such option"
            raise UsageError("", "", argument, text, hint=_HINT)
    if options.values.get("log-format", "text") not in ("text", "json"):
        raise UsageError("--log-format", "", options.values["log-format"], "allowed: text, json")
    return options


_HINT = "sandboxfs run --help lists the options"


def _set(options, name, value):
    if name in _OVERRIDES:
        text = "true" if value is None else value
        options.overrides.append((_OVERRIDES[name], text, f"--{name}"))
    elif value is None:
        options.flags.add(name)
    else:
        options.values[name] = value


def load(options):
    """Return the `Spec` of a command line: a bundle's, or the default one over a root."""
    bundle, config = options.values.get("bundle"), options.values.get("config")
    rootfs = options.values.get("rootfs")
    strict = "strict" in options.flags
    if bundle is None and config is None:
        from sandboxfs.spec import default

        spec = default.spec(rootfs or "/", options.command or ("sh",))
        spec.root_origin = "--rootfs"
    else:
        from sandboxfs.spec import load as loader

        spec = loader.load(bundle, config, strict)
        if rootfs is not None:
            spec.root_path = os.path.abspath(rootfs)
            spec.root_origin = "--rootfs"
        if options.command:
            if spec.process is None:
                spec.process = Process()
            spec.process.args = options.command
    if options.overrides:
        from sandboxfs.spec.annotations import override
        from sandboxfs.spec.model import Overrides

        own = Overrides()
        for key, text, option in options.overrides:
            override(own, key, text, option, UsageError)
        if spec.overrides is None:
            spec.overrides = own
        else:
            spec.overrides.merge(own)
    return spec


def main(arguments):  # noqa: RET503 - _exit doesn't return
    """Run a command line; ends the process with the payload's exit status."""
    options = parse(arguments)
    if "help" in options.flags:
        from sandboxfs.cli import main as verbs

        return verbs.show_run_help()
    marks = [("start", time())] if "timing" in options.flags else None
    spec = load(options)
    spec.document = {}  # all is read of it: of a long one the plan takes the memory
    if marks:
        marks.append(("load", time()))
    from sandboxfs.kernel import submounts
    from sandboxfs.plan.from_spec import plan as make_plan
    from sandboxfs.process.run import run

    submounts.own_process = True
    plan = make_plan(spec)
    if marks:
        marks.append(("plan", time()))

    def warn(text):
        if options.values.get("log-format") == "json":
            from sandboxfs.cli import report

            report.warning(text, True)
        elif sys.stderr is not None:
            sys.stderr.write(f"sandboxfs: warning: {text}\n")

    for text in plan.warnings:
        warn(text)
    if spec.not_applied:
        _not_applied(spec.not_applied, "strict" in options.flags, warn)
    try:
        status = run(plan, "verify" in options.flags, marks, warn, "strict" in options.flags,
                     _base_namespace(warn))
    finally:
        if marks:
            _show(marks, plan.new_namespace("mount"))
    # What is left of the interpreter's life is taking itself apart.
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(status)


def _base_namespace(warn):
    """Return the descriptor of the pinned base namespace, or -1."""
    # Looked for by name first: who has none shouldn't load what checks it.
    if not os.path.lexists(_PIN):
        return -1
    from sandboxfs.process import base_pin

    return base_pin.usable(warn)


def _not_applied(pointers, strict, warn):
    names = ", ".join(pointers)
    if strict:
        raise SandboxError(
            "", "", names, "is a runtime's work, which run doesn't do",
            hint="without --strict it is left out, with a warning",
        )
    warn(f"not applied, a runtime's work: {names}")


def _show(marks, new_namespace):
    """Write the table of --timing, and how the mount namespace was made, to standard error."""
    from sandboxfs.cli import report

    first = last = marks[0][1]
    lines = []
    for phase, moment in marks[1:]:
        lines.append(f"{phase:>14} {(moment - last) * 1e3:9.3f} ms\n")
        last = moment
    if new_namespace:
        own = any(phase == "base" for phase, _moment in marks)
        way = "a copy of the base namespace" if own else "a copy of the caller's"
        lines.append(f"{'mount namespace':>14} {way}\n")
    lines.append(f"{'all':>14} {(last - first) * 1e3:9.3f} ms\n")
    report.write("".join(lines))
