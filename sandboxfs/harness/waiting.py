"""The children of a lane and their hosts, as the warm process knows them.

Sources: pidfd_open(2), unix(7).
"""

from _signal import pidfd_send_signal
from select import EPOLLIN, poll

from sandboxfs.errors import ProcessError
from sandboxfs.harness import child, wire
from sandboxfs.harness.runs import fields_of
from sandboxfs.kernel import system as os
from sandboxfs.process.report import FAILED

_SIGKILL, _SHUT_RDWR = 9, 2
_CLEANING_MILLISECONDS = 2000


class Host:
    """A process in whose memory children wait, one after the other: pid, and our socket to it.

    child: who waits or builds there, or runs since and hasn't been waited for.  is_rested: it has
    nothing to do.
    """

    def __init__(self, lane, pid, socket):
        self.lane = lane
        self.pid = pid
        self.socket = socket
        self.child = None
        self.is_rested = False
        lane.hosts.append(self)
        lane.server.watch(socket.fileno(), self.on_word)

    def on_word(self):
        """It says that it is done with a child that executed, or is gone."""
        try:
            message = wire.receive(self.socket, wire.MSG_DONTWAIT)[0]
        except BlockingIOError:
            return
        if message is None:
            self.leave()
        else:
            self.is_rested = True
            self.lane.rested()

    def is_coming(self):
        """Whether it is going to say that it has rested."""
        return not self.is_rested and (self.child is None or self.child.run is not None)

    def leave(self):
        """It ends: it is waited for when nobody else has to wait then."""
        self.drop()
        self.lane.server.ending.append(self)

    def dismiss(self):
        """Have it end."""
        self.socket.shutdown(_SHUT_RDWR)
        self.leave()

    def drop(self):
        self.lane.server.forget(self.socket.fileno())
        self.lane.hosts.remove(self)

    def has_ended(self, how=os.WNOHANG):
        """Whether it could be waited for."""
        if not os.waitpid(self.pid, how)[0]:
            return False
        self.socket.close()
        return True

    def end(self):
        """End it, and wait until it is gone."""
        self.drop()
        os.kill(self.pid, _SIGKILL)  # ours to wait for: nobody else can have this number
        self.has_ended(0)


class Child:
    """A child: pid, pidfd, the socket it waits on, and the pipe it reports by.

    host: the `Host` in whose memory it waits, or None.  The child tells its own pid then; until
    it does, pid is 0 and pidfd -1.
    """

    def __init__(self, lane, pid, host, socket, report):
        self.lane = lane
        self.socket = socket
        self.report = report
        self.run = None
        self.asked = False
        self.namespace = self.pidfd = -1
        self.pid = 0
        self.host = host
        if host is None:
            self.is_born(pid)
        else:
            host.child = self
            host.is_rested = False
        lane.server.children.add(self)
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
                # Its host has failed to have it, and says so in its place.
                if self.host in self.lane.hosts:
                    self.host.dismiss()
                self.lane.server.reap_strays()
                self.ended(FAILED << 8)
        elif message[0] == "pid":
            self.is_born(message[1])
        elif message[0] == "namespace":
            self.namespace = descriptors[0]
        else:
            self.lane.ready(self)

    def is_over(self):
        """Whether it has ended, though nobody has waited for it yet."""
        if self.pidfd < 0:
            return False  # it has yet to tell its pid
        end = poll()
        end.register(self.pidfd, EPOLLIN)
        return bool(end.poll(0))

    def on_end(self):
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:  # else news of a closed descriptor that had the same number
            self.lane.server.forget(self.pidfd)
            self.ended(status)

    def ended(self, status):
        """Tell whoever waits for it; what is to be tidied up waits until nobody does."""
        lane, run = self.lane, self.run
        code = os.waitstatus_to_exitcode(status)
        # Who reports a failure ends with this status.
        fields = self.failure() if code == FAILED else None
        lane.server.children.discard(self)
        if run is None:
            self.drop()
            lane.lost(self, code, fields)
            return
        if fields is None and self.pidfd < 0:
            fields = fields_of(ProcessError(
                "", "run", "", "the process that was to execute it ended before it began"))
        run.tell_end(code, fields)
        lane.runs.remove(run)
        lane.server.behind += (run.close, self.drop)

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
        self.lane.server.children.discard(self)
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
            if self.pidfd in server.handlers:
                server.forget(self.pidfd)
            os.close(self.pidfd)
        if self.host is not None and self.host.child is self:
            self.host.child = None
        if self.socket.fileno() in server.handlers:
            server.forget(self.socket.fileno())
        self.socket.close()
        self.report.close()
        if self.namespace >= 0:
            server.sweeper.take([self.namespace])
            os.close(self.namespace)
