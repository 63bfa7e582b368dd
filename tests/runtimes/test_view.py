"""What a container sees with the hook is what its runtime gave it, on another root."""

from pathlib import Path

import pytest

from tests.runtimes.cases import CASES, Case
from tests.runtimes.container import PROBE, WRITES, Container, View, differences
from tests.runtimes.matrix import ENGINES, NOT_CALLED, kind_of, parameter, ways_of
from tests.runtimes.test_content import refuses
from tests.support import bind, snapshot, untouched
from tests.support import differences as changes

pytestmark = pytest.mark.needs("root", "overlay", "busybox", "launcher")

TABLE = [
    parameter(name, way, case.name, case)
    for case in CASES for name in ENGINES if kind_of(name) in case.runtimes
    for way in ways_of(name)
    # crun 1.8 binds nothing from the host's root then, ours or not, where a rootfs is a mount.
    if (name, way, case.name) != ("crun", "runtime", "root_propagation_unbindable")
]


def seen(done) -> View:
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return View(done.stdout)


def without_the_hook(runtime, container, place) -> tuple[View, Path]:
    """Return the view of a container in an image that has what its runtime makes in it.

    Without the hook a runtime makes in the image what that lacks, and we don't undo it; runc
    then gives a tmpfs the mode of its mountpoint, instead of the one in the spec.  Returned as
    well: the directory that the runtime leaves alone from then on, the image or all of the place.
    """
    for _ in range(3):
        before = snapshot(place.path)
        view = seen(runtime.run(container, place.rootfs))
        changed = changes(before, snapshot(place.path))
        if not changed:
            return view, place.path
    # crun 1.21 makes some mountpoints in sources of the host anew each time.
    assert not any("image" in line for line in changed), f"each time: {changed}"
    return view, place.image


@pytest.mark.parametrize(("name", "way", "case"), TABLE)
def test_the_runtimes_view_is_kept(runtime_of, by, name, way, case: Case, place, request):
    runtime = runtime_of(name)
    runtime.prepare(place.image)
    container = case.make(place)
    place.give_image_to(runtime.uid or 0 if case.owner is None else case.owner)
    if way == "runtime" and place.rootfs == place.image and not case.below:
        # As engines have it.  A runtime makes the mount that holds the rootfs private, and so all
        # binds from there; with one in front that is another mount, and these stay slaves.
        bind(place.image, place.rootfs, recursive=True)
    look, container.script = container.script, PROBE
    compared = container if case.compared else Container(PROBE)
    plain, alone = without_the_hook(runtime, compared, place)
    container.script = f"{PROBE}\n{look}\n{WRITES}"
    if way == "runtime" and runtime.forgets_the_program(container):
        view = seen(runtime.run(container, place.rootfs, by(name, way)))
        assert view.mounts["/"]["type"] != "overlay"
        request.node.stash[NOT_CALLED] = True
        return
    with untouched(alone):
        done = runtime.run(container, place.rootfs, by(name, way))
    if refuses(runtime, way, done, request.node):
        return
    hooked = seen(done)
    assert runtime.changes == []
    if case.compared and (way == "hooks" or not case.below):
        assert differences(plain, hooked, new=case.new) == []
    assert hooked.mounts["/"]["type"] == "overlay"
    assert hooked.lines("writes") == case.writes
    if case.check is not None:
        case.check(hooked)
