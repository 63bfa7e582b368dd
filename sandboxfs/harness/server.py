"""The warm process: everything imported, one child forked ahead for each sandbox to come.

It is started by the first sandbox of a program (`harness.client`), belongs to that program's
process alone, and ends with it.  Requests come over one socket, with the caller's descriptors; the
answer to each goes over a channel of its own, whose other end the caller keeps open for as long as
it wants the run to live.  All namespace work is done in the children, never in the caller.

A *lane* is a plan that was opened.  A child of a lane (`harness.child`) waits for the one command
it executes: for a sandbox it is in its new namespaces and has nothing built, for a pool it is in
the finished root.  When it is taken, the next one is forked.  It waits in the memory of another
process of ours, its host, which ends when the child executes.

Sources: unix(7), pidfd_open(2), epoll(7), prctl(2).
"""

from _signal import SIG_DFL, pidfd_send_signal
from _signal import signal as set_handler
from select import EPOLLHUP, EPOLLIN, EPOLLRDHUP, epoll, poll

from sandboxfs.errors import SandboxError
from sandboxfs.harness import child, wire
from sandboxfs.harness.sweeper import Sweeper
from sandboxfs.kernel import submounts
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import more_descriptors
from sandboxfs.process import payload

_SIGKILL, _SIGCHLD = 9, 17
_CLEANING_MILLISECONDS = 2000
# Children to come are forked when so long nothing has happened, unless they run short.
_IDLE_SECONDS = 0.001
_BUSY_SECONDS = 0.02
# Children that were killed while they waited, in a row, after which a request fails.
_MOST_LOSSES = 8
_READ = EPOLLIN | EPOLLHUP | EPOLLRDHUP
_DROPPED = "the sandbox was closed while its command ran"


class _Server:
    """Everything the process knows: lanes by number, and who acts when a descriptor has news."""

    def __init__(self, control, owner, owner_pid):
        self.control = control
        self.owner_pid = owner_pid
        self.lanes = {}
        self.handlers = {}
        self.due = set()
        # Their children are gone, and they have little left to do.
        self.hosts = []
        self.epoll = epoll()
        self.base = child.BaseNamespace()
        self.sweeper = Sweeper()
        self.descriptor_limit = more_descriptors()
        self.running = True
        self.last_words = _DROPPED
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
                self.fork_behind(not events)
                if self.hosts:
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
        """Wait for hosts whose children have ended."""
        self.hosts = [host for host in self.hosts if not os.waitpid(host, how)[0]]

    def patience(self):
        """Return how long nothing has to happen until the next child is forked; -1: none is due.

        A fork slows down what runs: it waits until the runs are over, within reason.
        """
        if not self.due:
            return _IDLE_SECONDS * 10 if self.hosts else -1
        if any(lane.is_short() for lane in self.due):
            return 0
        return _BUSY_SECONDS if any(lane.runs for lane in self.due) else _IDLE_SECONDS

    def fork_behind(self, idle):
        """Fork one of the children that are due: whoever asks is heard between two of them."""
        for lane in list(self.due):
            if idle or lane.is_short():
                lane.fork_one()
                if not self.due:
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
            run = _Run(nobody, wire.adopt(descriptors.pop(0)), descriptors, message[2:])
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
        known = {self.sweeper.pid, *self.hosts}
        for lane in self.lanes.values():
            for each in (*lane.waiting, *lane.building, *(run.child for run in lane.runs)):
                known.update((each.pid, each.host))
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
            lane = _Lane(self, number, plan, size, ahead)
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
        lane.request(_Run(lane, channel, descriptors, command))

    def close_lane(self, channel, _descriptors, number):
        lane = self.lanes.pop(number, None)
        if lane is not None:
            lane.close(_DROPPED)
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


