"""What the attack tests share: builds in a namespace of their own, and attackers."""

import ctypes
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sandboxfs
from sandboxfs.spec import load
from tests.support import Bundle

ENGINES = ("detached", "attached")
AT_FDCWD = -100
RENAME_EXCHANGE = 2

_libc = ctypes.CDLL(None, use_errno=True)


def planned(
    bundle: Bundle, document: dict[str, Any] | None = None, engine: str = "detached"
) -> Any:
    """Return the plan of a bundle's document, or of another one in its place."""
    text = json.dumps(document or bundle.document)
    spec = load.load(bundle.path, text=text)
    spec.overrides.engine = engine
    plan = sandboxfs.plan(spec)
    plan.engine = engine
    return plan


def exchange(one: bytes, other: bytes) -> bool:
    """Exchange two names in one step (renameat2(2)); False if one of them isn't there."""
    return bool(_libc.renameat2(AT_FDCWD, one, AT_FDCWD, other, RENAME_EXCHANGE) == 0)


@contextmanager
def attacker(step: Callable[[int], object]) -> Iterator[None]:
    """Call `step` with a running number, in a process of its own, while the block runs."""
    child = os.fork()
    if child == 0:
        try:
            number = 0
            while True:
                step(number)
                number += 1
        finally:
            os._exit(0)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def entries(path: Path) -> list[str]:
    """Return all names below a directory, sorted."""
    return sorted(str(each.relative_to(path)) for each in path.rglob("*"))


def bind_mount(source: Path | str, destination: str, *options: str) -> dict[str, Any]:
    """Return the entry of a bind."""
    return {
        "destination": destination, "source": str(source), "type": "bind",
        "options": ["bind", *options],
    }
