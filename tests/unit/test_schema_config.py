"""Our schema of config.json, the official one, and the hot path's checks: do they agree?

The official schema is that of Debian's golang-github-opencontainers-specs-dev.
"""

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandboxfs.errors import SpecError
from sandboxfs.spec import check, load, schema, values
from tests.support import CHECKOUT, containerd_spec, minimal_spec, needs

EXAMPLES = sorted((CHECKOUT / "specs" / "examples").glob("*/config.json"))
OFFICIAL = Path(
    "/usr/share/gocode/src/github.com/opencontainers/runtime-spec/schema/config-schema.json"
)
CONFIG = schema.read("config")

# What the official schema accepts and we refuse on purpose, by (pointer with * for an index or
# a name, the keyword of our schema).  This is the one place where they stand.
REFUSED_ON_PURPOSE = {
    # A NUL would end the string for the kernel; other formats name rules of the kernel.
    ("*", "pattern"): "NUL in a string; env without NAME=",
    ("*", "format"): "too long, not absolute, no name of an interface, …",
    ("*", "spelling"): "a known key in another case",
    # Empty where something is needed.
    ("/root/path", "minLength"): "an empty root",
    ("/process/args", "minItems"): "no command",
    ("/process/cwd", "minLength"): "an empty directory",
    ("/mounts/*/destination", "minLength"): "an empty destination",
    ("/mounts/*/options/*", "minLength"): "an empty option",
    ("/linux/devices/*/path", "minLength"): "a device without a path",
    ("/linux/maskedPaths/*", "minLength"): "an empty path",
    ("/linux/readonlyPaths/*", "minLength"): "an empty path",
    # Numbers the kernel can't use.
    ("/process/consoleSize/height", "maximum"): "a terminal's size has 16 bits",
    ("/process/consoleSize/width", "maximum"): "a terminal's size has 16 bits",
    ("/process/oomScoreAdj", "minimum"): "-1000 is the least",
    ("/process/oomScoreAdj", "maximum"): "1000 is the most",
    ("/process/user/uid", "maximum"): "2^32 - 1 is no id",
    ("/process/user/gid", "maximum"): "2^32 - 1 is no id",
    ("/process/user/additionalGids/*", "maximum"): "2^32 - 1 is no id",
    ("/process/user/umask", "maximum"): "a mask of permissions has nine bits",
    ("/linux/devices/*/major", "minimum"): "negative",
    ("/linux/devices/*/minor", "minimum"): "negative",
    ("/linux/devices/*/major", "maximum"): "12 bits",
    ("/linux/devices/*/minor", "maximum"): "20 bits",
    ("/linux/devices/*/uid", "maximum"): "2^32 - 1 is no id",
    ("/linux/devices/*/gid", "maximum"): "2^32 - 1 is no id",
    ("/linux/devices/*", "required"): "major and minor, required by the text but for a FIFO",
    **{
        (f"{owner}/{key}/*/{field}", keyword): "no range of ids"
        for owner in ("/linux", "/mounts/*")
        for key in ("uidMappings", "gidMappings")
        for field, keyword in (
            ("containerID", "maximum"), ("hostID", "maximum"), ("size", "minimum"),
        )
    },
    **{
        (f"{owner}/{key}", "maxItems"): "340 lines are the kernel's limit"
        for owner in ("/linux", "/mounts/*")
        for key in ("uidMappings", "gidMappings")
    },
    ("/mounts/*", "required"): "uidMappings and gidMappings come together",
    ("/mounts/*/uidMappings", "minItems"): "uidMappings and gidMappings come together",
    ("/mounts/*/gidMappings", "minItems"): "uidMappings and gidMappings come together",
    # Names nobody knows.
    ("/process/rlimits/*/type", "enum"): "a limit the kernel doesn't have",
    **{
        (f"/process/capabilities/{key}/*", "enum"): "no capability"
        for key in ("bounding", "effective", "inheritable", "permitted", "ambient")
    },
    # The official schema's map of strings lets values under the keys "" and "\n" be anything.
    ("/annotations/*", "type"): "no string",
    ("/linux/sysctl/*", "type"): "no string",
    # Positions the official schema of this version doesn't know yet; the text does.
    ("/linux/timeOffsets", "*"): "newer",
    ("/linux/netDevices", "*"): "newer",
}

# And what the official one refuses although it is of use, by pointer.
ACCEPTED_ON_PURPOSE = {
    "/linux/rootfsPropagation": "the recursive forms, which runc and crun take",
    "/linux/namespaces/*/type": "time, newer",
    "/linux/devices/*/fileMode": "set-id bits and bits of the type, which engines write",
}


