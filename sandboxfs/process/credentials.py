"""User, groups, capabilities and no_new_privs of the payload.

The order matters: the bounding set is dropped while CAP_SETPCAP is there; the capabilities
outlive the change of user by keepcaps; the ambient set needs the inheritable one.

Sources: config.md ("User", "Capabilities"), capabilities(7), credentials(7).
"""


from sandboxfs.errors import ProcessError
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import capget, capset, prctl

# linux/capability.h, in the order of their numbers.
NAMES = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID",
    "CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_IPC_LOCK",
    "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL", "CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG",
    "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND", "CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
)
_NUMBERS = {name: number for number, name in enumerate(NAMES)}

PR_SET_KEEPCAPS = 8
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
PR_CAP_AMBIENT_CLEAR_ALL = 4
_SETS = ("bounding", "effective", "permitted", "inheritable", "ambient")


class Credentials:
    """Who the payload is: ids, and the five capability sets as bit sets.

    dropped: numbers to drop from the bounding set; bounded: that is done.  denied_groups:
    supplementary groups can't be set at all (an unprivileged user namespace of one id).
    """

    __slots__ = (
        "ambient", "bounded", "dropped", "effective", "gid", "groups", "groups_denied",
        "inheritable", "no_new_privileges", "permitted", "uid",
    )

    def __init__(self, process):
        self.uid = process.uid
        self.gid = process.gid
        self.groups = list(process.additional_gids)
        self.groups_denied = False
        self.dropped = []
        self.bounded = False
        self.no_new_privileges = process.no_new_privileges

    def apply(self, job):
        """Become this user.  The caller must still have what its namespace gives root."""
        self.bound(job)
        job.step = ("process.capabilities", "prctl", "PR_SET_KEEPCAPS")
        prctl(PR_SET_KEEPCAPS, 1)
        self.change_ids(job)
        job.step = ("process.capabilities", "capset", "")
        capset(self.effective, self.permitted, self.inheritable)
        job.step = ("process.capabilities.ambient", "prctl", "PR_CAP_AMBIENT")
        prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
        for number in self.ambient:
            prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number)
        if self.no_new_privileges:
            job.step = ("process.noNewPrivileges", "prctl", "PR_SET_NO_NEW_PRIVS")
            prctl(PR_SET_NO_NEW_PRIVS, 1)

    def cover(self, job):
        """The old root lies below ours: CAP_SYS_ADMIN in its mount namespace could uncover it.

        A payload with a mount namespace copied into its own user namespace can't: the kernel
        locks what such a copy holds.  What the bounding set has, executing a program can give.
        """
        user = job.plan.user
        locked = user is not None and user.outside and job.plan.new_namespace("mount")
        if locked or _NUMBERS["CAP_SYS_ADMIN"] in self.dropped:
            return
        text = (
            "the root is an initramfs, which can't be pivoted away: with CAP_SYS_ADMIN the "
            "payload can unmount its own root and see the initramfs below"
        )
        if job.strict:
            raise ProcessError(
                "process.capabilities", "pivot_root", "/", text, 22,
                hint="without the capability, in a user namespace made by root, or after "
                "sandboxfs switch-root --user-root",
            )
        job.report.send("warning", text)

    def bound(self, job):
        """Drop what the payload may never have; what this process has it keeps until then."""
        if self.bounded:
            return
        job.step = ("process.capabilities.bounding", "prctl", "PR_CAPBSET_DROP")
        for number in self.dropped:
            prctl(PR_CAPBSET_DROP, number)
        self.bounded = True

    def change_ids(self, job):
        if self.groups or not self.groups_denied:
            job.step = ("process.user.additionalGids", "setgroups", str(self.groups))
            os.setgroups(self.groups)
        job.step = ("process.user.gid", "setresgid", str(self.gid))
        os.setresgid(self.gid, self.gid, self.gid)
        job.step = ("process.user.uid", "setresuid", str(self.uid))
        os.setresuid(self.uid, self.uid, self.uid)


def prepare(plan, warnings):
    """Return the `Credentials` of a plan; what can't be granted is said in `warnings`.

    config.md: a runtime should not fail over a capability that it can't grant, and must warn.
    A process without `capabilities` has none.
    """
    process, user = plan.process, plan.user
    credentials = Credentials(process)
    if user is not None:
        _check_ids(credentials, user)
    everything = (1 << _count()) - 1
    # In a user namespace of ours there are all of them.
    limit = everything if user is not None else everything & capget()[1]
    asked = process.capabilities or {}
    sets = {name: _bits(name, asked.get(name) or ()) for name in _SETS}
    refused = 0
    for name in ("bounding", "permitted", "effective", "inheritable"):
        refused |= sets[name] & ~limit
        sets[name] &= limit
    sets["effective"] &= sets["permitted"]
    # What isn't permitted and inheritable can't be ambient (capabilities(7)).  `runc spec`
    # writes such a list, and every runtime passes over it.
    sets["ambient"] &= sets["permitted"] & sets["inheritable"]
    if refused:
        warnings.append(f"process.capabilities: this user can't grant {_words(refused)}")
    credentials.dropped = _numbers(everything & ~sets["bounding"])
    credentials.permitted = sets["permitted"]
    credentials.effective = sets["effective"]
    credentials.inheritable = sets["inheritable"]
    credentials.ambient = _numbers(sets["ambient"])
    return credentials


def _bits(set_name, names):
    bits = 0
    for index, name in enumerate(names):
        number = _NUMBERS.get(name)
        if number is None:
            raise ProcessError(
                f"process.capabilities.{set_name}[{index}]", "", name, "no such capability"
            )
        bits |= 1 << number
    return bits


def _count():
    """Return how many capabilities this kernel has; it may know more than we, or fewer."""
    number = len(NAMES)
    while _exists(number):
        number += 1
    while number and not _exists(number - 1):
        number -= 1
    return number


def _exists(number):
    try:
        prctl(PR_CAPBSET_READ, number)
    except OSError as error:
        if error.errno != 22:
            raise
        return False  # EINVAL, beyond the last one
    return True


def _numbers(bits):
    return [number for number in range(bits.bit_length()) if bits >> number & 1]


def _words(bits):
    return " ".join(NAMES[number] for number in _numbers(bits) if number < len(NAMES))


def _check_ids(credentials, user):
    """Refuse ids that the user namespace doesn't map: the kernel would say a bare EINVAL."""
    credentials.groups_denied = False
    if user.path is not None and not user.uid_mappings:
        return  # a joined namespace: its maps are its own
    if user.host_uid(credentials.uid) is None:
        raise _unmapped("process.user.uid", "setresuid", credentials.uid, "uid")
    if user.host_gid(credentials.gid) is None:
        raise _unmapped("process.user.gid", "setresgid", credentials.gid, "gid")
    for index, group in enumerate(credentials.groups):
        if user.host_gid(group) is None:
            raise _unmapped(f"process.user.additionalGids[{index}]", "setgroups", group, "gid")


def _unmapped(origin, call, number, kind):
    return ProcessError(
        origin, call, str(number), "the id isn't mapped in the container's user namespace", 22,
        hint=f"linux.{kind}Mappings says which ids there are",
    )
