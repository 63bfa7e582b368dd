"""By writing, and by what is in the image and on the host afterwards: it is our root, and sealed.

The mount table is no proof: under some runtimes it shows a root that nobody runs on.
"""

import pytest

from tests.runtimes.container import Container, Memory, Volume
from tests.runtimes.matrix import ENGINES, REFUSED, parameter, ways_of
from tests.support import untouched

pytestmark = pytest.mark.needs("root", "overlay", "busybox", "launcher")

# Where one succeeds, against all expectation, the machine is as before.
ATTEMPTS = """
again() { value=$(cat $1) && echo "$value" >$1; }
tried() { (eval "$2") 2>/dev/null && echo "written $1" || echo "refused $1"; }
cat /etc/of-the-image
tried root 'echo x >/etc/written && cat /etc/written >/dev/null'
tried image-file 'echo changed >/etc/of-the-image'
tried removal 'rm /etc/moved'
tried tmp 'echo x >/tmp/written'
tried volume 'echo x >/volume/written'
tried read-only-volume 'echo x >/sealed/written'
tried read-only-file 'echo x >>/sealed/file'
tried file-volume 'echo x >>/sealed-file'
tried read-only-memory 'echo x >/memory/written'
tried proc-sys 'again /proc/sys/kernel/domainname'
tried sys 'again /sys/kernel/profiling'
tried sys-directory 'mkdir /sys/fs/cgroup/tests && rmdir /sys/fs/cgroup/tests'
tried mask 'echo x >/sys/firmware/written'
echo "masked $(cat /proc/timer_list /proc/keys 2>/dev/null | wc -c)"
"""
SEALED = [f"refused {each}" for each in (
    "read-only-volume", "read-only-file", "file-volume", "read-only-memory", "proc-sys", "sys",
    "sys-directory", "mask")]
OURS = [f"written {each}" for each in ("root", "image-file", "removal", "tmp", "volume")]


def expected(read_only: bool) -> list[str]:
    writes = list(OURS)
    if read_only:
        writes[:3] = [each.replace("written", "refused") for each in writes[:3]]
    return ["the image's", *writes, *SEALED, "masked 0"]


def made(place, read_only: bool) -> Container:
    (place.image / "etc/of-the-image").write_text("the image's\n", "utf-8")
    sealed, volume = place.directory("sealed", "file"), place.directory("volume")
    volume.chmod(0o777)
    return Container(ATTEMPTS, readonly=read_only, mounts=[
        Volume(sealed, "/sealed", "ro"), Volume(sealed / "file", "/sealed-file", "ro"),
        Volume(volume, "/volume"), Memory("/memory", "ro", "size=64k")])


TABLE = [
    parameter(engine, way, "content_read_only" if read_only else "content", read_only)
    for engine in ENGINES for way in ways_of(engine) for read_only in (False, True)
]


@pytest.mark.parametrize(("name", "way", "read_only"), TABLE)
def test_the_root_is_ours_and_what_is_read_only_is(
    runtime_of, by, name, way, read_only, place, request
):
    runtime = runtime_of(name)
    runtime.prepare(place.image)
    container = made(place, read_only)
    place.give_image_to(runtime.uid or 0)
    # The control: without us what is read-only is so, too, but the image is written.
    plain = runtime.run(container, place.rootfs)
    assert plain.stdout.splitlines()[6:] == [*SEALED, "masked 0"], plain
    written = (place.image / "etc/written").exists() or "etc/written" in str(runtime.changes)
    assert written != read_only
    (place.path / "volume/written").unlink()
    (place.image / "etc/of-the-image").write_text("the image's\n", "utf-8")
    for gone in ("etc/written", "tmp/written"):
        (place.image / gone).unlink(missing_ok=True)
    (place.image / "etc/moved").touch()
    with untouched(place.image, place.path / "sealed"):
        done = runtime.run(container, place.rootfs, by(name, way))
    if refuses(runtime, way, done, request.node):
        assert list((place.path / "volume").iterdir()) == []
        return
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.stdout.splitlines() == expected(read_only)
    assert [each.name for each in (place.path / "volume").iterdir()] == ["written"]
    assert runtime.changes == []


def refuses(runtime, way, done, node) -> bool:
    """Return whether no container is the right answer, after looking at the answer."""
    if way != "hooks" or not runtime.pins_the_rootfs():
        return False
    assert done.returncode != 0, f"it ran on another root: {done.stdout}"
    assert done.stdout == ""
    assert "sandboxfs-runtime" in done.stderr, done.stderr
    node.stash[REFUSED] = True
    return True
