"""The command ``sandboxfs``: `run` and `hook` at once, every other verb through argparse."""

import sys

INTERRUPTED = 130
BROKEN_PIPE = 141


def main(arguments=None):
    """Run one command line (a list of str, by default this process's); returns its status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if arguments and arguments[0] == "run":
            from sandboxfs.cli import run

            return run.main(arguments[1:])
        if arguments and arguments[0] == "hook":
            from sandboxfs.cli import hook

            return hook.main(arguments[1:])
        from sandboxfs.cli import main as verbs

        status = verbs.main(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _silence()
        return BROKEN_PIPE
    except Exception as error:  # noqa: BLE001 - a bug is reported as an error, too
        from sandboxfs.cli import report

        return report.failure(error, arguments)
    return status


def _silence():
    """Have what is still buffered go nowhere: the interpreter flushes once more at its end."""
    import os

    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


if __name__ == "__main__":
    sys.exit(main())
