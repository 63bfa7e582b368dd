"""The operator's file, read by hooks in user namespaces: there root's files are nobody's."""

import os

import pytest

from sandboxfs import policy
from sandboxfs.errors import PolicyError
from tests.support import UNPRIVILEGED
from tests.support.namespace import in_namespace

# As containers have it: the overflow id 65534 is mapped as well.
MAPPINGS = [(0, 100000, 65536)]

pytestmark = pytest.mark.needs("root", "user-namespaces")


@pytest.fixture
def file(public_path):
    path = public_path / "config.toml"
    path.write_text("[overlay]\nmode = 'none'\n", "utf-8")
    path.chmod(0o644)
    return path


def mode(path):
    return policy.load(str(path)).overlay


def message(path):
    with pytest.raises(PolicyError) as caught:
        policy.load(str(path))
    return caught.value.line()


def test_roots_file_counts_there(file):
    assert in_namespace(mode, file, mappings=MAPPINGS) == "none"
    assert in_namespace(mode, file, uid=UNPRIVILEGED) == "none"


def test_a_users_own_file_counts_in_their_namespace(file):
    os.chown(file, UNPRIVILEGED, UNPRIVILEGED)
    os.chown(file.parent, UNPRIVILEGED, UNPRIVILEGED)
    assert in_namespace(mode, file, uid=UNPRIVILEGED) == "none"
    assert f"belongs to user {UNPRIVILEGED}" in message(file)


def test_a_file_of_a_user_of_the_container_does_not(file):
    os.chown(file, 100000 + 1000, 0)
    said = in_namespace(message, file, mappings=MAPPINGS)
    assert said == f"{file}: belongs to user 1000, not to root"


def test_where_it_cant_be_read_it_is_an_error_and_the_hint_says_why(file):
    file.chmod(0o600)
    said = in_namespace(_whole, file, mappings=MAPPINGS)
    assert said.startswith(f"{file}: read: EACCES")
    assert "hooks of containers with a user namespace run as its root" in said
    file.chmod(0o644)
    file.parent.chmod(0o700)
    assert in_namespace(_whole, file, mappings=MAPPINGS).startswith(f"{file}: open: EACCES")


def _whole(path):
    with pytest.raises(PolicyError) as caught:
        policy.load(str(path))
    return str(caught.value)
