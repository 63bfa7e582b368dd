"""A payload that is root of its user namespace, with all capabilities, can't loosen its mounts."""

import pytest

from sandboxfs.spec.check_process import CAPABILITIES
from tests.attacks.tools import ENGINES, bind_mount
from tests.support import UNPRIVILEGED, default_spec, run_cli

pytestmark = pytest.mark.needs("root", "overlay", "busybox", "user-namespaces")

# For each mount: its flags, what of them could be cleared, and whether it could be unmounted.
PROBE = r"""
while read -r _ _ _ _ point flags _; do
    echo "$point $flags"
done < /proc/self/mountinfo > /tmp/table
while read -r point flags; do
    for pair in ro:rw nosuid:suid nodev:dev noexec:exec; do
        case ,$flags, in *,${pair%:*},*) ;; *) continue;; esac
        echo "tried ${pair%:*} $point"
        mount -o "remount,bind,${pair#*:}" "$point" 2>/dev/null && echo "cleared ${pair%:*} $point"
    done
    test "$point" = / && continue
    echo "tried umount $point"
    umount -l "$point" 2>/dev/null && echo "unmounted $point"
done < /tmp/table
touch /sealed/x 2>/dev/null && echo written
:
"""


def probing(source):
    document = default_spec("/bin/sh", "-c", PROBE)
    document["linux"]["namespaces"].append({"type": "user"})
    document["process"]["capabilities"] = {
        name: list(CAPABILITIES) for name in ("bounding", "effective", "permitted", "inheritable")
    }
    document["mounts"].append(bind_mount(source, "/sealed", "ro", "nosuid", "nodev", "noexec"))
    return document


def for_one_id(document):
    document["linux"]["namespaces"] = [
        entry for entry in document["linux"]["namespaces"] if entry["type"] != "cgroup"]
    for mount in document["mounts"]:
        # One id is mapped: the group of terminals isn't.
        mount["options"] = [word for word in mount["options"] if word != "gid=5"]
    return document


MAPPINGS = [{"containerID": 0, "hostID": 300000, "size": 65536}]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mappings", [None, MAPPINGS])
@pytest.mark.parametrize("readonly", [False, True])
def test_nothing_that_was_built_from_outside_can_be_loosened(
    bundle, public_path, engine, mappings, readonly
):
    source = public_path / "source"
    source.mkdir()
    document = probing(source)
    document["root"]["readonly"] = readonly
    if mappings:
        document["linux"]["uidMappings"] = document["linux"]["gidMappings"] = mappings
    done = run_cli("run", "--bundle", bundle(document), "--engine", engine, check=0)
    lines = done.stdout.splitlines()
    assert "tried ro /sealed" in lines
    assert "tried umount /proc/sys" in lines
    assert ("tried ro /" in lines) is readonly
    assert [line for line in lines if not line.startswith("tried")] == []
    assert list(source.iterdir()) == []


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_built_inside_can_be_loosened(bundle, public_path, engine):
    """The control, and what unprivileged users have to know: it is their own tree."""
    source = public_path / "source"
    source.mkdir()
    made = bundle(for_one_id(probing(source)))
    done = run_cli("run", "--bundle", made, "--engine", engine, uid=UNPRIVILEGED, check=0)
    assert "unmounted /sealed" in done.stdout.splitlines()
    assert "cleared ro /sealed" in done.stdout.splitlines()
