"""Doing what a plan says.  The package can be called: ``sandboxfs.build(plan)``."""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
else:
    ModuleType = type(sys)  # without the import


class _Room(ModuleType):
    def __call__(self, plan):
        """Return the `Root` of a `Plan`: gathered and assembled (`assemble.build`)."""
        from sandboxfs.build.assemble import build

        return build(plan)


sys.modules[__name__].__class__ = _Room
