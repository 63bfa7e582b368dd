"""The child of a run by fork, where it can't share the parent's memory, and helpers beside it.

`parent` is the `_Parent` of `process.run`; its `pid` is the payload's process when these return.

Sources: clone(2), user_namespaces(7), config-linux.md ("Network Devices").
"""

from sandboxfs.errors import ProcessError
from sandboxfs.kernel import abi
from sandboxfs.kernel.syscalls import prctl
from sandboxfs.process import payload
from sandboxfs.process.namespaces import fork_into, new_flags
from sandboxfs.process.report import Report


def start(parent):
    """Make the child, in the way that the plan's user namespace asks for; OSError."""
    user = parent.job.plan.user
    if user is None:
        _start_plain(parent)
    elif user.outside:
        _start_outside(parent)
    else:
        _start_inside(parent)


def _start_plain(parent):
    """No user namespace: the child is made at once."""
    job, flags = parent.job, new_flags(parent.job.plan)
    if job.base is not None:
        flags &= ~abi.CLONE_NEWNS
    if job.join is None:
        _fork(parent, flags, _plain)
        return
    offsets = job.plan.spec.time_offsets
    if offsets:
        flags &= ~abi.CLONE_NEWTIME
    # Who lives in a joined pid namespace may not look at the child, from its first moment.
    dumpable = prctl(payload.PR_GET_DUMPABLE)
    prctl(payload.PR_SET_DUMPABLE, 0)
    try:
        with job.join.ForChildren(job.joins, offsets) as children:
            parent.pid = fork_into(flags)
            if parent.pid == 0:
                children.in_child()
                payload.main(job, _plain)
    finally:
        prctl(payload.PR_SET_DUMPABLE, dumpable)


def _plain(job):
    """The child of a run without user namespace: join, build, become, execute."""
    payload.live_inside(job)
    payload.execute(job)


def _start_outside(parent):
    """A user namespace, and we have the host's privileges: a helper makes the child."""
    from sandboxfs.process import idmap

    _fork(parent, 0, idmap.outside)
    parent.helpers.add(parent.pid)
    parent.pid = 0
    _await_pid(parent)


def _start_inside(parent):
    """Without privileges: the child builds for itself; we write its maps."""
    from sandboxfs.process import idmap

    job, user = parent.job, parent.job.plan.user
    through_helper = user.path is not None or job.plan.spec.time_offsets or any(
        entry.type in ("pid", "time") for entry in job.joins
    )
    if not through_helper:
        _fork(parent, abi.CLONE_NEWUSER | new_flags(job.plan), idmap.inside)
        job.idmap.write(job.proc, parent.pid)
        return
    _fork(parent, abi.CLONE_NEWUSER if user.path is None else 0, idmap.between)
    helper, parent.pid = parent.pid, 0
    parent.helpers.add(helper)
    if user.path is None:
        job.idmap.write(job.proc, helper)
        parent.go()
    _await_pid(parent)


def _fork(parent, flags, body):
    parent.pid = fork_into(flags)
    if parent.pid == 0:
        payload.main(parent.job, body)


def _await_pid(parent):
    """Wait until a helper has made the payload's process."""
    report = parent.job.report
    report.close_writer()  # so that a helper's death ends the wait
    while not parent.pid:
        message = report.receive()
        if not message:
            raise ProcessError("", "clone3", "", "the helper process died")
        parent.note(message)
        parent.raise_failure()


def start_moving_devices(parent):
    """Move `linux.netDevices` by a process of its own, since it ends in their namespace."""
    from sandboxfs.process import network

    payload_pid, job = parent.pid, parent.job
    parent.device_report = Report()
    helper = fork_into(0)
    if helper == 0:
        job.report = parent.device_report
        job.step = ("linux.netDevices", "move", "")
        payload.main(job, lambda job: network.move_devices(job, payload_pid))
    parent.helpers.add(helper)
    parent.device_report.close_writer()
