"""/tmp: a tmpfs where nothing would be hidden."""

import _stat as stat

from sandboxfs.kernel import abi, fscontext, resolve
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import mount_id

_NO_ESCAPE = abi.MOUNT_ATTR_NOSUID | abi.MOUNT_ATTR_NODEV


def tmp(assembly, operation):
    why = None if operation.always else tmp_is_taken(assembly)
    if why is not None:
        assembly.outcomes.append((operation, "skipped", why))
        return
    if not operation.always and assembly.tmp_target >= 0:
        target = assembly.tmp_target
    else:
        target = assembly.own(assembly.maker.directory(b"/tmp"))
    settings = [fscontext.string(b"source", b"tmpfs"), fscontext.string(b"mode", b"1777")]
    if assembly.owner is not None:
        # The container's root, which the host's root is to be nobody for.
        settings += [fscontext.string(key, b"%d" % number)
                     for key, number in zip((b"uid", b"gid"), assembly.owner, strict=True)]
    mount = assembly.own(fscontext.create(b"tmpfs", settings, _NO_ESCAPE))
    assembly.attach(mount, target, operation, True)
    assembly.outcomes.append((operation, "tmpfs", ""))


def tmp_is_taken(assembly):
    """Return why /tmp is left alone, or None."""
    fd = resolve.find_in_root(assembly.root, b"/tmp", resolve.ANY_NO_FOLLOW)
    if fd is None:
        return None
    assembly.own(fd)
    mode = os.fstat(fd).st_mode
    if stat.S_ISLNK(mode):
        return "a symlink"
    if not stat.S_ISDIR(mode):
        return "not a directory"
    if mount_id(fd)[1]:
        return "a mount is there"
    content = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
    try:
        if os.listdir(content):
            return "not empty"
    finally:
        os.close(content)
    assembly.tmp_target = fd
    return None
