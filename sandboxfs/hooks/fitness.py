"""Whether hooks can be right under a runtime, by the version that it tells: for who installs them.

What counts is seen when a container starts (`pinned`); here operators are told before.
"""

import re
import subprocess

_VERSION = re.compile(r"^(?P<name>\S+) version v?(?P<major>\d+)\.(?P<minor>\d+)(\.(?P<patch>\d+))?",
                      re.MULTILINE)
# The latest crun that hooks were tried with.
_LATEST_CRUN = (1, 28)
_INSTEAD = "sandboxfs install puts sandboxfs-runtime in front of it instead"


def finding(runtime: "str") -> "str | None":
    """Return why hooks don't serve under the runtime at a path, in words; None where they do."""
    try:
        done = subprocess.run([runtime, "--version"], capture_output=True, text=True, timeout=10,
                              check=False, env={"PATH": "/usr/sbin:/usr/bin"}, cwd="/")
    except (OSError, subprocess.TimeoutExpired) as error:
        return (f"{runtime} doesn't tell its version ({error}): hooks may not serve there; "
                f"{_INSTEAD}")
    found = _VERSION.search(done.stdout)
    if found is None:
        return f"{runtime} is no runtime that hooks were tried with; {_INSTEAD}"
    version = (int(found["major"]), int(found["minor"]), int(found["patch"] or 0))
    words = f"{runtime} is {found['name']} {'.'.join(map(str, version))}"
    if found["name"] == "runc":
        if enters_past_hooks(version):
            return (f"{words}, which enters the rootfs past whatever a hook lays over it: "
                    f"containers won't start; {_INSTEAD}")
        return None
    if found["name"] == "crun" and version[:2] <= _LATEST_CRUN:
        return None
    return f"{words}, which hooks were not tried with; {_INSTEAD}"


def enters_past_hooks(version: "tuple[int, int, int]") -> bool:
    """Return whether runc of a version opens the rootfs before its hooks, and enters that.

    From 1.3.6 and 1.4.3 on (its pull request 5190).
    """
    return (1, 3, 6) <= version < (1, 4, 0) or version >= (1, 4, 3)
