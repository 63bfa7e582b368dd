"""Doing what a plan says.  The package can be called: ``sandboxfs.build(plan)``."""

import sys


class _Room(type(sys)):
    def __call__(self, plan):
        """Return the `Root` of a `Plan`: gathered and assembled (`assemble.build`)."""
        from sandboxfs.build.assemble import build

        return build(plan)


sys.modules[__name__].__class__ = _Room
