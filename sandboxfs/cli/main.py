"""Every verb but `run`: argparse, one module a command, loaded when it is called for.

A command's module has ``add_arguments(parser)`` and ``main(arguments)``, which returns the
exit status.
"""

import argparse
import sys
from importlib import import_module
from importlib.util import find_spec

from sandboxfs import __version__
from sandboxfs.errors import UsageError

# verb → (module under sandboxfs.cli, what it does).
VERBS = {
    "plan": ("plan", "print what run would do, and why; nothing is mounted"),
    "validate": ("validate", "check config.json files against the whole schema"),
    "spec": ("spec", "print a default config.json"),
    "verify": ("verify", "compare a running container's mounts with the plan"),
    "tree": ("tree", "draw a mount namespace"),
    "doctor": ("doctor", "what this kernel and user can do"),
    "launcher": ("launcher", "write the launcher that starts fastest"),
    "hook": ("hook", "an OCI hook; the container's state comes on standard input"),
    "hooks": ("hooks", "install, uninstall or show the registration of hooks"),
    "runtime": ("runtime", "write a program that stands in front of an OCI runtime"),
    "install": ("install", "register the runtime, or the hooks, with an engine"),
    "uninstall": ("uninstall", "take back what install has registered"),
    "pod": ("pod", "list, show or delete the shared mounts of pods"),
    "switch-root": ("switch_root", "leave an initramfs"),
    "early-mounts": ("early_mounts", "the basic mounts of an init"),
    "base-namespace": ("base_namespace", "keep a nearly empty mount namespace to start from"),
    "bench": ("bench", "the benchmarks"),
}

RUN_SUMMARY = "build a root, enter it, execute a command"
RUN_HELP = """\
usage: sandboxfs run [options] [--] [CMD ARG…]

Build the root that a bundle describes, enter it, and execute its process or CMD.  Without
--bundle and --config: a throw-away view of --rootfs, by default of this machine's own /.

  --bundle DIR         the bundle; the current directory with --config alone
  --config FILE        instead of the bundle's config.json
  --rootfs DIR|IMAGE   the root, instead of root.path

  --overlay MODE       tmpfs: what is written is gone at the end (default)
                       none: the rootfs itself; dir=PATH[:keep]: written under PATH
  --overlay-size SIZE  of all that is written: bytes, or with K M G T, or N%
  --overlay-binds      writable binds are not written either
  --lower DIR|IMAGE    one more layer below the root; repeatable, topmost first
  --tmp MODE           auto: a tmpfs where nothing would be hidden (default); tmpfs; keep
  --engine NAME        auto, detached, attached

  --strict             refuse what is otherwise only warned about; validate everything
  --verify             compare the finished tree with the plan before CMD starts
  --timing             print how long each phase took
  --debug              tracebacks
  --log-format FORMAT  text, or json: one object a line
  -h, --help           this text

Exit status: CMD's own, 128+N if signal N ended it; 2 unusable arguments; 65 a faulty
document; 125 the machine can't do it; 126 CMD can't be executed; 127 it isn't there.
"""


HOOK_HELP = """\
usage: sandboxfs hook createRuntime|createContainer|poststop [--config FILE]

What an OCI runtime starts; the container's state comes on standard input.  `sandboxfs hooks
install` registers it.

  createRuntime        on the host: the volumes of the container's pod, if it has hints of such
  createContainer      in the container's mount namespace: the overlay over the rootfs, with
                       all that the runtime has mounted there
  poststop             on the host: what outlives the container is taken away

  --config FILE        the operator's file, instead of /etc/sandboxfs/config.toml

What fails is one line on standard error and in the log.  Exit status: 0; 2 unusable
arguments; 65 a faulty document, annotation or operator's file; 125 everything else.
"""


class _Parser(argparse.ArgumentParser):
    """argparse with errors in our words."""

    def error(self, message):
        raise UsageError("", "", "", message, hint=f"{self.prog} --help")


def main(arguments):
    """Run a command line; returns the exit status."""
    verb = next((word for word in arguments if not word.startswith("-")), None)
    if verb == "help":
        return _help([word for word in arguments if word != "help"])
    if verb is None or arguments[0] != verb:
        return _without_verb(arguments)
    if not _exists(verb):
        raise UsageError("", "", verb, "no such command", hint="sandboxfs help lists them")
    command, parser = _command(verb)
    # An optional word may stand behind options, where argparse by itself looks for none.
    intermixed = getattr(command, "INTERMIXED", False)
    parse = parser.parse_intermixed_args if intermixed else parser.parse_args
    parsed = parse(arguments[1:])
    return command.main(parsed)


def _without_verb(arguments):
    if not arguments or arguments[0] in ("-h", "--help"):
        _overview()
        return 0 if arguments else UsageError.exit_status
    if arguments[0] == "--version":
        print(f"sandboxfs {__version__}")
        return 0
    raise UsageError("", "", arguments[0], "no such option", hint="sandboxfs help")


def _command(verb):
    module, summary = VERBS[verb]
    command = import_module(f"sandboxfs.cli.{module}")
    parser = _Parser(prog=f"sandboxfs {verb}", description=summary[0].upper() + summary[1:] + ".")
    command.add_arguments(parser)
    # Wherever a command fails, its errors are shown as asked.
    known = parser.format_usage()
    if "--debug" not in known:
        parser.add_argument("--debug", action="store_true", help="tracebacks")
    if "--log-format" not in known:
        parser.add_argument("--log-format", choices=("text", "json"), default="text",
                            help="how errors are written")
    return command, parser


def _exists(verb):
    return verb in VERBS and find_spec(f"sandboxfs.cli.{VERBS[verb][0]}") is not None


def _help(words):
    if not words:
        _overview()
        return 0
    if words[0] == "run":
        return show_run_help()
    if words[0] == "hook":
        return show_hook_help()
    if not _exists(words[0]):
        raise UsageError("", "", words[0], "no such command", hint="sandboxfs help lists them")
    _command(words[0])[1].print_help()
    return 0


def show_run_help():
    """Print the help of `run`; returns the exit status."""
    sys.stdout.write(RUN_HELP)
    return 0


def show_hook_help():
    """Print the help of `hook`; returns the exit status."""
    sys.stdout.write(HOOK_HELP)
    return 0


def _overview():
    lines = ["usage: sandboxfs COMMAND …", ""]
    lines += [f"  {'run':<15} {RUN_SUMMARY}"]
    lines += [f"  {verb:<15} {VERBS[verb][1]}" for verb in VERBS if _exists(verb)]
    lines += ["", "sandboxfs help COMMAND says more; sandboxfs --version."]
    print("\n".join(lines))
