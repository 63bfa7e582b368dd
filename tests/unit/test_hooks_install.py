"""Registering the hooks: the formats, by their descriptions, and what is written and removed."""

import ast
import json
import os
import stat
import subprocess
import tomllib
from pathlib import Path

import jsonschema
import pytest

from sandboxfs import policy
from sandboxfs.engines import Wish, access, hooks, record
from sandboxfs.engines import registration as registration_of
from sandboxfs.errors import SandboxError
from sandboxfs.hooks import registration
from sandboxfs.spec import load, schema
from tests.support import UNPRIVILEGED, default_spec, run_cli

ENVIRONMENT = ["PATH=/usr/sbin:/usr/bin"]
HOOKS_D = jsonschema.Draft202012Validator(schema.read("oci-hooks"))
OCI = ("podman", "cri-o")


def contents(directory):
    """Return path below `directory` → (mode, bytes)."""
    found = {}
    for path in Path(directory).rglob("*"):
        if not path.is_dir():
            mode = stat.S_IMODE(path.lstat().st_mode)
            found[str(path.relative_to(directory))] = (mode, path.read_bytes())
    return found


def hooks_of(directory):
    """Return stage → entry of hooks.d."""
    found = [json.loads(content) for name, (_mode, content) in contents(directory).items()
             if name.endswith(".json")]
    return {entry["stages"][0]: entry for entry in found}


@pytest.fixture
def dest(public_path):
    return public_path / "hooks.d"


@pytest.fixture
def base(public_path):
    """A spec for containerd to start from."""
    path = public_path / "base.json"
    path.write_text(json.dumps(default_spec()), "utf-8")
    return path


# -- the formats ------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", OCI)
@pytest.mark.parametrize("when", ["always", "annotated"])
def test_hooks_d_is_as_its_format_says(runtime, when, dest):
    run_cli("hooks", "install", "--for", runtime, "--dest", dest, "--when", when, check=0)
    found = hooks_of(dest)
    assert set(found) == {"createRuntime", "createContainer", "poststop"}
    for stage, entry in found.items():
        HOOKS_D.validate(entry)
        assert entry["stages"] == [stage]
        launcher = entry["hook"]["path"]
        assert entry["hook"]["args"] == [launcher, "hook", stage]
        assert entry["hook"]["env"] == ENVIRONMENT
        assert 0 < entry["hook"]["timeout"] <= 60
        assert launcher == str(dest / "sandboxfs-oci-hook")
        assert os.stat(launcher).st_mode & 0o777 == 0o755
        if when == "always":
            assert entry["when"] == {"always": True}
        else:
            assert set(entry["when"]) == {"annotations"}


def test_the_description_of_the_format_refuses_what_the_format_does():
    good = registration.hooks_d("/x", "poststop")
    HOOKS_D.validate(good)
    for change in ({"version": "0.1.0"}, {"stages": ["stop"]}, {"stages": []}, {"when": {}},
                   {"when": {"always": 1}}, {"hook": {"path": "x"}}, {"more": 1},
                   {"hook": {"path": "/x", "timeout": 0}}):
        assert not HOOKS_D.is_valid({**good, **change}), change


@pytest.mark.parametrize(("name", "matches"), [
    ("dev.sandboxfs.tmp", True), ("dev.gvisor.spec.mount.a.type", True),
    ("dev.sandboxfs", False), ("xdev.sandboxfs.tmp", False), ("dev.gvisor.other", False),
    ("devXsandboxfs.tmp", False),
])
def test_annotated_means_annotations_of_ours(name, matches):
    (pattern,) = registration.ANNOTATED
    done = subprocess.run(["grep", "-Eq", pattern], input=name, text=True, check=False)
    assert (done.returncode == 0) == matches


