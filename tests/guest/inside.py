"""Runs in the guest: does what /guest/request asks and reports over the second serial port.

One line of JSON each: ``{"case": …, "failure": null or text}`` for a behaviour, and
``{"status": N}`` in the end.
"""

import json
import os
import runpy
import sys
import traceback

CHECKOUT = "/guest/checkout"


# Opened before anything runs: a script may pivot this very process elsewhere.
PORT = os.open("/dev/ttyS1", os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)


def report(frame):
    """Send one object to the host."""
    line = json.dumps(frame).encode() + b"\n"
    while line:
        line = line[os.write(PORT, line) :]


def run_code(code, arguments):
    """Execute a script's text as `__main__`; return the exit status it gave."""
    sys.argv = arguments
    try:
        exec(compile(code, arguments[0], "exec"), {"__name__": "__main__"})
    except SystemExit as stopped:
        if stopped.code is None or isinstance(stopped.code, int):
            return stopped.code or 0
        sys.stderr.write(f"{stopped.code}\n")
        return 1
    except BaseException:  # noqa: BLE001  # whatever it is, the host has to hear of it
        traceback.print_exc()
        return 1
    return 0


def run_behaviours(module, wanted):
    """Run the wanted cases of a module, or those this kernel can run, reporting each."""
    offered = runpy.run_path(os.path.join(CHECKOUT, module))
    failures = 0
    for case in offered["cases"]() if wanted else offered["cases"](offered["engines_here"]()):
        if wanted and str(case) not in wanted:
            continue
        failure = offered["run_case"](case)
        failures += failure is not None and not failure.startswith(offered["SKIPPED"])
        report({"case": str(case), "failure": failure})
    return 1 if failures else 0


def main():
    """Do what is asked and report the status; the caller then powers the guest off."""
    sys.path.insert(0, CHECKOUT)
    with open("/guest/request", "rb") as file:
        request = json.load(file)
    if "code" in request:
        status = run_code(request["code"], request["arguments"])
    else:
        status = run_behaviours(request["behaviours"], request["cases"])
    sys.stdout.flush()
    report({"status": status})


main()
