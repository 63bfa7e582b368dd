"""The warm process: everything imported, one child made ahead for each sandbox to come.

It is started by the first sandbox of a program (`harness.client`), belongs to that program's
process alone, and ends with it.  Requests come over one socket, with the caller's descriptors; the
answer to each goes over a channel of its own, whose other end the caller keeps open for as long as
it wants the run to live.  All namespace work is done in the children, never in the caller.

A *lane* is a plan that was opened.  A child of a lane (`harness.child`) waits for the one command
it executes: for a sandbox it is in its new namespaces and has nothing built, for a pool it is in
the finished root.  When it is taken, the next one is made.  It waits in the memory of another
process of ours, its host, which can have the next one when the child has executed.

Sources: unix(7), pidfd_open(2), epoll(7), prctl(2).
"""

from _signal import SIG_DFL
from _signal import signal as set_handler
from select import EPOLLHUP, EPOLLIN, EPOLLRDHUP, epoll

from sandboxfs.errors import SandboxError
from sandboxfs.harness import child, wire
from sandboxfs.harness.lane import DROPPED, Lane
from sandboxfs.harness.runs import Run, answer, fields_of, refusal
from sandboxfs.harness.sweeper import Sweeper
from sandboxfs.kernel import submounts
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import more_descriptors

_SIGCHLD = 17
# Children to come are made when so long nothing has happened, unless they run short.
_IDLE_SECONDS = 0.001
_BUSY_SECONDS = 0.02
# What can wait is done when nothing happens, or when there is so much of it.
_MOST_BEHIND = 32
_READ = EPOLLIN | EPOLLHUP | EPOLLRDHUP


