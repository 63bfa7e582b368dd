"""The real runtimes: where an engine finds them, and the programs that go in front of them."""

import os
import stat

from sandboxfs.engines.record import Registration, checked
from sandboxfs.errors import SandboxError
from sandboxfs.runtime import wrap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

NAMES = ("crun", "runc")
# Where services look for programs.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PROGRAMS = "/usr/local/libexec/sandboxfs"
USERS_PROGRAMS = ".local/libexec/sandboxfs"


def directory(engine: str, dest: "str | None") -> str:
    """Return where the programs of an engine go: each engine has its own, with runtimes' names."""
    if dest is None:
        dest = PROGRAMS if os.geteuid() == 0 else os.path.join(home(), USERS_PROGRAMS)
    return checked(os.path.join(dest, engine))


def manifest(engine: str, dest: "str | None") -> str:
    """Return where the list of what was written for an engine lies."""
    return directory(engine, dest) + ".sha256"


def home() -> str:
    """Return the directory of the user who asks; one that isn't there for users without one."""
    found = os.path.expanduser("~")
    return found if os.path.isabs(found) else "/nonexistent"


def executable(candidates: "Iterable[str]") -> "str | None":
    """Return the first of these paths that is a program."""
    for path in candidates:
        try:
            if stat.S_ISREG(os.stat(path).st_mode) and os.access(path, os.X_OK):
                return path
        except OSError:
            continue
    return None


def on_path(name: str) -> "str | None":
    """Return where a service finds the program `name`; a path stays as it is."""
    if os.path.isabs(name):
        return executable([name])
    return executable(os.path.join(each, name) for each in PATH.split(":"))


def with_programs(engine: str, dest: "str | None", config: "str | None",
                  found: "Mapping[str, str]") -> "tuple[Registration, dict[str, str]]":
    """Return a `Registration` with a program in front of each runtime, and name → its path.

    found: name of a runtime → path of the real one.  SandboxError: there is none.
    """
    if not found:
        raise SandboxError("", "install", engine, "finds no runtime on this machine",
                           hint="apt-get install crun, or runc")
    place = directory(engine, dest)
    registration = Registration(manifest(engine, dest))
    programs = {}
    for name, runtime in found.items():
        path = os.path.join(place, os.path.basename(runtime))
        programs[name] = path
        # One that the engine was told of by its path comes before others of that name.
        if path not in registration.files:
            registration.files[path] = (wrap.content(runtime, config), 0o755)
    return registration, programs
