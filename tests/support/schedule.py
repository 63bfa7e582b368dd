"""Who runs what in a parallel run: all of tests/guest one worker, which boots the guest once.

pytest-xdist's own groups (``--dist loadgroup``) are lost with pytest 9.2, where the id of a
test can't be written to any more.
"""

from xdist.scheduler import LoadScopeScheduling

GUEST = "tests/guest/"


class OneGuest(LoadScopeScheduling):  # type: ignore[misc]  # it ships no types
    """Every test goes to whoever is free, those of the guest together and first."""

    def _split_scope(self, nodeid: str) -> str:
        return GUEST if nodeid.startswith(GUEST) else nodeid
