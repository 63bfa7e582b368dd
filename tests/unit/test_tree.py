"""How a mount table is drawn."""

import json
import os

import pytest

from sandboxfs.cli import tree
from sandboxfs.errors import SandboxError
from sandboxfs.kernel import mountinfo, mounttable
from tests.support.commands import run_cli

TABLE = rb"""10 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
11 10 0:5 / /dev ro,nosuid,noatime - devtmpfs dev rw
12 11 0:6 / /dev/pts rw,relatime shared:4 master:1 - devpts pts rw
13 10 8:1 /home/a\040b /mnt/new\012line rw unbindable - ext4 /dev/sda1 rw
14 13 0:7 / /mnt/new\012line rw,relatime - tmpfs  rw
"""

TYPES = ("ext4", "devtmpfs", "devpts ", "ext4", "tmpfs")


def drawn(boxes):
    return tree.draw(mountinfo.parse(TABLE), boxes)


def test_the_tree_tells_every_mount():
    lines = drawn(tree.BOXES)
    assert [" ".join(line.split()) for line in lines] == [
        "/ ext4 /dev/sda1 rw shared:1",
        "├─ /dev devtmpfs dev ro,nosuid,noatime private",
        "│ └─ /dev/pts devpts pts rw shared:4 slave:1",
        "└─ /mnt/new\\nline ext4 /dev/sda1[/home/a b] rw,strictatime unbindable (hidden)",
        "└─ /mnt/new\\nline tmpfs - rw private",
    ]
    # In columns, and indented below what it is mounted on.
    assert {line.index(type) for line, type in zip(lines, TYPES, strict=True)} == {22}
    assert lines[-1].startswith("   └─ /mnt")


def test_without_utf8_it_is_drawn_in_ascii():
    lines = drawn(tree.ASCII)
    assert all(line.isascii() for line in lines)
    assert [line.split("/")[0] for line in lines[1:]] == ["|- ", "|  `- ", "`- ", "   `- "]


def test_a_stack_of_a_thousand_is_drawn_without_recursion():
    records = mountinfo.parse(b"".join(
        b"%d %d 0:1 / /x rw,relatime - tmpfs t rw\n" % (number + 1, number)
        for number in range(1, 3000)
    ))
    assert len(tree.draw(records)) == len(records)


@pytest.mark.parametrize("pid", ["0", "-3"])
def test_a_number_that_is_no_process(pid):
    done = run_cli("tree", "--pid", pid, check=2)
    assert f"--pid: {pid}: not the number of a process" in done.stderr


def test_a_process_that_is_gone():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    done = run_cli("tree", "--pid", str(child), check=125)
    assert f"process {child}: ESRCH: no such process" in done.stderr


def test_a_process_that_is_closed_to_us(monkeypatch):
    monkeypatch.setattr(mounttable, "read", _refuse)
    with pytest.raises(SandboxError, match=r"EACCES[\s\S]*root's to see"):
        tree._read(1)


def _refuse(_pid):
    raise PermissionError(13, "Permission denied")


def test_json_and_drawing_hold_the_same_mounts():
    data = json.loads(run_cli("tree", "--json", check=0).stdout)
    lines = run_cli("tree", "--pid", str(os.getpid()), check=0).stdout.splitlines()
    assert len(data) == len(lines)
    assert data[0]["mountpoint"] == "/"
    assert {entry["id"] for entry in data} >= {entry["parent_id"] for entry in data[1:]}
