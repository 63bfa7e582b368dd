"""Every problem of a document at once, by ``specs/schema/config.schema.json``.

Reached only when the hot path's checks found a fault, by `validate` and by ``--strict``:
jsonschema takes longer to import than everything else together.
"""

import json
from functools import cache
from itertools import islice
from pathlib import Path

from sandboxfs.errors import SpecError
from sandboxfs.spec import check, check_linux, check_process, check_settings, values

# A document of 16 MiB can hold a million faults; nobody reads more than these.
MOST_PROBLEMS = 1000


def directory():
    """Return the `Path` of the schemas: in the package (a wheel), or beside it (a checkout)."""
    package = Path(__file__).resolve().parent.parent
    for place in (package / "_specs" / "schema", package.parent / "specs" / "schema"):
        if place.is_dir():
            return place
    raise FileNotFoundError(f"no schemas in {package / '_specs'} or {package.parent / 'specs'}")


def read(name):
    """Return the schema `name` (``"config"``, ``"plan"``, …) as parsed JSON."""
    return json.loads((directory() / f"{name}.schema.json").read_text("utf-8"))


def faults(document):
    """Yield what the schema refuses, as jsonschema's own errors."""
    yield from _validator().iter_errors(document)


def shapes(document):
    """Return a `SpecError` for each value the schema refuses, in the schema's order."""
    found = {}
    for fault in islice(faults(document), MOST_PROBLEMS):
        for error in _told(fault):
            # One value may break several keywords: the first one says enough.
            found.setdefault(error.origin, error)
    return list(found.values())


def problems(document, name="config.json"):
    """Return every problem of a parsed document as `SpecError`, in the document's order.

    Shapes come from the schema, rules between values from `check`.  name: the document's
    own name, the origin of what concerns it as a whole.
    """
    try:
        shaped = shapes(document)
    except (ImportError, RecursionError):
        # Without jsonschema, and for a value so deep that jsonschema fails to print it, the
        # hot path's own checks speak: one fault an entry.
        shaped = []
    related = check.collect(_without(document, shaped), name=name)
    for error in shaped:
        error.origin = error.origin or name
    told = {error.origin for error in shaped}
    found = shaped + [error for error in related if not _covered(error.origin, told)]
    orders = {}
    found.sort(key=lambda error: _place(document, error.origin, orders))
    return found[:MOST_PROBLEMS]


def error(found):
    """Return one `SpecError` that stands for a list of problems."""
    first = found[0]
    return SpecError(
        first.origin, first.operation, first.target, first.text, first.hint, problems=found
    )


def _without(document, faults):
    """Return `document` without what is wrong, so that the rest can be related.

    What lies on the way to a fault is copied, the document itself stays as it is.
    """
    if not faults or not isinstance(document, dict):
        return document
    copy = dict(document)
    for fault in faults:
        _remove(copy, [
            part.replace("~1", "/").replace("~0", "~") for part in fault.origin.split("/")[1:]
        ])
    return copy


def _remove(value, path):
    """Take the value at `path` out; the entries of a list keep their numbers."""
    owners = []
    for part in path:
        key = int(part) if isinstance(value, list) else part
        owners.append((value, key))
        try:
            inner = value[key]
        except (KeyError, IndexError):
            break  # it is missing, or was taken out already
        if not isinstance(inner, (dict, list)):
            break
        value[key] = value = inner.copy()
    while owners:
        owner, key = owners.pop()
        if isinstance(owner, dict):
            owner.pop(key, None)
            return
        if any(isinstance(entry, dict) for entry in owner):
            owner[key] = {}
            return
        # One bad string spoils its list: what lies around it is looked at without.


def _covered(origin, told):
    """Return whether the fault at a pointer, or at one above it, is told already."""
    while origin:
        if origin in told:
            return True
        origin = origin.rpartition("/")[0]
    return False


def _place(document, pointer, orders):
    """Return a sort key: where a JSON pointer leads in the document, as positions.

    orders: the positions of the keys of objects seen before, by id.
    """
    place = []
    value = document
    for part in pointer.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict):
            if id(value) not in orders:
                orders[id(value)] = {key: number for number, key in enumerate(value)}
            # What is missing comes after what is there.
            place.append(orders[id(value)].get(part, len(value)))
            value = value.get(part)
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            place.append(int(part))
            value = value[int(part)]
    return place


# -- jsonschema ---------------------------------------------------------------------------

