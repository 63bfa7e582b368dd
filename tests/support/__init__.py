"""What tests share.  `from tests.support import …` gives what most of them need."""

import pytest

# Before anything of it is imported: asserts in these files explain themselves, too.
for _name in ("bundles", "commands", "mounts", "namespace", "trees"):
    pytest.register_assert_rewrite(f"tests.support.{_name}")

from tests.support.bundles import Bundle, busybox_rootfs  # noqa: E402
from tests.support.bundles import bundle as make_bundle  # noqa: E402
from tests.support.commands import LAUNCHER, run, run_cli  # noqa: E402
from tests.support.host import CHECKOUT, attach, bind, mount_tmpfs  # noqa: E402
from tests.support.mounts import (  # noqa: E402
    assert_mount,
    flags_of,
    mount_at,
    parsed,
    points,
    table,
)
from tests.support.namespace import (  # noqa: E402
    RANGED,
    UNPRIVILEGED,
    ChildFailed,
    in_namespace,
    reap_orphans,
    set_propagation,
)
from tests.support.skips import needs  # noqa: E402
from tests.support.specs import containerd_spec, default_spec, minimal_spec  # noqa: E402
from tests.support.trees import differences, snapshot, untouched  # noqa: E402

__all__ = [
    "CHECKOUT", "LAUNCHER", "RANGED", "UNPRIVILEGED", "Bundle", "ChildFailed", "assert_mount",
    "attach", "bind", "busybox_rootfs", "containerd_spec", "default_spec", "differences",
    "flags_of", "in_namespace", "make_bundle", "minimal_spec", "mount_at", "mount_tmpfs", "needs",
    "parsed", "points", "reap_orphans", "run", "run_cli", "set_propagation", "snapshot", "table",
    "untouched",
]
