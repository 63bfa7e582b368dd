"""Running the program as users do."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.host import CHECKOUT

LAUNCHER = CHECKOUT / ".venv" / "bin" / "sandboxfs"
# Nothing of the developer's environment reaches the program.
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}

Done = subprocess.CompletedProcess[str]


def run_cli(*arguments: str | bytes | os.PathLike[str], **how: Any) -> Done:
    """Run ``sandboxfs ARGUMENTS`` by its launcher; `how` as for `run`."""
    return run(LAUNCHER, *arguments, **how)


def run(
    *command: str | bytes | os.PathLike[str],
    cwd: str | Path = "/",
    input: str = "",
    env: Mapping[str, str] | None = None,
    uid: int | None = None,
    timeout: float = 30,
    check: int | None = None,
    pass_fds: tuple[int, ...] = (),
) -> Done:
    """Run any program; returns its exit status and output as text.

    env: added to a clean environment.  uid: run as this user and group with no others
    (`namespace.UNPRIVILEGED`; `namespace.RANGED` together with the fixture `subordinate_ids`).
    check: the exit status it must have; another one is an assertion with the output in it.
    timeout: seconds; the program is killed and TimeoutExpired raised.
    """
    done = subprocess.run(
        command,
        cwd=cwd, input=input, env={**ENVIRONMENT, **(env or {})}, timeout=timeout,
        user=uid, group=uid, extra_groups=None if uid is None else [], pass_fds=pass_fds,
        capture_output=True, text=True, encoding="utf-8", errors="surrogateescape", check=False,
    )
    if check is not None:
        assert done.returncode == check, (
            f"{command} ended with {done.returncode}, not {check}\n"
            f"stdout:\n{done.stdout}\nstderr:\n{done.stderr}"
        )
    return done
