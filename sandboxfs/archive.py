"""The archives: the bytecode of hot modules, one file each for `run`, two hooks and the runtime.

Finding, reading and unpacking some thirty modules one by one costs as much as building the
root.  The launcher reads them from such a file instead: no docstrings, no line numbers.  The file
knows the size and time of every source it was made from; if one differs, or the file is
missing, modules are imported as always.  It lies in the package's ``__pycache__`` and is as
trusted as what lies there.
"""

import ast
import errno
import marshal
import os
import sys
import types
from importlib.util import find_spec

from sandboxfs.kernel import abi, system, vfork

# What `run` imports for an ordinary spec, cgroups included; tests/kernel/test_start.py pins it.
HOT: tuple[str, ...] = (
    "sandboxfs",
    "sandboxfs.__main__",
    "sandboxfs.build",
    "sandboxfs.build.assemble",
    "sandboxfs.build.calls",
    "sandboxfs.build.cgroups",
    "sandboxfs.build.compiled",
    "sandboxfs.build.engine",
    "sandboxfs.build.failure",
    "sandboxfs.build.gather",
    "sandboxfs.build.mountpoints",
    "sandboxfs.build.preparation",
    "sandboxfs.build.root",
    "sandboxfs.build.siblings",
    "sandboxfs.cli",
    "sandboxfs.cli.run",
    "sandboxfs.errors",
    "sandboxfs.kernel",
    "sandboxfs.kernel.abi",
    "sandboxfs.kernel.foreign",
    "sandboxfs.kernel.fscontext",
    "sandboxfs.kernel.resolve",
    "sandboxfs.kernel.submounts",
    "sandboxfs.kernel.syscalls",
    "sandboxfs.kernel.system",
    "sandboxfs.kernel.vfork",
    "sandboxfs.plan",
    "sandboxfs.plan.base",
    "sandboxfs.plan.from_spec",
    "sandboxfs.plan.operations",
    "sandboxfs.plan.survey",
    "sandboxfs.process",
    "sandboxfs.process.credentials",
    "sandboxfs.process.namespaces",
    "sandboxfs.process.payload",
    "sandboxfs.process.program",
    "sandboxfs.process.report",
    "sandboxfs.process.run",
    "sandboxfs.spec",
    "sandboxfs.spec.check",
    "sandboxfs.spec.check_linux",
    "sandboxfs.spec.check_mounts",
    "sandboxfs.spec.check_process",
    "sandboxfs.spec.check_root",
    "sandboxfs.spec.load",
    "sandboxfs.spec.model",
    "sandboxfs.spec.options",
    "sandboxfs.spec.values",
)

if not vfork.is_possible():
    # Children come from fork(2) then (Python 3.14).
    HOT += ("sandboxfs.process.forks",)

# The same for the hook createContainer of an ordinary container; test_hook_start.py pins it.
CONTAINER = (
    "sandboxfs",
    "sandboxfs.__main__",
    "sandboxfs.build",
    "sandboxfs.build.assemble",
    "sandboxfs.build.carry",
    "sandboxfs.build.compiled",
    "sandboxfs.build.engine",
    "sandboxfs.build.failure",
    "sandboxfs.build.gather",
    "sandboxfs.build.mounts",
    "sandboxfs.build.root",
    "sandboxfs.build.siblings",
    "sandboxfs.build.tmp",
    "sandboxfs.cli",
    "sandboxfs.cli.hook",
    "sandboxfs.errors",
    "sandboxfs.hooks",
    "sandboxfs.hooks.lifecycle",
    "sandboxfs.hooks.state",
    "sandboxfs.kernel",
    "sandboxfs.kernel.abi",
    "sandboxfs.kernel.foreign",
    "sandboxfs.kernel.fscontext",
    "sandboxfs.kernel.maker",
    "sandboxfs.kernel.mountinfo",
    "sandboxfs.kernel.mounttable",
    "sandboxfs.kernel.resolve",
    "sandboxfs.kernel.submount_records",
    "sandboxfs.kernel.submounts",
    "sandboxfs.kernel.syscalls",
    "sandboxfs.kernel.system",
    "sandboxfs.plan",
    "sandboxfs.plan.carry",
    "sandboxfs.plan.live",
    "sandboxfs.plan.operations",
    "sandboxfs.plan.survey",
    "sandboxfs.policy",
    "sandboxfs.spec",
    "sandboxfs.spec.annotations",
    "sandboxfs.spec.check",
    "sandboxfs.spec.check_linux",
    "sandboxfs.spec.check_mounts",
    "sandboxfs.spec.check_process",
    "sandboxfs.spec.check_root",
    "sandboxfs.spec.load",
    "sandboxfs.spec.model",
    "sandboxfs.spec.values",
)

