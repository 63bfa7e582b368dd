"""`kernel.system` means what `os` means."""

import ast
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxfs.kernel import system
from tests.support import CHECKOUT

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


def names_of(tree):
    """Return the names of `os` that a module uses, if that is ours."""
    ours = any(
        isinstance(node, ast.ImportFrom) and node.module == "sandboxfs.kernel"
        and any(alias.name == "system" and alias.asname == "os" for alias in node.names)
        for node in ast.walk(tree)
    )
    return {
        node.attr for node in ast.walk(tree) if ours and isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name) and node.value.id == "os"
    }


def test_every_name_that_is_used_is_there():
    used = set()
    for path in (CHECKOUT / "sandboxfs").rglob("*.py"):
        used |= names_of(ast.parse(path.read_text("utf-8")))
    assert len(used) > 50
    assert {name for name in used if not hasattr(system, name)} == set()
