"""What `switch-root` refuses, in an initramfs: each with the machine as it was before."""

import json
from pathlib import Path

import pytest

from tests.boot import machine

pytestmark = [pytest.mark.boot, pytest.mark.needs("guest")]

INIT = """#!/bin/sh
sandboxfs early-mounts
mkdir /newroot /plain /noexec /bound /whole /run/x
echo text >/file
mount -t tmpfs newroot /newroot
mount -t tmpfs -o noexec noexec /noexec
mount -t tmpfs run /run
cd /newroot
mkdir bin sbin dev proc run etc
cp /bin/busybox bin/busybox
ln -s busybox bin/sh
ln -s ../bin/busybox sbin/init
ln -s /init sbin/only-outside
printf '#!/bin/nothing -x\\n' >sbin/no-interpreter
printf '#!/sbin/no-interpreter\\n' >sbin/through-a-script
printf '#! \\n' >sbin/empty-interpreter
printf 'text\\n' >sbin/text
cp /bin/busybox sbin/not-executable
cp /usr/bin/python3 sbin/no-loader
cp /bin/busybox run/init
(dd if=/bin/busybox bs=1 count=18; printf '\\267\\0'; dd if=/bin/busybox bs=1 skip=20 count=200) \\
    2>/dev/null >sbin/other-machine
chmod +x sbin/*; chmod -x sbin/not-executable
cp bin/busybox /noexec/init
cd /
exec python3 -ISB /attempts.py "" poweroff -f
"""

NOT_FOUND = "ENOENT: No such file or directory"

# name → (words, how, what the error says)
CASES = {
    "no NEWROOT": (["/nowhere"], "", "NEWROOT: open /nowhere: " + NOT_FOUND),
    "a file": (["/file"], "", "NEWROOT: open /file: ENOTDIR: Not a directory"),
    "no mount point": (["/plain"], "", "NEWROOT: switch-root /plain: not a mount point"),
    "the root itself": (["/"], "", "NEWROOT: switch-root /: is the root already"),
    "a user": (["--force", "/newroot"], "user", "fsopen proc: EPERM: "),
    "not process 1": (["/newroot"], "child", "switch-root: not process 1, but "),
    "not process 1, user root": (["--user-root"], "child", "switch-root: not process 1, but "),
    "no INIT": (["/newroot", "/sbin/none"], "", "INIT: find /sbin/none: " + NOT_FOUND),
    "no INIT, --keep": (["--keep", "/newroot", "/sbin/none"], "", "INIT: find /sbin/none: "),
    "a directory": (["/newroot", "/sbin"], "", "INIT: find /sbin: EACCES: not a file"),
    "not executable": (
        ["/newroot", "/sbin/not-executable"], "",
        "INIT: find /sbin/not-executable: EACCES: not executable",
    ),
    "no interpreter": (
        ["/newroot", "/sbin/no-interpreter"], "",
        "INIT's interpreter: find /bin/nothing: " + NOT_FOUND,
    ),
    "no interpreter behind one": (
        ["/newroot", "/sbin/through-a-script"], "",
        "INIT's interpreter: find /bin/nothing: " + NOT_FOUND,
    ),
    "empty interpreter": (
        ["/newroot", "/sbin/empty-interpreter"], "", "ENOEXEC: names no interpreter after #!",
    ),
    "no loader": (
        ["/newroot", "/sbin/no-loader"], "",
        "INIT's interpreter: find /lib64/ld-linux-x86-64.so.2: " + NOT_FOUND,
    ),
    "text": (["/newroot", "/sbin/text"], "", "ENOEXEC: neither a program nor a script with #!"),
    "another machine's": (
        ["/newroot", "/sbin/other-machine"], "", "ENOEXEC: a program for another kind of machine",
    ),
    "a link that only the initramfs could follow": (
        ["/newroot", "/sbin/only-outside"], "", "INIT: find /sbin/only-outside: " + NOT_FOUND,
    ),
    "noexec": (["/noexec", "/init"], "", "INIT: find /init: EACCES: lies on a mount with noexec"),
    # /run moves along, and would cover it: that is noticed when it has moved.
    "covered by a mount": (["/newroot", "/run/init"], "", "INIT: find /run/init: " + NOT_FOUND),
    "nothing to preserve": (
        ["--preserve", "/nowhere", "/newroot"], "", "--preserve: find /nowhere: " + NOT_FOUND,
    ),
    "everything preserved": (
        ["--preserve", "/", "/newroot"], "", "--preserve: /: is the whole of the old root",
    ),
    "user root, no INIT": (["--user-root", "/nothing"], "", "INIT: find /nothing: " + NOT_FOUND),
    "in a chroot": (
        ["--force", "/run", "/init"], "chroot /newroot", "the root is no initramfs but tmpfs",
    ),
    "in a directory": (
        ["--force", "--user-root", "/file"], "chroot /plain",
        "--user-root: switch-root /: this process was chrooted into a directory",
    ),
    "no NEWROOT given": ([], "", "switch-root: neither NEWROOT nor a mode is given"),
    "an unknown option": (["--nothing", "/newroot"], "", "unrecognized arguments: --nothing"),
    "in use elsewhere": (
        ["/newroot"], "after mount -o bind / /whole",
        "the old root's files are still in use: /whole shows the same files",
    ),
    "the initramfs itself": (
        ["/whole", "/bin/busybox"], "",
        "the old root's files are still in use: /whole shows the same files",
    ),
}
USAGE = ("no NEWROOT given", "an unknown option")


@pytest.fixture(scope="module")
def refused():
    """Boot, and try everything."""
    cases = [[name, words, how] for name, (words, how, _) in CASES.items()]
    here = Path(__file__).parent
    return machine.boot(INIT, {
        "/attempts": json.dumps(cases), "/attempts.py": (here / "attempts.py").read_bytes(),
    })


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_and_nothing_changes(name, refused):
    text = refused.sections[name]
    assert CASES[name][2] in text
    if name in USAGE:
        assert "status 2" in text
    else:
        assert "status 125" in text
    assert "CHANGED" not in text
    if not CASES[name][1].startswith("chroot"):
        assert ", unchanged\n" in text


def test_every_file_is_still_there(refused):
    assert refused.sections["every file"].startswith("unchanged\n")
