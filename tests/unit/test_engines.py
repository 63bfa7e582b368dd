"""What is registered with an engine, and how its own files are left: byte for byte."""

import json
import os
import stat
import tomllib
from pathlib import Path

import pytest

from sandboxfs.engines import Wish, record, registration
from sandboxfs.errors import SandboxError
from tests.support import UNPRIVILEGED, run_cli

pytestmark = pytest.mark.needs("runc", "crun")

OTHERS = '{\n  "log-level": "warn",\n  "runtimes": {"other": {"path": "/usr/sbin/runc"}}\n}'


@pytest.fixture
def place(public_path):
    """Where the programs go, and the engine's own file (`config`)."""
    (public_path / "etc").mkdir()
    return public_path


def words(engine, place, *more):
    """Return the arguments of `install`, and of `uninstall`."""
    name = {"docker": "etc/daemon.json", "containerd": "etc/config.toml"}.get(engine, "etc")
    return ["--for", engine, "--dest", place / "ours", "--engine-config", place / name, *more]


def tree(place):
    """Return path below `place` → (mode, content); None for a directory."""
    return {str(path.relative_to(place)): (stat.S_IMODE(path.lstat().st_mode),
                                           None if path.is_dir() else path.read_bytes())
            for path in place.rglob("*")}


# -- what is written ----------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["podman", "cri-o", "containerd", "docker"])
def test_installing_twice_changes_nothing_and_uninstalling_leaves_nothing(engine, place):
    before = tree(place)
    first = run_cli("install", *words(engine, place), check=0)
    assert "unchanged" not in first.stdout
    installed = tree(place)
    again = run_cli("install", *words(engine, place), check=0)
    assert "written" not in again.stdout
    assert tree(place) == installed
    run_cli("uninstall", *words(engine, place), check=0)
    assert tree(place) == before
    nothing = run_cli("uninstall", *words(engine, place), check=0)
    assert nothing.stdout == f"nothing is installed in {place}/ours\n"


def program_of(place, engine, name):
    path = place / "ours" / engine / name
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    return str(path)


def test_podman_is_given_a_default_runtime_by_its_path(place):
    """By a path, podman fails where nothing is; a name it would look for in PATH."""
    run_cli("install", *words("podman", place), check=0)
    text = (place / "etc/50-sandboxfs.conf").read_text("utf-8")
    assert tomllib.loads(text) == {"engine": {"runtime": program_of(place, "podman", "crun")}}
    program_of(place, "podman", "runc")


def test_podmans_own_choice_of_a_runtime_stays(place):
    (place / "etc/10-other.conf").write_text('[engine]\nruntime = "runc"\n', "utf-8")
    run_cli("install", *words("podman", place), check=0)
    text = (place / "etc/50-sandboxfs.conf").read_text("utf-8")
    assert tomllib.loads(text) == {"engine": {"runtime": program_of(place, "podman", "runc")}}


def test_a_later_file_that_chooses_another_runtime_is_named(place):
    (place / "etc/60-other.conf").write_text('[engine]\nruntime = "runc"\n', "utf-8")
    done = run_cli("install", *words("podman", place), check=0)
    assert f"But {place}/etc/60-other.conf comes later, and makes runc the runtime" in done.stdout


def test_crio_is_given_a_handler(place):
    run_cli("install", *words("cri-o", place), check=0)
    text = (place / "etc/50-sandboxfs.conf").read_text("utf-8")
    # CRI-O doesn't start with names in allowed_annotations that it doesn't know.
    assert tomllib.loads(text) == {"crio": {"runtime": {"runtimes": {"sandboxfs": {
        "runtime_path": program_of(place, "cri-o", "crun"), "runtime_type": "oci",
        "runtime_root": "/run/crun"}}}}}


@pytest.mark.parametrize("before", [None, "", "{}", OTHERS])
def test_docker_is_given_a_runtime_beside_what_its_file_has(before, place):
    file = place / "etc/daemon.json"
    if before is not None:
        file.write_text(before, "utf-8")
        file.chmod(0o600)
    run_cli("install", *words("docker", place), check=0)
    expected = json.loads(before or "{}")
    expected.setdefault("runtimes", {})["sandboxfs"] = {
        "path": program_of(place, "docker", "runc")}
    assert json.loads(file.read_text("utf-8")) == expected
    if before is not None:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        # The list holds a copy of it.
        assert stat.S_IMODE((place / "ours/docker.sha256").stat().st_mode) == 0o600
    run_cli("uninstall", *words("docker", place), check=0)
    assert (file.read_text("utf-8") if file.exists() else None) == before


