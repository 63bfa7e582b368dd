"""User namespaces: who builds where, and the maps of ids.

With root outside, three processes: N makes a mount namespace that the host owns (M1) and in
it C, the payload, in its user namespace.  N then joins C's other namespaces, and the root is
built in M1 with the host's privileges.  Pivoting moves C's root too.  Only then C copies the
mount namespace for itself, and since the copy belongs to a less privileged user namespace
the kernel locks every flag in it (mount_namespaces(7), "Restrictions on mount namespaces").

Without privileges there is C alone, which builds for itself; an N only where a namespace has
to be joined or set up that takes its children.

Sources: user_namespaces(7), newuidmap(1), subuid(5), config-linux.md ("User namespace
mappings").
"""

import errno
import os

from sandboxfs.errors import ProcessError
from sandboxfs.kernel import abi
from sandboxfs.kernel.syscalls import mount_setattr, prctl, prlimit, setns, unshare
from sandboxfs.process import payload
from sandboxfs.process.namespaces import SIGCHLD, fork_into, new_flags
from sandboxfs.process.report import FAILED

_JOINABLE = (
    abi.CLONE_NEWPID | abi.CLONE_NEWNET | abi.CLONE_NEWIPC | abi.CLONE_NEWUTS
    | abi.CLONE_NEWCGROUP
)
_KINDS = ("uid", "gid")
_HELPERS = {"uid": "newuidmap", "gid": "newgidmap"}
_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


class Maps:
    """The maps of a new user namespace, and how they get written.

    helpers: dict from kind to the path of newuidmap/newgidmap where it is needed.
    deny_groups: setgroups(2) has to be given up for a gid map of our own making.
    """

    __slots__ = ("deny_groups", "helpers", "lines")

    def __init__(self):
        self.lines = {}
        self.helpers = {}
        self.deny_groups = False

    def write(self, proc, pid):
        """Write the maps of process `pid` by the procfs descriptor `proc`."""
        for kind in _KINDS:
            if kind in self.helpers:
                self._by_helper(kind, pid)
                continue
            if kind == "gid" and self.deny_groups:
                _write(proc, f"{pid}/setgroups", b"deny", "linux.gidMappings")
            text = "".join(f"{inside} {host} {size}\n" for inside, host, size in self.lines[kind])
            _write(proc, f"{pid}/{kind}_map", text.encode(), f"linux.{kind}Mappings")

    def _by_helper(self, kind, pid):
        program = self.helpers[kind]
        numbers = [str(number) for line in self.lines[kind] for number in line]
        reader, writer = os.pipe2(os.O_CLOEXEC)
        child = os.posix_spawn(
            program, [program, str(pid), *numbers], {"PATH": _PATH},
            file_actions=[(os.POSIX_SPAWN_DUP2, writer, 2)],
        )
        os.close(writer)
        said = b""
        while part := os.read(reader, 4096):
            said += part
        os.close(reader)
        _pid, status = os.waitpid(child, 0)
        if status:
            raise ProcessError(
                f"linux.{kind}Mappings", _HELPERS[kind], " ".join(numbers),
                said.decode("utf-8", "replace").strip() or "failed",
                hint=f"{program} must be setuid root, and /etc/sub{kind} must grant the range",
            )


def _write(proc, name, data, origin):
    try:
        fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)
    except OSError as error:
        hint = None
        if error.errno in (errno.EPERM, errno.EINVAL):
            hint = "the ranges must not overlap, and every host id must be mapped where we run"
        raise ProcessError(origin, "write", f"/proc/{name}", "", error.errno, hint) from None


def prepare(job):
    """Decide how the maps of the plan's user namespace get written; None: it is joined.

    Raises `ProcessError` for mappings that this user may not make.
    """
    user = job.plan.user
    if user.path is not None:
        return None
    maps = Maps()
    mappings = {"uid": user.uid_mappings, "gid": user.gid_mappings}
    for kind in _KINDS:
        maps.lines[kind] = [
            (entry.container_id, entry.host_id, entry.size) for entry in mappings[kind]
        ]
    if user.outside:
        return maps
    own = {"uid": os.geteuid(), "gid": os.getegid()}
    for kind in _KINDS:
        lines = maps.lines[kind]
        if len(lines) == 1 and lines[0][1:] == (own[kind], 1):
            continue  # one's own id, which every user may map
        maps.helpers[kind] = _helper(kind, lines, own[kind])
    maps.deny_groups = "gid" not in maps.helpers
    if maps.deny_groups:
        job.credentials.groups_denied = True
        if job.credentials.groups:
            raise ProcessError(
                "process.user.additionalGids", "setgroups", str(job.credentials.groups),
                "no groups can be set in a user namespace that an unprivileged user mapped",
                errno.EPERM, hint="linux.gidMappings with a range that /etc/subgid grants you",
            )
    return maps