def test_the_base_spec_is_the_given_one_with_our_hooks(dest, base):
    done = run_cli("hooks", "install", "--for", "containerd", "--dest", dest, "--base", base,
                   check=0)
    path = dest / "sandboxfs-base-spec.json"
    written = json.loads(path.read_text("utf-8"))
    hooks = written.pop("hooks")
    assert written == default_spec()
    launcher = str(dest / "sandboxfs-containerd-hook")
    assert list(hooks) == ["createRuntime", "createContainer", "poststop"]
    for stage, entries in hooks.items():
        assert [entry["args"] for entry in entries] == [[launcher, "hook", stage]]
        assert [entry["env"] for entry in entries] == [ENVIRONMENT]
    load.load(config=path)
    assert schema.problems(json.loads(path.read_text("utf-8")), "base") == []
    # What is left to do by hand is TOML that names it.
    lines = tomllib.loads(done.stdout.split("and restart it.\n")[1])
    runtimes = lines["plugins"]["io.containerd.grpc.v1.cri"]["containerd"]["runtimes"]
    assert set(runtimes) == {"sandboxfs", "runc"}
    assert runtimes["sandboxfs"] == {
        "runtime_type": "io.containerd.runc.v2", "base_runtime_spec": str(path),
        "pod_annotations": ["dev.sandboxfs.*", "dev.gvisor.spec.mount.*"],
        "container_annotations": ["dev.sandboxfs.*", "dev.gvisor.spec.mount.*"],
    }


@pytest.mark.needs("containerd")
def test_without_a_given_one_the_base_spec_is_the_runtimes_own(dest):
    run_cli("hooks", "install", "--for", "containerd", "--dest", dest, check=0)
    written = json.loads((dest / "sandboxfs-base-spec.json").read_text("utf-8"))
    del written["hooks"]
    own = subprocess.run(["ctr", "oci", "spec"], capture_output=True, check=True)
    assert written == json.loads(own.stdout)


def test_hooks_that_a_base_spec_has_stay_and_ours_come_once():
    other = {"path": "/other", "args": ["other"]}
    spec = {**default_spec(), "hooks": {"createRuntime": [other], "prestart": [other]}}
    once = registration.with_hooks(spec, "/a/sandboxfs-containerd-hook")
    twice = registration.with_hooks(once, "/b/sandboxfs-containerd-hook")
    assert [entry["path"] for entry in twice["hooks"]["createRuntime"]] == [
        "/other", "/b/sandboxfs-containerd-hook"]
    assert twice["hooks"]["prestart"] == [other]
    assert spec["hooks"]["createRuntime"] == [other]


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_for_a_bundle_the_hooks_are_printed(runtime):
    done = run_cli("hooks", "show", "--for", runtime, "--launcher", "/opt/hook", check=0)
    found = json.loads(done.stdout)
    assert found == {"hooks": registration.hooks_object("/opt/hook")}
    assert schema.problems({**default_spec(), **found}, "x") == []


def test_for_a_bundle_its_config_json_is_printed_with_the_hooks(base):
    done = run_cli("hooks", "show", "--for", "runc", "--base", base.name, cwd=base.parent, check=0)
    found = json.loads(done.stdout)
    launcher = "/usr/local/libexec/sandboxfs-oci-hook"
    assert found == {**default_spec(), "hooks": registration.hooks_object(launcher)}


def test_the_operators_file_is_handed_to_the_hooks(dest, base, public_path):
    config = public_path / "policy.toml"
    config.write_text("[overlay]\nmode = 'none'\n", "utf-8")
    config.chmod(0o644)
    run_cli("hooks", "install", "--for", "podman", "--dest", dest, "--config", "policy.toml",
            cwd=public_path, check=0)
    for stage, entry in hooks_of(dest).items():
        assert entry["hook"]["args"][1:] == ["hook", stage, "--config", str(config)]
    config.write_text("[overlay]\nmodes = 'none'\n", "utf-8")
    done = run_cli("hooks", "install", "--for", "containerd", "--dest", dest, "--config", config,
                   "--base", base, check=65)
    assert done.stderr.startswith(f"sandboxfs: {config}:2: overlay.modes: ")
    assert not (dest / "sandboxfs-base-spec.json").exists()


# -- writing and removing ---------------------------------------------------------------


def arguments(runtime, dest, base):
    extra = ["--base", base] if runtime == "containerd" else []
    return ["--for", runtime, "--dest", dest, *extra]


