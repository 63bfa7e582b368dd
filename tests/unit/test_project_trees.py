"""The trees with today's engines: made whole or not at all, anew only when their recipe changes."""

import pytest

from tests.support import enginetrees

pytestmark = pytest.mark.needs("root")

# Makes what `enginetrees` asks for, or half of it; each start is a line in a file.
MMDEBSTRAP = """#!/bin/sh
echo started >>{log}
for each; do case $each in */root) mkdir -p $each/usr/bin ;; esac; done
echo "E: the mirror at https://mirror.test/debian has a bad day" >&2
exit $(cat {status})
"""
APT = "#!/bin/sh\necho https://mirror.test/debian Debian Debian main\n"


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """Programs that stand in for the ones that need a network; `status` is what they end with."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (tmp_path / "log").touch()
    (tmp_path / "status").write_text("0")
    text = MMDEBSTRAP.format(log=tmp_path / "log", status=tmp_path / "status")
    for name, content in {"mmdebstrap": text, "apt-get": APT}.items():
        (programs / name).write_text(content)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setattr(enginetrees, "CACHE", tmp_path / "trees")
    recipes = {"oak": enginetrees.Recipe(["stable"], ["wood"], "minbase"),
               "ivy": enginetrees.Recipe(["stable", "next"], ["leaf"], "extract", "oak", ["leaf"])}
    monkeypatch.setattr(enginetrees, "RECIPES", recipes)
    return tmp_path


def starts(workshop) -> int:
    return len((workshop / "log").read_text().splitlines())


def test_a_tree_is_made_once(workshop):
    assert enginetrees.absence("oak") == f"the set-up has not made {workshop}/trees/oak"
    assert enginetrees.failure("oak") is None
    for _ in range(2):
        assert enginetrees.make("oak") is None
    assert starts(workshop) == 1
    assert enginetrees.absence("oak") is None


def test_another_recipe_makes_another_tree(workshop, monkeypatch):
    assert [enginetrees.make(name) for name in ("oak", "ivy")] == [None, None]
    monkeypatch.setitem(
        enginetrees.RECIPES, "oak", enginetrees.Recipe(["stable"], ["wood", "bark"], "minbase"))
    assert not enginetrees.is_made("oak")
    # What lies on it is another one as well.
    assert not enginetrees.is_made("ivy")
    assert enginetrees.make("oak") is None
    assert starts(workshop) == 3


def test_what_cannot_be_fetched_leaves_a_reason_and_no_tree(workshop):
    (workshop / "status").write_text("100")
    reason = enginetrees.make("oak")
    assert reason == "mmdebstrap: E: the mirror at the mirror has a bad day"
    assert starts(workshop) == enginetrees.ATTEMPTS
    assert [each.name for each in (workshop / "trees").iterdir()] == ["oak.failed"]
    for name in ("oak", "ivy"):
        assert enginetrees.absence(name) == enginetrees.failure(name) == reason
    # The next set-up tries again.
    (workshop / "status").write_text("0")
    assert enginetrees.main() == 0
    assert enginetrees.failure("oak") is None
    assert enginetrees.layers("ivy") == [workshop / "trees" / each / "root"
                                         for each in ("ivy", "oak")]


def test_a_half_made_tree_is_none(workshop):
    (workshop / "trees/oak/root").mkdir(parents=True)
    (workshop / "trees/oak.part/root").mkdir(parents=True)
    assert not enginetrees.is_made("oak")
    assert enginetrees.make("oak") is None
    assert [each.name for each in (workshop / "trees").iterdir()] == ["oak"]


@pytest.mark.parametrize(("text", "number"), [
    ("runc version 1.3.6+ds1\ncommit: 1.3.6+ds1-1\n", "1.3.6"), ("crun version 1.28\n", "1.28"),
    ("containerd github.com/containerd/containerd/v2 2.1.9 2.1.9~ds1\n", "2.1.9"),
    ("Docker version 28.5.2+dfsg4, build 89c5e8f\n", "28.5.2"), ("Python 3.14.10\n", "3.14.10"),
    ("none of them\n", ""),
])
def test_versions_are_read_from_what_programs_say(text, number):
    assert enginetrees._number(text) == number
