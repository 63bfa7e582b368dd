"""The process that takes down what a run leaves: the last references to its mounts.

A mount namespace goes with its last reference, and so does a clone that was attached nowhere; the
kernel waits for a grace period then, which takes longer than a short command.  Whoever waits for
that command shouldn't: the references are handed over here and closed behind.

Sources: namespaces(7), open_tree(2), unix(7).
"""

from time import sleep

from sandboxfs.harness import wire
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import close_range, prctl
from sandboxfs.process import payload
from sandboxfs.process.namespaces import fork_into

_LAST_DESCRIPTOR = 0xFFFFFFFF
_PATIENCE_SECONDS = 0.0005


class Sweeper:
    """Our end of it: `socket`, which children inherit; started when first needed."""

    __slots__ = ("pid", "socket")

    def __init__(self):
        self.socket, theirs = wire.pair()
        self.pid = fork_into(0)
        if self.pid == 0:
            _sweep(theirs)
        theirs.close()

    def take(self, descriptors):
        """Hand descriptors over; the caller closes its own at once, which costs nothing then."""
        for first in range(0, len(descriptors), wire.MOST_DESCRIPTORS):
            try:
                wire.send(self.socket, ("close",), descriptors[first:first + wire.MOST_DESCRIPTORS])
            except OSError:
                return  # it is behind, or gone: then closing costs what it costs

    def finish(self):
        """Wait until everything that was handed over before is closed."""
        ours, theirs = wire.pair()
        try:
            wire.send(self.socket, ("finish",), [theirs.fileno()])
        except OSError:
            return
        finally:
            theirs.close()
        wire.receive(ours)
        ours.close()

    def close(self):
        """End it, after what it has been given."""
        self.socket.close()
        os.waitpid(self.pid, 0)


def _sweep(socket):
    """Close what comes, in its order, for the rest of this process's life."""
    try:
        prctl(payload.PR_SET_PDEATHSIG, 9)
        number = socket.fileno()
        close_range(3, number - 1, 0)
        close_range(number + 1, _LAST_DESCRIPTOR, 0)
        while True:
            message, descriptors, _sender = wire.receive(socket)
            if message == ("close",):
                # Whoever sent them is to be rid of them first: the last one to close pays.
                sleep(_PATIENCE_SECONDS)
            # Who waits for the end of it holds the other end of the descriptor.
            for fd in descriptors:
                os.close(fd)
            if message is None:
                break
    finally:
        os._exit(0)
