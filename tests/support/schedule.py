"""Who runs what in a parallel run: all of tests/guest one worker, which boots the guest once.

pytest-xdist's own groups (``--dist loadgroup``) are lost with pytest 9.2, where the id of a
test can't be written to any more.
"""

from xdist.scheduler import LoadScopeScheduling

GUEST = "tests/guest/"
BOOT = "tests/boot/"


class OneGuest(LoadScopeScheduling):  # type: ignore[misc]  # it ships no types
    """Every test goes to whoever is free, those of the guest together and first.

    A file of tests/boot stays together, too: its tests look at the same boots.
    """

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith(BOOT):
            return nodeid.split("::", maxsplit=1)[0]
        return GUEST if nodeid.startswith(GUEST) else nodeid
