"""The table of behaviours: what holds on every engine and every kernel.

The behaviours themselves lie in the modules behaviours_*.py, by subject; importing this one
registers them all.  behaviours_table.py says how one is written and run.
"""

from tests.kernel import (  # noqa: F401  # importing registers
    behaviours_after,
    behaviours_binds,
    behaviours_cgroup,
    behaviours_data,
    behaviours_errors,
    behaviours_filesystems,
    behaviours_images,
    behaviours_kernel,
    behaviours_mountpoints,
    behaviours_options,
    behaviours_overlay,
    behaviours_readonly,
    behaviours_root,
    behaviours_view,
)
from tests.kernel.behaviours_table import (
    ATTACHED,
    DETACHED,
    ENGINES,
    SKIPPED,
    Case,
    cases,
    detached_works,
    engines_here,
    run_case,
)

__all__ = [
    "ATTACHED", "DETACHED", "ENGINES", "SKIPPED", "Case", "cases", "detached_works",
    "engines_here", "run_case",
]
