"""What the front starts for `create`, `run` and `restore`: the root, then the real runtime.

The root is built in a mount namespace that this process alone has, over the path of the bundle's
rootfs.  The runtime is executed there with the same words, environment and descriptors, finds our
root at the rootfs's path, and copies it into the container's namespace.  Nothing of it is on the
host, and nothing has to be cleaned up.
"""

import sys

from sandboxfs.errors import HookError, MountError
from sandboxfs.kernel import submounts
from sandboxfs.kernel import system as os
from sandboxfs.kernel.syscalls import fewer_descriptors, more_descriptors, read_file
from sandboxfs.runtime.request import Request, bundle_of, config_of, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

    from sandboxfs.build.root import Root
    from sandboxfs.spec.model import Spec

_INTERRUPTED = 130


def main() -> "NoReturn":
    """Serve the command line that the front passes on; ends in the runtime, or with an error.

    Arguments: the runtime's path, its kind, the operator's file or nothing, which of SIGPIPE and
    SIGXFSZ were ignored (two digits), and the words after the program's name.
    """
    runtime, kind, config, signals, *words = sys.argv[1:]
    request = Request()
    root = None
    try:
        _fill_standard_streams()
        parse(kind, words, request)
        if request.makes:
            # The umask is the caller's, and the runtime's again.
            umask = os.umask(0)
            limit = more_descriptors()
            root = _make_root(request, config or None)
            fewer_descriptors(limit)
            os.umask(umask)
        _execute(runtime, words, signals)
    except KeyboardInterrupt:
        os._exit(_INTERRUPTED)
    except Exception as error:  # noqa: BLE001 - whatever it is, the engine gets one line of it
        from sandboxfs.runtime import report

        status = report.failure(error, request)
        if root is not None:
            root.materials.cleanup(failed=True)
        os._exit(status)


def _fill_standard_streams() -> None:
    """Have no descriptor of ours be one of the standard streams that the caller has closed.

    They are closed again at exec.
    """
    while True:
        fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        if fd > 2:
            os.close(fd)
            return


def _execute(runtime: str, words: "Sequence[str]", signals: str) -> "NoReturn":
    """Become the runtime, as if the caller had executed it."""
    import _signal

    for number, ignored in zip((_signal.SIGPIPE, _signal.SIGXFSZ), signals, strict=True):
        _signal.signal(number, _signal.SIG_IGN if ignored == "1" else _signal.SIG_DFL)
    environment = _Environment(read_file("/proc/self/environ"))
    try:
        os.execve(runtime, [runtime, *words], environment)  # type: ignore[arg-type]
    except OSError as error:
        raise MountError("runtime", "execve", runtime, "", error.errno or 0) from error


class _Environment:
    """The caller's environment, in which a name may stand twice; what execve takes as a mapping.

    The front has marked each entry by a byte in front of it.
    """

    def __init__(self, raw: bytes) -> None:
        entries = [entry[1:].partition(b"=") for entry in raw.split(b"\0") if entry[:1] == b"\1"]
        # A name may begin with the sign; an entry without one is no variable.
        self._entries = [(name, value) for name, sign, value in entries if sign and name]

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, name: bytes) -> bytes:
        return dict(self._entries)[name]

    def keys(self) -> list[bytes]:
        return [name for name, _value in self._entries]

    def values(self) -> list[bytes]:
        return [value for _name, value in self._entries]


# -- what becomes of the container ---------------------------------------------------------


def _make_root(request: Request, config: str | None) -> "Root | None":
    """Build the container's root and attach it; returns it, None where it gets none of ours."""
    from sandboxfs import policy
    from sandboxfs.runtime import document

    rules = policy.load(config)
    bundle = bundle_of(request)
    if document.is_a_build(bundle, request.id):
        return None
    spec = document.load(bundle, config_of(request))
    rules.apply(spec)
    for warning in spec.warnings:
        from sandboxfs.runtime import report

        report.warning(warning, request)
    # Nobody else is in this process.
    submounts.own_process = True
    changed = document.changes(spec, config)
    if spec.overrides.overlay == "none" and changed is None:
        return None
    _refuse_half(spec)
    from sandboxfs.runtime import place

    return place.enter(spec, request, changed)


def _refuse_half(spec: "Spec") -> None:
    """Refuse a container whose root the runtime wouldn't take from our mount namespace."""
    mine = next((each for each in spec.namespaces if each.type == "mount"), None)
    if mine is None:
        raise HookError("linux.namespaces", "", "", "the container has no mount namespace of its "
                        "own: it would run on the host's mounts", hint=_NONE)
    if mine.path is not None:
        raise HookError(f"linux.namespaces[{mine.index}]", "", mine.path, "a mount namespace that "
                        "is joined has mounts of its own: no root of ours is in it", hint=_NONE)


_NONE = "the annotation dev.sandboxfs.overlay=none has the runtime start it without us"