class _Lane:
    """One plan: the children that wait, those that build first, the runs, and what is queued."""

    def __init__(self, server, number, plan, size, ahead):
        self.server = server
        self.number = number
        self.template = child.Template(
            plan, server.base, server.sweeper, server.descriptor_limit, ahead)
        self.ahead = self.template.ahead
        self.size = size
        self.waiting = []
        self.building = []
        self.runs = []
        self.queue = []
        self.losses = 0
        self.opening = None

    def request(self, run):
        """Give a command to a child that waits, or queue it for the next one."""
        if self.waiting:
            self.start(self.waiting.pop(0), run)
        else:
            self.queue.append(run)
        run.watch()
        self.refill()

    def start(self, waiting, run):
        try:
            wire.send(waiting.socket, run.command, run.descriptors)
        except OSError:
            # It has just died; its own end says why, to whoever comes next.
            self.queue.insert(0, run)
            return
        run.begin(waiting)
        self.losses = 0

    def missing(self):
        """Return how many children are to be forked."""
        return self.size + len(self.queue) - len(self.waiting) - len(self.building)

    def is_short(self):
        """Whether the next child shouldn't wait until nothing else happens."""
        return len(self.queue) > len(self.building) or 2 * (
            len(self.waiting) + len(self.building)) < self.size

    def refill(self):
        """Have children forked until as many wait as should."""
        if self.missing() > 0:
            self.server.due.add(self)

    def fork_one(self):
        """Fork one of those that are missing."""
        try:
            self.spawn()
        except (SandboxError, OSError) as error:
            self.server.due.discard(self)
            if not self.building:
                self.fail(fields_of(error))
        if self.missing() <= 0:
            self.server.due.discard(self)

    def spawn(self):
        new = _Child(self, *self.template.fork())
        if self.ahead:
            self.building.append(new)
        elif self.queue:
            self.start(new, self.queue.pop(0))
        else:
            self.waiting.append(new)

    def ready(self, new):
        """A child has its root built."""
        self.building.remove(new)
        self.opened("opened")
        if self.queue:
            self.start(new, self.queue.pop(0))
        else:
            self.waiting.append(new)

    def lost(self, gone, code, fields):
        """A child that waited or built died: whoever needs it gets the reason, or another one."""
        for group in (self.waiting, self.building):
            if gone in group:
                group.remove(gone)
        if fields is None:
            # It was killed: nothing is wrong with the plan, unless it happens again and again.
            self.losses += 1
            fields = fields_of(SandboxError(
                "", "wait", "", f"children that wait end, the last one with status {code}"))
        else:
            self.losses = _MOST_LOSSES
        if self.losses >= _MOST_LOSSES and (self.queue or self.opening is not None):
            self.losses = 0
            self.fail(fields)
        if self.queue or self.opening is not None:
            self.refill()
        else:
            self.server.due.discard(self)

    def fail(self, fields):
        if self.opening is not None:
            self.server.lanes.pop(self.number, None)
            opener, self.opening = self.opening, None
            self.server.forget(opener.fileno())
            self.close("")
            answer(opener, "failed", *fields)
            opener.close()
        if self.queue:
            self.queue.pop(0).fail(fields)
        elif not self.waiting:
            # The next request forks anew: a fault that stays mustn't become a loop.
            self.server.due.discard(self)

    def on_opener(self):
        """Who opens the lane asks whether we are there, or is gone."""
        try:
            message = wire.receive(self.opening, wire.MSG_DONTWAIT)[0]
        except BlockingIOError:
            return
        if message is None:
            self.opened()
        elif message[0] == "ping":
            answer(self.opening, "pong")

    def opened(self, *words):
        """Answer who opened the lane, if nobody has yet."""
        if self.opening is None:
            return
        self.server.forget(self.opening.fileno())
        answer(self.opening, *words)
        self.opening.close()
        self.opening = None

    def close(self, why):
        """End everything of it, and wait until nothing is left."""
        fields = fields_of(SandboxError("", "run", "", why))
        self.opened("failed", *fields)
        for run in self.queue:
            run.fail(fields)
        self.queue.clear()
        for run in list(self.runs):
            run.fail(fields)
        for each in [*self.waiting, *self.building, *(run.child for run in self.runs)]:
            each.kill()
            each.reap()
        for group in (self.waiting, self.building, self.runs):
            group.clear()
        self.server.due.discard(self)
        self.server.reap_hosts(0)
        self.template.close()


