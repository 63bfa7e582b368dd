"""What will be done, as data.  The package can be called: ``sandboxfs.plan(spec)``."""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
else:
    ModuleType = type(sys)  # without the import


class _Room(ModuleType):
    def __call__(self, spec, facts=None):
        """Return the `Plan` of a `Spec` (`from_spec.plan`)."""
        from sandboxfs.plan.from_spec import plan

        return plan(spec, facts)


sys.modules[__name__].__class__ = _Room
