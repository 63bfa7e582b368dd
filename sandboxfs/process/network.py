"""Kernel settings and network devices of new namespaces: sysctl, moved network devices.

Loaded only for plans that need one of them; pyroute2 only for `linux.netDevices`.

Sources: config-linux.md ("Sysctl", "Network Devices"), proc_sys(5).
"""

import errno

from sandboxfs.errors import MountError, ProcessError
from sandboxfs.kernel import abi
from sandboxfs.kernel import system as os
from sandboxfs.kernel.resolve import OpenHow, open_in_root
from sandboxfs.kernel.syscalls import setns

_SETTING = OpenHow(
    os.O_WRONLY | os.O_CLOEXEC, 0,
    abi.RESOLVE_NO_XDEV | abi.RESOLVE_NO_SYMLINKS | abi.RESOLVE_BENEATH,
)


def encoded_sysctls(settings):
    """Return `linux.sysctl` as a list of (name, path below /proc/sys as bytes, value as bytes)."""
    from sandboxfs.spec.check_settings import sysctl_path

    return [
        (name, os.fsencode(sysctl_path(name)), os.fsencode(str(value)))
        for name, value in settings.items()
    ]


def write_sysctls(job):
    """Write `linux.sysctl` through the caller's procfs, in this process's namespaces.

    The kernel looks settings up in the namespaces of who opens them.  Nothing on the way may
    be a symlink or another mount.
    """
    for name, path, value in job.sysctl:
        try:
            _write(job.proc, name, path, value)
        except MountError as error:
            if error.errno != errno.EACCES or not _as_owner(job, job.proc, name, path, value):
                raise


def _as_owner(job, root, name, path, value):
    """Write as root of the container's user namespace; False where there is none.

    Settings of an ipc namespace belong to that user, and privileges don't count for them.
    """
    user = job.plan.user
    if user is None or not user.outside or not user.root_uid or not user.root_gid:
        return False
    os.setegid(user.root_gid)
    os.seteuid(user.root_uid)
    try:
        _write(root, name, path, value)
    finally:
        os.seteuid(0)
        os.setegid(0)
    return True


def _write(root, name, path, value):
    origin = f"linux.sysctl.{name}"
    shown = f"/proc/sys/{os.fsdecode(path)}"
    try:
        fd = open_in_root(root, b"sys/" + path, _SETTING)
    except OSError as error:
        hint = None
        if error.errno == errno.EXDEV:
            hint = "something that is not procfs is mounted over /proc/sys where we run"
        if error.errno in (errno.EACCES, errno.EPERM):
            hint = "only settings of the container's own namespaces can be written"
        raise MountError(origin, "open", shown, "", error.errno, hint) from None
    try:
        os.write(fd, value)
    except OSError as error:
        text = f"the kernel refuses {os.fsdecode(value)!r}"
        raise MountError(origin, "write", shown, text, error.errno) from None
    finally:
        os.close(fd)


# -- linux.netDevices, in a helper process of the parent -----------------------------------


def move_devices(job, pid):
    """Move `linux.netDevices` into the network namespace of process `pid`, and exit.

    Their addresses, which the kernel drops with the move, are given to them again.
    """
    from pyroute2 import IPRoute

    devices = job.plan.spec.net_devices
    pidfd = os.pidfd_open(pid)
    found = {}
    with IPRoute() as here:
        for name in devices:
            found[name] = _described(here, name)
        for name, (index, _addresses) in found.items():
            _step(name, "move", here.link, "set", index=index, net_ns_pid=pid)
    setns(pidfd, abi.CLONE_NEWNET)
    with IPRoute() as there:
        for name, (_index, addresses) in found.items():
            _arrive(there, name, devices[name] or name, addresses)
    os._exit(0)


def _described(route, name):
    """Return (index, permanent global addresses) of the device `name`."""
    indexes = route.link_lookup(ifname=name)
    if not indexes:
        raise ProcessError(f"linux.netDevices.{name}", "move", name, "no such network device", 19)
    addresses = []
    for message in route.get_addr(index=indexes[0]):
        # config-linux.md: global scope only (0), and none that will expire.
        if message["scope"] == 0 and message["flags"] & 0x80:
            addresses.append((message.get_attr("IFA_ADDRESS"), message["prefixlen"],
                              message.get_attr("IFA_LOCAL")))
    return indexes[0], addresses


def _arrive(route, name, new_name, addresses):
    indexes = route.link_lookup(ifname=name)
    if not indexes:
        raise ProcessError(f"linux.netDevices.{name}", "move", name, "did not arrive", 19)
    index = indexes[0]
    if new_name != name:
        _step(name, "rename", route.link, "set", index=index, ifname=new_name)
    for address, length, local in addresses:
        _step(name, "address", route.addr, "add", index=index, address=local or address,
              prefixlen=length)
    _step(name, "up", route.link, "set", index=index, state="up")


def _step(name, operation, call, *arguments, **keywords):
    from pyroute2 import NetlinkError

    try:
        call(*arguments, **keywords)
    except NetlinkError as error:
        raise ProcessError(
            f"linux.netDevices.{name}", operation, name, "", error.code
        ) from None
