"""``sandboxfs hook NAME [--config FILE]``: an OCI hook; the container's state is on stdin.

Its environment and working directory belong to whoever made the image, and runtimes leak
descriptors to it: nothing of that is looked at, and all but the standard streams is closed.
"""

import sys

from sandboxfs.errors import PolicyError, UsageError, one_line, printable
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import close_range

_LAST = 0xFFFFFFFF
_INTERNAL = 125
_HINT = "createRuntime, createContainer and poststop are hooks"


def main(arguments):
    """Run one hook; ends the process, with 0 or what the error's class says."""
    # What is left of the interpreter's life is taking itself apart; descriptors go with it.
    status = run(arguments)
    if sys.stdout is not None:
        sys.stdout.flush()
    os._exit(status)


def run(arguments):
    """Run one hook; returns the exit status."""
    if arguments[:1] in (["-h"], ["--help"]):
        from sandboxfs.cli import main as verbs

        return verbs.show_hook_help()
    output = _Output()
    try:
        name, config = _parse(arguments)
        output.name = name
        _settle()
        from sandboxfs.hooks import lifecycle, state

        found = state.read(0)
        output.id = found.id
        output.use(_policy(name, config, output))
        lifecycle.HOOKS[name](found, output.policy, output.write)
    except Exception as error:  # noqa: BLE001 - whatever it is, the runtime gets one line of it
        return output.failure(error)
    return 0


def _parse(arguments):
    """Return (name of the hook, the operator's file or None)."""
    from sandboxfs.hooks.lifecycle import HOOKS

    if not arguments or arguments[0] not in HOOKS:
        raise UsageError("hook", "", arguments[0] if arguments else "", "no such hook" if arguments
                         else "which one?", hint=_HINT)
    config, rest = None, list(arguments[1:])
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        if option != "--config" or not (equals or rest):
            raise UsageError("hook", "", option, "no such option" if option != "--config" else
                             "needs a value", hint="--config FILE is the only one")
        config = value if equals else rest.pop(0)
    return arguments[0], config


def _settle():
    """Stand where nothing of the container's can be meant by accident."""
    while True:
        fd = os.open(os.devnull, os.O_RDWR)
        if fd > 2:
            break  # standard streams that were closed are nowhere now, not a mount of ours
    close_range(3, _LAST, 0)
    os.chdir("/")
    os.umask(0)


def _policy(name, config, output):
    """Return the operator's policy; for poststop there always is one.

    What a container leaves has to go although its operator's file has been damaged since.
    """
    from sandboxfs import policy

    try:
        return policy.load(config)
    except PolicyError as error:
        if name != "poststop":
            raise
        output.write("warning", one_line(error))
        rules = policy.Policy()
        # Only what createContainer made and marked is removed: it was allowed then.
        rules.host_paths = True
        return rules


class _Output:
    """Where a hook's lines go: standard error, which a runtime may throw away, and the log."""

    def __init__(self):
        self.name = self.id = ""
        self.policy = self.log = None

    def use(self, policy):
        self.policy = policy

    def write(self, level, text):
        """Write a line to the log; a warning to standard error, too.

        The log is closed to the root of a user namespace: not worth a word, a runtime doesn't
        show what a hook that does its work writes.
        """
        if level == "warning":
            _to_stderr(f"warning: {text}")
        self._keep(level, text)

    def _keep(self, level, text):
        if self.log is None:
            self.log = _log(self.policy)
        self.log.keep(level, f"{self.name} {self.id}: {text}")

    def failure(self, error):
        """Say what went wrong, in one line; returns the exit status."""
        line = one_line(error)
        _to_stderr(line)
        self._keep("error", line)
        return getattr(error, "exit_status", _INTERNAL)


def _log(policy):
    from sandboxfs.policy import LOG_FILE
    from sandboxfs.state.log import Log

    if policy is None:
        return Log()
    # The default place is the state directory, made and checked when it is first used.
    return Log(None if policy.log_path == LOG_FILE else policy.log_path, policy.log_level)


def _to_stderr(text):
    """Write one line, whatever it quotes: runtimes log it among their own."""
    if sys.stderr is not None:
        try:
            sys.stderr.write(f"sandboxfs: {printable(text)}\n")
            sys.stderr.flush()
        except OSError:
            pass
