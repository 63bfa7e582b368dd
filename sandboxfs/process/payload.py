"""The payload's process, from its creation to exec.

A `Job` holds everything the child needs, encoded and looked up by the parent beforehand: after
the pivot nothing may be imported or opened from the container, and what is done before the
fork isn't paid for twice.  Failures go to the parent as fields over a pipe; the parent words
them.

Sources: config.md ("Process"), runtime.md, credentials(7), prctl(2), signal(7).
"""

import sys
from _signal import SIG_DFL, SIG_SETMASK, pthread_sigmask
from _signal import signal as set_handler
from time import time

from sandboxfs.errors import MountError, ProcessError
from sandboxfs.kernel import abi, vfork
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import (
    close_range,
    fewer_descriptors,
    prctl,
    prlimit,
    setdomainname,
    sethostname,
    unshare,
)
from sandboxfs.process.namespaces import loopback_up
from sandboxfs.process.report import FAILED

CANNOT_EXECUTE = 126
NOT_FOUND = 127

PR_SET_PDEATHSIG = 1
PR_GET_DUMPABLE = 3
PR_SET_DUMPABLE = 4
_SIGKILL, _SIGPIPE, _SIGXFSZ = 9, 13, 25
_LAST_DESCRIPTOR = 0xFFFFFFFF
_CLOSE_RANGE_UNSHARE = 2
_DEFAULT_PATH = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# asm-generic/resource.h; only mips, alpha and sparc count otherwise.
RLIMITS = {
    name: number for number, name in enumerate((
        "RLIMIT_CPU", "RLIMIT_FSIZE", "RLIMIT_DATA", "RLIMIT_STACK", "RLIMIT_CORE",
        "RLIMIT_RSS", "RLIMIT_NPROC", "RLIMIT_NOFILE", "RLIMIT_MEMLOCK", "RLIMIT_AS",
        "RLIMIT_LOCKS", "RLIMIT_SIGPENDING", "RLIMIT_MSGQUEUE", "RLIMIT_NICE",
        "RLIMIT_RTPRIO", "RLIMIT_RTTIME",
    ))
}
_UNLIMITED = (1 << 64) - 1


class Job:
    """One run: the plan, and what its child needs.  Made by `prepare`.

    proc: the caller's procfs, where something needs it: /proc/self is right in it whatever
    namespace a child is in, and no other mount namespace can put its own in its place.
    base_namespace: its descriptor, borrowed, or -1; base: `process.base.Base` where the plan's
    child starts from it, else None.
    has_session: it leads a session of its own already.
    descriptor_limit: the caller's soft RLIMIT_NOFILE, raised while the root is built.
    step: (origin, operation, target) of what is being done, for errors of system calls.
    marks: list of (phase, seconds since the epoch) or None; the epoch's clock is the one
    that no time namespace shifts.
    """

    __slots__ = (
        "arguments", "assembly", "base", "base_namespace", "candidates", "console", "credentials",
        "cwd", "descriptor_limit",
        "domainname", "environment",
        "go_reader", "go_writer", "has_session", "hostname", "idmap", "join", "joins", "loopback",
        "marks",
        "materials", "network", "oom_score_adj", "plan", "proc", "process", "program",
        "report", "rlimits", "step", "strict", "sysctl", "upper", "user_namespace", "verify",
        "warnings",
    )

    def __init__(self, plan, verify, marks):
        self.plan = plan
        self.process = plan.process
        self.verify = verify
        self.strict = False
        self.marks = marks
        self.report = None
        self.go_reader = self.go_writer = -1
        self.has_session = False
        self.materials = self.assembly = None
        self.upper = None
        self.descriptor_limit = None
        self.user_namespace = self.proc = -1
        self.step = ("", "", "")
        self.joins = ()
        self.base_namespace = -1
        self.base = None
        self.join = self.idmap = self.console = None
        self.network = None
        self.warnings = []

    def mark(self, phase):
        """Note that `phase` ended now."""
        if self.marks is not None:
            self.marks.append((phase, time()))


