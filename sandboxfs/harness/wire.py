"""What the caller and the warm process say to each other: one datagram a message.

A message is a marshalled tuple, first its kind, with descriptors beside it (SCM_RIGHTS) and the
sender's ids, which the kernel writes (SCM_CREDENTIALS).  What is too long for a datagram lies in a
memfd.  A plan crosses as plain values, too: `pack` and `unpack` know how objects with `__slots__`
become those and come back.  Both ends are one installation of one interpreter.

Sources: unix(7), memfd_create(2).
"""

import _socket
import sys
from marshal import dumps, loads

from sandboxfs.kernel import system as os

SO_PASSCRED = 16
_SCM_RIGHTS, _SCM_CREDENTIALS = 1, 2
_INT, _UCRED = 4, 12
# SCM_MAX_FD is 253.
MOST_DESCRIPTORS = 64
# Safely below what a socket's buffer holds by default (net.core.wmem_default).
LONGEST = 1 << 16
MSG_DONTWAIT, _MSG_NOSIGNAL, _MSG_CMSG_CLOEXEC = 0x40, 0x4000, 0x40000000
_FLAGS = MSG_DONTWAIT | _MSG_NOSIGNAL
_INLINE, _IN_FILE = b"i", b"f"


def pair():
    """Return the two ends of a new connection (`_socket.socket`), close-on-exec."""
    return _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)


def adopt(fd):
    """Return the socket of a descriptor, owned from then on."""
    return _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, fd)


def send(socket, message, descriptors=()):
    """Send a tuple of plain values, and descriptors, which stay the sender's.

    BlockingIOError where the other end takes nothing more; BrokenPipeError, ConnectionResetError
    where it is gone.
    """
    body = dumps(message)
    file = -1
    if len(body) <= LONGEST:
        data = _INLINE + body
    else:
        file = _in_file(body)
        data, descriptors = _IN_FILE, (*descriptors, file)
    try:
        rights = []
        if descriptors:
            numbers = b"".join([fd.to_bytes(_INT, sys.byteorder) for fd in descriptors])
            rights = [(_socket.SOL_SOCKET, _SCM_RIGHTS, numbers)]
        socket.sendmsg([data], rights, _FLAGS)
    finally:
        if file >= 0:
            os.close(file)


def _in_file(body):
    file = os.memfd_create("sandboxfs", os.MFD_CLOEXEC)
    left = memoryview(body)
    while left:
        left = left[os.write(file, left):]
    return file


def receive(socket, flags=0, owner=None):
    """Return (message, descriptors, sender's pid); message is None where the other end is gone.

    The descriptors are close-on-exec and the receiver's.  The pid is 0 on a socket without
    SO_PASSCRED.  owner: the pid of who may say something; another one's message is (): what a
    stranger writes isn't unmarshalled.  BlockingIOError as recvmsg(2) has it.
    """
    room = _socket.CMSG_SPACE(MOST_DESCRIPTORS * _INT) + _socket.CMSG_SPACE(_UCRED)
    flags |= _MSG_CMSG_CLOEXEC
    try:
        data, ancillary, _flags, _address = socket.recvmsg(LONGEST + 1, room, flags)
    except ConnectionResetError:
        # It went with messages of ours unread, which is told once, before what it said last.
        data, ancillary, _flags, _address = socket.recvmsg(LONGEST + 1, room, flags)
    descriptors, pid = [], 0
    for _level, kind, content in ancillary:
        if kind == _SCM_RIGHTS:
            descriptors += [
                int.from_bytes(content[at:at + _INT], sys.byteorder)
                for at in range(0, len(content) - len(content) % _INT, _INT)
            ]
        elif kind == _SCM_CREDENTIALS:
            pid = int.from_bytes(content[:_INT], sys.byteorder)
    if not data:
        for fd in descriptors:
            os.close(fd)
        return None, [], pid
    if owner is not None and pid != owner:
        return (), descriptors, pid
    if data[:1] == _INLINE:
        return loads(data[1:]), descriptors, pid
    return loads(_content(descriptors.pop())), descriptors, pid


def _content(file):
    try:
        length = os.fstat(file).st_size
        content = b""
        while len(content) < length and (part := os.pread(file, length, len(content))):
            content += part
        return content
    finally:
        os.close(file)


# -- objects as plain values ---------------------------------------------------------------

_PLAIN = (type(None), bool, int, float, str, bytes)


def pack(value, without=()):
    """Return `value` as plain values: any nesting of lists, tuples, dicts and slotted objects.

    Two references to one object stay that.  without: attributes to leave out.  TypeError for what
    can't cross.
    """
    numbers, objects, kept = {}, [], []

    def walk(value):
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind in (list, tuple, set, frozenset):
            return (kind.__name__, [walk(each) for each in value])
        if kind is dict:
            return ("dict", [(walk(key), walk(each)) for key, each in value.items()])
        if not kind.__module__.startswith("sandboxfs."):
            raise TypeError(f"{kind.__module__}.{kind.__name__} can't be sent to another process")
        number = numbers.get(id(value))
        if number is None:
            number = numbers[id(value)] = len(objects)
            kept.append(value)  # so that no other object gets its id
            objects.append(None)
            objects[number] = (kind.__module__, kind.__qualname__, [
                (name, walk(getattr(value, name))) for name in _slots(kind)
                if name not in without and hasattr(value, name)
            ])
        return ("object", number)

    return walk(value), objects


def _slots(kind):
    names = []
    for each in kind.__mro__:
        slots = getattr(each, "__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    return names


_CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def unpack(packed):
    """Return what `pack` was given."""
    value, objects = packed
    made = []
    for module, name, _fields in objects:
        __import__(module)
        kind = getattr(sys.modules[module], name)
        made.append(kind.__new__(kind))

    def walk(value):
        if type(value) is not tuple:
            return value
        kind, content = value
        if kind == "object":
            return made[content]
        if kind == "dict":
            return {walk(key): walk(each) for key, each in content}
        return _CONTAINERS[kind]([walk(each) for each in content])

    for each, (_module, _name, fields) in zip(made, objects, strict=True):
        for name, content in fields:
            setattr(each, name, walk(content))
    return walk(value)