class _Child:
    """A child: pid, pidfd, the socket it waits on, and the pipe it reports by.

    host: the pid of the process in whose memory it waits, 0 where there is none any more.  The
    child tells its own pid then; until it does, pid is 0 and pidfd -1.
    """

    def __init__(self, lane, pid, socket, report):
        self.lane = lane
        self.socket = socket
        self.report = report
        self.run = None
        self.asked = False
        self.namespace = self.pidfd = -1
        self.pid = self.host = 0
        if lane.template.hosted:
            self.host = pid
        else:
            self.is_born(pid)
        lane.server.watch(socket.fileno(), self.on_word)

    def is_born(self, pid):
        try:
            self.pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return  # it was waited for as a stray; its socket's end follows
        self.pid = pid
        self.lane.server.watch(self.pidfd, self.on_end)

    def on_word(self):
        """It gives us its pid, its mount namespace, or says that its root is ready."""
        try:
            message, descriptors, _sender = wire.receive(self.socket, wire.MSG_DONTWAIT)
        except BlockingIOError:
            return
        if message is None:
            self.lane.server.forget(self.socket.fileno())  # executed or dead: its pidfd tells
            if self.pidfd < 0:
                status = os.waitpid(self.wait_for_host(), 0)[1]
                self.lane.server.reap_strays()
                self.ended(status)
        elif message[0] == "pid":
            self.is_born(message[1])
        elif message[0] == "namespace":
            self.namespace = descriptors[0]
        else:
            self.lane.ready(self)

    def wait_for_host(self):
        """Return the pid of the host, which is waited for at once."""
        host, self.host = self.host, 0
        return host

    def on_end(self):
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:  # else news of a closed descriptor that had the same number
            self.ended(status)

    def ended(self, status):
        """Tell whoever waits for it, and tidy up."""
        lane, run = self.lane, self.run
        code, fields = os.waitstatus_to_exitcode(status), self.failure()
        if run is not None:
            # Before anything is tidied up: somebody waits for it.
            run.end(code, fields)
            lane.runs.remove(run)
        self.drop()
        if run is None:
            lane.lost(self, code, fields)

    def kill(self):
        """Kill it; where it is a payload's parent, first the payload, so that it cleans up."""
        first, self.asked = not self.asked, True
        if first and self.lane.template.supervised and child.kill_children(self.pid):
            return
        if self.pidfd < 0:
            self.await_birth()
        if self.pidfd < 0:
            return  # it will never be
        try:
            pidfd_send_signal(self.pidfd, _SIGKILL)
        except ProcessLookupError:
            pass

    def await_birth(self):
        """Wait until it has told its pid, or is gone: its host is alive, or its socket ends."""
        born = poll()
        born.register(self.socket.fileno(), EPOLLIN)
        while self.pidfd < 0 and born.poll(_CLEANING_MILLISECONDS):
            message, _descriptors, _sender = wire.receive(self.socket)
            if message is None:
                return
            self.is_born(message[1])

    def ends(self):
        """Whether it ends within the time that cleaning up may take."""
        end = poll()
        end.register(self.pidfd, EPOLLIN)
        return bool(end.poll(_CLEANING_MILLISECONDS))

    def reap(self):
        """Wait for the end of one that was killed."""
        if self.pidfd >= 0:
            if not self.ends():
                self.kill()
            os.waitpid(self.pid, 0)
        if self.host:
            os.waitpid(self.wait_for_host(), 0)
            if self.pidfd < 0:
                self.lane.server.reap_strays()
        self.drop()

    def failure(self):
        """Return the fields of the failure that it reported before it ended, or None."""
        fields = None
        while message := self.report.receive():
            if message[0] == "failure":
                fields = message[1:]
        return fields

    def drop(self):
        """Close what belongs to it, once it has been waited for."""
        server = self.lane.server
        if self.pidfd >= 0:
            server.forget(self.pidfd)
            os.close(self.pidfd)
        if self.host:
            server.hosts.append(self.host)
        if self.socket.fileno() in server.handlers:
            server.forget(self.socket.fileno())
        self.socket.close()
        self.report.close()
        if self.namespace >= 0:
            server.sweeper.take([self.namespace])
            os.close(self.namespace)


class _Run:
    """A command under way: its channel to the caller, and the child that executes it."""

    def __init__(self, lane, channel, descriptors, command):
        self.lane = lane
        self.channel = channel
        self.descriptors = descriptors
        self.command = command
        self.child = None

    def watch(self):
        """Listen to the caller, also while the command is queued: it may give up."""
        if self.channel is not None:
            self.lane.server.watch(self.channel.fileno(), self.on_word)

    def begin(self, taken):
        self.child = taken
        taken.run = self
        self.lane.runs.append(self)
        self.drop_descriptors()

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
            else:
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
        if fields is None:
            answer(self.channel, "ended", status)
        else:
            answer(self.channel, "failed", *fields)
        self.close()

    def fail(self, fields):
        answer(self.channel, "failed", *fields)
        self.close()

    def close(self):
        self.drop_descriptors()
        if self.channel is not None:
            if self.channel.fileno() in self.lane.server.handlers:
                self.lane.server.forget(self.channel.fileno())
            self.channel.close()
            self.channel = None


def answer(channel, *message):
    """Send a message to a caller; one that is gone or doesn't listen is nobody's loss."""
    if channel is None:
        return
    try:
        wire.send(channel, message)
    except OSError:
        pass


def fields_of(error):
    """Return an error as the strings that `payload.failure` makes one of."""
    if isinstance(error, SandboxError):
        return (type(error).__name__, error.origin, error.operation, payload.as_text(error.target),
                error.text, str(error.errno), error.hint or "", str(error.exit_status), "")
    return ("ProcessError", "", getattr(error, "call", "fork"), "", "", str(error.errno or 0), "",
            "125", "")


def refusal(sender, owner):
    """Return the fields of the answer to another process than the owner."""
    return fields_of(SandboxError(
        "", "request", f"process {sender}", f"this warm process belongs to process {owner}",
        hint="after a fork, a sandbox of the child's own starts one of its own"))


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