def prepare(plan, verify=False, marks=None, strict=False):
    """Return the `Job` of a plan: arguments encoded, names looked up, modules imported.

    Raises `ProcessError` for a process that can't be started anywhere.
    """
    job = Job(plan, verify, marks)
    job.strict = strict
    process, spec = plan.process, plan.spec
    if process is None:
        raise ProcessError("process", "", "", "the document has no process to execute")
    job.arguments = [os.fsencode(argument) for argument in process.args]
    job.environment = environment_of(process.env)
    job.candidates = candidates_of(job.arguments[0], job.environment)
    job.cwd = os.fsencode(process.cwd)
    job.rlimits = [_rlimit(index, limit) for index, limit in enumerate(process.rlimits)]
    job.oom_score_adj = process.oom_score_adj
    job.hostname = os.fsencode(spec.hostname) if spec.hostname else None
    job.domainname = os.fsencode(spec.domainname) if spec.domainname else None
    job.loopback = plan.new_namespace("network")
    from sandboxfs.process import credentials, program

    job.credentials = credentials.prepare(plan, job.warnings)
    job.program = program.Guard()
    job.sysctl = []
    if spec.sysctl:
        from sandboxfs.process import network

        job.network = network
        job.sysctl = network.encoded_sysctls(spec.sysctl)
    return job


def environment_of(entries):
    """Return `process.env`, str or bytes, as execve(2) takes it; ProcessError."""
    environment = {}
    for index, entry in enumerate(entries):
        key, equals, value = os.fsencode(entry).partition(b"=")
        if not equals or not key:
            raise ProcessError(
                f"process.env[{index}]", "", entry, "is not of the form NAME=VALUE"
            )
        environment[key] = value
    return environment


def candidates_of(name, environment):
    """Return the paths to try for `name`, as execvp(3) would."""
    if b"/" in name:
        return [name]
    directories = environment.get(b"PATH", _DEFAULT_PATH).split(b":")
    return [(directory or b".") + b"/" + name for directory in directories] if name else []


def _rlimit(index, limit):
    name, soft, hard = limit
    if name not in RLIMITS:
        raise ProcessError(f"process.rlimits[{index}]", "", name, "no such limit")
    return index, name, RLIMITS[name], (soft & _UNLIMITED, hard & _UNLIMITED)


# -- in the child ------------------------------------------------------------------------


def main(job, body):
    """Run `body(job)` as the whole life of a child: it never returns."""
    try:
        body(job)
    except BaseException as error:  # noqa: BLE001 - the parent re-raises it
        tell(job, error)
    os._exit(FAILED)


def tell(job, error):
    """Tell the parent of a failure."""
    try:
        job.report.fail(error, job.step)
    except BrokenPipeError:
        pass  # the parent is gone; nobody is left to be told


def begin(job):
    """The first steps of every child: tied to the parent's life, and its ends closed."""
    os.close(job.report.reader)
    if job.go_writer >= 0:
        os.close(job.go_writer)
        job.go_writer = -1
    prctl(PR_SET_PDEATHSIG, _SIGKILL)


def wait_for_go(job):
    """Wait until the parent did its part (maps, devices, the build from outside)."""
    job.step = ("", "read", "")
    if not os.read(job.go_reader, 1):
        os._exit(FAILED)  # the parent is gone or has failed, and says why itself
    os.close(job.go_reader)
    job.step = ("", "", "")


def live_inside(job):
    """Begin, join, and build the root that this process lives in from then on."""
    begin(job)
    set_oom_score(job)
    if job.joins:
        enter(job, [entry for entry in job.joins if entry.type not in ("pid", "time")])
    if job.go_reader >= 0:
        wait_for_go(job)
    job.mark("clone")
    if job.base is not None and not enter_base(job):
        job.step = ("linux.namespaces", "unshare", "mount")
        unshare(abi.CLONE_NEWNS)
    build(job)


class SharedLife:
    """The life of a child that shares its parent's memory (`kernel.vfork`), step by step.

    live: called with the job first, does everything until `be_ready`; what it returns is an exit
    status if it isn't None.
    """

    __slots__ = ("attempts", "job", "live", "program")

    def __init__(self, job, live):
        self.job = job
        self.live = live
        self.attempts = self.program = None

    def step(self, number):
        """Return what is next: (path, `vfork.Program`), or an exit status."""
        job = self.job
        try:
            if self.attempts is not None:
                return self.attempts.send(OSError(number, os.strerror(number))), self.program
            status = self.live(job)
            if status is not None:
                return status
            self.program = vfork.Program(job.arguments, job.environment)
            be_ready(job)
            self.attempts = attempts_of(job)
            return next(self.attempts), self.program
        except BaseException as error:  # noqa: BLE001 - the parent re-raises it
            tell(job, error)
            return FAILED


def enter_base(job):
    """Move into a copy of the base namespace; False where this process can't join it."""
    job.step = ("linux.namespaces", "setns", "base namespace")
    entered = job.base.enter()
    if entered:
        # What the other engine would have to open again has no path in here; and where there is
        # a base namespace, the kernel builds detached trees.
        job.plan.engine = "detached"
        job.mark("base")
    job.base.close()
    return entered


