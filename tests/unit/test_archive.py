"""What the archive makes of a module's source: numbers where constants are named."""

import ast
import errno
import os

import pytest

from sandboxfs import archive
from sandboxfs.kernel import abi

IMPORTS = (
    "import errno\nfrom errno import EBUSY, ENOENT as missing\n"
    "from sandboxfs.kernel import abi\nfrom sandboxfs.kernel import system as os\n"
)


def numbered(text):
    """Return `text` with numbers, as a code object; its names and its values."""
    code = compile(archive._Numbers(ast.parse(text)).tree, "module", "exec")
    values = {}
    exec(code, values)
    return code, values


@pytest.mark.parametrize(("expression", "value"), [
    ("errno.EINVAL", errno.EINVAL), ("EBUSY", errno.EBUSY), ("missing", errno.ENOENT),
    ("abi.SYS_openat2", abi.SYS_openat2), ("os.O_PATH | os.O_CLOEXEC", os.O_PATH | os.O_CLOEXEC),
    ("abi.CLONE_NEWNS & ~errno.EPERM", abi.CLONE_NEWNS & ~errno.EPERM),
])
def test_a_constant_is_its_number(expression, value):
    code, values = numbered(f"{IMPORTS}found = {expression}\n")
    assert values["found"] == value
    assert "errno" not in values
    assert "errno" not in code.co_names


def test_what_is_no_number_is_looked_up():
    code, values = numbered(
        f"{IMPORTS}found = os.open, os.devnull, abi.PIVOT_ROOT_BY_MACHINE\n")
    assert values["found"] == (os.open, os.devnull, abi.PIVOT_ROOT_BY_MACHINE)
    assert "open" in code.co_names


@pytest.mark.parametrize("text", [
    "import errno\ndef f(errno):\n    return errno.EPERM\n",
    "import errno\ndef f(what):\n    errno = what\n    return errno.EPERM\n",
    "import errno\ndef f(what):\n    for errno in [what]:\n        return errno.EPERM\n",
])
def test_a_name_that_is_something_else_too_is_left_alone(text):
    class What:
        EPERM = "kept"

    assert numbered(text)[1]["f"](What) == "kept"


def test_the_table_of_names_needs_errno_itself():
    code, values = numbered("import errno\nfound = errno.errorcode[errno.EPERM]\n")
    assert values["found"] == "EPERM"
    assert "errno" in code.co_names
    assert numbered("from errno import errorcode\n")[1]["errorcode"] is errno.errorcode


def test_no_hot_module_loads_errno_from_the_archive():
    for name in archive.HOT:
        code = archive._entry(name)[-1]
        assert "errno" not in code.co_names, name
