"""The command lines of runtimes: understood as the runtime understands them, or refused."""

import pytest

from sandboxfs.errors import UsageError
from sandboxfs.runtime.request import Request, bundle_of, config_of, parse

KINDS = ("runc", "crun", "other")
# Words → (bundle, config, id), or "asks" (no container is made), or "refused".
EVERYWHERE = {
    "create id": (None, None, "id"),
    "run --bundle /b id": ("/b", None, "id"),
    "create --bundle=/b id": ("/b", None, "id"),
    "restore -b /b --image-path /i id": ("/b", None, "id"),
    "create --bundle /a --bundle /b id": ("/b", None, "id"),
    "--root /r --log /l --log-format json create --bundle /b id": ("/b", None, "id"),
    "--root=/r --debug --systemd-cgroup run -b /b create": ("/b", None, "create"),
    "create -b create -- id": ("create", None, "id"),
    "-- create -b /b id": ("/b", None, "id"),
    "create --console-socket /s --pid-file /p --no-pivot --preserve-fds 3 id": (None, None, "id"),
    "run -d id": (None, None, "id"),
    "run --help": "asks",
    "--version create id": "asks",
    "state create": "asks",
    "start id": "asks",
    "delete --force run": "asks",
    "": "asks",
    "--root": "refused",
    "create --bundle": "refused",
    "create": "refused",
    "create a b": "refused",
    "create ../id": "refused",
    "create ..": "refused",
    f"create {'x' * 256}": "refused",
    "create --unknown id": "refused",
    "--unknown create id": "refused",
    "--unknown value start id": "asks",
    "create - id": "refused",
    "create --bund=/b --unknown id": "refused",
}
ONE = {
    "runc": {
        "--log create run run": (None, None, "run"),
        "run -bundle /b id": ("/b", None, "id"),
        "run -bundle=/b id": ("/b", None, "id"),
        "run -b=/b id": ("/b", None, "id"),
        "run id --bundle /b": ("/b", None, "id"),
        "-root /r run id -b /b": ("/b", None, "id"),
        "run --no-pivot=false -b /b id": ("/b", None, "id"),
        "run --root /r -b /b id": ("/b", None, "id"),
        "run -b/b id": "refused",
        "run -db /b id": "refused",
        "run --bund /b id": "refused",
        "run --config /c id": "refused",
        "run --pid-file -b /b id": "refused",
        "run id -- --bundle /b": "refused",
        "run -help": "asks",
        "create -h": "asks",
    },
    "crun": {
        "run -b/b id": ("/b", None, "id"),
        "run -db /b id": ("/b", None, "id"),
        "run -db/b id": ("/b", None, "id"),
        "run --bund /b id": ("/b", None, "id"),
        "run --bun=/b id": ("/b", None, "id"),
        "run --b /b id": ("/b", None, "id"),
        "run -f /c id": (None, "/c", "id"),
        "run -f/c -b /b id": ("/b", "/c", "id"),
        "run --config=/c id": (None, "/c", "id"),
        "run --conf /c id": (None, "/c", "id"),
        "run --con x id": "refused",
        "run -bundle /b id": "refused",
        "--log create run run": (None, None, "run"),
        "--cgroup-man disabled run id": (None, None, "id"),
        "--lo /l run id": "refused",
        "run --no-pivot=x id": "refused",
        "run id -b /b": "refused",
        "run --pid-file -b id": (None, None, "id"),
        "run -? id": "asks",
    },
    "other": {
        "--rootless create run": "refused",
        "run -bundle /b id": "refused",
        "run -b/b id": "refused",
        "run --bund /b id": "refused",
        "run -b=/b id": "refused",
        "run id --bundle /b": "refused",
        "run --config /c id": "refused",
    },
}
ROWS = [(kind, words, wanted) for kind in KINDS
        for words, wanted in {**EVERYWHERE, **ONE[kind]}.items()
        # Without anything behind it crun and runc say themselves that a value is missing.
        if words != "--root"]


@pytest.mark.parametrize(("kind", "words", "wanted"), ROWS)
def test_a_command_line(kind: str, words: str, wanted: object) -> None:
    request = Request()
    if wanted == "refused":
        with pytest.raises(UsageError):
            parse(kind, words.split(), request)
        assert not request.makes
        return
    parse(kind, words.split(), request)
    if wanted == "asks":
        assert not request.makes
        return
    assert request.makes
    assert (request.bundle, request.config, request.id) == wanted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("word", [" create", "create ", "\tcreate"])
def test_white_space_around_a_command_is_refused(kind: str, word: str) -> None:
    with pytest.raises(UsageError):
        parse(kind, [word, "id"], Request())


@pytest.mark.parametrize("kind", KINDS)
def test_the_log_is_known_although_the_rest_is_refused(kind: str) -> None:
    request = Request()
    with pytest.raises(UsageError):
        parse(kind, ["--log", "/l", "--log-format=json", "create", "--what", "id"], request)
    assert (request.log, request.log_format) == ("/l", "json")


def test_an_empty_bundle_is_the_current_directory_for_runc_alone(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    request = Request()
    parse("runc", ["create", "--bundle", "", "id"], request)
    assert bundle_of(request) == str(tmp_path)
    with pytest.raises(UsageError):
        parse("crun", ["create", "--bundle=", "id"], Request())


def test_a_config_is_relative_to_the_current_directory_but_for_one_name(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("other.json", "config.json"):
        (tmp_path / name).touch()
    for written, found in (("other.json", f"{tmp_path}/other.json"), ("config.json", None),
                           ("./config.json", f"{tmp_path}/config.json"),
                           (f"{tmp_path}/other.json", f"{tmp_path}/other.json")):
        request = Request()
        parse("crun", ["run", "-f", written, "-b", "/b", "id"], request)
        assert config_of(request) == found
