"""The terminal of `process.terminal`: a pty of the container's, relayed to ours.

The build opens the pty from the container's own devpts; its master comes to the parent over a
socket, the slave goes to the payload.  Loaded only with a terminal.

Sources: pty(7), termios(3), ioctl_tty(2), unix(7) (SCM_RIGHTS).
"""

import array
import os
import select
import sys
import termios
from _socket import AF_UNIX, SCM_RIGHTS, SOCK_CLOEXEC, SOCK_STREAM, SOL_SOCKET, socketpair
from fcntl import ioctl

from sandboxfs.errors import ProcessError
from sandboxfs.kernel.syscalls import signalfd

_STDIN, _STDOUT = 0, 1
_CHUNK = 65536
_SIGINFO_SIZE = 128
_SIGWINCH = 28
_END_OF_FILE = b"\x04"
# Indexes into what tcgetattr returns.
_IFLAG, _OFLAG, _CFLAG, _LFLAG, _CC = 0, 1, 2, 3, 6


class Console:
    """Both sides of one terminal: made before the fork, then each process uses its part.

    far: the payload is another process than the builder, and gets the slave by socket.
    """

    __slots__ = (
        "child_end", "far", "input_open", "master", "parent_end", "pending", "saved", "size",
        "slave", "slave_receiver", "slave_sender",
    )

    def __init__(self, far, size):
        self.parent_end, self.child_end = socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
        self.far = far
        self.size = size
        self.slave = self.master = -1
        self.slave_receiver = self.slave_sender = None
        if far:
            self.slave_receiver, self.slave_sender = socketpair(
                AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC
            )
        self.saved = None
        self.pending = b""
        self.input_open = True

    # -- in the builder and the payload --------------------------------------------------

    def hand_over(self, root):
        """Send the master to the parent, and the slave to the payload where it is far."""
        _send(self.child_end, root.console_master)
        if self.far:
            _send(self.slave_sender, root.console_slave)
        else:
            self.slave = root.console_slave

    def become_controlling(self):
        """Make the slave this session's terminal, and our standard input and outputs."""
        if self.slave < 0:
            self.slave = _receive(self.slave_receiver)
        ioctl(self.slave, termios.TIOCSCTTY, 0)
        for number in (0, 1, 2):
            os.dup2(self.slave, number)

    # -- in the parent ---------------------------------------------------------------------

    def after_fork(self):
        """Close what belongs to the children."""
        self.child_end.close()
        if self.far:
            self.slave_receiver.close()
            self.slave_sender.close()

    def supervise(self, numbers, on_signal):
        """Relay until `on_signal(number)` returns a status, and return that.

        numbers: the signals to read, blocked.  Our terminal is raw meanwhile.
        """
        signals = signalfd(numbers)
        try:
            self.enter_raw()
            return self._loop(signals, on_signal)
        finally:
            self.restore()
            os.close(signals)
            self.parent_end.close()
            if self.master >= 0:
                os.close(self.master)
                self.master = -1

    def enter_raw(self):
        """Put our terminal in raw mode, if standard input is one."""
        if self.saved is None and os.isatty(_STDIN):
            self.saved = termios.tcgetattr(_STDIN)
        if self.saved is None:
            return
        mode = [*self.saved[:_CC], list(self.saved[_CC])]
        mode[_IFLAG] &= ~(
            termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP | termios.INLCR
            | termios.IGNCR | termios.ICRNL | termios.IXON
        )
        mode[_OFLAG] &= ~termios.OPOST
        mode[_LFLAG] &= ~(
            termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN
        )
        mode[_CFLAG] = mode[_CFLAG] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
        mode[_CC][termios.VMIN], mode[_CC][termios.VTIME] = 1, 0
        termios.tcsetattr(_STDIN, termios.TCSADRAIN, mode)

    def restore(self):
        """Give our terminal its mode back."""
        if self.saved is not None:
            termios.tcsetattr(_STDIN, termios.TCSADRAIN, self.saved)

    def resize(self):
        """Give the pty the size of our terminal; without one, what the document says."""
        if self.master >= 0 and self.saved is not None:
            size = ioctl(_STDIN, termios.TIOCGWINSZ, bytes(8))
            ioctl(self.master, termios.TIOCSWINSZ, size)

    def _loop(self, signals, on_signal):
        status = None
        while status is None:
            for fd, event in self._poll(signals):
                if fd == signals:
                    status = self._signals(signals, on_signal)
                elif fd == self.parent_end.fileno():
                    self._take_master()
                elif fd == _STDIN:
                    self._read_input()
                else:
                    self._master_ready(event)
        while self.master >= 0 and self._copy_output():
            pass
        return status

    def _poll(self, signals):
        poll = select.poll()
        poll.register(signals, select.POLLIN)
        if self.parent_end.fileno() >= 0:
            poll.register(self.parent_end.fileno(), select.POLLIN)
        if self.master >= 0:
            poll.register(
                self.master, select.POLLIN | (select.POLLOUT if self.pending else 0)
            )
            if self.input_open and not self.pending:
                poll.register(_STDIN, select.POLLIN)
        return poll.poll()

    def _signals(self, signals, on_signal):
        status = None
        data = os.read(signals, 32 * _SIGINFO_SIZE)
        for at in range(0, len(data), _SIGINFO_SIZE):
            number = int.from_bytes(data[at:at + 4], sys.byteorder)  # ssi_signo
            if number == _SIGWINCH:
                self.resize()
                continue
            status = on_signal(number) if status is None else status
        return status

    def _take_master(self):
        master = _receive(self.parent_end, missing_ok=True)
        self.parent_end.close()
        if master is None:
            return  # the child failed before; its report says why
        self.master = master
        os.set_blocking(master, False)
        self.resize()

    def _read_input(self):
        try:
            data = os.read(_STDIN, _CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""  # the terminal was hung up
        if not data:
            self.input_open = False
            data = _END_OF_FILE
        self.pending = data

    def _master_ready(self, event):
        if event & select.POLLOUT and self.pending:
            try:
                self.pending = self.pending[os.write(self.master, self.pending):]
            except BlockingIOError:
                pass  # not yet: poll says when
        if event & ~select.POLLOUT and not self._copy_output():
            os.close(self.master)
            self.master = -1

    def _copy_output(self):
        """Copy what there is; False when nothing more can come (nor is there now)."""
        try:
            data = os.read(self.master, _CHUNK)
        except OSError:
            return False  # EIO: no slave is open any more; EAGAIN: drained
        if data:
            _write_all(_STDOUT, data)
        return bool(data)


def _write_all(fd, data):
    while data:
        try:
            data = data[os.write(fd, data):]
        except BlockingIOError:
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            poll.poll()


def _send(socket, fd):
    socket.sendmsg([b"1"], [(SOL_SOCKET, SCM_RIGHTS, array.array("i", [fd]))])


def _receive(socket, missing_ok=False):
    space = array.array("i", [0]).itemsize
    _data, ancillary, _flags, _address = socket.recvmsg(1, 64, 0x40000000)  # MSG_CMSG_CLOEXEC
    for level, kind, data in ancillary:
        if level == SOL_SOCKET and kind == SCM_RIGHTS:
            return array.array("i", data[:space])[0]
    if missing_ok:
        return None
    raise ProcessError("process.terminal", "recvmsg", "", "the terminal didn't arrive")