# What the schema's formats stand for: functions that return a complaint or None.
FORMATS = {
    "sandboxfs-path": values.wrong_path,
    "sandboxfs-length": values.wrong_length,
    "sandboxfs-inner-path": values.wrong_inner_path,
    "sandboxfs-absolute-path": values.wrong_absolute_path,
    "sandboxfs-absolute-inner-path": values.wrong_absolute_inner_path,
    "sandboxfs-namespace-path": check_linux.wrong_namespace_path,
    "sandboxfs-cwd": check_process.wrong_cwd,
    "sandboxfs-hostname": check.wrong_hostname,
    "sandboxfs-variable": check_process.wrong_variable,
    "sandboxfs-interface": check_settings.wrong_interface,
    "sandboxfs-interface-or-empty": (
        lambda value: check_settings.wrong_interface(value) if value else None
    ),
}

_TYPES = {
    "object": "an object", "array": "an array", "string": "a string",
    "boolean": "true or false", "integer": "a whole number",
}


@cache
def _validator():
    """Return a validator of config.schema.json that is as exact as the hot path."""
    import jsonschema
    from jsonschema.validators import extend

    draft = jsonschema.Draft202012Validator
    exact = extend(
        draft,
        validators={"properties": _properties(draft.VALIDATORS["properties"])},
        # To JSON Schema 1.0 is an integer; to the readers of config.json it is none.
        type_checker=draft.TYPE_CHECKER.redefine(
            "integer", lambda _checker, value: type(value) is int
        ),
    )
    formats = jsonschema.FormatChecker(formats=())
    for name, wrong in FORMATS.items():
        formats.checks(name)(
            lambda value, wrong=wrong: not isinstance(value, str) or wrong(value) is None
        )
    return exact(read("config"), format_checker=formats)


def _properties(original):
    """Wrap the keyword `properties`: a known key in another case is a fault."""
    from jsonschema import ValidationError

    def properties(validator, known, instance, schema):
        yield from original(validator, known, instance, schema)
        # Inside `if` and `then` there are no positions, only conditions.
        if not isinstance(instance, dict) or "type" not in schema:
            return
        folded = {key.casefold(): key for key in known}
        for key in instance:
            if key not in known and key.casefold() in folded:
                yield ValidationError(
                    f"is another spelling of {folded[key.casefold()]}", path=[key],
                    validator="spelling",
                )

    return properties


def _told(fault):
    """Yield jsonschema's finding in our words, at the pointer of what is wrong."""
    pointer = "".join(f"/{values.escaped(str(part))}" for part in fault.absolute_path)
    value = fault.instance
    shown = values.shown(value)
    keyword, rule = fault.validator, fault.validator_value
    if keyword == "required":
        for key in rule:
            if key not in value:
                yield SpecError(f"{pointer}/{key}", text="is missing")
    elif keyword == "spelling":
        yield SpecError(pointer, text=fault.message)
    elif keyword == "type":
        yield SpecError(pointer, "", shown, f"{_allowed_type(fault)} is allowed")
    elif keyword == "enum":
        yield SpecError(pointer, "", shown, "allowed: " + ", ".join(rule))
    elif keyword in ("minimum", "maximum"):
        yield SpecError(pointer, "", shown, f"{_allowed_type(fault)} is allowed")
    elif keyword == "additionalProperties":
        yield from _unexpected(fault, pointer)
    elif keyword in ("minItems", "minLength"):
        yield SpecError(pointer, "", shown, "must not be empty")
    elif keyword == "maxItems":
        yield SpecError(pointer, text=f"at most {rule} entries are allowed")
    elif keyword == "format":
        yield from _misformed(fault, pointer)
    elif keyword == "pattern":
        if "propertyNames" in fault.absolute_schema_path:
            pointer = f"{pointer}/{values.escaped(value)}"
        what = "holds a NUL" if "\0" in value else "NAME=VALUE is allowed"
        yield SpecError(pointer, "", shown, what)
    else:
        yield SpecError(pointer, "", shown, fault.message)


def _allowed_type(fault):
    low, high = fault.schema.get("minimum"), fault.schema.get("maximum")
    words = _TYPES[fault.schema["type"]]
    return words if low is None else f"{words} from {low} to {high}"


def _unexpected(fault, pointer):
    known = fault.schema["properties"]
    for key in fault.instance:
        if key not in known:
            yield SpecError(
                f"{pointer}/{values.escaped(key)}", text="allowed: " + ", ".join(known)
            )


def _misformed(fault, pointer):
    text = FORMATS[fault.validator_value](fault.instance)
    if "propertyNames" in fault.absolute_schema_path:
        yield SpecError(f"{pointer}/{values.escaped(fault.instance)}", text=text)
    else:
        yield SpecError(pointer, "", values.shown(fault.instance), text)