@pytest.mark.parametrize("runtime", hooks.ENGINES)
def test_installing_again_changes_nothing_and_uninstalling_leaves_nothing(runtime, dest, base):
    where = dest / "deeper"
    first = run_cli("hooks", "install", *arguments(runtime, where, base), check=0)
    assert "unchanged" not in first.stdout
    before = contents(where)
    times = {name: os.stat(where / name).st_mtime_ns for name in before}
    again = run_cli("hooks", "install", *arguments(runtime, where, base), check=0)
    assert "written" not in again.stdout
    assert contents(where) == before
    assert {name: os.stat(where / name).st_mtime_ns for name in before} == times
    removed = run_cli("hooks", "uninstall", "--for", runtime, "--dest", where, check=0)
    assert removed.stdout.count("removed ") == len(before) - 1
    assert not dest.exists()
    nothing = run_cli("hooks", "uninstall", "--for", runtime, "--dest", where, check=0)
    assert nothing.stdout == f"nothing is installed in {where}\n"


@pytest.mark.parametrize("runtime", hooks.ENGINES)
def test_show_prints_what_install_writes_and_writes_nothing(runtime, dest, base):
    shown = run_cli("hooks", "show", *arguments(runtime, dest, base), check=0).stdout
    assert not dest.exists()
    run_cli("hooks", "install", *arguments(runtime, dest, base), check=0)
    for name, (mode, content) in contents(dest).items():
        if not name.endswith(".sha256"):
            assert f"# {dest}/{name} (mode {mode:04o})\n{content.decode()}" in shown


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_what_is_written_is_open_to_all_whatever_the_umask(mask, dest):
    before = os.umask(mask)
    try:
        run_cli("hooks", "install", "--for", "podman", "--dest", dest / "a", check=0)
    finally:
        os.umask(before)
    modes = {mode for mode, _content in contents(dest).values()}
    assert modes == {0o755, 0o644}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (dest, dest / "a")} == {0o755}


def test_the_list_is_what_sha256sum_reads(dest):
    run_cli("hooks", "install", "--for", "podman", "--dest", dest, check=0)
    (manifest,) = dest.glob("*.sha256")
    done = subprocess.run(["sha256sum", "--strict", "-c", manifest], capture_output=True,
                          text=True, check=True)
    assert done.stdout.count(": OK") == 4


@pytest.mark.parametrize("name", ["sandboxfs-poststop.json", "sandboxfs-oci-hook"])
@pytest.mark.parametrize("action", ["uninstall", "install"])
def test_what_somebody_changed_is_neither_removed_nor_overwritten(name, action, dest):
    run_cli("hooks", "install", "--for", "podman", "--dest", dest, check=0)
    with (dest / name).open("ab") as file:
        file.write(b"\n")
    before = contents(dest)
    done = run_cli("hooks", action, "--for", "podman", "--dest", dest, check=125)
    assert done.stderr.startswith(f"sandboxfs: {dest / name}: was changed since it was written; "
                                  "nothing was touched\n")
    assert contents(dest) == before
    # As the hint says.
    (dest / name).unlink()
    run_cli("hooks", action, "--for", "podman", "--dest", dest, check=0)
    assert dest.exists() == (action == "install")


def test_a_file_of_somebody_else_is_not_overwritten(dest):
    dest.mkdir()
    other = dest / "sandboxfs-createRuntime.json"
    other.write_text("{}", "utf-8")
    done = run_cli("hooks", "install", "--for", "cri-o", "--dest", dest, check=125)
    assert f"{other}: is there and isn't ours; nothing was touched" in done.stderr
    assert set(contents(dest)) == {other.name}


@pytest.mark.parametrize("kind", ["fifo", "link", "directory"])
def test_what_is_no_file_is_not_overwritten(kind, dest, public_path):
    dest.mkdir()
    path = dest / "sandboxfs-createRuntime.json"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(public_path / "elsewhere")
    done = run_cli("hooks", "install", "--for", "cri-o", "--dest", dest, check=125)
    assert done.stderr.startswith(f"sandboxfs: read {path}: ")
    assert os.listdir(dest) == [path.name]
    assert not (public_path / "elsewhere").exists()


def test_directories_that_others_use_stay(dest):
    run_cli("hooks", "install", "--for", "podman", "--dest", dest / "a", check=0)
    (dest / "mine").write_text("x", "utf-8")
    run_cli("hooks", "uninstall", "--for", "podman", "--dest", dest / "a", check=0)
    assert os.listdir(dest) == ["mine"]


def test_two_runtimes_in_one_directory_dont_touch_each_other(dest, base):
    run_cli("hooks", "install", *arguments("containerd", dest, base), check=0)
    before = contents(dest)
    run_cli("hooks", "install", *arguments("podman", dest, base), check=0)
    run_cli("hooks", "uninstall", "--for", "podman", "--dest", dest, check=0)
    assert contents(dest) == before


