"""docs/compatibility.md is made by the tests, and decides whose failures count."""

import pytest

from tests.runtimes import compatibility
from tests.runtimes.compatibility import Outcome
from tests.runtimes.matrix import ENGINES, SAMPLE, is_wanted, kind_of
from tests.support import CHECKOUT
from tests.support.schedule import ENGINE

OUTCOMES = [
    Outcome("runc", "1.10.1", "hooks", "content", "refused"),
    Outcome("runc", "1.9", "hooks", "content", "held"),
    Outcome("podman", "5.8.6 (crun 1.28)", "runtime", "a_hundred_mounts", "failed"),
]


def test_the_document_lists_what_ran_in_order():
    text = compatibility.document(OUTCOMES)
    assert "| case | 1.9, hooks | 1.10.1, hooks |\n|---|---|---|\n| content | ✓ | refused |" in text
    assert "| a hundred mounts | **✗** |" in text
    assert compatibility.listed(text) == {
        ("runc", "1.9"), ("runc", "1.10.1"), ("podman", "5.8.6 (crun 1.28)")}


def test_the_latest_outcome_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(compatibility, "OUTCOMES", tmp_path / "matrix/outcomes")
    for result in ("failed", "held"):
        compatibility.record(OUTCOMES[0]._replace(result=result))
    assert [each.result for each in compatibility.recorded()] == ["held"]


def test_a_title_names_the_runtime_behind():
    versions = {"dockerd": "28.5.2", "runc": "1.3.6"}
    assert compatibility.title("docker", versions) == "28.5.2 (runc 1.3.6)"


class Item:
    nodeid = "tests/runtimes/test_view.py::test_it[runc@sid-hooks-default]"

    def get_closest_marker(self, name):
        return object() if name == "matrix" else None


def test_every_test_of_the_matrix_is_in_one_share(monkeypatch):
    found = []
    for share in range(8):
        monkeypatch.setenv("SANDBOXFS_MATRIX", f"{share}/8")
        found.append(is_wanted(Item()))
    assert found.count(True) == 1
    for text, wanted in {"all": True, "": False}.items():
        monkeypatch.setenv("SANDBOXFS_MATRIX", text)
        assert is_wanted(Item()) is wanted


def test_the_sample_names_engines_and_cases_that_there_are():
    found = "".join(path.read_text("utf-8")
                    for path in (CHECKOUT / "tests/runtimes").glob("*.py")
                    if path.name != "matrix.py")
    for engine, cases in SAMPLE.items():
        assert engine in ENGINES or kind_of(engine) == "cri"
        assert all(case in found for case in cases)


def test_the_tests_of_an_engine_stay_together():
    assert ENGINE.search(Item.nodeid)[1] == "runc@sid"
    assert ENGINE.search("tests/runtimes/test_view.py::test_it[runc-default]") is None


UNLISTED = """
import pytest
from tests.support.skips import told_only

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.failed:
        told_only(report, "runc 9.9")
    return report
"""


def test_a_failure_that_is_only_told_is_told_last(pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("CI", "true")
    pytester.makeconftest(UNLISTED)
    pytester.makepyfile("def test_it(): assert 1 == 2, 'arithmetic'")
    result = pytester.runpytest_subprocess("-p", "tests.support.skips", timeout=60)
    assert result.ret == pytest.ExitCode.OK
    assert result.outlines[-1] == "runc 9.9: test_it"
    result.stdout.fnmatch_lines(["*arithmetic*", "*FAILED, ON VERSIONS*"])