def enter(job, joins):
    """Join namespaces, the mount namespace last."""
    if joins and joins[-1].type == "mount":
        seal_interpreter()  # from then on paths lead to the other namespace's files
    job.join.enter_all(joins)


def build(job, root=None):
    """Build the root in this process's mount namespace, and pivot into it.

    root: one that was built already.
    """
    from sandboxfs.build import assemble, gather

    plan = job.plan
    if job.materials is None and root is None:
        job.materials = gather.gather(plan, job.upper)
        job.mark("gather")
    set_up(job)
    if root is None:
        job.step = ("", "assemble", "")
        umask = os.umask(0)
        root = assemble.assemble(
            plan, job.materials, job.user_namespace, umask_is_clear=True, prepared=job.assembly
        )
        os.umask(umask)
    job.mark("assemble")
    if job.console is not None:
        job.console.hand_over(root)
    seal_interpreter()
    job.step = ("", "pivot", "")
    root.pivot(load_initramfs)
    if root.covers:
        job.credentials.cover(job)
    if job.verify:
        job.step = ("", "verify", "")
        _verify(root)
    job.mark("attach+pivot")


def _verify(root):
    differences = root.verify()
    if differences:
        raise MountError(
            "", "verify", "", "the finished tree differs from the plan: "
            + "; ".join(map(str, differences)),
        )


_sealed = []


def seal_interpreter():
    """From here on an import is an error: it would load the container's code."""
    _sealed[:] = sys.path[:], sys.meta_path[:], sys.path_hooks[:]
    sys.path.clear()
    sys.meta_path.clear()
    sys.path_hooks.clear()
    sys.path_importer_cache.clear()


def unseal_interpreter():
    """Undo `seal_interpreter`: what shared our memory did it, and we are still outside."""
    if _sealed:
        sys.path[:], sys.meta_path[:], sys.path_hooks[:] = _sealed
        _sealed.clear()


def load_initramfs():
    """Load what a pivot needs where it can't be one.  Our root is still the caller's then.

    (Of another mount namespace's root too much would be loaded: there it has been before.)
    """
    if "sandboxfs.build.initramfs" in sys.modules:
        return
    sys.path[:], sys.meta_path[:], sys.path_hooks[:] = _sealed
    from sandboxfs.build import initramfs  # noqa: F401

    seal_interpreter()


