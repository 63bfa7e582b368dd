"""New file-system instances through fsopen, fsconfig and fsmount, with the kernel's own words.

Source: Documentation/filesystems/mount_api.rst.
"""


from sandboxfs.kernel import abi
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import fail, fsmount, syscall


def messages(fd):
    """Return what the kernel logged in the context `fd`, errors first, joined by "; "."""
    errors, others = [], []
    while True:
        try:
            # One read, one message: "e text", "w text" or "i text".
            message = os.read(fd, 4096).decode("utf-8", "replace").strip()
        except OSError:  # ENODATA: the log is empty
            break
        if not message:
            break
        kind, _, text = message.partition(" ")
        (errors if kind == "e" else others).append(text)
    return "; ".join(errors + others)


def create(type, settings, attributes):
    """Return the descriptor of a new detached mount.

    type: bytes.  settings: list of (command, key, value, aux), the arguments of fsconfig(2)
    after the context.  attributes: `MOUNT_ATTR_*` of the mount.  An OSError carries `call`
    (``fsconfig size=1q``) and `log`, the kernel's own message.
    """
    context = syscall(abi.SYS_fsopen, type, abi.FSOPEN_CLOEXEC)
    if context < 0:
        fail("fsopen")
    step = None
    try:
        # A build makes some forty of these calls: at once, without a function between.
        for step in settings:
            if syscall(_SYS_fsconfig, context, *step) < 0:
                fail("fsconfig")
        step = _CREATE
        if syscall(_SYS_fsconfig, context, *_CREATE) < 0:
            fail("fsconfig")
        return fsmount(context, attributes)
    except OSError as error:
        error.log = messages(context)
        if error.call == "fsconfig":
            error.call = _named(step)
        raise
    finally:
        os.close(context)


_SYS_fsconfig = abi.SYS_fsconfig
_CREATE = (abi.FSCONFIG_CMD_CREATE, None, None, 0)


def _named(step):
    if step[0] == abi.FSCONFIG_CMD_CREATE:
        return "fsconfig FSCONFIG_CMD_CREATE"
    key = os.fsdecode(step[1])
    value = step[2] if len(step) > 2 else None
    return f"fsconfig {key}" if value is None else f"fsconfig {key}={os.fsdecode(value)}"


def string(key, value):
    """Return the setting of a string parameter (bytes, bytes)."""
    return (abi.FSCONFIG_SET_STRING, key, value, 0)


def flag(key):
    """Return the setting of a parameter without value."""
    return (abi.FSCONFIG_SET_FLAG, key, None, 0)


def descriptor(key, fd):
    """Return the setting of a parameter given by descriptor."""
    return (abi.FSCONFIG_SET_FD, key, None, fd)
