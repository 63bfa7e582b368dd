"""The children of the warm process: each waits for one command, and becomes it.

Most plans need nothing between the warm process and the payload: its child is made in its new
namespaces, and is the payload.  It waits and builds in the memory of another one, its host, a
forked copy of the warm process that has nothing else to do (`kernel.vfork`): so execution leaves
a copied interpreter behind instead of taking it apart first.  When one has executed, its host has
the next one: nothing is forked for it, and the pages that it writes to have been copied.  For a
user namespace, joined namespaces, devices to move, or an upper that has to be removed, the child
is `process.run`'s parent, and the payload its child.
"""

import gc
from _signal import pidfd_send_signal
from fcntl import F_DUPFD_CLOEXEC, fcntl, ioctl
from select import POLLIN, poll
from time import sleep

from sandboxfs.build import (  # noqa: F401 - loaded before there is a root to load from
    assemble,
    calls,
    cgroups,
    console,
    copyup,
    devices,
    gather,
    images,
    masks,
    mounts,
    preparation,
    tmp,
    upper,
    view,
    writable,
)
from sandboxfs.build.compiled import compile_once
from sandboxfs.build.usual import Usual
from sandboxfs.errors import ProcessError, SandboxError
from sandboxfs.harness import wire
from sandboxfs.harness.ahead import (
    has_directories,
    leaves_no_trace,
    may_be_built_ahead,
    needs_parent,
)
from sandboxfs.kernel import (  # noqa: F401
    abi,
    mountinfo,
    submount_records,
    usernamespace,
    vfork,
)
from sandboxfs.kernel import system as os
from sandboxfs.kernel.submount_watch import Look, Watch
from sandboxfs.kernel.syscalls import close_range, unshare
from sandboxfs.process import base, credentials, network, payload, program  # noqa: F401
from sandboxfs.process.namespaces import fork_into, loopback_up, new_flags
from sandboxfs.process.report import Report
from sandboxfs.process.run import run

_SIGKILL = 9
_LAST_DESCRIPTOR = 0xFFFFFFFF
# What is done ahead begins when this long nothing has come: it isn't to slow down what came before.
_IDLE_MILLISECONDS = 2
# How long a host rests when its child has executed: what it takes down would slow that down.
_HOST_SECONDS = 0.005
# Its own descriptors are above: a payload's limit leaves the low numbers to that.
_ROOM = 1000
_PIDFD_GET_MNT_NAMESPACE = 0xFF03  # linux/pidfd.h; Linux 6.11


class BaseNamespace:
    """The base namespace that the warm process keeps, made when first needed."""

    __slots__ = ("number",)

    def __init__(self):
        self.number = None

    def fd(self):
        """Return its descriptor, or -1 where none can be made: then it goes the plain way."""
        if self.number is None:
            try:
                self.number = base.create()
            except (SandboxError, OSError):
                self.number = -1
        return self.number


class _NoCommand(Exception):
    """Whoever would have sent the command is gone."""


