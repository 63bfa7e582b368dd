"""What a container sees with the hook is what its runtime gave it, on another root."""

import pytest

from tests.runtimes.cases import CASES, Case
from tests.runtimes.container import PROBE, WRITES, Container, View, differences
from tests.runtimes.matrix import ENGINES, kind_of, parameter, ways_of
from tests.runtimes.test_content import refuses
from tests.support import differences as changes
from tests.support import snapshot, untouched

pytestmark = pytest.mark.needs("root", "overlay", "busybox", "launcher")

# With this machine's runtimes and the hooks, all of it is run with every `make test`.
TABLE = [
    parameter(name, way, case.name, case, sampled=(way, "@" in name) == ("hooks", False))
    for case in CASES for name in ENGINES if kind_of(name) in case.runtimes
    for way in ways_of(name)
]


def seen(done) -> View:
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return View(done.stdout)


def without_the_hook(runtime, container, place) -> View:
    """Return the view of a container in an image that has what its runtime makes in it.

    Without the hook a runtime makes in the image what that lacks, and we don't undo it; runc
    then gives a tmpfs the mode of its mountpoint, instead of the one in the spec.
    """
    for _ in range(3):
        before = snapshot(place.image)
        view = seen(runtime.run(container, place.rootfs))
        if not (changed := changes(before, snapshot(place.image))):
            return view
    raise AssertionError(f"the runtime itself changes the image each time: {changed}")


@pytest.mark.parametrize(("name", "way", "case"), TABLE)
def test_the_runtimes_view_is_kept(runtime_of, by, name, way, case: Case, place, request):
    runtime = runtime_of(name)
    runtime.prepare(place.image)
    container = case.make(place)
    place.give_image_to(runtime.uid or 0 if case.owner is None else case.owner)
    look, container.script = container.script, PROBE
    plain = without_the_hook(runtime, container if case.compared else Container(PROBE), place)
    container.script = f"{PROBE}\n{look}\n{WRITES}"
    with untouched(place.path):
        done = runtime.run(container, place.rootfs, by(name, way))
    if refuses(runtime, way, done, request.node):
        return
    hooked = seen(done)
    assert runtime.changes == []
    if case.compared:
        assert differences(plain, hooked, new=case.new) == []
    assert hooked.mounts["/"]["type"] == "overlay"
    assert hooked.lines("writes") == case.writes
    if case.check is not None:
        case.check(hooked)
