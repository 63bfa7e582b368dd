"""`process.terminal`: a pty of the container's, relayed to ours."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time

import pytest

from tests.support import LAUNCHER, needs, run_cli
from tests.support.commands import ENVIRONMENT

pytestmark = pytest.mark.needs("root", "overlay", "busybox", "launcher")

RANGE = [{"containerID": 0, "hostID": 300000, "size": 65536}]


def terminal(bundle, script, change=None):
    def configure(document):
        document["process"].update(terminal=True, args=["/bin/sh", "-c", script])
        if change is not None:
            change(document)

    return bundle(configure)


def from_outside(document):
    document["linux"]["namespaces"].append({"type": "user"})
    document["linux"].update(uidMappings=RANGE, gidMappings=RANGE)


class Session:
    """A run with a terminal of ours as its standard streams."""

    def __init__(self, made, rows=33, columns=77):
        self.ours, theirs = pty.openpty()
        self.resize(rows, columns)
        self.before = termios.tcgetattr(theirs)
        self.theirs = theirs
        self.seen = b""
        self.process = subprocess.Popen(
            [LAUNCHER, "run", "--bundle", made], stdin=theirs, stdout=theirs, stderr=theirs,
            env=ENVIRONMENT, start_new_session=True,
        )

    def resize(self, rows, columns):
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text):
        os.write(self.ours, text.encode())

    def expect(self, text, seconds=10):
        """Read until `text` has come."""
        deadline = time.monotonic() + seconds
        while text.encode() not in self.seen:
            ready, _, _ = select.select([self.ours], [], [], deadline - time.monotonic())
            assert ready, f"no {text!r} in {self.seen!r}"
            self.seen += os.read(self.ours, 4096)
        self.seen = self.seen.partition(text.encode())[2]

    def end(self):
        """Wait; returns the exit status and whether our terminal is as it was."""
        status = self.process.wait(10)
        restored = termios.tcgetattr(self.theirs) == self.before
        os.close(self.ours)
        os.close(self.theirs)
        return status, restored


@pytest.mark.parametrize("change", [None, from_outside], ids=["host", "user"])
def test_a_session_is_relayed(bundle, change):
    if change is not None:
        needs("user-namespaces")
    session = Session(terminal(
        bundle, "tty; stty size; read line; echo got=$line; exit 4",
        change,
    ))
    session.expect("/dev/pts/0")
    session.expect("33 77")
    assert termios.tcgetattr(session.theirs)[3] & termios.ICANON == 0
    session.type("hello\n")
    session.expect("got=hello")
    assert session.end() == (4, True)


def test_a_change_of_size_reaches_the_payload(bundle):
    session = Session(terminal(
        bundle, "trap 'stty size; exit 0' WINCH; echo ready; while :; do sleep .1; done",
    ))
    session.expect("ready")
    session.resize(11, 22)
    session.process.send_signal(signal.SIGWINCH)
    session.expect("11 22")
    assert session.end() == (0, True)


def test_control_c_interrupts_the_payload_not_us(bundle):
    session = Session(terminal(
        bundle, "trap 'echo caught; exit 5' INT; echo ready; while :; do sleep .1; done",
    ))
    session.expect("ready")
    session.type("\x03")
    session.expect("caught")
    assert session.end() == (5, True)


def test_our_terminal_is_restored_when_the_run_is_ended(bundle):
    script = "trap 'exit 6' TERM; echo ready; while :; do sleep .1; done"
    session = Session(terminal(bundle, script))
    session.expect("ready")
    session.process.terminate()
    assert session.end() == (6, True)


def test_our_terminal_is_restored_after_an_error(bundle):
    session = Session(terminal(bundle, "true", lambda document: document["mounts"].append(
        {"destination": "/x", "source": "/nonexistent", "options": ["bind"]},
    )))
    session.expect("/nonexistent: ENOENT")
    assert session.end() == (125, True)


def test_without_a_terminal_of_ours_there_is_one_inside(bundle):
    made = terminal(bundle, "tty; stty size; echo done")
    made.document["process"]["consoleSize"] = {"height": 44, "width": 88}
    made.write(made.document)
    done = run_cli("run", "--bundle", made, check=0)
    assert done.stdout.splitlines() == ["/dev/pts/0", "44 88", "done"]


def test_input_is_relayed_and_ends(bundle):
    done = run_cli("run", "--bundle", terminal(bundle, "stty -echo; cat | tr a-z A-Z"),
                   input="some words\n", check=0)
    assert "SOME WORDS" in done.stdout


def test_a_lot_of_output_comes_through_whole(bundle):
    done = run_cli("run", "--bundle", terminal(bundle, "seq 20000"), check=0)
    assert done.stdout.split() == [str(number) for number in range(1, 20001)]
