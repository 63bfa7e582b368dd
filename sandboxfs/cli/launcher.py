"""``sandboxfs launcher PATH``: write the launcher that starts fastest.

What pip writes imports `site`, reads ``.pth`` files and looks for the environment it belongs to,
which costs more than the bare interpreter does.  This launcher names the interpreter itself
(never a virtual environment's link, which is looked up through ``pyvenv.cfg``), runs it as
``-I -S -B`` and says where everything lies.  Nothing of the caller's environment or working
directory reaches the import path, so it is also what hooks are started with.

Of a script Python looks whether it is an archive, and compiles it, at every start.  So the first
line passes Python a command (``-c``) that executes the last one, which is the bytecode of those
between.  These are executed where the first line would be too long for it, and for whoever names
the interpreter.
"""

import marshal
import os
import shlex
import subprocess
import sys
from errno import ENOENT
from stat import S_ISREG

from sandboxfs import archive
from sandboxfs.errors import MountError, SandboxError, UsageError

# Linux up to 5.0 cuts the first line at 127 bytes, later ones at 255.
LONGEST_SHEBANG = 127
COMMAND = "import sys,marshal;exec(marshal.loads(bytes.fromhex([*open(sys.argv[1])][-1][1:])))"
# The launcher's bytes have to be the same each time.  Version 2 notes no references, which depend
# on who else refers to an object; but slices among the constants (Python 3.14) need version 5.
MARSHAL_VERSION = 2 if marshal.version < 5 else 5
# Every launcher holds it, the one that pip writes too: what has it may be replaced.
WITNESS = b"from sandboxfs.__main__ import main"
REQUIRED = ("prctl", "pyroute2", "jsonschema")


def add_arguments(parser):
    """Add this command's arguments to an argparse parser."""
    parser.add_argument("path", metavar="PATH", help="where to write the launcher")
    parser.add_argument(
        "--force", action="store_true", help="overwrite PATH even if it is something else"
    )


def main(arguments):
    """Write the launcher to `arguments.path`; returns the exit status."""
    write(arguments.path, force=arguments.force)
    return 0


def write(path, force=False):
    """Write the launcher to `path` (str), atomically, mode 0755, replacing an older one.

    UsageError: something else is at `path` and `force` isn't set.  SandboxError: it can't be
    written.
    """
    if not force:
        _refuse_others(path)
    start = content()
    compile_package()
    archive.write()
    temporary = f"{path}.{os.getpid()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(temporary, flags, 0o700), "wb") as file:
            try:
                file.write(start)
                os.fchmod(file.fileno(), 0o755)
                file.flush()
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
    except OSError as error:
        raise MountError("", "write", path, errno=error.errno) from error


def interpreter():
    """Return the interpreter that runs us, never a virtual environment's link to it."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def content():
    """Return the launcher (bytes) for the interpreter and the packages that run us."""
    found = interpreter()
    return text(found, import_path(found))


def text(interpreter, directories):
    """Return the launcher's content (bytes) for an interpreter and an import path (lists of str).

    The kernel passes what follows the interpreter as one argument, and cuts the line at a length;
    where that would hurt, or the interpreter's path has white space, a shell starts it instead.
    """
    if not interpreter.isprintable() or "\\" in interpreter or not interpreter.isascii():
        raise UsageError("", "launcher", interpreter, "no launcher can name this interpreter")
    lines = (
        # Nothing that `run` makes is cyclic garbage; looking for some costs half a millisecond.
        f"import gc, marshal, sys; gc.disable(); sys.path[:] = {[*directories]!a}",
        *archive.start_lines(),
        f"{WITNESS.decode()}; sys.exit(main())",
    )
    return "\n".join([_shebang(interpreter), *lines, f"#{_bytecode(lines)}\n"]).encode("ascii")


def _shebang(interpreter):
    # Another version couldn't read our bytecode; what has the version in its name stays this one.
    stays = interpreter.endswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    for options in ((f"-ISBc{COMMAND}",) if stays else ()) + ("-ISB",):
        shebang = f"#!{interpreter} {options}"
        if len(shebang) <= LONGEST_SHEBANG and " " not in interpreter:
            return shebang
    # To the shell ''''exec is exec; to Python the line is a string.
    return f"#!/bin/sh\n''''exec {shlex.quote(interpreter)} -I -S -B \"$0\" \"$@\" # '''"


def _bytecode(lines: "tuple[str, ...]") -> str:
    # The arguments of a command begin one later than those of a script.
    text = "\n".join(("import sys; del sys.argv[0]", *lines))
    code = compile(text, "<launcher>", "exec", dont_inherit=True, optimize=2)
    return marshal.dumps(code, MARSHAL_VERSION).hex()


def import_path(interpreter):
    """Return the directories the launcher imports from, as a list of absolute paths.

    First the interpreter's own, so that no installed package hides a module of the standard
    library; then ours, then those of the packages we need.
    """
    done = subprocess.run(
        [interpreter, "-I", "-S", "-c", r"import sys; print(*sys.path, sep='\0', end='')"],
        stdout=subprocess.PIPE, check=True,
    )
    found = [path for path in os.fsdecode(done.stdout).split("\0") if os.path.isdir(path)]
    return list(dict.fromkeys(found + own_path()))


def own_path():
    """Return the directories of our package and of those it needs."""
    return list(dict.fromkeys([_package_parent(), *(_home(name) for name in REQUIRED)]))


def compile_package():
    """Compile our own bytecode where it is missing or old, as far as we may write it.

    The launcher's -B keeps Python from doing it, and PYTHONDONTWRITEBYTECODE may be set.
    """
    import compileall

    package = os.path.join(_package_parent(), "sandboxfs")
    if os.access(package, os.W_OK):
        compileall.compile_dir(package, quiet=2)


def _package_parent():
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))


def _home(name):
    """Return the directory that holds the top-level module `name`, without importing it."""
    from importlib.util import find_spec

    found = find_spec(name)
    if found is None or not found.origin:
        raise SandboxError("", "import", name, "is not installed", hint="pip install sandboxfs")
    directory = os.path.dirname(os.path.abspath(found.origin))
    return os.path.dirname(directory) if found.submodule_search_locations else directory


def _refuse_others(path):
    try:
        # O_NONBLOCK: a FIFO at the path must not hang us.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == ENOENT and not os.path.islink(path):
            return
        raise MountError("", "open", path, errno=error.errno) from error
    try:
        head = os.read(fd, 4096) if S_ISREG(os.fstat(fd).st_mode) else b""
    finally:
        os.close(fd)
    if WITNESS not in head:
        raise UsageError(
            "", "launcher", path, "exists and is no launcher of sandboxfs",
            hint="--force overwrites it",
        )
