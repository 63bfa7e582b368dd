"""/dev/console: the pty of `process.terminal`, from the container's own devpts.

Source: config.md, "Process", `terminal`; ioctl_tty(2); the slave is had from the master by
TIOCGPTPEER, never by a path (runc CVE-2025-52565).
"""

import errno
import fcntl
import os
import struct

from sandboxfs.build import devices
from sandboxfs.errors import MountError
from sandboxfs.kernel import abi
from sandboxfs.kernel.syscalls import mount_setattr, open_tree

_TIOCSPTLCK = 0x40045431
_TIOCGPTN = 0x80045430
_TIOCGPTPEER = 0x5441
_TIOCSWINSZ = 0x5414
_OPEN = os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC


def make(assembly, operation):
    """Make the pty and bind its slave on /dev/console; returns (master, slave)."""
    devpts = next(
        (mount for mount, step, _own in assembly.attached
         if getattr(step, "type", None) == "devpts"), None,
    )
    if devpts is None:
        raise MountError(operation.origin, "open", "/dev/pts/ptmx",
                         "a terminal needs a devpts among the mounts", errno.ENODEV)
    master = assembly.own(os.open("ptmx", _OPEN, dir_fd=devpts))
    fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
    (number,) = struct.unpack("i", fcntl.ioctl(master, _TIOCGPTN, struct.pack("i", 0)))
    slave = assembly.own(fcntl.ioctl(master, _TIOCGPTPEER, _OPEN))
    if operation.size:
        fcntl.ioctl(master, _TIOCSWINSZ, struct.pack("HHHH", *operation.size, 0, 0))
    process = assembly.plan.process
    owner, group = assembly.host_ids(process.uid, process.gid)
    # devpts' own gid= (tty) stays; without it the group would be whoever builds.
    os.fchown(slave, owner, -1 if os.fstat(slave).st_gid else group)
    os.fchmod(slave, 0o620)
    node = assembly.own(os.open(str(number), abi.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC,
                                dir_fd=devpts))
    if os.fstat(node).st_rdev != os.fstat(slave).st_rdev:
        raise MountError(operation.origin, "open", f"/dev/pts/{number}",
                         "not the slave of the pty that was made")
    mount = assembly.own(open_tree(node, b"", abi.OPEN_TREE_CLONE | abi.AT_EMPTY_PATH))
    mount_setattr(mount, 0, 0, abi.MS_PRIVATE)
    devices.bind_node(assembly, operation, mount)
    return master, slave
