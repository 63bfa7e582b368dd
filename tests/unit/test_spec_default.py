"""The spec without a bundle, and the commands `spec` and `validate`."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from sandboxfs.cli import spec as spec_command
from sandboxfs.cli import validate
from sandboxfs.errors import SpecError
from sandboxfs.plan import from_spec
from sandboxfs.spec import default, load, schema
from tests.support import CHECKOUT, containerd_spec, minimal_spec
from tests.unit.test_schema_config import official


def environment(spec):
    return dict(entry.split("=", 1) for entry in spec.process.env)


@pytest.mark.parametrize("rootless", [False, True])
@pytest.mark.parametrize("rootfs", ["/", "/srv/image.erofs", b"/srv/a\xff"])
def test_the_default_is_right(rootfs, rootless):
    spec = default.spec(rootfs, ["true"], rootless)
    assert schema.problems(spec.document) == []
    assert spec.root_path == os.fsdecode(rootfs)
    assert (spec.bundle, spec.warnings, spec.not_applied) == (None, [], [])
    assert spec.process.args == ["true"]
    assert [entry.type for entry in spec.namespaces] == [
        "pid", "mount", "ipc", "uts", *["user"] * rootless,
    ]
    assert [mount.destination for mount in spec.mounts] == [
        "/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue", "/sys",
    ]
    if rootless:
        (mapping,) = spec.uid_mappings
        assert (mapping.container_id, mapping.host_id, mapping.size) == (0, os.geteuid(), 1)
        assert "gid=5" not in spec.mounts[2].options


def test_who_is_not_root_gets_a_user_namespace(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert default.document()["linux"]["uidMappings"] == [
        {"containerID": 0, "hostID": 1000, "size": 1}
    ]


def test_a_relative_root_is_the_callers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert default.spec("tree").root_path == str(tmp_path / "tree")


def test_the_callers_surroundings_in_a_view_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/opt/bin")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("SECRET", "x")
    spec = default.spec()
    assert environment(spec) == {"PATH": "/opt/bin", "HOME": "/home/me", "TERM": "dumb"}
    assert spec.process.cwd == str(tmp_path)


def test_another_root_has_surroundings_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/opt/bin")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("TERM", raising=False)
    spec = default.spec("/srv")
    assert environment(spec) == {"PATH": default.DEFAULT_PATH, "HOME": "/root"}
    assert spec.process.cwd == "/"


@pytest.mark.parametrize("path", ["/", "/proc", "/proc/self", "/dev/shm", "/sys"])
def test_a_working_directory_that_is_replaced(path, monkeypatch):
    monkeypatch.chdir(path)
    assert default.spec().process.cwd == "/"


def test_a_working_directory_that_is_gone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gone = tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    assert default.spec().process.cwd == "/"


def test_names_that_are_no_text(tmp_path, monkeypatch):
    odd = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(odd)
    monkeypatch.chdir(odd)
    monkeypatch.setenv("HOME", os.fsdecode(b"/\xff"))
    spec = default.spec()
    assert spec.process.cwd == "/"
    assert environment(spec)["HOME"] == ""
    json.dumps(spec.document, ensure_ascii=False).encode()


def test_root_keeps_its_capabilities():
    with open("/proc/self/status", encoding="ascii") as file:
        held = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    mask = int(held["CapPrm"], 16) & int(held["CapBnd"], 16)
    sets = default.document(rootless=False)["process"]["capabilities"]
    assert set(sets) == {"bounding", "effective", "permitted"}
    assert all(len(names) == mask.bit_count() for names in sets.values())
    assert ("CAP_SYS_ADMIN" in sets["effective"]) == bool(mask >> 21 & 1)


def test_no_terminal_unless_both_ends_are():
    assert default.document()["process"]["terminal"] is False


def test_a_document_without_a_root_has_no_plan():
    spec = load.load(text='{"ociVersion": "1.0.2"}')
    with pytest.raises(SpecError, match="/root: is missing"):
        from_spec.plan(spec)


# -- spec ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rootless", [False, True])
def test_spec_prints_what_official_and_own_schema_accept(rootless, capsys):
    arguments = SimpleNamespace(rootless=rootless, rootfs="/srv")
    assert spec_command.main(arguments) == 0
    text = capsys.readouterr().out
    assert list(official().iter_errors(json.loads(text))) == []
    spec = load.load(text=text, strict=True)
    assert spec.root_path == "/srv"
    assert bool(spec.uid_mappings) == (rootless or os.geteuid() != 0)


# -- validate -----------------------------------------------------------------------------


def validated(capsys, *files):
    status = validate.main(SimpleNamespace(files=[str(file) for file in files]))
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err.splitlines()


def test_validate_a_file_and_a_bundle(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(containerd_spec()))
    assert validated(capsys, tmp_path) == (0, [f"{tmp_path}: valid"], [])
    file = tmp_path / "config.json"
    assert validated(capsys, file) == (0, [f"{file}: valid"], [])


def test_validate_tells_every_problem(tmp_path, capsys):
    document = minimal_spec()
    document["hostname"] = 1
    document["mounts"] = [{"destination": "/"}, {"destination": "/a", "options": [""]}]
    file = tmp_path / "wrong.json"
    file.write_text(json.dumps(document))
    assert validated(capsys, file) == (65, [], [
        "sandboxfs: /hostname: 1: a string is allowed",
        'sandboxfs: /mounts/0/destination: "/": the root itself is not allowed',
        'sandboxfs: /mounts/1/options/0: "": must not be empty',
    ])


def test_validate_looks_at_the_words_of_options(tmp_path, capsys):
    document = minimal_spec()
    document["mounts"] = [
        {"destination": "/t", "type": "tmpfs",
         "options": ["ro", "size=99999999999999999999", "size=1k,nr_inodes=3"]},
    ]
    file = tmp_path / "options.json"
    file.write_text(json.dumps(document))
    status, out, err = validated(capsys, file)
    assert (status, out) == (65, [])
    assert [line.split(": ")[1] for line in err] == ["/mounts/0/options/1", "/mounts/0/options/2"]


def test_validate_looks_at_what_fits_together(tmp_path, capsys):
    """What `run` would refuse with 65 isn't valid."""
    document = minimal_spec()
    document["mounts"] = [
        {"destination": "/b", "source": "/missing", "options": ["bind", "size=3"]},
    ]
    file = tmp_path / "bind.json"
    file.write_text(json.dumps(document))
    status, out, err = validated(capsys, file)
    assert (status, out) == (65, [])
    assert err[0] == "sandboxfs: /mounts/0/options/1: size=3: no mount option 'size' for a bind"


