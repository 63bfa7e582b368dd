"""Pods, as a kubelet asks containerd for them: their containers' roots, mounts and annotations."""

import os

import pytest

from sandboxfs.kernel import abi, syscalls
from tests.runtimes.cri import BIDIRECTIONAL, HOST_TO_CONTAINER, Refused
from tests.runtimes.matrix import REFUSED, parameter, ways_of
from tests.runtimes.test_content import ATTEMPTS, SEALED, expected
from tests.support import mount_tmpfs, untouched

pytestmark = pytest.mark.needs("root", "overlay", "busybox", "launcher")

PREFIX = "dev.sandboxfs."
NAMES = ("cri", "cri@trixie", "cri@sid", "cri@experimental")


def table(*cases: str, more: str = "", values: tuple[bool | None, ...] = (None,)):
    """Make a test run on every engine: a case for each of the values that it takes besides."""
    return pytest.mark.parametrize(
        ("name", "way", *([more] if more else [])),
        [parameter(name, way, case, *([value] if more else []))
         for name in NAMES for way in ways_of(name)
         for case, value in zip(cases, values, strict=True)])


@pytest.fixture
def node(runtime_of, place, name, way, request):
    """containerd with an image; the test ends here where no pod is the right answer."""
    cri = runtime_of(name)
    (place.image / "etc/of-the-image").write_text("the image's\n", "utf-8")
    cri.import_images(place.image)
    if way == "hooks" and cri.pins_the_rootfs():
        # Without us it runs.  The pod itself has no root of ours.
        with cri.pod("plain") as pod:
            assert cri.execute(pod.run(), "echo ran") == "ran\n"
        with pytest.raises(Refused, match="sandboxfs-runtime"), cri.pod(way) as pod:
            pod.run()
        request.node.stash[REFUSED] = True
        return None
    return cri


def mounts_of(place) -> list[dict[str, object]]:
    sealed, volume = place.directory("sealed", "file"), place.directory("volume")
    return [{"container_path": "/sealed", "host_path": str(sealed), "readonly": True},
            {"container_path": "/sealed-file", "host_path": str(sealed / "file"),
             "readonly": True},
            {"container_path": "/volume", "host_path": str(volume)}]


def of_pods(lines: list[str]) -> list[str]:
    """Leave out what pods don't have: a tmpfs, and on cgroup v1 a read-only /sys/fs/cgroup."""
    return [line for line in lines if "memory" not in line and "sys-directory" not in line]


@table("content_of_a_pod", "content_of_a_read_only_pod", more="read_only", values=(False, True))
def test_content(node, way, read_only, place):
    if node is None:
        return
    mounts = mounts_of(place)
    attempts = "\n".join(of_pods(ATTEMPTS.splitlines()))
    with node.pod("plain") as pod:
        # The control: the image is written, and what is read-only isn't.
        container = pod.run(mounts=mounts, security={"readonly_rootfs": read_only})
        said = node.execute(container, attempts).splitlines()
        assert said[6:] == [*of_pods(SEALED), "masked 0"], said
        assert (node.rootfs(container) / "etc/written").exists() is not read_only
    (place.path / "volume/written").unlink()
    with untouched(place.path / "sealed"), node.pod(way) as pod:
        container = pod.run("touch /etc/by-the-payload; ls /etc/by-the-payload >/volume/said",
                            mounts=mounts, security={"readonly_rootfs": read_only})
        with untouched(node.rootfs(container)):
            said = node.execute(container, attempts).splitlines()
            assert said == of_pods(expected(read_only))
            # A second exec enters the same root.
            assert node.execute(container, "cat /tmp/written") == "x\n"
    assert {each.name for each in (place.path / "volume").iterdir()} == {"said", "written"}


@table("propagation_in_a_pod")
def test_propagation(node, way, place):
    if node is None:
        return
    into, both = place.directory("into", "below/covered"), place.directory("both", "below/covered")
    mounts = [
        {"container_path": "/into", "host_path": str(into), "propagation": HOST_TO_CONTAINER},
        {"container_path": "/both", "host_path": str(both), "propagation": BIDIRECTIONAL},
    ]
    with node.pod(way) as pod:
        container = pod.run(
            mounts=mounts, security={"capabilities": {"add_capabilities": ["SYS_ADMIN"]}})
        for each in (into, both):
            mount_tmpfs(each / "below")
            (each / "below/of-the-host").touch()
        try:
            said = node.execute(container, "ls /into/below /both/below")
            assert said.split() == ["/both/below:", "of-the-host", "/into/below:", "of-the-host"]
        finally:
            for each in (into, both):
                syscalls.umount2(os.fsencode(each / "below"), abi.MNT_DETACH)
        assert node.execute(container, "ls /into/below").split() == ["covered"]
        made = "mount -t tmpfs none /both/below && touch /both/below/of-the-container"
        assert node.execute(container, made) == ""
        assert [each.name for each in (both / "below").iterdir()] == ["of-the-container"]
        assert node.execute(container, "umount /both/below") == ""
        assert [each.name for each in (both / "below").iterdir()] == ["covered"]


@table("annotations_of_a_pod")
def test_annotations(node, way, place):
    """A container's own, and its pod's, reach us; a wrong one is refused in its own words."""
    if node is None:
        return
    with node.pod(way) as pod:
        container = pod.run(annotations={f"{PREFIX}overlay": "none"})
        assert node.execute(container, "echo kept >/etc/kept") == ""
        assert (node.rootfs(container) / "etc/kept").read_text() == "kept\n"
        with pytest.raises(Refused, match="sometimes"):
            pod.run(name="two", annotations={f"{PREFIX}tmp": "sometimes"})
    with (
        pytest.raises(Refused, match="sometimes"),
        node.pod(way, annotations={f"{PREFIX}tmp": "sometimes"}) as pod,
    ):
        pod.run()