def _helper(kind, lines, own):
    """Return the path of the helper program; raise where /etc/sub?id grants no such range."""
    file = f"/etc/sub{kind}"
    granted = _granted(file)
    for index, (_inside, host, size) in enumerate(lines):
        if (host, size) == (own, 1):
            continue
        if not any(first <= host and host + size <= first + count for first, count in granted):
            raise ProcessError(
                f"linux.{kind}Mappings[{index}]", _HELPERS[kind], f"{host}-{host + size - 1}",
                f"{file} grants {_user_name()} no such range", errno.EPERM,
                hint=f"root can add a line to {file}: {_user_name()}:{host}:{size}",
            )
    for directory in _PATH.split(":"):
        program = f"{directory}/{_HELPERS[kind]}"
        if os.access(program, os.X_OK):
            return program
    raise ProcessError(
        f"linux.{kind}Mappings", _HELPERS[kind], "", "is not installed", errno.ENOENT,
        hint="Debian's package uidmap has it",
    )


def _user_name():
    from pwd import getpwuid

    try:
        return getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _granted(file):
    """Return the (first, count) ranges that `file` (subuid(5)) grants this user."""
    names = {_user_name(), str(os.getuid())}
    found = []
    try:
        with open(file, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                name, _, numbers = line.strip().partition(":")
                first, _, count = numbers.partition(":")
                if name in names and first.isdigit() and count.isdigit():
                    found.append((int(first), int(count)))
    except FileNotFoundError:
        pass
    return found


# -- root outside ------------------------------------------------------------------------


def outside(job):
    """The life of N: make M1 and C, join C's namespaces, build in M1."""
    payload.begin(job)
    plan = job.plan
    os.chdir("/")
    payload.set_oom_score(job)
    job.oom_score_adj = None
    flags = new_flags(plan) & ~abi.CLONE_NEWNS
    if job.join is not None:
        prctl(payload.PR_SET_DUMPABLE, 0)  # who lives in joined namespaces may not look at us
        here = ("network", "ipc", "uts", "cgroup", "mount")
        payload.enter(job, [entry for entry in job.joins if entry.type in here])
        if plan.spec.time_offsets:
            job.join.new_time_namespace(plan.spec.time_offsets)
            flags &= ~abi.CLONE_NEWTIME
    if plan.new_namespace("mount"):
        job.step = ("linux.namespaces", "unshare", "mount")
        if job.base is None or not payload.enter_base(job):
            unshare(abi.CLONE_NEWNS)
    pid = _inhabit(job, flags)
    if job.idmap is not None:
        job.idmap.write(job.proc, pid)
    job.step = ("linux.namespaces", "open", f"/proc/{pid}/ns/user")
    job.user_namespace = os.open(f"{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC, dir_fd=job.proc)
    _raise_limits(job, pid)
    _build_beside(job, pid, flags & _JOINABLE)


def _inhabit(job, flags):
    """Make C, a child of our parent, in its user namespace; returns its pid."""
    for_children = [entry for entry in job.joins if entry.type in ("pid", "time")]
    user = [entry for entry in job.joins if entry.type == "user"]
    if not user:
        if for_children:
            job.join.enter_all(for_children)
        pid = fork_into(abi.CLONE_NEWUSER | flags | abi.CLONE_PARENT, 0)
        if pid == 0:
            inhabitant(job)
        job.report.send("pid", str(pid))
        return pid
    # Joining a user namespace gives the host's privileges up, and we still need ours.
    reader, writer = os.pipe2(os.O_CLOEXEC)
    between = fork_into(abi.CLONE_PARENT, 0)
    if between == 0:
        prctl(payload.PR_SET_PDEATHSIG, 9)
        job.join.enter_all(for_children + user)
        pid = fork_into(flags | abi.CLONE_PARENT, 0)
        if pid == 0:
            inhabitant(job)
        os.write(writer, str(pid).encode())
        os._exit(0)
    job.report.send("helper", str(between))
    os.close(writer)
    number = os.read(reader, 32)
    os.close(reader)
    if not number:
        os._exit(FAILED)  # it has said why
    job.report.send("pid", number.decode())
    return int(number)


def _build_beside(job, pid, flags):
    """Build in M1, with the host's privileges, in the other namespaces of C."""
    in_pid_namespace = any(entry.type == "pid" for entry in job.plan.namespaces)
    if in_pid_namespace:
        flags |= abi.CLONE_NEWPID
    if flags:
        job.step = ("linux.namespaces", "setns", f"pid {pid}")
        pidfd = os.pidfd_open(pid)
        setns(pidfd, flags)
        os.close(pidfd)
    # A fresh proc shows the pid namespace of who mounts it: only a child is inside.
    builder = fork_into(0, SIGCHLD) if in_pid_namespace else 0
    if builder == 0:
        prctl(payload.PR_SET_PDEATHSIG, 9)
        payload.build(job)
        os._exit(0)
    _pid, status = os.waitpid(builder, 0)
    os._exit(FAILED if status else 0)


def _raise_limits(job, pid):
    """Raise the hard limits of C that will be asked for: from inside it can't any more."""
    for index, name, number, (_soft, hard) in job.rlimits:
        job.step = (f"process.rlimits[{index}]", f"prlimit {name}", "")
        soft_now, hard_now = prlimit(pid, number)
        if hard > hard_now:
            prlimit(pid, number, (soft_now, hard))


def inhabitant(job):
    """The life of C with the root built from outside."""
    prctl(payload.PR_SET_PDEATHSIG, 9)
    payload.seal_interpreter()
    payload.wait_for_go(job)
    _become_root(job)
    job.step = ("", "chroot", "/")
    # pivot_root takes all processes along.  From an initramfs, where the root was put on top of
    # the old one, each has to go by itself: `..` of a root leads to what is mounted on it.
    if not os.path.samestat(os.stat("/.."), os.stat("/")):
        os.chroot("/..")
    os.chdir("/")
    if job.plan.new_namespace("mount"):
        job.step = ("linux.namespaces", "unshare", "mount")
        unshare(abi.CLONE_NEWNS)
        job.step = ("linux.rootfsPropagation", "mount_setattr", "/")
        _propagate(job.plan)
    payload.execute(job)


def _propagate(plan):
    """Apply `linux.rootfsPropagation` to a copy of the root's mount namespace."""
    number = plan.operations[-1].propagation
    if number:
        root = os.open("/", os.O_PATH | os.O_CLOEXEC)
        mount_setattr(root, 0, 0, number & ~abi.MS_REC, bool(number & abi.MS_REC))
        os.close(root)


def _become_root(job):
    """Become root of the user namespace, if it has one."""
    job.step = ("linux.uidMappings", "setresuid", "0")
    try:
        if not job.credentials.groups_denied:
            os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
    except OSError as error:
        # EINVAL: 0 isn't mapped; the capabilities, which are what counts, are ours anyway.
        # EPERM: somebody else's namespace, where groups are denied.
        if error.errno not in (errno.EINVAL, errno.EPERM):
            raise


# -- without privileges --------------------------------------------------------------------


def inside(job):
    """The life of C, in a user namespace that was made with it."""
    payload.begin(job)
    payload.wait_for_go(job)
    payload.set_oom_score(job)
    if job.joins:
        prctl(payload.PR_SET_DUMPABLE, 0)
        payload.enter(job, job.joins)
    _live_inside(job)


def between(job):
    """The life of an N without privileges: join or set up what takes its children, make C."""
    payload.begin(job)
    payload.set_oom_score(job)
    plan = job.plan
    children = ("pid", "time")
    others = [entry for entry in job.joins if entry.type != "user"]
    if plan.user.path is None:
        payload.wait_for_go(job)
        refused = others
    else:
        # With the caller's privileges first: a namespace may belong to the caller's side.
        refused = job.join.enter([entry for entry in others if entry.type in children])
        refused += [entry for entry in others if entry.type not in children]
        job.join.enter_all([entry for entry in job.joins if entry.type == "user"])
    flags = new_flags(plan)
    if plan.spec.time_offsets:
        job.join.new_time_namespace(plan.spec.time_offsets)
        flags &= ~abi.CLONE_NEWTIME
    if job.joins:
        prctl(payload.PR_SET_DUMPABLE, 0)
    job.join.enter_all([entry for entry in refused if entry.type in children])
    pid = fork_into(flags | abi.CLONE_PARENT, 0)
    if pid:
        job.report.send("pid", str(pid))
        os._exit(0)
    prctl(payload.PR_SET_PDEATHSIG, 9)
    payload.enter(job, [entry for entry in refused if entry.type not in children])
    _live_inside(job)


def _live_inside(job):
    _become_root(job)
    job.step = ("linux.namespaces", "open", "/proc/self/ns/user")
    job.user_namespace = os.open("self/ns/user", os.O_RDONLY | os.O_CLOEXEC, dir_fd=job.proc)
    payload.build(job)
    payload.execute(job)
