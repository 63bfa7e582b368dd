"""Facts of the machine that the plan depends on: read-only, asked once."""


from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import capget, read_file

CAP_SYS_ADMIN = 21
_EVERY_ID = ((0, 4294967295),)
_EVERY_ID_WRITTEN = b"         0          0 4294967295\n"


class Facts:
    """Who builds.

    uid, gid: effective ids.  privileged: CAP_SYS_ADMIN is effective, so that mount
    namespaces need no user namespace of ours.  initial_user_namespace: every id of the
    machine is mapped, so that marks in trusted.* can be written.  selinux: it is there.
    id_ranges: ((uid maps), (gid maps)) of our own user namespace, as (first, size).  The last
    two are asked for when somebody wants to know, where they weren't given.
    """

    __slots__ = (
        "gid", "initial_user_namespace", "known_ranges", "known_selinux", "privileged", "uid",
    )

    def __init__(self, uid=0, gid=0, privileged=True, initial=True, selinux=False,
                 id_ranges=(_EVERY_ID, _EVERY_ID)):
        self.uid = uid
        self.gid = gid
        self.privileged = privileged
        self.initial_user_namespace = initial
        self.known_selinux = selinux
        self.known_ranges = id_ranges

    @property
    def selinux(self):
        if self.known_selinux is None:
            self.known_selinux = os.path.exists("/sys/fs/selinux/enforce")
        return self.known_selinux

    @property
    def id_ranges(self):
        if self.known_ranges is None:
            self.known_ranges = _ranges("/proc/self/uid_map"), _ranges("/proc/self/gid_map")
        return self.known_ranges


def facts():
    """Return the `Facts` of this process and machine."""
    return Facts(
        uid=os.geteuid(),
        gid=os.getegid(),
        privileged=has_capability(CAP_SYS_ADMIN),
        initial=_ranges("/proc/self/uid_map") == _EVERY_ID,
        selinux=None,
        id_ranges=None,
    )


def _ranges(path):
    try:
        text = read_file(path)
    except OSError:
        return _EVERY_ID
    if text == _EVERY_ID_WRITTEN:
        return _EVERY_ID
    return tuple((int(first), int(size)) for first, _, size in map(bytes.split, text.splitlines()))


def has_capability(number):
    """Return whether this process has the capability in its effective set (capget(2))."""
    return bool(capget()[0] >> number & 1)