def test_validate_several(tmp_path, capsys):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(minimal_spec()))
    bad.write_text("{}")
    assert validated(capsys, good, bad) == (
        65, [f"{good}: valid"], [f"sandboxfs: {bad}#/ociVersion: is missing"]
    )
    status, _, err = validated(capsys, tmp_path / "none.json")
    assert status == 125
    assert err == [
        f"sandboxfs: config.json: open {tmp_path}/none.json: ENOENT: No such file or directory"
    ]


def test_validate_tells_json_if_asked(tmp_path, capsys):
    file = tmp_path / "bad.json"
    file.write_text("{}")
    assert validate.main(SimpleNamespace(files=[str(file)], log_format="json")) == 65
    told = json.loads(capsys.readouterr().err)
    assert (told["origin"], told["text"], told["status"]) == ("/ociVersion", "is missing", 65)


def test_warnings_are_told_and_no_fault(tmp_path, capsys):
    document = {**minimal_spec(), "mounts": [{"destination": "x", "type": "tmpfs"}]}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(document))
    status, _, err = validated(capsys, file)
    assert status == 0
    assert err[0].startswith('sandboxfs: warning: mounts[0]: destination "x" is relative')


def test_an_installed_package_finds_its_schemas(tmp_path):
    """As a wheel lays it out: the schemas are inside the package."""
    package = tmp_path / "sandboxfs"
    package.symlink_to(CHECKOUT / "sandboxfs")
    program = "from sandboxfs.spec import schema; print(schema.directory())"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(CHECKOUT / "specs" / "schema")
    package.unlink()
    shutil.copytree(
        CHECKOUT / "sandboxfs", package, ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(CHECKOUT / "specs", package / "_specs")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {program}"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )
    assert done.stdout.strip() == str(package / "_specs" / "schema")
