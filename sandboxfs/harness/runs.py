"""A command under way: its channel to the caller, its child, and what the caller is told.

Sources: unix(7), signal(7).
"""

from sandboxfs.errors import SandboxError
from sandboxfs.harness import wire
from sandboxfs.kernel import system as os
from sandboxfs.process.report import as_text

_SIGKILL = 9


class Run:
    """A command under way: its channel to the caller, and the child that executes it."""

    def __init__(self, lane, channel, descriptors, command):
        self.lane = lane
        self.channel = channel
        self.descriptors = descriptors
        self.command = command
        self.child = None

    def watch(self):
        """Listen to the caller, also while the command is queued: it may give up."""
        if self.channel is not None and self.channel.fileno() not in self.lane.server.handlers:
            self.lane.server.watch(self.channel.fileno(), self.on_word)

    def begin(self, taken):
        self.child = taken
        taken.run = self
        self.lane.runs.append(self)
        self.lane.server.behind.append(self.drop_descriptors)

    def drop_descriptors(self):
        while self.descriptors:
            os.close(self.descriptors.pop())

    def on_word(self):
        """The caller asks whether we are there, wants a signal sent, or is gone."""
        try:
            message, descriptors, _sender = wire.receive(self.channel, wire.MSG_DONTWAIT)
        except BlockingIOError:
            return
        for fd in descriptors:
            os.close(fd)
        if message is None:
            self.abandon()
        elif message[0] == "ping":
            answer(self.channel, "pong")
        elif message[0] == "kill":
            if self.child is not None:
                self.child.kill()
            elif self in self.lane.queue:
                self.lane.queue.remove(self)
                self.end(-_SIGKILL, None)

    def abandon(self):
        """Nobody waits for it any more."""
        self.close()
        if self.child is not None:
            self.child.kill()
        elif self in self.lane.queue:
            self.lane.queue.remove(self)

    def end(self, status, fields):
        self.tell_end(status, fields)
        self.close()

    def tell_end(self, status, fields):
        """Tell the caller how it ended: its status, or what failed."""
        self.child = None
        self.drop_descriptors()
        # Its end closes as soon as it knows, and would wake us in the middle of that.
        self.forget()
        if fields is None:
            answer(self.channel, "ended", status)
        else:
            answer(self.channel, "failed", *fields)

    def fail(self, fields):
        answer(self.channel, "failed", *fields)
        self.close()

    def close(self):
        self.drop_descriptors()
        if self.channel is not None:
            self.forget()
            self.channel.close()
            self.channel = None

    def forget(self):
        """Listen to the caller no longer."""
        if self.channel is not None and self.channel.fileno() in self.lane.server.handlers:
            self.lane.server.forget(self.channel.fileno())


def answer(channel, *message):
    """Send a message to a caller; one that is gone or doesn't listen is nobody's loss."""
    if channel is None:
        return
    try:
        wire.send(channel, message)
    except OSError:
        pass


def fields_of(error):
    """Return an error as the strings that `report.failure` makes one of."""
    if isinstance(error, SandboxError):
        return (type(error).__name__, error.origin, error.operation, as_text(error.target),
                error.text, str(error.errno), error.hint or "", str(error.exit_status), "")
    return ("ProcessError", "", getattr(error, "call", "fork"), "", "", str(error.errno or 0), "",
            "125", "")


def refusal(sender, owner):
    """Return the fields of the answer to another process than the owner."""
    return fields_of(SandboxError(
        "", "request", f"process {sender}", f"this warm process belongs to process {owner}",
        hint="after a fork, a sandbox of the child's own starts one of its own"))
