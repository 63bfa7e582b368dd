"""Pods of real containers, by runc and crun, through the hooks as they are registered."""

import os

import pytest

from tests.support.pods import assert_nothing_left, on_host, pods, store_mounts

pytestmark = pytest.mark.needs("root", "runc", "crun", "launcher")
RUNTIMES = ("runc", "crun")
each_runtime = pytest.mark.parametrize("runtime", RUNTIMES)


@each_runtime
def test_two_containers_without_a_sandbox_share_a_volume(public_path, runtime):
    def body(host):
        one = host.started("one")
        two = host.started("two", at="/elsewhere")
        one.sh("echo first > /data/file")
        assert two.sh("cat /elsewhere/file") == "first\n"
        two.sh("echo second >> /elsewhere/file")
        assert one.sh("cat /data/file") == "first\nsecond\n"
        # Neither what the runtime bound there nor the host sees any of it.
        assert os.listdir(host.path / "volumes-cache") == []
        (pod,) = pods("list")
        assert pod["id"] == "p1"
        assert pod["stale"] is False
        assert [each["living"] for each in pod["containers"]] == [True, True]
        (volume,) = pod["volumes"]
        assert volume["size"] == 1 << 20
        assert volume["used"] >= 4096
        assert len(store_mounts()) == 1
        one.delete()
        assert two.sh("cat /elsewhere/file") == "first\nsecond\n"
        assert len(store_mounts()) == 1
        two.delete()
        assert pods("list") == []
        assert_nothing_left()

    on_host(body, public_path, runtime)