def test_containerd_2_is_given_a_file_of_its_own_where_it_imports_a_directory(place):
    (place / "etc/config.toml").write_text('version = 3\nimports = ["conf.d/*.toml"]\n', "utf-8")
    before = tree(place)
    run_cli("install", *words("containerd", place), check=0)
    assert tree(place)["etc/config.toml"] == before["etc/config.toml"]
    document = tomllib.loads((place / "etc/conf.d/50-sandboxfs.toml").read_text("utf-8"))
    globs = ["dev.sandboxfs.*", "dev.gvisor.spec.mount.*"]
    assert document == {"version": 3, "plugins": {"io.containerd.cri.v1.runtime": {"containerd": {
        "runtimes": {"sandboxfs": {
            "runtime_type": "io.containerd.runc.v2", "pod_annotations": globs,
            "container_annotations": globs,
            "options": {"BinaryName": program_of(place, "containerd", "runc")}}}}}}}
    run_cli("uninstall", *words("containerd", place), check=0)
    assert tree(place) == before


def test_containerds_settings_are_where_the_last_imported_file_has_them(place):
    """Before containerd 2 such a file replaces all settings of the plugin."""
    (place / "etc/config.toml").write_text('version = 2\nimports = ["*.d/a.toml"]\n', "utf-8")
    (place / "etc/x.d").mkdir()
    plugin = '[plugins."io.containerd.grpc.v1.cri".cni]\nbin_dir = "/x"\n'
    (place / "etc/x.d/a.toml").write_text(f"version = 2\n{plugin}", "utf-8")
    before = tree(place)
    run_cli("install", *words("containerd", place), check=0)
    assert "runtimes.sandboxfs" in (place / "etc/x.d/a.toml").read_text("utf-8")
    assert tree(place)["etc/config.toml"] == before["etc/config.toml"]
    run_cli("uninstall", *words("containerd", place), check=0)
    assert tree(place) == before


@pytest.mark.parametrize(("content", "message"), [
    ('disabled_plugins = ["cri"]\n', "is of version 1"),
    ("version = 2\nversion = 2\n", "parse "),
    ('version = 2\nplugins."io.containerd.grpc.v1.cri".containerd = {runtimes = {}}\n',
     "its tables can't be added to"),
    ('version = 2\n[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.sandboxfs]\n',
     "has a runtime sandboxfs already"),
    ("# >>> sandboxfs: written by `sandboxfs install`, removed by `sandboxfs uninstall`\n",
     "holds an entry of ours"),
])
def test_a_file_of_containerd_that_cant_be_added_to_is_left_alone(content, message, place):
    (place / "etc/config.toml").write_text(content, "utf-8")
    before = tree(place)
    done = run_cli("install", *words("containerd", place), check=125)
    assert message in done.stderr
    assert tree(place) == before


@pytest.mark.parametrize("content", ["{", "[]", '{"runtimes": []}',
                                     '{"runtimes": {"sandboxfs": {"path": "/x"}}}'])
def test_a_file_of_docker_that_cant_be_added_to_is_left_alone(content, place):
    (place / "etc/daemon.json").write_text(content, "utf-8")
    before = tree(place)
    run_cli("install", *words("docker", place), check=125)
    assert tree(place) == before


# -- what others do meanwhile -------------------------------------------------------------------


def test_what_others_write_into_a_file_meanwhile_stays(place):
    file, config = place / "etc/daemon.json", place / "etc/config.toml"
    file.write_text(OTHERS, "utf-8")
    config.write_text("version = 2", "utf-8")
    for engine in ("docker", "containerd"):
        run_cli("install", *words(engine, place), check=0)
    document = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**document, "debug": True}), "utf-8")
    config.write_text(config.read_text("utf-8") + "[debug]\nlevel = 'info'\n", "utf-8")
    for engine in ("docker", "containerd"):
        run_cli("install", *words(engine, place), check=0)
        run_cli("uninstall", *words(engine, place), check=0)
    assert json.loads(file.read_text("utf-8")) == {**json.loads(OTHERS), "debug": True}
    assert tomllib.loads(config.read_text("utf-8")) == {"version": 2, "debug": {"level": "info"}}


