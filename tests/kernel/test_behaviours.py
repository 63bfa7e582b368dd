"""The table of behaviours on this machine's kernel, on both engines."""

import pytest

from tests.kernel import behaviours


@pytest.mark.parametrize("case", behaviours.cases(), ids=str)
def test_behaviour(case):
    failure = behaviours.run_case(case)
    if failure and failure.startswith(behaviours.SKIPPED):
        pytest.skip(failure.removeprefix("skipped: "))
    assert failure is None, failure


def test_a_failing_behaviour_is_reported_with_its_traceback():
    def fails(engine):
        assert engine == "another", "said by the behaviour"

    failure = behaviours.run_case(behaviours.Case("fails", "attached", fails))
    assert failure is not None
    assert "said by the behaviour" in failure


def test_a_behaviour_that_hangs_is_ended():
    import time

    def hangs(engine):
        time.sleep(60)

    failure = behaviours.run_case(behaviours.Case("hangs", "attached", hangs), seconds=0.2)
    assert failure == "no end in time"


def test_a_behaviour_that_dies_silently_failed():
    import os

    def dies(engine):
        os._exit(0 if engine == "detached" else 3)

    failure = behaviours.run_case(behaviours.Case("dies", "attached", dies))
    assert failure == "ended with wait status 0x300, without a word"