# And for the hooks on the host's side, createRuntime and poststop.
HOOK = (
    "sandboxfs",
    "sandboxfs.__main__",
    "sandboxfs.cli",
    "sandboxfs.cli.hook",
    "sandboxfs.errors",
    "sandboxfs.hooks",
    "sandboxfs.hooks.lifecycle",
    "sandboxfs.hooks.state",
    "sandboxfs.kernel",
    "sandboxfs.kernel.abi",
    "sandboxfs.kernel.foreign",
    "sandboxfs.kernel.syscalls",
    "sandboxfs.kernel.system",
    "sandboxfs.plan",
    "sandboxfs.plan.survey",
    "sandboxfs.policy",
    "sandboxfs.spec",
    "sandboxfs.spec.annotations",
    "sandboxfs.spec.check",
    "sandboxfs.spec.check_linux",
    "sandboxfs.spec.check_mounts",
    "sandboxfs.spec.check_process",
    "sandboxfs.spec.check_root",
    "sandboxfs.spec.load",
    "sandboxfs.spec.model",
    "sandboxfs.spec.values",
    "sandboxfs.state",
    "sandboxfs.state.directory",
)

# And for the runtime in front, of an ordinary container; test_runtime_start.py pins it.
RUNTIME = (
    "sandboxfs",
    "sandboxfs.build",
    "sandboxfs.build.assemble",
    "sandboxfs.build.compiled",
    "sandboxfs.build.engine",
    "sandboxfs.build.failure",
    "sandboxfs.build.gather",
    "sandboxfs.build.root",
    "sandboxfs.build.siblings",
    "sandboxfs.build.tmp",
    "sandboxfs.errors",
    "sandboxfs.kernel",
    "sandboxfs.kernel.abi",
    "sandboxfs.kernel.foreign",
    "sandboxfs.kernel.fscontext",
    "sandboxfs.kernel.resolve",
    "sandboxfs.kernel.submounts",
    "sandboxfs.kernel.syscalls",
    "sandboxfs.kernel.system",
    "sandboxfs.plan",
    "sandboxfs.plan.base",
    "sandboxfs.plan.in_front",
    "sandboxfs.plan.operations",
    "sandboxfs.plan.survey",
    "sandboxfs.policy",
    "sandboxfs.runtime",
    "sandboxfs.runtime.document",
    "sandboxfs.runtime.main",
    "sandboxfs.runtime.paths",
    "sandboxfs.runtime.place",
    "sandboxfs.runtime.request",
    "sandboxfs.spec",
    "sandboxfs.spec.annotations",
    "sandboxfs.spec.check_linux",
    "sandboxfs.spec.check_root",
    "sandboxfs.spec.load",
    "sandboxfs.spec.model",
    "sandboxfs.spec.values",
)

# C modules that are files, and that every start of the kind needs.
EXTENSIONS = ("_ctypes", "_json")
SETS = {"hot": HOT, "container": CONTAINER, "hook": HOOK, "runtime": RUNTIME}

# The modules are marshalled in groups, so that names used by many are read once.  What a group is
# read into is used again for the next one, where glibc doesn't map it (from 128 KiB on).
_GROUP = 100 << 10

