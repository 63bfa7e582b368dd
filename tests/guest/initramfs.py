"""What the guest's initramfs holds, and the cpio archive it is.

The archive is left uncompressed: under emulation unpacking costs more than qemu's copying.
"""

import importlib.util
import os
import re
import stat
import subprocess
from pathlib import Path

BUSYBOX = "/usr/bin/busybox"
PYTHON = "/usr/bin/python3"
# Taken along where the machine has them.
PROGRAMS = ("/usr/bin/newuidmap", "/usr/bin/newgidmap", "/usr/bin/strace")

# What no test imports, by the first component below the standard library.
LEFT_OUT = re.compile(
    r"config-3|curses|dbm|distutils|ensurepip|idlelib|lib2to3|pydoc_data|sqlite3|test$|tkinter"
    r"|turtledemo|venv|wsgiref|xmlrpc|__pycache__|site-packages|dist-packages|asyncio|unittest"
    r"|_(testcapi|codecs_|curses|dbm|ssl|sqlite3|tkinter|test|xxtest|decimal|crypt)|nis\.|ossaudio"
)

USERS = {
    "/etc/passwd": "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n"
    "nobody:x:65534:65534:nobody:/:/bin/false\n",
    "/etc/group": "root:x:0:\nuser:x:1000:\nnogroup:x:65534:\n",
    "/etc/subuid": "user:100000:65536\n",
    "/etc/subgid": "user:100000:65536\n",
}

DIRECTORIES = (
    "/bin", "/dev", "/etc", "/guest/modules", "/home/user", "/proc", "/root", "/run", "/sys",
    "/tmp", "/usr/bin", "/userroot",
)


class Archive:
    """A cpio archive of the kind the kernel unpacks (newc); parents are made as needed."""

    def __init__(self):
        self._parts = []
        self._paths = set()

    def _add(self, path, mode, content=b"", mtime=0, device=(0, 0)):
        path = path.lstrip("/")
        parent = os.path.dirname(path)
        if parent and parent not in self._paths:
            self._add(parent, stat.S_IFDIR | 0o755)
        self._paths.add(path)
        name = os.fsencode(path) + b"\0"
        fields = (
            len(self._paths), mode, 0, 0, 1, mtime, len(content), 0, 0, *device, len(name), 0,
        )
        header = b"070701" + b"".join(b"%08x" % field for field in fields)
        for part in (header + name, content):
            self._parts += [part, bytes(-len(part) % 4)]

    def __contains__(self, path):
        return path.lstrip("/") in self._paths

    def directory(self, path, mode=0o755):
        """Add a directory, unless it is there already."""
        if path not in self:
            self._add(path, stat.S_IFDIR | mode)

    def file(self, path, content, mode=0o644, mtime=0):
        """Add a file with `content` (bytes); `mtime` in seconds."""
        self._add(path, stat.S_IFREG | mode, content, int(mtime))

    def symlink(self, path, target):
        """Add a symlink."""
        self._add(path, stat.S_IFLNK | 0o777, os.fsencode(target))

    def character_device(self, path, major, minor):
        """Add a device node."""
        self._add(path, stat.S_IFCHR | 0o600, device=(major, minor))

    def copy(self, path, name=None):
        """Add this machine's file at `path`, symlinks followed, under its own name or `name`."""
        status = os.stat(path)
        content = Path(path).read_bytes()
        self.file(name or path, content, stat.S_IMODE(status.st_mode), status.st_mtime)

    def finish(self):
        """Return the whole archive as bytes."""
        self._add("TRAILER!!!", 0)
        return b"".join(self._parts)


def add_system(archive):
    """Add directories, users, busybox as /bin/busybox and what else of programs there is."""
    for directory in DIRECTORIES:
        archive.directory(directory)
    archive.character_device("/dev/console", 5, 1)
    for path, text in USERS.items():
        archive.file(path, text.encode())
    archive.copy(BUSYBOX, "/bin/busybox")
    archive.symlink("/bin/sh", "busybox")
    present = [program for program in PROGRAMS if os.path.exists(program)]
    for program in present:
        archive.copy(program)
    _add_libraries(archive, present)


def add_python(archive):
    """Add the system's interpreter and its standard library, as bytecode without sources."""
    library = Path(_asked_of_python("import sysconfig; print(sysconfig.get_path('stdlib'))"))
    archive.copy(PYTHON)
    archive.symlink("/bin/python3", PYTHON)
    extensions = []
    for path in _kept(library):
        if path.suffix == ".so":
            archive.copy(str(path))
            extensions.append(str(path))
        elif path.suffix == ".py":
            _add_bytecode(archive, path)
    _add_libraries(archive, [PYTHON, *extensions])


def add_package(archive, name, directory):
    """Add a module of this interpreter's, with the libraries it is linked with, to `directory`."""
    file = importlib.util.find_spec(name).origin
    archive.copy(file, f"{directory}/{os.path.basename(file)}")
    if file.endswith(".so"):
        _add_libraries(archive, [file])


def _kept(directory):
    for entry in sorted(directory.iterdir()):
        if LEFT_OUT.match(entry.name):
            continue
        if entry.is_dir():
            yield from _kept(entry)
        else:
            yield entry


def _add_bytecode(archive, path):
    """Add a module's cached bytecode in its source's place, or the source if there is none."""
    cached = list((path.parent / "__pycache__").glob(f"{path.stem}.cpython-*.pyc"))
    cached = [file for file in cached if file.stem.count(".") == 1]
    if len(cached) == 1:
        archive.copy(str(cached[0]), str(path.with_suffix(".pyc")))
    else:
        archive.copy(str(path))


def _add_libraries(archive, programs):
    """Add the shared libraries that `programs` are linked with, and the dynamic loader."""
    if not programs:
        return
    listing = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=True).stdout
    for path in sorted(set(re.findall(r"(?:=> |^\t)(/\S+)", listing, re.MULTILINE))):
        if path not in archive:
            archive.copy(path)


def _asked_of_python(code):
    done = subprocess.run([PYTHON, "-I", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def add_tree(archive, directory, name):
    """Add the Python and data files below `directory` under `name`, cached bytecode with them."""
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            archive.copy(str(path), f"{name}/{relative}")
