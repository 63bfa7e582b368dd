"""Who runs what in a parallel run: all of tests/guest one worker, which boots the guest once.

pytest-xdist's own groups (``--dist loadgroup``) are lost with pytest 9.2, where the id of a
test can't be written to any more.
"""

import re

from xdist.scheduler import LoadScopeScheduling

GUEST = "tests/guest/"
BOOT = "tests/boot/"
# Of tests/runtimes: a runtime or engine of a tree.
ENGINE = re.compile(r"\[([a-z-]+@[a-z]+)-")


class OneGuest(LoadScopeScheduling):  # type: ignore[misc]  # it ships no types
    """Every test goes to whoever is free, those of the guest together and first.

    A file of tests/boot stays together, too: its tests look at the same boots.  So do the tests
    of one engine of a tree, which takes seconds to start.
    """

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith(BOOT):
            return nodeid.split("::", maxsplit=1)[0]
        if engine := ENGINE.search(nodeid):
            return engine[1]
        return GUEST if nodeid.startswith(GUEST) else nodeid