def test_another_launcher_replaces_the_old_one(dest, public_path):
    elsewhere = public_path / "libexec" / "hook"
    run_cli("hooks", "install", "--for", "podman", "--dest", dest, check=0)
    run_cli("hooks", "install", "--for", "podman", "--dest", dest, "--launcher", elsewhere, check=0)
    assert not (dest / "sandboxfs-oci-hook").exists()
    assert {entry["hook"]["path"] for entry in hooks_of(dest).values()} == {str(elsewhere)}
    run_cli("hooks", "uninstall", "--for", "podman", "--dest", dest, check=0)
    assert not dest.exists()
    assert not elsewhere.parent.exists()


@pytest.mark.parametrize("writes", range(7))
def test_an_installation_that_was_cut_off_is_taken_up(writes, dest, monkeypatch):
    """After any number of writes: neither the next installation nor the removal is refused."""
    def installed(content, limit=None):
        left = [limit]

        def write(path, *rest):
            if left[0] == 0:
                raise KeyboardInterrupt
            if left[0] is not None:
                left[0] -= 1
            original(path, *rest)

        original = record._write
        monkeypatch.setattr(record, "_write", write)
        wanted = registration_of(wish)
        wanted.files[str(dest / "sandboxfs-oci-hook")] = (content, 0o755)
        try:
            record.install(wanted)
        except KeyboardInterrupt:
            pass
        finally:
            monkeypatch.setattr(record, "_write", original)

    wish = Wish("podman", hooks=True, dest=str(dest))

    installed(b"old")
    installed(b"new", writes)
    installed(b"new")
    assert (dest / "sandboxfs-oci-hook").read_bytes() == b"new"
    installed(b"newer", writes)
    record.uninstall(Wish("podman", hooks=True, dest=str(dest)).recorded)
    assert not dest.exists()


def test_the_launcher_is_the_one_that_starts_isolated(dest):
    run_cli("hooks", "install", "--for", "podman", "--dest", dest, check=0)
    lines = (dest / "sandboxfs-oci-hook").read_text("ascii").splitlines()
    assert lines[0].startswith("#!/")
    assert " -ISB" in lines[0] or "exec" in lines[1]
    path = next(line for line in lines if "sys.path[:] = " in line)
    for entry in ast.literal_eval(path.partition("sys.path[:] = ")[2]):
        assert os.path.isabs(entry)
    done = subprocess.run([dest / "sandboxfs-oci-hook", "--version"], capture_output=True,
                          text=True, check=True, env={}, user=UNPRIVILEGED)
    assert done.stdout.startswith("sandboxfs ")


# -- who can start it ---------------------------------------------------------------------


def found_about(*paths):
    return list(access.findings(map(str, paths)))


def test_ways_that_are_closed_to_others_are_named(public_path):
    inner = public_path / "a" / "b"
    inner.mkdir(parents=True)
    file = inner / "file"
    file.write_text("x", "utf-8")
    file.chmod(0o644)
    inner.chmod(0o755)
    assert found_about(file, inner) == []
    (public_path / "a").chmod(0o700)
    assert found_about(file) == [
        (f"{public_path}/a (mode 0700) is closed to others: containers of users and those with "
        "a user namespace can't start")]
    (public_path / "a").chmod(0o711)
    assert found_about(file) == []
    inner.chmod(0o711)
    assert found_about(file) == []
    # A directory that modules are looked for in has to be listed.
    assert f"{inner} (mode 0711) is closed to others" in found_about(inner)[0]
    file.chmod(0o600)
    assert f"{file} (mode 0600) is closed to others" in found_about(file)[0]


@pytest.mark.needs("root")
def test_a_users_own_ways_are_open_to_the_root_of_their_containers(public_path):
    closed = public_path / "home"
    closed.mkdir(mode=0o700)
    os.chown(closed, UNPRIVILEGED, UNPRIVILEGED)
    done = run_cli("hooks", "install", "--for", "podman", "--dest", closed / "hooks.d",
                   uid=UNPRIVILEGED, check=0)
    assert str(closed) not in done.stderr


