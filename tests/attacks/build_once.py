"""Build a bundle's root, pivot into it and print its mounts, all in one process.

strace counts a call's occurrences by process: here each of them can be made to fail, those of
gathering and those of assembling.

    python -m tests.attacks.build_once BUNDLE ENGINE
"""

import os
import sys

import sandboxfs
from sandboxfs.kernel import abi, syscalls


def main(bundle: str, engine: str) -> None:
    spec = sandboxfs.load(bundle)
    spec.overrides.engine = engine
    try:
        plan = sandboxfs.plan(spec)
        plan.engine = engine
        try:
            syscalls.unshare(abi.CLONE_NEWNS)
        except OSError as error:
            raise sandboxfs.MountError("", "unshare", "", "", error.errno) from error
        proc = os.open("/proc/self/mountinfo", os.O_RDONLY)
        root = sandboxfs.build(plan)
        root.pivot()
    except sandboxfs.SandboxError as error:
        sys.stderr.write(f"sandboxfs: {error}\n")
        sys.exit(error.exit_status)
    sys.stdout.write(os.read(proc, 1 << 20).decode())


if __name__ == "__main__":
    main(*sys.argv[1:])
