"""What is wrong with the operator's file, and in which line: by the library, off the hot path."""

import tomllib

from sandboxfs.errors import PolicyError, shown

# Finding a line means parsing again, several times.
MOST_FAULTS = 20


def tables(text, path):
    """Return what the TOML document `text` holds; `PolicyError` if it isn't one."""
    try:
        return tomllib.loads(text)
    except ValueError as error:
        raise _syntax(text, path, error) from None
    except RecursionError:
        raise PolicyError(path, text="is nested too deeply to be read") from None


def error(text, path, problems):
    """Return the `PolicyError` of problems (key, value, text), in the order of their lines."""
    errors = []
    for key, value, problem in problems[:MOST_FAULTS]:
        keys = key if isinstance(key, tuple) else tuple(key.split("."))
        shown_value = "" if isinstance(value, dict) else f"{_toml(value)}: "
        line = line_of(text, keys)
        name = shown(".".join(keys))
        errors.append((line, PolicyError(f"{path}:{line}", text=f"{name}: {shown_value}{problem}")))
    errors.sort(key=lambda entry: entry[0])
    first = errors[0][1]
    return PolicyError(first.origin, text=first.text, problems=[each for _line, each in errors])


def _toml(value):
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{shown(value)}"' if isinstance(value, str) else shown(str(value))


def _syntax(text, path, error):
    """Return the `PolicyError` of what isn't TOML.

    The parser names the place in its message only (a field of its own came with Python 3.14).
    """
    reason, found, place = str(error).rpartition(" (at ")
    line = len(_lines(text))
    if not found:
        # Not from the grammar: a number of too many digits.
        reason = str(error)
        line = next(count for count in range(1, line + 1) if _parses(_lines(text)[:count]) is None)
    elif place.startswith("line "):
        line = int(place[len("line "):].partition(",")[0])
    return PolicyError(f"{path}:{line}", text=f"is no TOML: {reason[:1].lower()}{reason[1:]}")


def line_of(text, keys):
    """Return the number of the line of a TOML document in which the statement of `keys` begins.

    Parsed again, in beginnings of the document: the statement lies between the longest that is
    TOML and lacks the key and the shortest that has it.  So whatever way it is written (dotted,
    in an inline table, over several lines), the parser itself says where.
    """
    lines = _lines(text)
    lacking, having = 0, len(lines)
    while True:
        middle = next(
            (count for count in _from_the_middle(lacking, having) if _parses(lines[:count])), None
        )
        if middle is None:
            return lacking + 1
        if _has(tomllib.loads("\n".join(lines[:middle])), keys):
            having = middle
        else:
            lacking = middle


def _from_the_middle(low, high):
    """Yield the numbers between `low` and `high`, those in the middle first."""
    middle = (low + high) // 2
    yield from range(max(middle, low + 1), high)
    yield from range(middle - 1, low, -1)


def _lines(text):
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")


def _parses(lines):
    """Return whether `lines` are TOML; None if only a value is out of bounds."""
    try:
        tomllib.loads("\n".join(lines))
    except tomllib.TOMLDecodeError:
        return False
    except ValueError:
        return None
    return True


def _has(tables, keys):
    for key in keys:
        if not isinstance(tables, dict) or key not in tables:
            return False
        tables = tables[key]
    return True