class Template:
    """A plan, prepared for the children that will execute it.

    supervised: the child is the payload's parent.  hosted: the child lives in a host's memory.
    ahead: its root is built before it is asked for.
    """

    def __init__(self, plan, namespace, sweeper, descriptor_limit, ahead):
        if plan.process is not None and plan.process.terminal:
            raise ProcessError("process.terminal", "", "", "a sandbox has no terminal of its own",
                               hint="leave it out of the document, or use run")
        self.plan = plan
        self.supervised = needs_parent(plan)
        self.hosted = not self.supervised and vfork.is_possible()
        self.ahead = ahead and may_be_built_ahead(plan)
        self.namespace = self.null = -1
        self.usual = None
        # A host's own descriptors, and what it knows of the lower.
        self.lasting: set[int] = set()
        self.watch = Watch()
        # What is taken along into the base namespace, and how often the watch had begun by then.
        self.taken, self.taken_at = None, 0
        self.is_seasoned = self.is_batch = False
        user = plan.user
        # An image's device has to be free again when the run is over.
        plain = self.supervised or self.hosted or not has_directories(plan)
        self.sweeper = None if plain else sweeper
        # If the child is killed meanwhile, its pid namespace takes that one's child along.
        self.may_rehearse = (
            self.hosted and plan.new_namespace("pid") and leaves_no_trace(plan)
        )
        self.base = namespace.fd() if user is None or user.outside else -1
        self.job = payload.prepare(plan)
        self.job.descriptor_limit = descriptor_limit
        self.own_words = (
            self.job.arguments, self.job.environment, self.job.candidates, self.job.cwd)
        self.has_loopback = self.job.loopback
        if not self.supervised and (self.job.sysctl or self.job.oom_score_adj is not None):
            self.job.proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.flags = 0 if self.supervised else new_flags(plan) & ~abi.CLONE_NEWNS

    def close(self):
        """Close what was opened for the plan."""
        if self.job.proc >= 0:
            os.close(self.job.proc)
            self.job.proc = -1

    def connections(self):
        """Return (our end of a new child's socket, the child's end, its report)."""
        report = self.job.report = Report()
        try:
            return (*wire.pair(), report)
        except BaseException:
            report.close()
            raise

    def fork(self, control=None):
        """Fork a child that waits, or its host; returns (pid, our end of its socket, its report).

        control: a host's end of its socket, which stays ours to close.  The pid is the host's; the
        child tells its own.
        """
        ours, theirs, report = self.connections()
        try:
            pid = fork_into(0 if self.hosted else self.flags)
        except BaseException:
            theirs.close()
            ours.close()
            report.close()
            raise
        if pid == 0:
            payload.main(self.job, lambda job: self.begin(theirs, control))
        theirs.close()
        report.close_writer()
        os.set_blocking(report.reader, False)
        return pid, ours, report

    def hand_over(self, control):
        """Have a host that rests make the next child; returns (our end, its report) as `fork`."""
        ours, theirs, report = self.connections()
        try:
            wire.send(control, ("live",), [theirs.fileno(), report.writer])
        except BaseException:
            ours.close()
            report.close()
            raise
        finally:
            theirs.close()
        report.close_writer()
        os.set_blocking(report.reader, False)
        return ours, report

    # -- in the child --------------------------------------------------------------------

    def begin(self, socket, control):
        """Live, or be the host of those that do."""
        job = self.job
        payload.begin(job)
        kept = {job.report.writer, socket.fileno(), self.base, job.proc}
        if self.sweeper is not None:
            kept.add(self.sweeper.socket.fileno())
        if control is not None:
            kept.add(control.fileno())
        keep_only(kept)
        if self.hosted:
            self.host(socket, control)
        try:
            if self.supervised:
                self.supervise(socket)
            self.live(socket)
        except _NoCommand:
            os._exit(0)
        payload.start(job)

    def host(self, socket, control):
        """Have one after the other live in our memory that is a child of the warm process as well.

        Our descriptors are its own until it executes: the last references to its mounts are ours
        then, and taking them down takes longer than a short command, which isn't to wait for it.
        One that fails leaves nothing behind for another one: we end with it.
        """
        control = self.settle(control)
        child: vfork.Child = vfork.Child(None)
        while True:
            child.step = payload.SharedLife(self.job, self.life(child, socket)).step
            child.start(self.flags | abi.CLONE_PARENT | abi.CLONE_FILES)
            try:
                if type(child.following) is int:
                    os._exit(0)
                self.let_go()
                if control is None:
                    os._exit(0)
                socket = self.rest(socket, control)
            except BaseException:  # noqa: BLE001 - whatever it is, the next one is forked
                os._exit(0)

    def life(self, child, socket):
        """Return what a child does until it executes."""

        def live(_job):
            payload.prctl(payload.PR_SET_PDEATHSIG, _SIGKILL)
            if self.is_batch:
                os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
            wire.send(socket, ("pid", child.pid.value))
            try:
                self.live(socket)
            except _NoCommand:
                return 0
            return None

        return live

    def settle(self, control):
        """Move what a host keeps for all its children out of their way.

        Returns its socket, or None where the limit doesn't allow so many descriptors: then it has
        one child only.  To grow a table that is shared, the kernel waits until nobody can be
        looking at it, 10 ms: this makes room, too.
        """
        try:
            self.null = moved_up(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))
            self.base = moved_up(self.base)
            self.job.proc = moved_up(self.job.proc)
            number = moved_up(control.fileno())
        except OSError:
            return None
        control.detach()
        # Lives leave circles behind; what there is by now needn't be searched for them.
        gc.freeze()
        self.yield_to_others()
        self.lasting = {number, self.null, self.base, self.job.proc}
        return wire.adopt(number)

    def yield_to_others(self):
        """Don't interrupt a child that executes: from then on this process may go on, too.

        The kernel lets who is woken in SCHED_BATCH wait for who runs (sched(7)).
        """
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
            self.is_batch = True

    def let_go(self):
        """Leave the command alone for a moment, after closing its streams."""
        for fd in (0, 1, 2):
            # Who reads them waits for their end.  What we open later isn't to be among these.
            if self.null >= 0:
                os.dup2(self.null, fd)
            else:
                os.close(fd)
        sleep(_HOST_SECONDS)

    def rest(self, socket, control):
        """Drop what a child has left that executed: mounts, descriptors, what we know of it.

        Returns the next one's socket, when one is wanted; ends this process if none will be.
        """
        job = self.job
        socket.detach()
        job.materials = job.base = None
        job.credentials.bounded = False
        job.arguments, job.environment, job.candidates, job.cwd = self.own_words
        job.loopback, job.has_session = self.has_loopback, False
        job.step = ("", "", "")
        self.namespace = -1
        self.usual = self.taken = None
        for prepared in self.plan.compiled.calls if self.plan.compiled is not None else ():
            prepared.take()  # the next one may have the same pid in its namespace
        self.is_seasoned = True
        payload.unseal_interpreter()
        gc.collect()
        keep_only(self.lasting | self.watch.descriptors())
        wire.send(control, ("rested",))
        message, descriptors, _sender = wire.receive(control)
        if message is None:
            os._exit(0)
        job.report.writer = descriptors[1]
        return wire.adopt(descriptors[0])

    def live(self, socket):
        """Wait for the command, and do everything that comes before it is executed."""
        job = self.job
        payload.set_oom_score(job)
        if self.ahead:
            self.wait_in_root(socket)
            return
        if _nothing_comes(socket, _IDLE_MILLISECONDS):
            job.credentials.bound(job)
            if self.may_rehearse and not self.is_seasoned:
                self.rehearse(socket)
            self.watch.take_over()
            self.go_ahead(self.watch)
            self.set_up_ahead()
        command = wait(socket)
        _dress(job, *command)
        self.build(socket)
        if self.sweeper is not None and job.materials is not None:
            self.sweeper.take(job.materials.descriptors)
            job.materials.close()
        payload.become(job)

    def wait_in_root(self, socket):
        """Wait for the command with everything done but its execution."""
        job = self.job
        _nothing_comes(socket, _IDLE_MILLISECONDS)
        self.build(socket)
        payload.become(job)
        # The payload's limit may leave no room beside what the build still holds.
        kept = {job.report.writer, socket.fileno(), self.namespace}
        keep_only(kept | self.lasting | self.watch.descriptors())
        _rehearse_start(job)
        wire.send(socket, ("ready",))
        command = wait(socket)
        _dress(job, *command)
        if command[2] is not None:
            payload.change_directory(job, True)

    def rehearse(self, socket):
        """Build the root once and enter it, while nobody waits, in a child that ends then.

        Every page that is written to for the first time after the fork is copied then, which takes
        as long as the build; that child shares our memory.  What is wrong is found again, and
        said, when it counts.
        """
        job = self.job

        def live(_errno):
            payload.prctl(payload.PR_SET_PDEATHSIG, _SIGKILL)
            try:
                self.go_ahead(Look())
                self.build(socket)
                payload.become(job)
                _rehearse_start(job)
            except Exception:  # noqa: BLE001 - it is no more than an exercise
                pass
            return 0

        child = vfork.Child(live)
        try:
            os.waitpid(child.start(), 0)
        finally:
            child.close()
            payload.unseal_interpreter()
            job.materials = job.base = None
            self.usual = self.taken = None

    def go_ahead(self, watch):
        """Make the file systems that need nothing of the host, while nobody waits."""
        try:
            compile_once(self.plan)
            usual = Usual(self.plan)
            if usual.entries is None:
                preparation.go_ahead(self.plan)
            else:
                self.usual = usual
                usual.go_ahead(watch)
                if self.base >= 0:
                    self.taken, self.taken_at = base.prepare(self.plan, self.base), watch.begun
        except OSError:
            pass  # it is done again, and said, when it counts

    def set_up_ahead(self):
        """Set up what is this process's own already: its session, `lo` of its new network."""
        job = self.job
        try:
            os.setsid()
            job.has_session = True
            if job.loopback:
                loopback_up()
                job.loopback = False
        except OSError:
            pass  # the same

    def take_along(self, watched):
        """Return the `Base` of this build.  watched: no mount has changed since the last look."""
        taken, self.taken = self.taken, None
        if taken is not None and watched and self.taken_at == self.watch.begun:
            return taken
        if taken is not None:
            taken.close()
        return base.prepare(self.plan, self.base)

    def build(self, socket):
        """Build the root in a mount namespace of this process's own, and pivot into it."""
        job = self.job
        job.step = ("", "gather", "")
        root = self.build_at_once()
        if root is None:
            job.materials = gather.gather(self.plan)
        if self.base >= 0:
            # What is built at once has looked whether mounts have changed.
            job.base = self.take_along(root is not None)
        if job.base is None or not payload.enter_base(job):
            job.step = ("linux.namespaces", "unshare", "mount")
            unshare(abi.CLONE_NEWNS)
        self.keep_namespace(socket)
        payload.build(job, root)

    def build_at_once(self):
        """Return the root of a usual plan, or None: it is gathered and assembled."""
        if self.usual is None:
            return None
        opened = []
        umask = os.umask(0)
        try:
            if self.usual.build(opened):
                return self.usual.root(self.plan, opened)
        finally:
            os.umask(umask)
        for fd in opened:
            os.close(fd)
        return None

    def keep_namespace(self, socket):
        """Have our host, or the warm process, hold our mount namespace: our end isn't its end."""
        if not self.hosted and self.sweeper is None:
            return
        try:
            namespace = own_mount_namespace()
        except OSError:
            return  # no procfs: the namespace goes with this process
        if self.hosted:
            self.namespace = namespace
            return
        try:
            wire.send(socket, ("namespace",), [namespace])
        finally:
            os.close(namespace)

    def supervise(self, socket):
        """Be the parent of the payload."""
        process = self.plan.process
        arguments, environment, directory = wait(socket)
        process.args = [os.fsdecode(word) for word in arguments]
        if environment is not None:
            process.env = [os.fsdecode(entry) for entry in environment]
        if directory is not None:
            process.cwd = os.fsdecode(directory)
        os._exit(run(self.plan, base=self.base))


