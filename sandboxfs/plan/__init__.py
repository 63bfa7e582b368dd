"""What will be done, as data.  The package can be called: ``sandboxfs.plan(spec)``."""

import sys


class _Room(type(sys)):
    def __call__(self, spec, facts=None):
        """Return the `Plan` of a `Spec` (`from_spec.plan`)."""
        from sandboxfs.plan.from_spec import plan

        return plan(spec, facts)


sys.modules[__name__].__class__ = _Room