class _Server:
    """Everything the process knows: lanes by number, and who acts when a descriptor has news."""

    def __init__(self, control, owner, owner_pid):
        self.control = control
        self.owner_pid = owner_pid
        self.lanes = {}
        self.handlers = {}
        self.due = set()
        # Those that haven't been waited for.
        self.children = set()
        # Hosts that have little left to do.
        self.ending = []
        # What is left to do of runs that have begun or ended: functions.
        self.behind = []
        self.epoll = epoll()
        self.base = child.BaseNamespace()
        self.sweeper = Sweeper()
        self.descriptor_limit = more_descriptors()
        self.running = True
        self.last_words = DROPPED
        self.watch(control.fileno(), self.on_request)
        self.watch(owner, self.stop)

    def watch(self, fd, handler, events=_READ):
        self.handlers[fd] = handler
        self.epoll.register(fd, events)

    def forget(self, fd):
        self.epoll.unregister(fd)
        del self.handlers[fd]

    def serve(self):
        """Answer until the owner is gone; then end everything that is left."""
        try:
            while self.running:
                events = self.epoll.poll(self.patience())
                for fd, _events in events:
                    handler = self.handlers.get(fd)
                    if handler is not None:
                        handler()
                if self.behind and (not events or len(self.behind) > _MOST_BEHIND):
                    self.tidy_up()
                    continue
                self.spawn_behind(not events)
                if self.ending:
                    self.reap_hosts(os.WNOHANG)
        except BaseException as error:
            # A bug of ours: the owner is told, and we end.
            self.last_words = f"{type(error).__name__}: {error}"
            answer(self.control, "died", self.last_words)
            raise
        finally:
            for lane in list(self.lanes.values()):
                lane.close(self.last_words)
            self.sweeper.close()

    def reap_hosts(self, how):
        """Wait for hosts that end."""
        self.ending = [host for host in self.ending if not host.has_ended(how)]

    def tidy_up(self):
        """Do what is left of runs: nobody waits for that."""
        behind, self.behind = self.behind, []
        for each in behind:
            each()

    def patience(self):
        """Return how long nothing has to happen until the next child is made; -1: none is due.

        That slows down what runs: it waits until the runs are over, within reason.
        """
        if any(lane.is_short() for lane in self.due):
            return 0
        if self.behind:
            return _IDLE_SECONDS
        if not any(lane.may_spawn() for lane in self.due):
            return _IDLE_SECONDS * 10 if self.ending else -1
        return _BUSY_SECONDS if any(lane.runs for lane in self.due) else _IDLE_SECONDS

    def spawn_behind(self, idle):
        """Make one of the children that are due: whoever asks is heard between two of them."""
        for lane in list(self.due):
            if lane.is_short() or (idle and lane.may_spawn()):
                if lane.spawn_one() and not self.due:
                    self.exercise()
                return

    def exercise(self):
        """Go through a request that nobody made.

        What a fork has shared is copied when it is written to: now, and not while somebody waits.
        """
        opened = []
        try:
            opened += wire.pair()
            opened += wire.pair()
            ours, theirs, _caller, channel = opened
            wire.send(ours, ("run", 0, [b"true"], None, None), [channel.fileno(), 0, 1, 2])
            message, descriptors, _sender = wire.receive(theirs, wire.MSG_DONTWAIT)
            nobody = _Nobody(self)
            run = Run(nobody, wire.adopt(descriptors.pop(0)), descriptors, message[2:])
            opened.append(run)
            run.watch()
            wire.send(theirs, run.command, run.descriptors)
            run.begin(nobody)
            self.epoll.poll(0)
        except OSError:
            pass  # no descriptors are left: whoever needs some is told
        finally:
            for each in opened:
                each.close()

    def reap_strays(self):
        """Wait for children that ended before they told their pids."""
        known = {self.sweeper.pid, *(host.pid for host in self.ending)}
        known.update([each.pid for each in self.children])
        for lane in self.lanes.values():
            known.update([host.pid for host in lane.hosts])
        for pid in child.children_of(os.getpid()):
            if pid not in known:
                os.waitpid(pid, os.WNOHANG)

    def stop(self):
        self.running = False

    def on_request(self):
        try:
            message, descriptors, sender = wire.receive(
                self.control, wire.MSG_DONTWAIT, self.owner_pid)
        except BlockingIOError:
            return
        if message == () or sender not in (0, self.owner_pid):  # 0: the end, or out of sight
            self.refuse(sender, descriptors)
            return
        if message is None:
            self.running = False
            return
        channel = wire.adopt(descriptors.pop(0)) if descriptors else None
        getattr(self, _REQUESTS[message[0]])(channel, descriptors, *message[1:])

    def refuse(self, sender, descriptors):
        """Answer another process than the owner, which may have sent anything."""
        if descriptors:
            try:
                channel = wire.adopt(os.dup(descriptors[0]))
            except OSError:
                pass  # no socket
            else:
                answer(channel, "failed", *refusal(sender, self.owner_pid))
                channel.close()
        for fd in descriptors:
            os.close(fd)

    # -- requests ------------------------------------------------------------------------

    def open_lane(self, channel, _descriptors, number, packed, size, ahead):
        """Open a plan: the first children are forked.  A pool's answer is its first root."""
        try:
            plan = wire.unpack(packed)
            plan.compiled = None
            lane = Lane(self, number, plan, size, ahead)
        except SandboxError as error:
            answer(channel, "failed", *fields_of(error))
            channel.close()
            return
        self.lanes[number] = lane
        if lane.ahead:
            lane.opening = channel
            self.watch(channel.fileno(), lane.on_opener)
        lane.refill()
        if not lane.ahead:
            answer(channel, "opened")
            channel.close()

    def run(self, channel, descriptors, number, *command):
        lane = self.lanes.get(number)
        if lane is None:
            answer(channel, "failed", *fields_of(SandboxError("", "run", "", "it is closed")))
            channel.close()
            for fd in descriptors:
                os.close(fd)
            return
        lane.request(Run(lane, channel, descriptors, command))

    def close_lane(self, channel, _descriptors, number):
        lane = self.lanes.pop(number, None)
        if lane is not None:
            lane.close(DROPPED)
            self.sweeper.finish()
        answer(channel, "closed")
        channel.close()

    def tell(self, channel, _descriptors, number):
        """Say how many children of a lane wait ready, wait building, and run."""
        lane = self.lanes.get(number)
        counts = (0, 0, 0) if lane is None else (
            len(lane.waiting), len(lane.building), len(lane.runs))
        answer(channel, "counts", *counts)
        channel.close()

    def ping(self, channel, _descriptors):
        answer(channel, "pong")
        channel.close()


_REQUESTS = {
    "open": "open_lane", "run": "run", "close": "close_lane", "tell": "tell", "ping": "ping",
}


class _Nobody:
    """Who has a command in `_Server.exercise`: lane and child at once."""

    def __init__(self, server):
        self.server = server
        self.runs = []
        self.queue = []
        self.run = None


def main(control, owner, owner_pid):
    """Serve process `owner_pid` (`owner`: its pidfd) on the socket `control`, to its end."""
    socket = wire.adopt(control)
    if os.getppid() != owner_pid:
        return  # it was gone before it could be watched
    submounts.own_process = True
    set_handler(_SIGCHLD, SIG_DFL)  # ignored, the kernel would reap our children
    os.chdir("/")
    server = _Server(socket, owner, owner_pid)
    server.serve()

