"""Build the file-system view of a container from an OCI runtime spec.

The names below are loaded when they are first used: ``import sandboxfs`` costs nothing.
"""

import sys

__version__ = "0.1.0"

__all__ = [
    "BootError", "MountError", "Plan", "Pool", "ProcessError", "Root", "Sandbox", "SandboxError",
    "Spec", "SpecError", "UsageError", "__version__", "boot", "build", "errors", "load", "plan",
]

# name → (module, attribute).  `plan` and `build` are rooms that can be called.
_HOMES = {
    "BootError": ("sandboxfs.errors", "BootError"),
    "MountError": ("sandboxfs.errors", "MountError"),
    "Plan": ("sandboxfs.plan.operations", "Plan"),
    "Pool": ("sandboxfs.harness.sandbox", "Pool"),
    "ProcessError": ("sandboxfs.errors", "ProcessError"),
    "Root": ("sandboxfs.build.root", "Root"),
    "Sandbox": ("sandboxfs.harness.sandbox", "Sandbox"),
    "SandboxError": ("sandboxfs.errors", "SandboxError"),
    "Spec": ("sandboxfs.spec.model", "Spec"),
    "SpecError": ("sandboxfs.errors", "SpecError"),
    "UsageError": ("sandboxfs.errors", "UsageError"),
    "boot": ("sandboxfs.boot", None),
    "build": ("sandboxfs.build", None),
    "errors": ("sandboxfs.errors", None),
    "load": ("sandboxfs.spec.load", "load"),
    "plan": ("sandboxfs.plan", None),
}


def __getattr__(name):
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'sandboxfs' has no attribute {name!r}")
    module, attribute = home
    __import__(module)
    value = sys.modules[module]
    if attribute is not None:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
