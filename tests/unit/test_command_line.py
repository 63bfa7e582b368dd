"""The command line: what is parsed by hand, and how errors are written."""

import json
import subprocess
import sys

import pytest

import sandboxfs
from sandboxfs.__main__ import main
from sandboxfs.cli import run
from sandboxfs.errors import UsageError


def test_options_in_both_spellings():
    options = run.parse([
        "--bundle", "b", "--config=c=d", "--verify", "--lower", "one", "--lower=two",
        "--overlay-size", "1M", "--overlay-binds", "sh", "-c", "--not-ours",
    ])
    assert options.values == {"bundle": "b", "config": "c=d"}
    assert options.flags == {"verify"}
    assert options.overrides == [
        ("lower", "one", "--lower"), ("lower", "two", "--lower"),
        ("overlay.size", "1M", "--overlay-size"), ("overlay.binds", "true", "--overlay-binds"),
    ]
    assert options.command == ["sh", "-c", "--not-ours"]


def test_two_dashes_end_the_options():
    assert run.parse(["--", "--bundle", "--"]).command == ["--bundle", "--"]
    assert run.parse(["--bundle", "--"]).values == {"bundle": "--"}
    assert run.parse(["-", "x"]).command == ["-", "x"]
    assert run.parse([]).command == []


@pytest.mark.parametrize(("arguments", "words"), [
    (["--bogus"], "--bogus: no such option"),
    (["-x"], "-x: no such option"),
    (["--bundle"], "--bundle: needs a value"),
    (["--verify=yes"], "--verify=yes: takes no value"),
    (["--log-format", "xml"], "--log-format: xml: allowed: text, json"),
])
def test_what_cannot_be_used(arguments, words, capsys):
    with pytest.raises(UsageError):
        run.parse(arguments)
    assert main(["run", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"sandboxfs: {words}")


@pytest.mark.parametrize(("arguments", "words"), [
    (["--overlay", "weird"], "--overlay"),
    (["--overlay-size", "lots"], "--overlay-size"),
    (["--tmp", "never"], "--tmp"),
    (["--engine", "diesel"], "--engine"),
])
def test_values_are_checked_like_annotations_but_named_like_options(arguments, words, capsys):
    assert main(["run", *arguments, "--", "true"]) == 2
    assert capsys.readouterr().err.startswith(f"sandboxfs: {words}: ")


def test_every_problem_of_a_document_has_its_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"ociVersion": 1, "root": {"path": 2}, "mounts": 3}')
    assert main(["run", "--bundle", str(tmp_path)]) == 65
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("  ")]
    assert len(lines) >= 3
    assert all(line.startswith("sandboxfs: /") for line in lines)
    assert main(["run", "--log-format=json", "--bundle", str(tmp_path)]) == 65
    objects = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {"/ociVersion", "/root/path", "/mounts"} <= {each["origin"] for each in objects}
    assert {each["status"] for each in objects} == {65}


def test_a_bug_is_an_error_with_a_traceback_only_on_demand(monkeypatch, capsys):
    def broken(arguments):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(run, "main", broken)
    assert main(["run"]) == 125
    error = capsys.readouterr().err
    assert error.startswith("sandboxfs: internal error: ZeroDivisionError: oh\n  hint: --debug")
    assert main(["run", "--debug"]) == 125
    assert "Traceback" in capsys.readouterr().err
    assert main(["run", "--", "--debug"]) == 125
    assert "Traceback" not in capsys.readouterr().err


def test_an_interrupt_is_quiet(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "main", interrupted)
    assert main(["run"]) == 130
    assert capsys.readouterr().err == ""


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sandboxfs {sandboxfs.__version__}\n"
    for arguments in (["help"], ["--help"]):
        assert main(arguments) == 0
        assert "  run " in capsys.readouterr().out
    for arguments in (["run", "--help"], ["run", "-h"], ["help", "run"]):
        assert main(arguments) == 0
        text = capsys.readouterr().out
        for option in (*run.VALUES, *run.FLAGS):
            assert f"--{option}" in text
    assert main([]) == 2
    assert "usage: " in capsys.readouterr().out


def test_commands_that_do_not_exist(capsys):
    assert main(["bogus"]) == 2
    assert capsys.readouterr().err.startswith("sandboxfs: bogus: no such command")
    assert main(["--bogus"]) == 2
    assert main(["help", "bogus"]) == 2


def test_a_broken_pipe_is_quiet():
    done = subprocess.run(
        ["/bin/sh", "-c", '{ "$0" -m sandboxfs help; echo "status $?" >&2; } | true',
         sys.executable],
        capture_output=True, text=True, check=True,
    )
    assert "Traceback" not in done.stderr
    assert done.stderr.strip() in ("status 0", "status 141")


# -- the library's names -------------------------------------------------------------------


def test_the_package_imports_nothing_heavy():
    script = (
        "import sys; before = set(sys.modules); import sandboxfs; "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          check=True)
    assert done.stdout.split() == ["sandboxfs"]


def test_the_public_names():
    assert sorted(sandboxfs.__all__) == dir(sandboxfs)
    for name in sandboxfs.__all__:
        assert getattr(sandboxfs, name) is not None
    assert callable(sandboxfs.plan)
    assert callable(sandboxfs.build)
    with pytest.raises(AttributeError, match="no attribute 'bogus'"):
        sandboxfs.bogus  # noqa: B018
