"""A text that JSON's grammar lets pass and `load` doesn't: scanned again, to say what is wrong."""

from sandboxfs.errors import SpecError
from sandboxfs.spec.load import scan
from sandboxfs.spec.values import escaped


def explained(text, name):
    """Scan again, keeping what was refused in place, and return the error that names it."""
    doubled = []
    constants = []

    def pairs_hook(pairs):
        found = dict(pairs)
        if len(found) != len(pairs):
            once = set()
            twice = {}
            for key, _ in pairs:
                if key in once:
                    twice[key] = True
                once.add(key)
            doubled.append((found, twice))
        return found

    def constant_hook(word):
        constants.append([word])
        return constants[-1]

    document = scan(text, name, pairs_hook, constant_hook)
    problems = [
        SpecError(pointer, text="holds half of a surrogate pair, which is no character")
        for pointer in lone_surrogates(document)
    ]
    keys = {id(found): keys for found, keys in doubled}
    words = {id(holder): holder[0] for holder in constants}
    for pointer, value in _containers(document):
        problems.extend(
            SpecError(f"{pointer}/{escaped(key)}", text="stands twice in one object")
            for key in keys.get(id(value), ())
        )
        if id(value) in words:
            problems.append(SpecError(pointer or name, "", words[id(value)], "is no JSON number"))
    return SpecError(problems[0].origin, "", problems[0].target, problems[0].text,
                     problems=problems)


def lone_surrogates(document):
    """Return the pointers of strings that no UTF-8 can write."""
    found = []
    for pointer, string in _strings(document):
        try:
            string.encode()
        except UnicodeEncodeError:
            found.append(pointer)
    return found


def _strings(document):
    """Yield (pointer, string) for every key and string value, without recursion."""
    pending = [("", document)]
    while pending:
        pointer, value = pending.pop()
        if type(value) is str:
            yield pointer, value
        elif type(value) is dict:
            for key, inner in value.items():
                yield f"{pointer}/{escaped(key)}", key
                pending.append((f"{pointer}/{escaped(key)}", inner))
        elif type(value) is list:
            pending.extend((f"{pointer}/{index}", inner) for index, inner in enumerate(value))


def _containers(document):
    """Yield (pointer, value) for every object and array in document order."""
    pending = [("", document)]
    while pending:
        pointer, value = pending.pop()
        if type(value) is dict:
            inner = [(f"{pointer}/{escaped(key)}", item) for key, item in value.items()]
        elif type(value) is list:
            inner = [(f"{pointer}/{index}", item) for index, item in enumerate(value)]
        else:
            continue
        yield pointer, value
        pending.extend(reversed(inner))
