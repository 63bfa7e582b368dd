"""docs/compatibility.md, made of what the tests found: version, engine, way, case, what held.

Every run of a table appends its outcomes to .cache/matrix/outcomes; `make matrix` runs all of it
and writes the document.  A version that the document doesn't list is run all the same; where it
fails this is said loudly, and fails nobody's commit until the document lists it.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from tests.support import CHECKOUT

DOCUMENT = CHECKOUT / "docs/compatibility.md"
OUTCOMES = CHECKOUT / ".cache/matrix/outcomes"
# Order of the tables, and what of a version is said of each.
KINDS = {
    "runc": ("runc",), "crun": ("crun",), "containerd": ("containerd", "runc"),
    "podman": ("podman", "crun"), "podman-rootless": ("podman", "crun"),
    "docker": ("dockerd", "runc"), "cri": ("containerd", "runc"),
}
_SYMBOLS = {"held": "✓", "refused": "refused", "failed": "**✗**", "": ""}

INTRODUCTION = """\
# What holds under which version

Written by `make matrix` from what the tests found; don't edit it. For every version, engine and way
(the hooks, or the runtime in front) each case was run and judged by writing, and by what was in the
image and on the host afterwards.

- **✓**: the container got exactly our root, and everything read-only was so.
- **refused**: the container did not start, and the message said what to use instead. That is right
  for hooks under a runc that pins the rootfs (1.3.6, 1.4.3 and later).
- **✗**: neither. Nothing: the case says nothing about this engine.

A version that isn't here has not been tried; the next run of the tests that meets it says how it
did.
"""


class Outcome(NamedTuple):
    """What a case came to: `versions` as the columns are titled."""

    kind: str
    versions: str
    way: str
    case: str
    result: str


def title(kind: str, versions: Mapping[str, str]) -> str:
    """Return what a column says of versions: the engine's own, and that of the runtime behind."""
    first, *behind = KINDS[kind]
    more = "".join(f" ({each} {versions[each]})" for each in behind)
    return versions.get(first, "?") + more


def record(outcome: Outcome) -> None:
    """Append an outcome; one write, since other workers append as well."""
    OUTCOMES.parent.mkdir(parents=True, exist_ok=True)
    with open(OUTCOMES, "a", encoding="utf-8") as file:
        file.write(json.dumps(outcome) + "\n")


def recorded() -> list[Outcome]:
    """Return the latest outcome of everything that ever ran in this checkout."""
    latest: dict[tuple[str, ...], Outcome] = {}
    for line in OUTCOMES.read_text("utf-8").splitlines():
        outcome = Outcome(*json.loads(line))
        latest[outcome[:4]] = outcome
    return list(latest.values())


def listed(text: str | None = None) -> set[tuple[str, str]]:
    """Return (kind, title) of every version that the document lists."""
    if text is None:
        text = DOCUMENT.read_text("utf-8") if DOCUMENT.exists() else ""
    found, kind = set(), ""
    for line in text.splitlines():
        if line.startswith("## "):
            kind = line.removeprefix("## ")
        elif line.startswith("| case |"):
            columns = [column.strip() for column in line.strip("|").split("|")[1:]]
            found |= {(kind, column.rpartition(", ")[0]) for column in columns}
    return found


def document(outcomes: Iterable[Outcome]) -> str:
    """Return the document for these outcomes."""
    outcomes = list(outcomes)
    parts = [INTRODUCTION]
    for kind in KINDS:
        ours = [each for each in outcomes if each.kind == kind]
        if not ours:
            continue
        columns = sorted({(each.versions, each.way) for each in ours}, key=_by_number)
        results = {(each.case, each.versions, each.way): each.result for each in ours}
        cases = list(dict.fromkeys(each.case for each in sorted(ours, key=_by_case)))
        lines = [
            f"## {kind}", "",
            f"| case | {' | '.join(f'{versions}, {way}' for versions, way in columns)} |",
            f"|---|{'---|' * len(columns)}",
        ]
        for case in cases:
            cells = [_SYMBOLS[results.get((case, *column), "")] for column in columns]
            lines.append(f"| {case.replace('_', ' ')} | {' | '.join(cells)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _by_number(column: tuple[str, str]) -> tuple[list[int], str]:
    return [int(number) for number in re.findall(r"\d+", column[0])], column[1]


def _by_case(outcome: Outcome) -> tuple[bool, str]:
    return not outcome.case.startswith("content"), outcome.case


def main(path: Path = DOCUMENT) -> int:
    """Write the document; returns 1 where something neither held nor was refused."""
    outcomes = recorded()
    path.write_text(document(outcomes), "utf-8")
    failed = [each for each in outcomes if each.result == "failed"]
    print(f"{path}: {len(outcomes)} outcomes, {len(failed)} failed")
    for each in failed:
        print("  failed:", *each[:4])
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
