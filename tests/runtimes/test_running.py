"""While a container runs: who else is in it, and what of it the host sees."""

import pytest

from tests.runtimes.cases import DOCUMENTS
from tests.runtimes.conftest import NAMES
from tests.runtimes.container import Container, Volume
from tests.support import table, untouched

pytestmark = pytest.mark.needs("root", "overlay", "busybox", "launcher")

PREFIX = "dev.sandboxfs."


@pytest.mark.parametrize("name", NAMES)
def test_exec_enters_the_same_root(runtime_of, name, place, hooks):
    runtime = runtime_of(name)
    place.give_image_to(runtime.uid or 0)
    runtime.run(Container(mounts=[Volume(place.path, "/control")]), place.rootfs)
    with untouched(place.path), runtime.started(
        Container("echo made >/etc/made"), place.rootfs, hooks
    ) as running:
        found = running.exec("cat /etc/made; echo x >/tmp/x; rm /etc/passwd")
        assert found == (0, "made\n")
        status, output = running.exec("cat /tmp/x; cat /etc/passwd")
        assert (status, output.splitlines()[0]) == (1, "x")
        assert "No such file" in output


def mounts_of_ours() -> set[tuple[bytes, bytes]]:
    return {(each.mountpoint, each.type) for each in table()}


@pytest.mark.parametrize("propagation", [None, "rshared", "rslave"])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_host_sees_no_more_than_without_the_hook(
    runtime_of, name, place, hooks, propagation
):
    runtime = runtime_of(name)
    volume = place.directory("volume")

    def made() -> Container:
        def change(document):
            if propagation:
                document["linux"]["rootfsPropagation"] = propagation

        return Container(change=change, mounts=[Volume(volume, "/shared", "rshared")])

    before = mounts_of_ours()
    with runtime.started(made(), place.rootfs):
        without = mounts_of_ours() - before
    with runtime.started(made(), place.rootfs, hooks):
        assert mounts_of_ours() - before == without
    assert mounts_of_ours() == before


@pytest.mark.parametrize("name", NAMES)
def test_two_containers_of_a_pod_share_a_volume(runtime_of, name, place, hooks):
    runtime = runtime_of(name)
    place.give_image_to(runtime.uid or 0)
    volume = place.directory("volume")
    hint = {"source": str(volume), "type": "tmpfs", "share": "pod", "options": "size=1M"}
    annotations = {f"{PREFIX}mount.v.{field}": value for field, value in hint.items()}
    annotations[f"{PREFIX}pod"] = "of-the-tests"

    def made(script: str, at: str) -> Container:
        return Container(script, mounts=[Volume(volume, at)], annotations=annotations)

    with runtime.started(made("echo first >/one/file", "/one"), place.rootfs, hooks) as first:
        done = runtime.run(
            made("cat /two/file; echo second >/two/file", "/two"), place.rootfs, hooks)
        assert (done.returncode, done.stdout) == (0, "first\n"), done.stderr
        assert first.exec("cat /one/file") == (0, "second\n")
    # It was memory: nothing of it is on the host, and the fixture looks for what is left.
    assert list(volume.iterdir()) == []
    # After the last one, it is another volume.
    done = runtime.run(made("ls /three", "/three"), place.rootfs, hooks)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("tmp", "kept"), [({}, ["x"]), ({f"{PREFIX}tmp": "tmpfs"}, [])])
def test_without_an_overlay_writes_reach_the_image(runtime_of, name, place, hooks, tmp, kept):
    """Those to /tmp as well, unless that is asked for."""
    runtime = runtime_of(name)
    place.give_image_to(runtime.uid or 0)
    container = Container(
        "echo kept >/etc/kept; echo >/tmp/x; cat /proc/self/mountinfo",
        annotations={f"{PREFIX}overlay": "none", **tmp})
    done = runtime.run(container, place.rootfs, hooks)
    assert done.returncode == 0, done.stderr
    assert (place.image / "etc/kept").read_text() == "kept\n"
    assert [each.name for each in (place.image / "tmp").iterdir()] == kept
    assert " overlay " not in done.stdout


def test_podman_with_ids_of_its_own_runs_no_create_container_hook(runtime_of, place, hooks):
    """Not even /bin/true: crun 1.8.1 can't enter podman's storage then (docs/limits.md)."""
    place.give_image_to(300000)
    container = Container("echo ran", user=True)
    podman = runtime_of("podman")
    assert "ran" in podman.run(container, place.rootfs).stdout
    harmless = hooks.only("createContainer").changed(
        lambda hook: hook.update(path="/bin/true", args=["true"]), "createContainer")
    for each in (harmless, hooks):
        done = podman.run(container, place.rootfs, each)
        assert done.returncode != 0
        assert "ran" not in done.stdout


@pytest.mark.parametrize("name", ["runc", "crun", "containerd", "podman"])
def test_an_upper_on_disk_goes_with_its_container(runtime_of, name, place, hooks):
    runtime = runtime_of(name)
    runtime.run(Container(mounts=[Volume(place.path, "/control")]), place.rootfs)
    uppers = place.directory("uppers")
    policy = place.path / "config.toml"
    policy.write_text("[annotations]\nhost-paths = true\n", "utf-8")
    allowed = hooks.changed(
        lambda hook: hook["args"].extend(["--config", str(policy)]), *hooks.section)

    def run(value: str):
        container = Container("echo made >/etc/made; rm /etc/group; ls /control",
                              annotations={f"{PREFIX}overlay": f"dir={uppers}{value}"},
                              mounts=[Volume(uppers, "/control")])
        return runtime.run(container, place.rootfs, allowed)

    with untouched(place.image):
        done = run("")
        assert done.returncode == 0, done.stderr
        # It was there while the container ran, and isn't any more.
        assert len(done.stdout.split()) == 1
        assert list(uppers.iterdir()) == []
        done = run(":keep")
    assert done.returncode == 0, done.stderr
    (kept,) = uppers.rglob("etc/made")
    assert kept.read_text() == "made\n"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_link_in_the_place_of_proc_is_refused(runtime_of, name, place, hooks):
    """By the runtimes themselves (CVE-2019-19921), and the hooks that ran by then leave nothing."""
    runtime = runtime_of(name)
    (place.image / "proc").rmdir()
    (place.image / "elsewhere").mkdir()
    (place.image / "proc").symlink_to("/elsewhere")
    plain = runtime.run(Container("echo ran"), place.rootfs)
    with untouched(place.image):
        hooked = runtime.run(Container("echo ran"), place.rootfs, hooks)
    for done in (plain, hooked):
        assert done.returncode != 0
        assert done.stdout == ""
        assert "/proc" in done.stderr