@pytest.mark.parametrize("engine", ["docker", "containerd"])
@pytest.mark.parametrize("action", ["install", "uninstall"])
def test_an_entry_of_ours_that_somebody_changed_is_left_to_them(engine, action, place):
    run_cli("install", *words(engine, place), check=0)
    file = place / words(engine, place)[5]
    file.write_text(file.read_text("utf-8").replace("/ours/", "/theirs/"), "utf-8")
    before = tree(place)
    done = run_cli(action, *words(engine, place), check=125)
    assert "holds an entry of ours that was changed" in done.stderr
    assert tree(place) == before


@pytest.mark.parametrize("engine", ["docker", "containerd"])
def test_an_entry_that_is_gone_already_is_no_obstacle(engine, place):
    file = place / words(engine, place)[5]
    run_cli("install", *words(engine, place), check=0)
    file.unlink()
    run_cli("uninstall", *words(engine, place), check=0)
    assert tree(place).keys() == {"etc"}


@pytest.mark.parametrize(("engine", "name", "content"), [
    ("docker", "daemon.json", '"default-runtime": "sandboxfs", '),
    ("docker", "daemon.json", '"runtimes": {"mine": {"path": "PROGRAM"}}, '),
    ("containerd", "config.toml",
     '[plugins."io.containerd.grpc.v1.cri".containerd]\ndefault_runtime_name = "sandboxfs"\n'),
    ("containerd", "config.toml", (
        '[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.mine]\n'
        'options = {BinaryName = "PROGRAM"}\n')),
    ("podman", "99-mine.conf", '[engine.runtimes]\nmine = ["PROGRAM"]\n'),
    ("podman", "99-mine.conf", '[engine]\nruntime = "PROGRAM"\n'),
    ("cri-o", "99-mine.conf", '[crio.runtime]\ndefault_runtime = "sandboxfs"\n'),
    ("cri-o", "99-mine.conf", '[crio.runtime.runtimes.mine]\nruntime_path = "PROGRAM"\n'),
])
def test_who_is_named_elsewhere_stays(engine, name, content, place):
    """Taking the program away would leave an engine that doesn't load, or starts no container."""
    file = place / "etc" / name
    program = {"podman": "crun", "cri-o": "crun"}.get(engine, "runc")
    text = content.replace("PROGRAM", str(place / "ours" / engine / program))
    if engine == "docker":
        file.write_text("{" + text.rstrip(", ") + "}", "utf-8")
    else:
        file.write_text(("version = 2\n" if engine == "containerd" else "") + text, "utf-8")
    alone = tree(place)
    run_cli("install", *words(engine, place), check=0)
    installed = tree(place)
    done = run_cli("uninstall", *words(engine, place), check=125)
    assert f"sandboxfs: warning: {file} " in done.stderr
    assert f"sandboxfs: uninstall {engine}: is in use; nothing was removed" in done.stderr
    assert tree(place) == installed
    run_cli("uninstall", *words(engine, place, "--force"), check=0)
    assert tree(place) == alone


def test_where_an_engines_configuration_is_need_not_be_said_again(place):
    (place / "etc/config.toml").write_text("version = 2\n", "utf-8")
    before = tree(place)
    run_cli("install", *words("containerd", place), check=0)
    short = ["--for", "containerd", "--dest", place / "ours"]
    assert "written" not in run_cli("install", *short, check=0).stdout
    run_cli("uninstall", *short, check=0)
    assert tree(place) == before


def test_a_configuration_that_cant_be_read_is_a_matter_of_force(place):
    run_cli("install", *words("docker", place), check=0)
    (place / "etc/daemon.json").write_text("{", "utf-8")
    run_cli("uninstall", *words("docker", place), check=125)
    (place / "etc/daemon.json").unlink()
    run_cli("install", *words("podman", place), check=0)
    (place / "etc/99-broken.conf").write_text("[", "utf-8")
    assert "parse" in run_cli("uninstall", *words("podman", place), check=125).stderr
    done = run_cli("uninstall", *words("podman", place, "--force"), check=0)
    assert "who uses it can't be told" in done.stderr