# Runs before anything of ours is imported, from the archive itself; what it gets are its globals.
# Memory that is touched for the first time costs more than anything else here.
_LOADER = """
def load(file, sources, extensions, groups):
    import sys
    from _frozen_importlib import ModuleSpec as Spec
    from _imp import create_dynamic, exec_dynamic
    from marshal import loads
    from posix import stat
    for path, time, size in sources:
        status = stat(path)
        if status.st_mtime_ns != time or status.st_size != size:
            return
    modules = sys.modules
    Module = type(sys)
    flags = sys.getdlopenflags()
    # Of what a C module calls of Python most is never called.
    sys.setdlopenflags(1)  # RTLD_LAZY
    for name, path in extensions:
        # The search for its file takes longer than loading it.
        if name not in modules:
            spec = Spec(name, None, origin=path)
            modules[name] = module = create_dynamic(spec)
            module.__spec__ = spec
            exec_dynamic(module)
    sys.setdlopenflags(flags)
    for members, length in groups:
        for (name, path, package), code in zip(members, loads(file.read(length))):
            modules[name] = module = Module(name)
            parent, _, child = name.rpartition(".")
            module.__file__ = path
            if package:
                module.__path__ = [package]
                module.__package__ = name
            else:
                module.__package__ = parent
            exec(code, module.__dict__)
            if parent:
                setattr(modules[parent], child, module)
try:
    load(file, sources, extensions, groups)
except BaseException:
    # Half of us would be worse than nothing: what failed fails again, and says so, on import.
    import sys
    for name in (*extensions, *[member for members, _ in groups for member in members]):
        sys.modules.pop(name[0], None)
    raise
"""


def path(kind="hot"):
    """Return where this interpreter's archive of a kind (a key of `SETS`) lies."""
    tag = sys.implementation.cache_tag
    return os.path.join(_package(), "__pycache__", f"{kind}.{tag}.archive")


def write():
    """Write all archives, each atomically; returns `run`'s path, or None where it can't be done."""
    try:
        os.makedirs(os.path.dirname(path()), exist_ok=True)
        for kind in SETS:
            destination = path(kind)
            temporary = f"{destination}.{os.getpid()}"
            made = content(kind)
            with open(temporary, "xb") as file:
                # Whoever may start us reads it: in a user namespace hooks run as somebody else.
                os.fchmod(file.fileno(), 0o644)
                file.write(made)
            os.replace(temporary, destination)
    except OSError:
        # A package that only root may write: its users start a little slower.
        return None
    return path()


def content(kind="hot"):
    """Return an archive: the length of its head in 8 digits, the head, the groups of modules.

    The head is a loader's code and what it needs to know, marshalled; each group is a marshalled
    tuple of codes.
    """
    loader = compile(_LOADER, "<sandboxfs archive>", "exec", dont_inherit=True, optimize=2)
    extensions = [found for name in EXTENSIONS for found in _extension(name)]
    sources = [(path, *_version(os.stat(path))) for _name, path in extensions]
    groups, texts = [], []
    for entries in _grouped(map(_entry, _ordered(SETS[kind]))):
        texts.append(marshal.dumps(tuple(code for *_member, code in entries)))
        groups.append(([tuple(member) for *member, _version, _code in entries], len(texts[-1])))
        sources += [(path, *version) for _name, path, _package, version, _code in entries]
    known = {"sources": sources, "extensions": extensions, "groups": groups}
    head = marshal.dumps((loader, known))
    return b"%08d" % len(head) + head + b"".join(texts)


def _grouped(entries):
    """Yield lists of entries, each of which is at most as large as a group may be."""
    group, size = [], 0
    for entry in entries:
        length = len(marshal.dumps(entry[-1]))
        if group and size + length > _GROUP:
            yield group
            group, size = [], 0
        group.append(entry)
        size += length
    yield group


def start_lines(kind=None):
    """Return the launcher's lines that read the archive where it fits; without it nothing is lost.

    kind: the archive to read, None where the command line decides.  Not with --debug: what comes
    from the archive has no line numbers.
    """
    which = f"{path(kind)!a}" if kind else (
        f"{path('container')!a} if sys.argv[1:3] == ['hook', 'createContainer'] else "
        f"{path('hook')!a} if 'hook' in sys.argv[1:2] else {path()!a}"
    )
    return (
        "try:",
        f" file = '--debug' in sys.argv or open({which}, 'rb', 0)",
        " code, known = marshal.loads(file.read(int(file.read(8))))",
        " exec(code, {**known, 'file': file}); file.close()",
        "except (OSError, ValueError, EOFError, TypeError, AttributeError, ImportError): pass",
    )


