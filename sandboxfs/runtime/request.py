"""The command line of an OCI runtime, understood as the runtime behind us understands it.

runc and crun read the same words in different ways.  runc uses Go's flags: one dash or two, no
abbreviation, options before or after the container's id.  crun uses argp: abbreviations, values
glued to a letter, and options before the id alone.  A container must never start on the bare
image because an option was read differently, so a form that isn't certain is refused.

Sources: runc's main.go, create.go, run.go, restore.go with urfave/cli v1 and v3; crun's crun.c,
run_create.c, restore.c; argp(3).
"""

from sandboxfs.errors import UsageError
from sandboxfs.runtime.paths import real

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# It names a directory of ours (overlay=dir=), as it does one of the runtime's.
LONGEST_ID = 255
MAKERS = ("create", "run", "restore")
# Each name with whether it takes a value.
_GLOBAL = {
    "root": True, "log": True, "log-format": True, "log-level": True, "rootless": True,
    "cgroup-manager": True, "criu": True, "debug": False, "systemd-cgroup": False,
}
_COMMAND = {
    "bundle": True, "console-socket": True, "pid-file": True, "pidfd-socket": True,
    "preserve-fds": True, "no-pivot": False, "no-new-keyring": False, "no-subreaper": False,
    "detach": False, "keep": False,
    # restore
    "image-path": True, "work-path": True, "manage-cgroups-mode": True, "empty-ns": True,
    "lsm-profile": True, "lsm-mount-context": True, "tcp-established": False, "tcp-close": False,
    "ext-unix-sk": False, "shell-job": False, "file-locks": False, "auto-dedup": False,
    "lazy-pages": False,
}
_CRUN = {**_COMMAND, "config": True}
_LETTERS = {"b": "bundle", "d": "detach"}
_CRUN_LETTERS = {**_LETTERS, "f": "config"}
# With one of these a runtime prints something and makes no container.
_QUESTIONS = ("help", "version", "usage")
_QUESTION_LETTERS = "hvV?"


class Request:
    """One command line.

    makes: whether it makes a container; else the runtime answers it alone.  bundle, config: str
    or None, as written, of crun's ``--config`` the latter.  id: the container's.  log,
    log_format: str or None, where a runtime writes its errors.
    """

    __slots__ = ("bundle", "config", "id", "log", "log_format", "makes")

    def __init__(self) -> None:
        self.makes = False
        self.bundle: str | None = None
        self.config: str | None = None
        self.id = ""
        self.log: str | None = None
        self.log_format: str | None = None


def parse(kind: str, words: "Sequence[str]", request: Request) -> None:
    """Fill in `request` from the words after the program's name.

    kind: ``"runc"`` (Go's flags), ``"crun"`` (argp), or anything else: then only what both
    understand in the same way is taken.  UsageError for a form that isn't certain; what was
    understood until then, the log above all, is in `request`.
    """
    rest = _Words(kind, words)
    options = rest.options(_GLOBAL, {}, None)
    _keep_log(request, options)
    if rest.asked:
        return
    command = rest.positional[0] if rest.positional else ""
    if command not in MAKERS:
        if any(word.strip() in MAKERS for word in (command, *rest.left) if rest.uncertain):
            raise rest.refusal(rest.uncertain, "which command follows this option isn't certain")
        if command.strip() in MAKERS:
            raise rest.refusal(command, "white space around the command")
        return
    if rest.uncertain:
        raise rest.refusal(rest.uncertain, "this option isn't known")
    rest = _Words(kind, rest.left)
    names = _CRUN if kind == "crun" else _COMMAND
    if kind == "runc":
        # From version 1.5 on runc takes its global options here as well.
        names = {**_GLOBAL, **names}
    options = rest.options(names, _CRUN_LETTERS if kind == "crun" else _LETTERS, kind)
    _keep_log(request, options)
    if rest.asked:
        return
    if rest.uncertain:
        raise rest.refusal(rest.uncertain, "this option isn't known")
    identity = rest.positional + rest.left
    if len(identity) != 1 or not identity[0] or identity[0] != identity[0].strip():
        raise rest.refusal(" ".join(identity), "one container id is expected, behind the options")
    if "/" in identity[0] or identity[0] in (".", "..") or len(identity[0]) > LONGEST_ID:
        raise rest.refusal(identity[0], "a container's id has no slash and at most 255 characters")
    request.makes = True
    request.id = identity[0]
    request.bundle = options.get("bundle")
    request.config = options.get("config")
    if request.bundle == "":
        if kind != "runc":
            raise rest.refusal("--bundle=", "the value is empty")
        request.bundle = None


def _keep_log(request: Request, options: "dict[str, str]") -> None:
    request.log = options.get("log", request.log)
    request.log_format = options.get("log-format", request.log_format)