@pytest.mark.needs("root")
def test_ways_that_others_can_change_are_named(public_path):
    file = public_path / "file"
    file.write_text("x", "utf-8")
    file.chmod(0o666)
    assert f"{file} (mode 0666) is writable by everybody" in found_about(file)[0]
    file.chmod(0o644)
    public_path.chmod(0o1777)
    assert found_about(file) == []
    public_path.chmod(0o777)
    assert f"{public_path} (mode 0777) is writable by everybody" in found_about(file)[0]
    public_path.chmod(0o755)
    os.chown(file, UNPRIVILEGED, 0)
    assert f"{file} belongs to user {UNPRIVILEGED}" in found_about(file)[0]


def test_install_warns_of_a_closed_way(public_path):
    closed = public_path / "closed"
    closed.mkdir(mode=0o700)
    done = run_cli("hooks", "install", "--for", "podman", "--dest", closed / "hooks.d", check=0)
    assert f"sandboxfs: warning: {closed} (mode 0700) is closed to others" in done.stderr


# -- the command --------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "status", "message"), [
    (["install"], 2, "sandboxfs: hooks install: --for ENGINE is missing"),
    (["install", "--for", "runc"], 2, ("sandboxfs: hooks install: runc reads hooks from each "
                                      "bundle only")),
    (["uninstall", "--for", "crun"], 2, "crun reads hooks from each bundle only"),
    (["install", "--for", "docker"], 2, "invalid choice: 'docker'"),
    (["show", "--for", "containerd", "--when", "annotated"], 2, "has no conditions for hooks"),
    (["show", "--for", "podman", "--base", "/x"], 2, "--base: /x: is for containerd, "),
    (["show", "--for", "podman", "--dest", "/a\nb"], 2, "no registration can hold this path"),
    (["show", "--for", "containerd", "--base", "/none"], 125, "ENOENT"),
    (["install", "--for", "podman", "--dest", "/proc/nowhere"], 125, "mkdir /proc/nowhere: ENOENT"),
    (["install", "--for", "podman", "--config", "/none"], 65, "sandboxfs: /none: open: ENOENT"),
])
def test_what_cant_be_done_is_said_in_one_line(words, status, message):
    done = run_cli("hooks", *words, check=status)
    assert message in done.stderr.splitlines()[0]
    assert done.stdout == ""


def test_unprivileged_users_are_told_where_they_can_install():
    done = run_cli("hooks", "install", "--for", "podman", uid=UNPRIVILEGED, check=125)
    assert "EACCES" in done.stderr
    assert "hint: --dest DIR" in done.stderr


def test_show_prints_the_effective_policy_as_a_file_that_says_the_same(public_path):
    config = public_path / "config.toml"
    config.write_text('[overlay]\nsize = "1M"\n[hints]\ncap = "1G"\n[annotations]\nhonour = []\n',
                      "utf-8")
    config.chmod(0o644)
    done = run_cli("hooks", "show", "--config", config, check=0)
    assert done.stdout.startswith(f"# {config}\n")
    assert 'size = "1048576"\n' in done.stdout
    assert 'mode = "tmpfs"  # default\n' in done.stdout
    again = public_path / "again.toml"
    again.write_text(done.stdout, "utf-8")
    again.chmod(0o644)
    given, shown = policy.load(str(config)), policy.load(str(again))
    for name in set(policy.Policy.__slots__) - {"path", "given"}:
        assert getattr(given, name) == getattr(shown, name), name


def test_show_says_what_is_wrong_with_the_file(public_path):
    config = public_path / "config.toml"
    config.write_text("[log]\nlevel = 'all'\n", "utf-8")
    config.chmod(0o644)
    done = run_cli("hooks", "show", "--config", config, check=65)
    assert done.stderr == (f'sandboxfs: {config}:2: log.level: "all": allowed: "error", "warning", '
                           '"info", "debug"\n')


def test_a_faulty_base_spec_is_refused(base, dest):
    base.write_text('{"ociVersion": 1}', "utf-8")
    done = run_cli("hooks", "install", *arguments("containerd", dest, base), check=65)
    assert "/ociVersion" in done.stderr
    assert not dest.exists()


def test_errors_of_installing_are_ours(tmp_path):
    with pytest.raises(SandboxError):
        record.install(registration_of(Wish("podman", hooks=True, dest="/proc/self")))
