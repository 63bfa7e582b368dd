"""Skips that name what is missing, and that CI doesn't take on trust.  A pytest plugin.

A test says what it needs, as a mark or in its body::

    @pytest.mark.needs("root", "overlay")
    def test_…():
        needs("newuidmap")

and is skipped with "needs NAME: why" where the probe of that name (`capabilities`) says it is
absent.  With CI=true every other skip is a failure, and so is one for something that the
set-up installs: a suite that quietly tests less than it could is worth less than it says.
Something that the set-up could not fetch may be skipped, and the last lines say so loudly.
"""

import os
import re
from collections.abc import Generator
from typing import Any

import pytest

from tests.support import capabilities

_UNLISTED = "not listed in docs/compatibility.md: "
_REASON = re.compile(r"(?:Skipped: )?(in the guest: )?needs ([\w.-]+): ")


def needs(*names: str) -> None:
    """Skip the running test unless every capability in `names` is there."""
    for name in names:
        absence = capabilities.absence(name)
        if absence:
            pytest.skip(f"needs {name}: {absence}")


def fault_of_skip(reason: str) -> str | None:
    """Return what is wrong with a skip for `reason` in CI, or None if it is honest."""
    match = _REASON.match(reason)
    if not match:
        return "skipped without needs(…), so nobody can tell whether this machine could run it"
    name = match[2]
    if name in capabilities.PROVIDED:
        # In a tree of another Debian it provides nothing but what the tree is made of.
        if os.environ.get("SANDBOXFS_TESTS_IN_TREE") and capabilities.absence(name):
            return None
        return f"skipped for want of {name}, which the set-up provides"
    if name in capabilities.FETCHED:
        if capabilities.unfetched(name):
            return None
        return f"skipped for want of {name}, which the set-up has not tried to fetch"
    if name not in capabilities.MACHINE:
        return f"skipped for {name}, of which there is no probe"
    # What an older kernel in a guest lacks was probed there.
    if not match[1] and capabilities.absence(name) is None:
        return f"skipped for want of {name}, but this machine has it"
    return None


def in_ci() -> bool:
    """Return whether this is a run in CI."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        needs(*mark.args)


def told_only(report: pytest.TestReport, version: str) -> None:
    """Make of a failure one that is only told, since nobody has said yet that a version works."""
    report.outcome = "skipped"
    report.wasxfail = f"{_UNLISTED}{version}"


def pytest_unconfigure(config: pytest.Config) -> None:
    """Say which of the fetched things were missing, and what is only told, in the last lines."""
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    lacking: dict[str, list[str]] = {}
    for report in reporter.stats.get("skipped", ()) if reporter else ():
        match = _REASON.match(str(report.longrepr[-1]))
        if match and match[2] in capabilities.FETCHED:
            lacking.setdefault(match[2], []).append(report.longrepr[-1][match.end():])
    if lacking:
        reporter.section("NOT TESTED: what the set-up could not fetch", "!", red=True)
    for name, reasons in lacking.items():
        reporter.write_line(f"{name}: {len(reasons)} tests did not run: {reasons[0]}", red=True)
    told: dict[str, list[str]] = {}
    for report in reporter.stats.get("xfailed", ()) if reporter else ():
        if report.wasxfail.startswith(_UNLISTED):
            told.setdefault(report.wasxfail, []).append(report.nodeid.rpartition("::")[2])
            reporter.section(report.nodeid, "_", red=True)
            reporter.write_line("\n".join(report.longreprtext.splitlines()[-15:]))
    if told:
        reporter.section(
            "FAILED, ON VERSIONS THAT docs/compatibility.md DOESN'T LIST", "!", red=True)
    for version, names in told.items():
        reporter.write_line(f"{version.removeprefix(_UNLISTED)}: {', '.join(names)}", red=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    return _judge((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    return _judge((yield))


def _judge(report: Any) -> Any:
    # An expected failure is reported as skipped, too, but it did run.
    if in_ci() and report.skipped and not hasattr(report, "wasxfail"):
        *_, reason = report.longrepr
        fault = fault_of_skip(reason)
        if fault:
            report.outcome = "failed"
            report.longrepr = f"{fault}\n({reason})"
    return report