class _Words:
    """Words that are read from left to right.

    positional, left: the words that are no options, and those that weren't read.  asked: a
    question stands among them (``--help``).  uncertain: the first option that isn't known here;
    reading ends at it.
    """

    def __init__(self, kind: str, words: "Sequence[str]") -> None:
        self.kind = kind
        self.left = list(words)
        self.positional: list[str] = []
        self.asked = False
        self.uncertain = ""
        self.before_command = False

    def refusal(self, word: str, why: str) -> UsageError:
        return UsageError("runtime", "", word, why, hint="write it as --NAME=VALUE, before the "
                          "container's id, as `create --help` of the runtime lists it")

    def options(
        self, names: "dict[str, bool]", letters: "dict[str, str]", command: str | None
    ) -> "dict[str, str]":
        """Read options into a dict of their values.

        command: the kind of runtime whose command's options these are, None for the global ones,
        which end at the first word that is none.
        """
        found: dict[str, str] = {}
        self.before_command = command is None
        while self.left and not self.uncertain and not self.asked:
            word = self.left.pop(0)
            if self.kind != "crun" and word != word.strip() and word.strip().startswith("-"):
                # Later versions of Go's flags drop the white space.
                self.uncertain = word
                break
            if word == "--":
                if command is None and self.left:
                    self.positional.append(self.left.pop(0))
                return found
            if not word.startswith("-"):
                self.positional.append(word)
                # argp reads none behind the first word; Go's flags may stand behind the id.
                if command != "runc":
                    return found
                continue
            if not self.long(word, names, found) and not self.short(word, names, letters, found):
                self.uncertain = word
        return found

    def long(self, word: str, names: "dict[str, bool]", found: "dict[str, str]") -> bool:
        """Read ``--name``, ``--name=value``, for Go ``-name``; returns whether it was one."""
        dashes = 2 if word.startswith("--") else 1 if self.kind == "runc" else 0
        if not dashes:
            return False
        name, equals, value = word[dashes:].partition("=")
        if self.kind == "crun" and name:
            name = _completed(name, names)
        if name in _QUESTIONS or (dashes == 1 and name in ("h", "v")):
            self.asked = not equals
            return self.asked
        if name not in names:
            # One word, whatever it means: Go's flags know no abbreviation that could be ours.
            return bool(name and equals and self.kind == "runc" and name not in _LETTERS
                        and name[0] != "-")
        if equals and not names[name]:
            return self.kind == "runc"  # --no-pivot=false
        if names[name]:
            found[name] = value if equals else self.value(word)
        return True

    def short(
        self, word: str, names: "dict[str, bool]", letters: "dict[str, str]",
        found: "dict[str, str]",
    ) -> bool:
        """Read ``-b VALUE``, for argp also ``-dbVALUE``; returns whether it was one."""
        if word.startswith("--"):
            return False
        if self.kind != "crun":
            letter, equals, value = word[1:].partition("=")
            if letter == "h":
                self.asked = not equals
                return self.asked
            if letter not in letters or (equals and self.kind != "runc"):
                return False
            if names[letters[letter]]:
                found[letters[letter]] = value if equals else self.value(word)
            return True
        for at, letter in enumerate(word[1:], 2):
            if letter in _QUESTION_LETTERS[1:]:
                self.asked = True
                return True
            name = letters.get(letter)
            if name is None:
                return False
            if names[name]:
                found[name] = word[at:] or self.value(word)
                return True
        return len(word) > 1

    def value(self, word: str) -> str:
        if not self.left:
            raise self.refusal(word, "its value is missing")
        value = self.left.pop(0)
        if self.before_command and self.kind not in ("runc", "crun") and value in MAKERS:
            raise self.refusal(f"{word} {value}", "the command may be meant")
        # runc 1.x moves words that begin with a dash away from the option before them.
        if value.startswith("-") and self.kind != "crun":
            raise self.refusal(f"{word} {value}", "the value begins with a dash")
        return value


def _completed(name: str, names: "dict[str, bool]") -> str:
    """Return the one option that an abbreviation stands for, or the name as it is."""
    if name in names or name in _QUESTIONS:
        return name
    matches = [each for each in (*names, *_QUESTIONS) if each.startswith(name)]
    return matches[0] if len(matches) == 1 else name


def bundle_of(request: Request) -> str:
    """Return the path of a request's bundle without links; the current directory by default."""
    return real(request.bundle or ".", "bundle")


def config_of(request: Request) -> str | None:
    """Return the path of crun's ``--config`` without links, None for the bundle's config.json.

    crun takes the very name ``config.json`` as the bundle's, and any other relative path as one
    from the directory that it was started in.
    """
    if request.config is None or request.config == "config.json":
        return None
    return real(request.config, "--config")
