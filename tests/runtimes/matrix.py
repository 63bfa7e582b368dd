"""Which runtimes and engines the tables run on, in which way, and what is run when.

An engine is named ``KIND@PLACE``: this machine's by the kind alone, those of a tree by its name.
`make test` runs a sample; the rest is marked ``matrix`` and runs where ``SANDBOXFS_MATRIX`` says
``all``, or ``K/N``: the Kth of N shares.
"""

import os
import zlib

import pytest

from tests.runtimes.spaces import HAS_FRONT

MACHINE = ("runc", "crun", "containerd", "podman", "podman-rootless")
TREES = {
    "trixie": (*MACHINE, "docker"), "sid": (*MACHINE, "docker"),
    # With that tree's runc, or its podman.
    "experimental": ("runc", "containerd", "podman", "podman-rootless", "docker"),
}
ENGINES = (*MACHINE, *(f"{kind}@{tree}" for tree, kinds in TREES.items() for kind in kinds))
WAYS = ("hooks", "runtime") if HAS_FRONT else ("hooks",)
# What `make test` runs besides all that this machine's do with the hooks.
SAMPLE = {
    **dict.fromkeys((*MACHINE, "cri"), ("default", "read_only_root", "content")),
    "runc@trixie": ("default", "content"),
    "runc@experimental": ("default", "read_only_root", "content", "content_read_only"),
    "crun@sid": ("default", "mounts_inside_a_read_only_bind", "content", "content_read_only"),
    "containerd@sid": ("default", "content"),
    "podman@sid": ("default", "flags_of_binds_and_file_systems", "content"),
    "podman-rootless@sid": ("content",),
    "docker@sid": ("default", "content"),
    "cri@trixie": ("content_of_a_pod", "propagation_in_a_pod"),
    "cri@sid": ("content_of_a_pod", "annotations_of_a_pod"),
}
# In the stash of a test whose container did not start, rightly so.
REFUSED = pytest.StashKey[bool]()


def kind_of(engine: str) -> str:
    """Return what an engine is, without where it comes from."""
    return engine.partition("@")[0]


def ways_of(engine: str) -> tuple[str, ...]:
    """Return the ways in which the product can be used with an engine."""
    return tuple(way for way in WAYS if way != "hooks" or kind_of(engine) != "docker")


def parameter(engine: str, way: str, case: str, *values: object):
    """Return a parameter of a table; it runs in `make test` if it is of the sample."""
    ours = way == "hooks" and "@" not in engine
    marks = [pytest.mark.combination(engine, way, case)]
    if not ours and case not in SAMPLE.get(engine, ()):
        marks.append(pytest.mark.matrix)
    words = [engine, *([] if ours else [way]), case]
    return pytest.param(engine, way, *values, id="-".join(words), marks=marks)


def is_wanted(item: pytest.Item) -> bool:
    """Return whether a test runs in this run."""
    if item.get_closest_marker("matrix") is None:
        return True
    wanted = os.environ.get("SANDBOXFS_MATRIX", "")
    if "/" not in wanted:
        return wanted == "all"
    share, shares = map(int, wanted.split("/"))
    return zlib.crc32(item.nodeid.encode()) % shares == share % shares