def set_oom_score(job):
    """Set `process.oomScoreAdj` of this process and its children to come."""
    if job.oom_score_adj is None:
        return
    number = str(job.oom_score_adj)
    job.step = ("process.oomScoreAdj", "write", number)
    fd = os.open("self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC, dir_fd=job.proc)
    try:
        os.write(fd, number.encode())
    except PermissionError as error:
        raise ProcessError(
            "process.oomScoreAdj", "write", number, "", error.errno,
            hint="going below the caller's own score needs CAP_SYS_RESOURCE",
        ) from None
    finally:
        os.close(fd)


def set_up(job):
    """Set what belongs to the new namespaces: names, `lo` and sysctl."""
    if job.hostname is not None:
        job.step = ("hostname", "sethostname", job.hostname)
        sethostname(job.hostname)
    if job.domainname is not None:
        job.step = ("domainname", "setdomainname", job.domainname)
        setdomainname(job.domainname)
    if job.loopback:
        job.step = ("linux.namespaces", "ioctl SIOCSIFFLAGS", "lo")
        loopback_up()
    if job.sysctl:
        job.network.write_sysctls(job)


def execute(job):
    """Become the payload: session, directory, limits, ids, capabilities, exec."""
    become(job)
    start(job)


def become(job):
    """Take what the payload has of a process; what is executed doesn't matter yet."""
    job.step = ("process", "setsid", "")
    # A session of its own, always: in ours it could push input into our terminal (TIOCSTI).
    if not job.has_session:
        os.setsid()
    if job.console is not None:
        job.step = ("process.terminal", "ioctl TIOCSCTTY", "/dev/console")
        job.console.become_controlling()
    in_place = change_directory(job, False)
    set_rlimits(job)
    job.credentials.apply(job)
    if not in_place:
        change_directory(job, True)


def start(job):
    """Execute the payload, in the directory where this process is."""
    be_ready(job)
    execute_first(job)


def be_ready(job):
    """Do the last that is to be done before exec."""
    check_directory(job)
    if job.process.umask is not None:
        os.umask(job.process.umask)
    last_words(job)


def change_directory(job, last):
    """Enter the working directory; False: not allowed to, try again as the payload's user."""
    job.step = ("process.cwd", "chdir", job.cwd)
    try:
        os.chdir(job.cwd)
    except PermissionError:
        # A directory that only the payload's user may enter, on a file system where root
        # is nobody (FUSE, NFS).
        if last:
            raise
        os.chdir("/")
        return False
    return True


def check_directory(job):
    """Make sure that the working directory lies inside the root (CVE-2024-21626)."""
    job.step = ("process.cwd", "getcwd", job.cwd)
    if not os.getcwdb().startswith(b"/"):
        raise ProcessError("process.cwd", "chdir", job.cwd, "leads out of the container's root")


def set_rlimits(job):
    """Set `process.rlimits`; still with our privileges, since the payload may lack them."""
    fewer_descriptors(job.descriptor_limit)
    for index, name, number, limits in job.rlimits:
        job.step = (f"process.rlimits[{index}]", f"prlimit {name}", "")
        try:
            prlimit(0, number, limits)
        except PermissionError as error:
            raise ProcessError(
                job.step[0], job.step[1], "", "", error.errno,
                hint="raising a hard limit needs CAP_SYS_RESOURCE; the caller's own is the most",
            ) from None


def last_words(job):
    """Tie the payload's life to the parent's, and report that exec comes next."""
    job.step = ("", "prctl", "PR_SET_PDEATHSIG")
    # Again: a change of credentials cleared it.
    prctl(PR_SET_PDEATHSIG, _SIGKILL)
    words = ["execute"]
    if job.marks is not None:
        words += [f"{phase}={moment!r}" for phase, moment in job.marks]
    try:
        # A parent that died before prctl is noticed here: nobody reads the pipe.
        job.report.send(*words)
    except BrokenPipeError:
        os._exit(FAILED)
    # Python ignores these two; exec would hand that on.
    set_handler(_SIGPIPE, SIG_DFL)
    set_handler(_SIGXFSZ, SIG_DFL)
    pthread_sigmask(SIG_SETMASK, ())
    job.step = ("", "close_range", "")
    close_descriptors(job.report.writer)


def close_descriptors(kept):
    """Close what isn't the payload's, but for one descriptor, which exec closes.

    Closed before exec, not by it: `args` may name /proc/self/fd/N/../.. (CVE-2024-21626).  Where
    they are somebody else's too, they stay that one's.
    """
    # The higher ones first: a table that is shared is copied up to there only.
    close_range(max(kept, 2) + 1, _LAST_DESCRIPTOR, _CLOSE_RANGE_UNSHARE)
    if kept > 3:
        close_range(3, kept - 1, _CLOSE_RANGE_UNSHARE)
    for fd in (0, 1, 2):
        try:
            # Started with a standard stream closed, we have something of our own there.
            if fd != kept and not os.get_inheritable(fd):
                os.close(fd)
        except OSError:
            pass  # EBADF: it is closed


def execute_first(job):
    """Execute the first candidate that can be."""
    attempts = attempts_of(job)
    path = next(attempts)
    while True:
        try:
            os.execve(path, job.arguments, job.environment)
        except OSError as error:
            path = attempts.send(error)


def attempts_of(job):
    """Give one candidate after the other to execute, as a generator that is sent the errors.

    Raises `ProcessError` where none is left, or what an error says is about the program itself.
    """
    denied = None
    for path in job.candidates:
        job.program.check(path)
        error = yield path
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            if _exists(path):
                raise _exec_error(
                    NOT_FOUND, path, error,
                    "the file is there; the interpreter or loader it names is not",
                )
        elif isinstance(error, PermissionError):
            denied = denied or (path, error)
        else:
            raise _exec_error(CANNOT_EXECUTE, path, error, None)
    if denied is not None:
        hint = "is it a file with the x bit, on a mount without noexec?"
        raise _exec_error(CANNOT_EXECUTE, *denied, hint)
    name = os.fsdecode(job.arguments[0])
    where = "no such file in the container"
    if "/" not in name:
        where = "in no directory of the container's PATH"
    missing = ProcessError("process.args[0]", "execve", name, where, 2)
    missing.exit_status = NOT_FOUND
    raise missing


def _exec_error(status, path, failure, hint):
    error = ProcessError(
        "process.args[0]", "execve", os.fsdecode(path), "", failure.errno, hint
    )
    error.exit_status = status
    return error


def _exists(path):
    try:
        os.lstat(path)
    except OSError:
        return False
    return True
