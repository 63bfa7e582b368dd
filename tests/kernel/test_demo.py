"""`make demo` works, and what it prints is what happened."""

import sys

import pytest

from tests.support import CHECKOUT, run


@pytest.mark.needs("root", "busybox", "launcher")
def test_the_demo_shows_what_it_says():
    demo = run(sys.executable, CHECKOUT / "tools" / "demo.py", cwd=CHECKOUT, check=0).stdout
    assert "touch: /etc/x: Read-only file system" in demo
    assert "touch: /data/x: Read-only file system" in demo
    assert "      kept\n" in demo
    assert "welcome to a bound file" in demo
    assert "      scratch\n" in demo
    assert demo.count("nothing changed") == 2
    tree = demo[demo.index("as seen inside"):].splitlines()
    shown = {line.split()[0] for line in tree if line.strip().startswith("/")}
    assert {"/", "/proc", "/dev", "/data/cache", "/tmp", "/private", "/etc/motd"} <= shown
    assert "  outside  $ ls /etc/x\n            no such file\n" in demo