def test_the_hooks_and_the_runtime_dont_take_each_others_place_in_containerd(place):
    run_cli("install", *words("containerd", place), check=0)
    before = tree(place)
    done = run_cli("install", *words("containerd", place, "--hooks"), check=125)
    assert "has a runtime sandboxfs already" in done.stderr
    assert tree(place) == before


def test_lines_that_an_operator_wrote_for_the_hooks_are_theirs(place):
    """As it was in 0.1: install wrote the base spec, and printed the lines."""
    file = place / "etc/config.toml"
    table = '[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.sandboxfs]'
    text = f'version = 2\n{table}\nbase_runtime_spec = "{place}/ours/sandboxfs-base-spec.json"\n'
    file.write_text(text, "utf-8")
    done = run_cli("install", *words("containerd", place, "--hooks"), check=0)
    assert f"{file} names {place}/ours/sandboxfs-base-spec.json" in done.stdout
    assert file.read_text("utf-8") == text
    run_cli("uninstall", *words("containerd", place, "--hooks"), check=125)
    file.unlink()
    run_cli("uninstall", *words("containerd", place, "--hooks"), check=0)
    assert tree(place).keys() == {"etc"}


def test_the_directory_of_two_engines_goes_with_the_second(place):
    before = tree(place)
    for engine in ("podman", "docker"):
        run_cli("install", *words(engine, place), check=0)
    for engine in ("podman", "docker"):
        run_cli("uninstall", *words(engine, place), check=0)
    assert tree(place) == before


@pytest.mark.parametrize("engine", ["docker", "containerd"])
@pytest.mark.parametrize("writes", range(6))
def test_an_installation_that_was_cut_off_is_taken_up(engine, writes, place, monkeypatch):
    """After any number of writes: neither the next installation nor the removal is refused."""
    file = place / words(engine, place)[5]
    original = b"{}" if engine == "docker" else b"version = 2\n"
    file.write_bytes(original)
    write = record._write

    def wish(config):
        return Wish(engine, False, str(place / "ours"), config, str(file))

    def installed(config, limit):
        calls = iter(range(limit))

        def counted(*arguments):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            write(*arguments)

        monkeypatch.setattr(record, "_write", counted)
        try:
            record.install(registration(wish(config)))
        except KeyboardInterrupt:
            pass
        monkeypatch.setattr(record, "_write", write)

    installed("/old", 99)
    installed("/new", writes)
    installed("/new", 99)
    record.uninstall(wish(None).recorded)
    installed("/newer", writes)
    record.uninstall(wish(None).recorded)
    assert file.read_bytes() == original
    assert tree(place).keys() <= {"etc", f"etc/{file.name}", "ours", f"ours/{engine}"}


# -- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "status", "message"), [
    (["install"], 2, "--for"),
    (["install", "--for", "rkt"], 2, "invalid choice: 'rkt'"),
    (["install", "--for", "docker", "--hooks"], 2, "docker: has no place for hooks"),
    (["install", "--for", "podman", "--config", "/none"], 65, "/none: open: ENOENT"),
    (["install", "--for", "podman", "--dest", "/a\nb"], 2, "no registration can hold this path"),
    (["install", "--for", "podman", "--dest", "/proc/x"], 125, "mkdir /proc/x: ENOENT"),
])
def test_what_cant_be_done_is_said_in_one_line(arguments, status, message):
    done = run_cli(*arguments, check=status)
    assert message in done.stderr.splitlines()[0]


@pytest.mark.needs("root")
def test_a_user_installs_for_their_own_podman(public_path):
    home = public_path / "home"
    home.mkdir(mode=0o700)
    os.chown(home, UNPRIVILEGED, UNPRIVILEGED)
    environment = {"HOME": str(home)}
    run_cli("install", "--for", "podman", uid=UNPRIVILEGED, env=environment, check=0)
    text = (home / ".config/containers/containers.conf.d/50-sandboxfs.conf").read_text("utf-8")
    program = tomllib.loads(text)["engine"]["runtime"]
    assert program == str(home / ".local/libexec/sandboxfs/podman/crun")
    run_cli("uninstall", "--for", "podman", uid=UNPRIVILEGED, env=environment, check=0)
    assert os.listdir(home) == []


def test_errors_of_a_list_that_is_damaged_are_ours(place):
    Path(place / "ours").mkdir()
    (place / "ours/docker.sha256").mkdir()
    with pytest.raises(SandboxError):
        Wish("docker", dest=str(place / "ours"))
