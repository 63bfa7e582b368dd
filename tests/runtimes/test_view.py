"""What a container sees with the hook is what its runtime gave it, on another root."""

import pytest

from tests.runtimes.cases import CASES, Case
from tests.runtimes.container import PROBE, WRITES, Container, View, differences
from tests.support import differences as changes
from tests.support import snapshot, untouched

pytestmark = pytest.mark.needs("root", "overlay", "busybox", "launcher")

TABLE = [
    pytest.param(name, case, id=f"{name}-{case.name}")
    for case in CASES for name in case.runtimes
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


@pytest.mark.parametrize(("name", "case"), TABLE)
def test_the_runtimes_view_is_kept(runtime_of, name, case: Case, place, hooks):
    runtime = runtime_of(name)
    runtime.prepare(place.image)
    container = case.make(place)
    place.give_image_to(runtime.uid or 0 if case.owner is None else case.owner)
    look, container.script = container.script, PROBE
    plain = without_the_hook(runtime, container if case.compared else Container(PROBE), place)
    container.script = f"{PROBE}\n{look}\n{WRITES}"
    with untouched(place.path):
        hooked = seen(runtime.run(container, place.rootfs, hooks))
    if case.compared:
        assert differences(plain, hooked, new=case.new) == []
    assert hooked.mounts["/"]["type"] == "overlay"
    assert hooked.lines("writes") == case.writes
    if case.check is not None:
        case.check(hooked)
