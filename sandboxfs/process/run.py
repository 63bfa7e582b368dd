"""`run`: the parent of the payload, from the plan to the exit status.

It gathers, makes the child, and then only forwards signals, reaps, and words what the child
reports.  Exit statuses are those of a shell: the payload's own, 128+N for signal N.

Sources: config.md ("Process"), clone(2), sigwaitinfo(2), kill(2).
"""

from _signal import (
    SIG_BLOCK,
    SIG_DFL,
    SIG_IGN,
    SIG_SETMASK,
    getsignal,
    pthread_sigmask,
    sigwaitinfo,
)
from _signal import signal as set_handler

from sandboxfs.errors import ProcessError, SandboxError
from sandboxfs.kernel import abi, submounts, vfork
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import fewer_descriptors, more_descriptors
from sandboxfs.process import payload
from sandboxfs.process.namespaces import new_flags, refused, require_one_thread
from sandboxfs.process.report import Report, failure

_SIGINT, _SIGKILL, _SIGPIPE, _SIGCHLD, _SIGCONT, _SIGSTOP = 2, 9, 13, 17, 18, 19
_SIGTSTP, _SIGURG, _SIGXFSZ, _SIGWINCH = 20, 23, 25, 28
# Not forwarded: what can't be caught; what a fault of our own raises; what belongs to our
# terminal (TTIN, TTOU) or to our writing (PIPE, XFSZ); 32 and 33 are the C library's.
_OURS = {4, 5, 6, 7, 8, 9, 11, 13, 19, 21, 22, 25, 31, 32, 33}
SIGNALS = [number for number in range(1, 65) if number not in _OURS]
# Those of them that end a process by default, as the kernel's bit set.
_FATAL = sum(1 << number - 1 for number in SIGNALS) & ~sum(
    1 << number - 1 for number in (_SIGCHLD, _SIGCONT, _SIGTSTP, _SIGURG, _SIGWINCH)
)


def run(plan, verify=False, marks=None, warn=None, strict=False, base=-1):
    """Build the plan's root, execute its process inside, and return the exit status (int).

    verify: compare the finished tree with the plan before the payload starts.  marks: a list
    that gets (phase, seconds since the epoch) as phases end.  warn: called with one line for
    each thing that can't be granted.  strict: refuse what the child would only warn of.  base:
    descriptor of a base namespace to start from where the plan allows it (`process.base`), or -1.

    Raises SandboxError, also for what happened in the child; `trace` on it says where.  The
    process must be single-threaded.
    """
    require_one_thread()
    job = payload.prepare(plan, verify, marks, strict)
    if warn is not None:
        for line in job.warnings:
            warn(line)
    parent = _Parent(job, warn)
    job.base_namespace = base
    job.descriptor_limit = more_descriptors()
    try:
        parent.start()
        return parent.supervise()
    except OSError as error:
        if isinstance(error, SandboxError):
            raise
        # A pipe, a limit of this process: no operation of the plan.
        call = getattr(error, "call", None) or "start"
        raise ProcessError("run", call, "", "", error.errno or 0) from error
    finally:
        parent.close()


def close_all(descriptors):
    """Close descriptors that are all open, neighbours by one call: of many binds most are."""
    start = 0
    descriptors = sorted(descriptors)
    for index, fd in enumerate(descriptors, 1):
        if descriptors[index:index + 1] != [fd + 1]:
            os.closerange(descriptors[start], fd + 1)
            start = index


class _Watch:
    """What a child that shares our memory does about signals.

    mask: its own until exec.  status: descriptor of our status file, or -1.
    """

    __slots__ = ("mask", "status")

    def __init__(self, mask):
        self.mask = mask
        try:
            self.status = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self.status = -1  # no procfs: what is sent to us is forwarded

    def close(self):
        if self.status >= 0:
            os.close(self.status)

    def live(self, job):
        """Live as far as exec; a signal to the parent that came until then is the status."""
        # Stopped here, it would keep us from stopping; its session to come knows nothing of that.
        pthread_sigmask(SIG_SETMASK, {*self.mask, _SIGTSTP})
        payload.live_inside(job)
        payload.become(job)
        number = self.waiting()
        return 128 + number if number else None

    def waiting(self):
        """Return the number of a signal that waits for the parent, or 0 (proc_pid_status(5))."""
        if self.status < 0:
            return 0
        words = os.pread(self.status, 8192, 0).partition(b"ShdPnd:")[2].split(None, 1)
        signals = int(words[0], 16) & _FATAL if words else 0
        return (signals & -signals).bit_length()


