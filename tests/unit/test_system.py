"""`kernel.system` means what `os` means."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxfs.kernel import system

PATHS = st.text(st.sampled_from("/.ab"), max_size=12)


@given(PATHS)
def test_paths_mean_what_they_mean_in_os(path):
    for name in ("isabs", "normpath", "abspath", "dirname", "exists", "lexists"):
        ours, theirs = getattr(system.path, name), getattr(os.path, name)
        assert ours(path) == theirs(path)
        assert ours(path.encode()) == theirs(path.encode())


@given(PATHS, PATHS, PATHS)
def test_join(first, second, third):
    assert system.path.join(first, second, third) == os.path.join(first, second, third)
    assert system.path.join(first.encode(), second.encode()) == os.path.join(
        first.encode(), second.encode())


@given(st.binary())
def test_names_go_round(name):
    assert system.fsdecode(name) == os.fsdecode(name)
    assert system.fsencode(os.fsdecode(name)) == name


def test_the_environment_is_left_out():
    """`posix.environ` holds bytes and would be mistaken for `os.environ`."""
    assert not hasattr(system, "environ")


@pytest.mark.parametrize("name", ["open", "O_CLOEXEC", "mkdir", "_exit", "pipe2", "fork", "stat"])
def test_the_rest_is_posix(name):
    assert getattr(system, name) == getattr(os, name)
