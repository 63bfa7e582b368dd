"""TOML as operators write it, read without the library.

Importing `tomllib` takes longer than building a root.  What this reads, and nothing else, is
tables, and in them strings without escapes, true, false and lists of such strings.  Of anything
beyond it nothing is guessed: then the library is asked, and so it is for every fault.
"""

_KEY = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


def tables(text):
    """Return what ``tomllib.loads(text)`` would, or None where that has to be asked."""
    lines = text.split("\n")
    if not all(line.replace("\t", " ").isprintable() for line in lines):
        return None
    found, table, index = {}, None, 0
    while index < len(lines):
        line = lines[index].strip(" \t")
        if not _is_end(line):
            if line[0] == "[":
                name, closing, rest = line[1:].partition("]")
                name = name.strip(" \t")
                if not closing or not _is_key(name) or name in found or not _is_end(rest):
                    return None
                table = found[name] = {}
            else:
                name, equals, rest = line.partition("=")
                name = name.strip(" \t")
                if not equals or table is None or not _is_key(name) or name in table:
                    return None
                entry = _value(lines, index, rest.strip(" \t"))
                if entry is None or not _is_end(entry[1]):
                    return None
                table[name], _rest, index = entry
        index += 1
    return found


def _is_key(name):
    return name != "" and _KEY.issuperset(name)


def _is_end(rest):
    """Return whether nothing of a line is left but a comment."""
    rest = rest.lstrip(" \t")
    return not rest or rest[0] == "#"


def _value(lines, index, rest):
    """Return (value, what follows it, index of its last line), or None."""
    if rest[:1] == "[":
        return _list(lines, index, rest[1:])
    for word, value in (("true", True), ("false", False)):
        if rest.startswith(word):
            return value, rest[len(word):], index
    string = _string(rest)
    return string and (*string, index)


def _string(rest):
    """Return (string, what follows it), or None."""
    quote = rest[:1]
    if quote not in ('"', "'") or not quote or rest.startswith(quote * 3):
        return None
    content, closing, rest = rest[1:].partition(quote)
    if not closing or (quote == '"' and "\\" in content):
        return None
    return content, rest


def _list(lines, index, rest):
    values, wanted = [], True
    while True:
        rest = rest.lstrip(" \t")
        if _is_end(rest):
            index += 1
            if index == len(lines):
                return None
            rest = lines[index]
        elif rest[0] == "]":
            return values, rest[1:], index
        elif rest[0] == "," and not wanted:
            wanted, rest = True, rest[1:]
        else:
            string = _string(rest) if wanted else None
            if string is None:
                return None
            wanted = False
            value, rest = string
            values.append(value)