class _Parent:
    """The parent's state.  helpers: pids that must end well before the payload may go on."""

    __slots__ = (
        "device_report", "executed", "failure", "helpers", "job", "old_child_handler",
        "old_mask", "pid", "warn",
    )

    def __init__(self, job, warn):
        self.job = job
        self.warn = warn
        self.pid = 0
        self.helpers = set()
        self.executed = False
        self.failure = None
        self.device_report = None
        self.old_mask = self.old_child_handler = None

    # -- start -------------------------------------------------------------------------------

    def start(self):
        """Gather, and make the child."""
        job = self.job
        from sandboxfs.build import assemble, gather

        self.load_cold_parts()
        if not gather.belongs_inside(job.plan):
            job.materials = gather.gather(job.plan)
            job.assembly = assemble.prepare(job.plan, job.materials, umask_is_clear=True)
            job.mark("gather")
        elif job.plan.spec.overrides.overlay == "dir":
            from sandboxfs.build import upper

            job.upper = upper.prepare(job.plan)  # the child's end doesn't remove it
        self.prepare_base()
        job.report = Report()
        if job.plan.user is not None or job.plan.spec.net_devices:
            job.go_reader, job.go_writer = os.pipe2(os.O_CLOEXEC)
        # An inherited SIG_IGN would have the kernel reap our children.
        self.old_child_handler = set_handler(_SIGCHLD, SIG_DFL)
        self.old_mask = pthread_sigmask(SIG_BLOCK, SIGNALS)
        if self.may_share_memory():
            self.start_sharing()
        else:
            from sandboxfs.process import forks

            forks.start(self)
        job.report.close_writer()
        if job.go_reader >= 0:
            os.close(job.go_reader)
        if job.console is not None:
            job.console.after_fork()
        if job.materials is not None:
            job.materials.close()  # the child has its own copies
        if job.base is not None:
            job.base.close()
        if job.plan.spec.net_devices:
            from sandboxfs.process import forks

            forks.start_moving_devices(self)
        elif job.go_writer >= 0 and not self.helpers:
            self.go()

    def load_cold_parts(self):
        """Load what this plan needs and most don't; nothing can be loaded in the container."""
        job, plan = self.job, self.job.plan
        user, spec = plan.user, plan.spec
        if spec.time_offsets or (user is not None and user.path is not None) or any(
            entry.path is not None for entry in plan.namespaces
        ):
            from sandboxfs.process import join

            job.join = join
            job.joins = join.open_all(plan)
            if any(entry.type == "mount" for entry in job.joins):
                self.load_lazy_parts()
        if user is not None or job.sysctl or job.oom_score_adj is not None:
            job.proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        if user is not None:
            from sandboxfs.process import idmap

            job.idmap = idmap.prepare(job)
        if job.verify:
            from sandboxfs.build import verify  # noqa: F401
        if plan.process.terminal:
            from sandboxfs.process.console import Console

            job.console = Console(
                user is not None and user.outside, plan.process.console_size
            )

    def load_lazy_parts(self):
        """Load what the build loads as it goes: in another mount namespace it can't."""
        from sandboxfs.build import (  # noqa: F401
            cgroups,
            console,
            copyup,
            devices,
            images,
            initramfs,
            masks,
            mounts,
            tmp,
            upper,
            view,
        )
        from sandboxfs.kernel import maker, submount_records, usernamespace  # noqa: F401

    def prepare_base(self):
        """Have the child start from the base namespace, if there is one and the plan allows it."""
        job = self.job
        if job.base_namespace < 0:
            return
        from sandboxfs.process import base

        job.base = base.prepare(job.plan, job.base_namespace)
        if job.base is not None and job.verify:
            self.load_lazy_parts()

    def may_share_memory(self):
        """Whether the child may share our memory: nothing is left to us to do beside it."""
        job = self.job
        return (
            submounts.own_process and job.materials is not None and job.materials.upper is None
            and job.plan.user is None and job.join is None and job.console is None
            and job.go_reader < 0 and not abi.CLONE_NEWTIME & new_flags(job.plan)
            and vfork.is_possible()
        )

    def start_sharing(self):
        """Make the child by vfork: it builds in our memory, and is the payload when we go on.

        Signals wait for that meanwhile, but for SIGKILL.
        """
        job = self.job
        flags = new_flags(job.plan)
        if job.base is not None:
            flags &= ~abi.CLONE_NEWNS
        # Its own copies are the child's, and it notes in our memory that it has closed them.
        clones = job.base.clones if job.base is not None else []
        descriptors = [*job.materials.descriptors, *(clone for clone, _path in clones)]
        interrupt = getsignal(_SIGINT)
        if callable(interrupt):
            set_handler(_SIGINT, SIG_DFL)  # Python's waits for an interpreter that goes on
        watch = _Watch(self.old_mask)
        child = vfork.Child(payload.SharedLife(job, watch.live).step)
        try:
            self.pid = child.start(flags)
        except OSError as error:
            raise refused(error, "clone", flags) from None
        finally:
            watch.close()
            child.close()
        if callable(interrupt):
            set_handler(_SIGINT, interrupt)
        # The child has set them for itself, and Python believes that it was us.
        for number in (_SIGPIPE, _SIGXFSZ):
            set_handler(number, SIG_IGN)
        payload.unseal_interpreter()
        job.materials.descriptors.clear()
        clones.clear()
        close_all(descriptors)

    def go(self):
        """Let the child go on."""
        job = self.job
        if job.go_writer < 0:
            return
        try:
            os.write(job.go_writer, b"1")
        except BrokenPipeError:
            pass  # it has died already: its report and status say why
        os.close(job.go_writer)
        job.go_writer = -1

    # -- life --------------------------------------------------------------------------------

    def supervise(self):
        """Wait for the payload, forwarding signals; returns its exit status."""
        job = self.job
        os.set_blocking(job.report.reader, job.marks is not None and not self.helpers)
        if job.marks is not None and not self.helpers:
            # Who asks for the timing waits for exec: the pipe's end is closed by it.
            self.read_reports()
            job.mark("exec")
        if job.console is not None:
            return job.console.supervise(SIGNALS, self.on_signal)
        status = None
        while status is None:
            status = self.on_signal(sigwaitinfo(SIGNALS).si_signo)
        return status

    def on_signal(self, number):
        """Act on one signal; returns the exit status once there is one."""
        if number == _SIGCHLD:
            return self.reap()
        if number == _SIGTSTP:
            # The payload's session is its own, where the default action of SIGTSTP does
            # nothing: stop it for certain.  Its stopping then stops us.
            self.send(_SIGSTOP)
            return None
        if not self.executed:
            self.read_reports()
        if self.executed or number in (_SIGCONT, _SIGURG, _SIGWINCH):
            self.send(number)
            return None
        return 128 + number  # nobody is inside yet to decide: we end, and the build with us

    def send(self, number):
        # Until it is waited for, nobody else can have its number.
        os.kill(self.pid, number)

    def reap(self):
        """Look who ended or stopped; returns the payload's exit status if it ended."""
        self.reap_helpers()
        pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED)
        if not pid:
            return None
        if os.WIFSTOPPED(status):
            self.stop_too()
            return None
        self.pid = 0
        self.read_reports()
        self.raise_failure()
        code = os.waitstatus_to_exitcode(status)
        return code if code >= 0 else 128 - code

    def reap_helpers(self):
        if not self.helpers:
            return
        for helper in list(self.helpers):
            pid, status = os.waitpid(helper, os.WNOHANG)
            if not pid:
                continue
            self.helpers.discard(helper)
            if status:
                self.read_reports()
                self.raise_failure()
                raise ProcessError("", "wait", f"process {helper}", "a helper process died")
        if not self.helpers:
            self.go()

    def stop_too(self):
        """The payload was stopped: stop as well, so that the caller's shell takes over."""
        console = self.job.console
        if console is not None:
            console.restore()
        os.kill(os.getpid(), _SIGSTOP)
        if console is not None:
            console.enter_raw()
            console.resize()
        self.send(_SIGCONT)

    def read_reports(self):
        for report in (self.job.report, self.device_report):
            while report is not None and (message := report.receive()):
                self.note(message)

    def note(self, message):
        kind, *fields = message
        if kind == "execute":
            self.executed = True
            if self.job.marks is not None:
                pairs = (field.partition("=") for field in fields)
                self.job.marks[:] = [(phase, float(moment)) for phase, _, moment in pairs]
        elif kind == "warning":
            if self.warn is not None:
                self.warn(fields[0])
        elif kind == "failure":
            self.failure = self.failure or fields
        elif kind == "pid":
            self.pid = int(fields[0])
        elif kind == "helper":
            self.helpers.add(int(fields[0]))

    def raise_failure(self):
        if self.failure is not None:
            raise failure(self.failure)

    def close(self):
        """End what is left of the run, on every way out."""
        for pid in (*self.helpers, self.pid):
            if pid:
                os.kill(pid, _SIGKILL)
                os.waitpid(pid, 0)
        job = self.job
        if job.report is not None:
            # Whatever ended the wait: a payload that ran may have written what is to be kept.
            job.report.close_writer()
            self.read_reports()
        for fd in (job.go_writer, job.proc):
            if fd >= 0:
                os.close(fd)
        for report in (job.report, self.device_report):
            if report is not None:
                report.close()
        if job.join is not None:
            job.join.close(job.joins)
        if job.base is not None:
            job.base.close()
        if job.materials is not None:
            job.materials.close()
            job.materials.cleanup(failed=not self.executed)
        if job.upper is not None:
            job.upper.remove(failed=not self.executed)
        fewer_descriptors(job.descriptor_limit)
        if self.old_mask is not None:
            pthread_sigmask(SIG_SETMASK, self.old_mask)
            set_handler(_SIGCHLD, self.old_child_handler)