@cache
def official():
    """Return a validator of the official schema, its references resolved to local files."""
    jsonschema = pytest.importorskip("jsonschema")
    needs("oci-schemas")
    from referencing import Registry, Resource
    from referencing.jsonschema import DRAFT4

    resources = [
        (path.as_uri(), Resource.from_contents(
            json.loads(path.read_text("utf-8")), default_specification=DRAFT4
        ))
        for path in OFFICIAL.parent.glob("*.json")
    ]
    contents = {**json.loads(OFFICIAL.read_text("utf-8")), "id": OFFICIAL.as_uri()}
    return jsonschema.Draft4Validator(contents, registry=Registry().with_resources(resources))


def official_faults(document):
    """Yield what the official schema refuses, inside `anyOf` too."""
    pending = list(official().iter_errors(document))
    while pending:
        fault = pending.pop()
        if fault.context:
            pending.extend(fault.context)
        else:
            yield fault


def general(path):
    """Return a pointer with * for indices and for names that the user chooses."""
    parts = ["*" if isinstance(part, int) else str(part) for part in path]
    if parts[:1] == ["annotations"] or parts[:2] == ["linux", "sysctl"]:
        parts[-1] = "*"
    return "".join(f"/{part}" for part in parts)


def on_purpose(fault):
    """Return whether one of our refusals stands in the list."""
    pointer = general(fault.absolute_path)
    return (
        (pointer, fault.validator) in REFUSED_ON_PURPOSE
        or ("*", fault.validator) in REFUSED_ON_PURPOSE
        or any(
            keyword == "*" and (pointer + "/").startswith(place + "/")
            for place, keyword in REFUSED_ON_PURPOSE
        )
    )


def hot_refuses(document):
    try:
        check.read(document)
    except SpecError:
        return True
    return False


# -- documents ----------------------------------------------------------------------------

_RANGE = {"containerID": 0, "hostID": 1, "size": 2}
# One of everything, and no more: each place is tried with each value.
FULL = {
    "ociVersion": "1.0.2", "hostname": "h", "domainname": "d", "annotations": {"a": "b"},
    "root": {"path": "rootfs", "readonly": True},
    "process": {
        "terminal": True, "consoleSize": {"height": 25, "width": 80}, "oomScoreAdj": -5,
        "user": {"uid": 1, "gid": 2, "umask": 18, "additionalGids": [3]},
        "args": ["sh"], "env": ["A=b"], "cwd": "/", "noNewPrivileges": True,
        "capabilities": {
            key: ["CAP_CHOWN"]
            for key in ("bounding", "effective", "inheritable", "permitted", "ambient")
        },
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
    },
    "mounts": [
        {"destination": "/proc", "type": "proc"},
        {"destination": "/i", "source": "/s", "type": "bind", "options": ["bind", "idmap"],
         "uidMappings": [_RANGE], "gidMappings": [_RANGE]},
    ],
    "linux": {
        "namespaces": [{"type": "mount"}, {"type": "user", "path": "/n"}, {"type": "network"}],
        "uidMappings": [_RANGE], "gidMappings": [_RANGE],
        "devices": [
            {"type": "c", "path": "/dev/x", "major": 1, "minor": 2, "fileMode": 438, "uid": 0,
             "gid": 0},
            {"type": "p", "path": "/dev/p"},
        ],
        "maskedPaths": ["/m"], "readonlyPaths": ["/r"],
        "rootfsPropagation": "slave", "mountLabel": "l", "cgroupsPath": "/c",
        "sysctl": {"net.ipv4.ip_forward": "1"},
        "timeOffsets": {"monotonic": {"secs": -1, "nanosecs": 5}},
        "netDevices": {"eth0": {"name": "e"}, "eth1": {}},
        "resources": {"memory": {"limit": 4096}},
    },
}

# Values that are wrong, right, and at the limits of something.
VALUE_LIST = [
    None, True, False, 0, 1, -1, 2, 511, 512, 513, 4095, 4096, 65535, 65536, 0o177777, 1 << 20,
    1000, 1001, -1000, -1001, 2**31, 2**32 - 2, 2**32 - 1, 2**32, 10**9 - 1, 10**9, 2**63 - 1,
    2**63, -(2**63), -(2**63) - 1, 2**64 - 1, 2**64, 10**30, 1.0, 0.5, "", "a", "/", "//", "/.",
    "/a/..", "..", "a/b", "/a", "a=b", "=b", "a\0b", "/a\0", "/" + "x" * 256, "/" + "é" * 200,
    "/x" * 2048, "h" * 64, "h" * 65, "é" * 33, "eth0", "eth0%d", "x" * 16, "..", "a b",
    "/proc/self/fd/7", "/proc/self", "/dev/fd/3", "CAP_CHOWN", "cap_chown", "CAP_X",
    "RLIMIT_CPU", "RLIMIT_FOO", "mount", "time", "rshared", "shared", "weird", "z", "c", "p",
    "u", "1.0.2", "x\n", "\n", "\u2028", [], {}, [[]], [{}], [0], [""], ["/a"], [None], {"": 0},
    {"a": "b"}, {"a": 1}, {"type": "pid"}, {"path": "x"}, {"destination": "/d"},
    [_RANGE] * 341,
]
VALUES = st.sampled_from(VALUE_LIST)
KEYS = st.sampled_from([
    *sorted({key for keys in values.KNOWN.values() for key in keys}), "ROOT", "Mounts", "Type",
    "\u017fize", "LINUX", "hostid", "monotonic", "boottime", "Monotonic", "eth0", "a/b", "", "x\0",
])


