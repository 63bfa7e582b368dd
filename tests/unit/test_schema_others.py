"""The schemas of plans, annotations and hook states agree with the code."""

import json

import jsonschema
import pytest

from sandboxfs.errors import SpecError
from sandboxfs.plan import operations
from sandboxfs.spec import annotations, schema


def accepts(name, document):
    return jsonschema.Draft202012Validator(schema.read(name)).is_valid(document)


# -- plans --------------------------------------------------------------------------------


def kinds(kind=operations.Operation):
    for below in kind.__subclasses__():
        if below.name:
            yield below
        yield from kinds(below)


def fields(kind):
    return {
        field for base in kind.__mro__ for field in getattr(base, "__slots__", ())
    }


@pytest.mark.parametrize("kind", list(kinds()), ids=lambda kind: kind.__name__)
def test_each_operation_is_described(kind):
    described = schema.read("plan")["$defs"][kind.name.replace(" ", "-")]
    assert described["properties"]["operation"] == {"const": kind.name}
    assert set(described["properties"]) == {"operation"} | fields(kind)
    assert set(described["required"]) == set(described["properties"])


def test_nothing_else_is_described_as_an_operation():
    listed = schema.read("plan")["properties"]["operations"]["items"]["oneOf"]
    assert {entry["$ref"].rpartition("/")[2] for entry in listed} == {
        kind.name.replace(" ", "-") for kind in kinds()
    }


def test_a_plan():
    plan = {
        "engine": "auto", "container_id": None, "user": None, "warnings": [],
        "namespaces": [{"type": "mount", "path": None}],
        "operations": [
            {"operation": "lower", "origin": "root.path", "path": "/a", "submounts": True},
            {"operation": "seal", "origin": "root.readonly"},
        ],
        "notes": [{"origin": "/tmp", "text": "left alone"}],
    }
    assert accepts("plan", plan)
    plan["operations"][1]["path"] = "/"
    assert not accepts("plan", plan)
    plan["operations"][1] = {"operation": "dance", "origin": "x"}
    assert not accepts("plan", plan)


# -- annotations --------------------------------------------------------------------------

GVISOR, OWN = annotations.HINT_PREFIXES
VALUES = [
    "", "tmpfs", "none", "dir=/a", "dir=", "dir=:keep", "dir=/a:keep", "dir", "true", "false",
    "yes", "auto", "keep", "detached", "attached", "0", "1", "64M", "64m", "0K", "50%", "0%",
    "100%", "101%", "1.5G", "bind", "container", "pod", "shared", "/path", "x y",
]
NAMES = [
    "dev.sandboxfs.overlay", "dev.sandboxfs.overlay.size", "dev.sandboxfs.overlay.binds",
    "dev.sandboxfs.tmp", "dev.sandboxfs.engine", "dev.sandboxfs.lower", "dev.sandboxfs.lower.1",
    "dev.sandboxfs.lower.9999", "dev.sandboxfs.lower.0", "dev.sandboxfs.lower.10000",
    "dev.sandboxfs.lower.x", "dev.sandboxfs.pod", "dev.sandboxfs.unknown", "org.example",
]
HINT_NAMES = [
    prefix + rest
    for prefix in annotations.HINT_PREFIXES
    for rest in (
        "v.source", "v.type", "v.share", "v.lifecycle", "v.directfs", "v.other", "v", "v.w.type",
        "v.", ".source",
    )
]


@pytest.mark.parametrize("name", NAMES)
def test_overrides_and_schema_agree(name):
    for value in VALUES:
        try:
            annotations.overrides({name: value}, "/")
            read = True
        except SpecError:
            read = False
        assert accepts("annotations", {name: value}) == read, value


@pytest.mark.parametrize("name", HINT_NAMES)
def test_hints_and_schema_agree(name):
    """In a hint that is whole otherwise."""
    prefix = GVISOR if name.startswith(GVISOR) else OWN
    rest = {f"{prefix}v.source": "/s", f"{prefix}v.type": "tmpfs", f"{prefix}v.share": "pod"}
    for value in VALUES:
        document = {**rest, name: value}
        try:
            annotations.hints(document)
            read = True
        except SpecError:
            read = False
        assert accepts("annotations", document) == read, value


# -- hook states --------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    {}, {"pid": 0}, {"root": "/b/rootfs"}, {"annotations": {"a": "b"}}, {"unknown": 1},
])
def test_states_of_runtimes(changes):
    state = {
        "ociVersion": "1.0.2", "id": "c", "pid": 7, "status": "creating", "bundle": "/b",
        **changes,
    }
    assert accepts("hook-state", json.loads(json.dumps(state)))


@pytest.mark.parametrize("changes", [
    {"id": None}, {"pid": -1}, {"status": "paused"}, {"bundle": ""}, {"annotations": {"a": 1}},
])
def test_no_states(changes):
    state = {"ociVersion": "1.0.2", "id": "c", "status": "creating", "bundle": "/b", **changes}
    assert not accepts("hook-state", state)