def wait(socket):
    """Wait for a command: returns (arguments, environment or None, directory or None).

    Its descriptors have become 0, 1 and 2 then.  Raises _NoCommand.
    """
    message, descriptors, _sender = wire.receive(socket)
    if message is None:
        raise _NoCommand
    for number, fd in enumerate(descriptors):
        os.dup2(fd, number)
        os.close(fd)
    return message


def _rehearse_start(job):
    """Go through what a command makes necessary, so that its memory is ours by then."""
    ours, theirs = wire.pair()
    wire.send(ours, (job.arguments, [b"A=B"], b"/"))
    arguments, environment, _directory = wire.receive(theirs)[0]
    ours.close()
    theirs.close()
    payload.environment_of(environment)
    vfork.Program(arguments, job.environment)
    payload.check_directory(job)
    try:
        next(payload.attempts_of(job))
    except SandboxError:
        pass  # another command will come


def _dress(job, arguments, environment, directory):
    """Put a command into the job."""
    job.arguments = arguments
    if environment is not None:
        job.environment = payload.environment_of(environment)
    job.candidates = payload.candidates_of(arguments[0], job.environment)
    if directory is not None:
        job.cwd = directory


def own_mount_namespace():
    """Return a descriptor of this process's mount namespace; OSError."""
    try:
        pidfd = os.pidfd_open(os.getpid())
        try:
            return ioctl(pidfd, _PIDFD_GET_MNT_NAMESPACE)
        finally:
            os.close(pidfd)
    except OSError:
        # By its path, which takes longer.
        return os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)