def places(value, path=()):
    """Yield the path of every value of a document."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, (*path, index))


def copied(value):
    """Return a JSON value anew, nothing in it shared (deepcopy keeps what is shared so)."""
    return json.loads(json.dumps(value))


def around(path, value):
    """Return FULL with `value` at `path`, cut down to the part that `path` lies in."""
    document = {"ociVersion": "1.0.2", path[0]: copied(FULL[path[0]])}
    if path[0] in ("process", "linux") and len(path) > 1:
        document[path[0]] = {"cwd": "/", path[1]: copied(FULL[path[0]][path[1]])}
    owner = document
    for part in path[:-1]:
        owner = owner[part]
    owner[path[-1]] = copied(value)
    return document


PLACES = [path for path in places(FULL) if path]
at_every_place = pytest.mark.parametrize(
    "path", PLACES, ids=[".".join(map(str, path)) for path in PLACES]
)


def mutate(draw, document):
    """Change one place of `document` and return it."""
    paths = list(places(document))
    path = paths[draw(st.integers(0, len(paths) - 1))]
    owner = document
    for part in path[:-1]:
        owner = owner[part]
    kind = draw(st.sampled_from(["replace", "remove", "add", "repeat"]))
    value = owner[path[-1]] if path else document
    if kind == "add" and isinstance(value, dict):
        value[draw(KEYS)] = copied(draw(VALUES))
    elif kind == "add" and isinstance(value, list):
        value.append(copied(draw(VALUES)))
    elif kind == "repeat" and isinstance(value, list) and value:
        value.append(copied(value[0]))
    elif not path:
        return document
    elif kind == "remove":
        del owner[path[-1]]
    else:
        owner[path[-1]] = copied(draw(VALUES))
    return document


@st.composite
def documents(draw, most=3):
    """Documents like FULL, with some places changed."""
    document = copied(draw(st.sampled_from([FULL, minimal_spec()])))
    for _ in range(draw(st.integers(0, most))):
        document = mutate(draw, document)
    return document


# -- hot path and schema --------------------------------------------------------------------


@settings(max_examples=600)
@given(documents())
def test_hot_path_and_schema_agree_on_shapes(document):
    shaped = schema.shapes(document)
    assert hot_refuses(document) == bool(shaped), [str(fault) for fault in shaped]


@at_every_place
def test_hot_path_and_schema_agree_at_every_place(path):
    """Every value once at every place: no luck needed."""
    disagree = []
    for value in VALUE_LIST:
        document = around(path, value)
        if hot_refuses(document) != (next(schema.faults(document), None) is not None):
            disagree.append(value)
    assert disagree == []


def test_the_full_document_is_right():
    assert schema.shapes(FULL) == []
    assert not hot_refuses(FULL)
    assert list(official().iter_errors(FULL)) == []


def test_the_known_keys_are_those_of_the_schema():
    """Both refuse other spellings of known keys: the sets have to be the same."""
    described = []

    def visit(node):
        if isinstance(node, dict):
            if "properties" in node and node.get("type") == "object":
                described.append(frozenset(node["properties"]))
            for inner in node.values():
                visit(inner)
        elif isinstance(node, list):
            for inner in node:
                visit(inner)

    visit(CONFIG)
    clocks = frozenset(("monotonic", "boottime"))
    assert set(described) - {clocks} == set(values.KNOWN.values())


@pytest.mark.needs("oci-schemas")
def test_the_official_keys_are_known():
    """Every key the official schema has at the positions we read."""
    contents = json.loads(OFFICIAL.read_text("utf-8"))
    properties = contents["properties"]
    assert set(properties) <= values.KNOWN[""]
    assert set(properties["process"]["properties"]) <= values.KNOWN["process"]
    assert set(properties["process"]["properties"]["user"]["properties"]) <= values.KNOWN["user"]
    linux = json.loads((OFFICIAL.parent / "config-linux.json").read_text("utf-8"))["linux"]
    assert set(linux["properties"]) <= values.KNOWN["linux"]
    resources = linux["properties"]["resources"]["properties"]
    assert set(resources) <= values.KNOWN["resources"]
    assert set(resources["memory"]["properties"]) <= values.KNOWN["memory"]


# -- ours and the official one --------------------------------------------------------------


@settings(max_examples=400)
@given(documents())
def test_what_the_official_schema_accepts_ours_accepts(document):
    if not official().is_valid(document):
        return
    strange = [fault.message for fault in schema.faults(document) if not on_purpose(fault)]
    assert strange == []


@settings(max_examples=400)
@given(documents())
def test_what_ours_accepts_the_official_schema_accepts(document):
    if next(schema.faults(document), None) is not None:
        return
    strange = [
        (general(fault.absolute_path), fault.message)
        for fault in official_faults(document)
        if general(fault.absolute_path) not in ACCEPTED_ON_PURPOSE and read_by_us(fault)
    ]
    assert strange == []


def read_by_us(fault):
    """Return whether our schema describes the place of a fault, and not just knows its name."""
    node = CONFIG
    for part in fault.absolute_path:
        while isinstance(node, dict) and "$ref" in node:
            node = CONFIG["$defs"][node["$ref"].rpartition("/")[2]]
        if isinstance(part, int):
            node = node["items"]
        else:
            node = node["properties"].get(part, node.get("additionalProperties", True))
        if node is True:
            return False
    return True


@at_every_place
def test_both_schemas_at_every_place(path):
    """As above, without luck."""
    strange = []
    for value in VALUE_LIST:
        document = around(path, value)
        ours = list(schema.faults(document))
        theirs = list(official_faults(document))
        if not theirs:
            strange += [(value, fault.message) for fault in ours if not on_purpose(fault)]
        if not ours:
            strange += [
                (value, fault.message) for fault in theirs
                if general(fault.absolute_path) not in ACCEPTED_ON_PURPOSE and read_by_us(fault)
            ]
    assert strange == []


# -- the report ---------------------------------------------------------------------------


@given(documents(most=6))
def test_a_refusal_tells_of_problems_in_single_lines(document):
    error = None
    try:
        load.load(text=json.dumps(document))
    except SpecError as refusal:
        error = refusal
    if error is None:
        return
    assert error.problems
    origins = [problem.origin for problem in error.problems]
    assert all(origin.startswith("/") or origin == "config.json" for origin in origins)
    assert all("\n" not in problem.line() for problem in error.problems)
    assert len(error.line()) < 1000


def test_every_problem_at_once_in_the_documents_order():
    document = containerd_spec()
    document["hostname"] = "x" * 65
    document["mounts"][1]["options"] = "ro"
    document["mounts"][3]["destination"] = "/"
    document["mounts"].append({"destination": "/proc/1", "type": "tmpfs"})
    document["linux"]["namespaces"].append({"type": "pid"})
    document["linux"]["devices"] = [{"type": "z", "path": "/dev/z"}]
    del document["ociVersion"]
    with pytest.raises(SpecError) as caught:
        load.load(text=json.dumps(document))
    assert [problem.origin for problem in caught.value.problems] == [
        "/mounts/1/options", "/mounts/3/destination", "/mounts/7/destination",
        "/linux/namespaces/5/type", "/linux/devices/0/type", "/hostname", "/ociVersion",
    ]
    assert caught.value.line() == '/mounts/1/options: "ro": an array is allowed'


def test_strict_asks_the_schema_even_if_all_is_well(monkeypatch):
    asked = []
    monkeypatch.setattr(schema, "problems", lambda *arguments: asked.append(arguments) or [])
    load.load(text=json.dumps(minimal_spec()))
    assert asked == []
    load.load(text=json.dumps(minimal_spec()), strict=True)
    assert len(asked) == 1


def test_without_jsonschema_the_checks_themselves_speak(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jsonschema", None)
    document = minimal_spec()
    document["mounts"] = [{"destination": ""}, {"destination": "/ok"}, {"destination": 3}]
    with pytest.raises(SpecError) as caught:
        load.load(text=json.dumps(document))
    assert [problem.origin for problem in caught.value.problems] == [
        "/mounts/0/destination", "/mounts/2/destination",
    ]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_examples(path):
    load.load(path.parent, strict=True)
    assert list(official().iter_errors(json.loads(path.read_text("utf-8")))) == [] or (
        path.parent.name == "idmapped"
    )


def test_there_are_examples():
    assert {path.parent.name for path in EXAMPLES} == {
        "minimal", "overlay", "read-only", "rootless", "idmapped", "pod-hints", "cgroup",
    }


@pytest.mark.parametrize("name", ["config", "plan", "annotations", "hook-state"])
def test_the_schemas_are_schemas(name):
    import jsonschema

    jsonschema.Draft202012Validator.check_schema(schema.read(name))
