"""The plan of every example, as text and as JSON, compared with files.

A changed plan is a changed file to review: SANDBOXFS_WRITE_GOLDEN=1 writes them anew.
"""

import json
import os
from pathlib import Path

import jsonschema
import pytest

from sandboxfs.plan import from_spec, show, survey
from sandboxfs.spec import load

TOP = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
EXAMPLES = sorted(path.parent for path in (TOP / "specs/examples").glob("*/config.json"))
FACTS = {
    "root": survey.Facts(),
    "user": survey.Facts(uid=1000, gid=1000, privileged=False),
}


def planned(example, who):
    return from_spec.plan(load.load(str(example)), FACTS[who])


def normalised(text, example):
    """The checkout's own place is no part of a plan."""
    return text.replace(str(example), "BUNDLE")


def compare(path, text):
    if os.environ.get("SANDBOXFS_WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("who", FACTS)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_text(example, who):
    text = normalised(str(planned(example, who)), example)
    compare(GOLDEN / f"{example.name}.{who}.txt", text)


@pytest.mark.parametrize("who", FACTS)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_json(example, who):
    text = normalised(planned(example, who).to_json(), example)
    compare(GOLDEN / f"{example.name}.{who}.json", text)


@pytest.mark.parametrize("who", FACTS)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_json_is_of_the_schema(example, who):
    schema = json.loads((TOP / "specs/schema/plan.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(show.to_dict(planned(example, who)))


def test_every_kind_of_operation_is_in_some_example():
    from sandboxfs.plan import operations

    kinds = {
        kind for kind in vars(operations).values()
        if isinstance(kind, type) and issubclass(kind, operations.Operation) and kind.name
    }
    seen = {type(step) for path in EXAMPLES for step in planned(path, "root")}
    # `overlay=none`, a terminal and a cwd: test_plan_decisions has them.  The plans of a hook and
    # of a runtime in front have the rest.
    assert {kind.__name__ for kind in kinds - seen} <= {
        "Attach", "Carry", "Console", "Cover", "Directory", "PlainRoot", "ReadonlyMount",
        "SetAside",
    }