def _extension(name):
    """Yield name and file of a C module, unless the interpreter has it built in."""
    found = find_spec(name)
    if found is not None and found.has_location and found.origin:
        yield name, found.origin


def _entry(name):
    """Return a module's name, file, directory if it is a package, file's version, and code."""
    file, package = _source(name)
    with open(file, "rb") as source:
        text = source.read()
        version = _version(os.fstat(source.fileno()))
    tree = _Numbers(ast.parse(text)).tree
    code = compile(tree, file, "exec", dont_inherit=True, optimize=2)
    return name, file, os.path.dirname(file) if package else None, version, _bare(code)


class _Numbers(ast.NodeTransformer):
    """Puts numbers where a module names constants of `errno`, `os` or the kernel's interface.

    Half of what a module's code consists of would be looking them up, and `errno` takes longer to
    load than any module of ours.  A name that a module also uses for something else is left alone.
    """

    def __init__(self, tree):
        self.modules = {}
        others = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for alias in node.names:
                    name = alias.asname or alias.name
                    full = f"{getattr(node, 'module', None) or ''}.{alias.name}".lstrip(".")
                    if full in _NUMBERED:
                        self.modules[name] = _NUMBERED[full]
                    else:
                        others.add(name)
            elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                others.add(node.id)
            elif isinstance(node, ast.arg):
                others.add(node.arg)
            elif isinstance(node, ast.Attribute) and node.attr == "errorcode":
                others.add(getattr(node.value, "id", ""))
        for name in others:
            self.modules.pop(name, None)
        self.tree = ast.fix_missing_locations(self.visit(tree))

    def visit_Attribute(self, node):
        self.generic_visit(node)
        if isinstance(node.value, ast.Name) and node.value.id in self.modules:
            number = getattr(self.modules[node.value.id], node.attr, None)
            if type(number) is int:
                return ast.copy_location(ast.Constant(number), node)
        return node

    def visit_Import(self, node):
        # All that is used of errno are its numbers.
        names = [alias for alias in node.names if (alias.asname or alias.name) not in self.modules]
        return ast.copy_location(ast.Import(names) if names else ast.Pass(), node)

    def visit_ImportFrom(self, node):
        if node.module != "errno" or not all(alias.name.startswith("E") for alias in node.names):
            return node
        return [
            ast.copy_location(ast.Assign(
                [ast.Name(alias.asname or alias.name, ast.Store())],
                ast.Constant(getattr(errno, alias.name)),
            ), node) for alias in node.names
        ]


_NUMBERED = {
    "errno": errno, "sandboxfs.kernel.abi": abi, "sandboxfs.kernel.system": system,
}


def _version(status):
    return status.st_mtime_ns, status.st_size


def _bare(code):
    """Return a code object without its table of lines, a quarter of its size.

    A method's qualified name, a string of its own, is its plain one.
    """
    constants = tuple(
        _bare(each) if isinstance(each, types.CodeType) else each for each in code.co_consts
    )
    return code.replace(co_linetable=b"", co_qualname=code.co_name, co_consts=constants)


def _ordered(names):
    """Return `names` so that every module comes after its package and what it imports at once."""
    ordered = []

    def place(name):
        if name in ordered or name not in names:
            return
        for needed in _imported(name):
            place(needed)
        ordered.append(name)

    for name in names:
        place(name)
    return ordered


def _imported(name):
    """Yield the modules that `name` needs before its own code can run."""
    if "." in name:
        yield name.rpartition(".")[0]
    with open(_source(name)[0], "rb") as source:
        tree = ast.parse(source.read())
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _source(name):
    base = os.path.join(os.path.dirname(_package()), *name.split("."))
    if os.path.isdir(base):
        return os.path.join(base, "__init__.py"), True
    return base + ".py", False


def _package():
    return os.path.dirname(os.path.realpath(__file__))