def keep_only(descriptors):
    """Close everything above standard error but `descriptors`."""
    first = 3
    for fd in sorted(descriptors):
        if fd > first:
            close_range(first, fd - 1, 0)
        first = max(first, fd + 1)
    close_range(first, _LAST_DESCRIPTOR, 0)


def moved_up(fd):
    """Move a descriptor, or -1, to a number that no payload's limit is about; OSError."""
    if fd < 0:
        return fd
    moved = fcntl(fd, F_DUPFD_CLOEXEC, _ROOM)
    os.close(fd)
    return moved


def _nothing_comes(socket, milliseconds):
    """Wait so long for a command to come; whether none did."""
    waiting = poll()
    waiting.register(socket.fileno(), POLLIN)
    return not waiting.poll(milliseconds)


def children_of(pid):
    """Return the pids of the children of a process of one thread; [] without a procfs."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", "rb", buffering=0) as file:
            return [int(number) for number in file.read(65536).split()]
    except OSError:
        return []


def kill_children(pid):
    """Kill the children of a process of ours; whether there were any."""
    children = children_of(pid)
    for each in children:
        try:
            pidfd = os.pidfd_open(each)
        except ProcessLookupError:
            continue
        try:
            pidfd_send_signal(pidfd, _SIGKILL)
        except ProcessLookupError:
            pass
        finally:
            os.close(pidfd)
    return bool(children)
