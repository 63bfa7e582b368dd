"""A lane: a plan that was opened, the children that wait for its commands, and its runs."""

from sandboxfs.errors import SandboxError
from sandboxfs.harness import child, wire
from sandboxfs.harness.runs import answer, fields_of
from sandboxfs.harness.waiting import Child, Host

# Children that were killed while they waited, in a row, after which a request fails.
_MOST_LOSSES = 8
DROPPED = "the sandbox was closed while its command ran"


class Lane:
    """One plan: the children that wait, those that build first, the runs, and what is queued.

    hosts: the processes in whose memory children wait or have waited.
    """

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
        self.hosts = []
        self.losses = 0
        self.opening = None

    def request(self, run):
        """Give a command to a child that waits, or queue it for the next one."""
        if self.waiting:
            # The child starts when we sleep: nothing else comes before that.
            self.server.behind.append(run.watch)
            self.start(self.waiting.pop(0), run)
        else:
            self.queue.append(run)
            run.watch()
        self.refill()

    def start(self, waiting, run):
        """Hand a command to a child; if that has just died, its end has another one made."""
        # Its host holds its socket open still.
        is_over = waiting.is_over()
        if not is_over:
            try:
                wire.send(waiting.socket, run.command, run.descriptors)
            except OSError:
                is_over = True
        if is_over:
            self.queue.insert(0, run)
            return
        run.begin(waiting)
        self.losses = 0

    def children(self):
        """Return a list of those that wait, build or run."""
        return [*self.waiting, *self.building, *(run.child for run in self.runs)]

    def missing(self):
        """Return how many children are to be forked."""
        return self.size + len(self.queue) - len(self.waiting) - len(self.building)

    def is_short(self):
        """Whether the next child shouldn't wait until nothing else happens."""
        return len(self.queue) > len(self.building) or 2 * (
            len(self.waiting) + len(self.building) + self.coming()) < self.size

    def coming(self):
        """Return how many hosts will be able to have the next child."""
        return sum([host.is_coming() for host in self.hosts])

    def resting(self):
        """Return a host that has nothing to do, or None."""
        for host in self.hosts:
            if host.is_rested:
                return host
        return None

    def may_spawn(self):
        """Whether a child that is missing is to come now; else a host comes that can have it."""
        return self.resting() is not None or not self.coming()

    def rested(self):
        """A host can have the next child, or isn't needed any more."""
        if self.missing() <= 0:
            self.dismiss_rested()

    def dismiss_rested(self):
        while (host := self.resting()) is not None:
            host.dismiss()

    def refill(self):
        """Have children made until as many wait as should."""
        if self.missing() > 0:
            self.server.due.add(self)

    def spawn_one(self):
        """Make one of those that are missing; returns whether that was a fork."""
        forked = False
        try:
            forked = self.spawn()
        except (SandboxError, OSError) as error:
            self.server.due.discard(self)
            if not self.building:
                self.fail(fields_of(error))
        if self.missing() <= 0:
            self.server.due.discard(self)
            self.dismiss_rested()
        return forked

    def spawn(self):
        """Make a child, in a host that rests or by a fork; returns whether it was that."""
        pid, host = 0, self.resting()
        forked = host is None
        if host is not None:
            try:
                words = self.template.hand_over(host.socket)
            except (BrokenPipeError, ConnectionResetError):
                host.dismiss()  # it was killed
                return self.spawn()
        elif self.template.hosted:
            host, words = self.fork_host()
        else:
            pid, *words = self.template.fork()
        new = Child(self, pid, host, *words)
        if self.ahead:
            self.building.append(new)
        elif self.queue:
            self.start(new, self.queue.pop(0))
        else:
            self.waiting.append(new)
        return forked

    def fork_host(self):
        """Fork a host; returns it, and (socket, report) of its first child."""
        ours, theirs = wire.pair()
        try:
            pid, *words = self.template.fork(theirs)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return Host(self, pid, ours), words

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
        self.server.tidy_up()
        fields = fields_of(SandboxError("", "run", "", why))
        self.opened("failed", *fields)
        for run in self.queue:
            run.fail(fields)
        self.queue.clear()
        for run in list(self.runs):
            run.fail(fields)
        unborn = False
        for each in self.children():
            each.kill()
            unborn = unborn or each.pidfd < 0
            each.reap()
        for group in (self.waiting, self.building, self.runs):
            group.clear()
        self.server.due.discard(self)
        for host in list(self.hosts):
            host.end()
        self.server.reap_hosts(0)
        if unborn:
            self.server.reap_strays()
        self.template.close()
