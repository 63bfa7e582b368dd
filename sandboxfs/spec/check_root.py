"""What the hot path checks of `root` and `annotations`: they decide what a root is made of."""

from sandboxfs.errors import SpecError
from sandboxfs.spec.model import Overrides
from sandboxfs.spec.values import checked, flag, missing, object_of, string_map, wrong_path


def read(document, found, problems):
    """Read `root`."""
    root = object_of(document, "root", "root", "")
    if root is None:
        return
    found.root_path = checked(root, "path", "/root", wrong_path)
    if found.root_path is None:
        missing("/root/path")
    found.root_readonly = flag(root, "readonly", "/root")


def read_annotations(document, found, bundle, problems):
    """Read the annotations of ours; bundle: where relative paths start."""
    found.overrides = Overrides()
    try:
        values = object_of(document, "annotations", None, "")
        if not values:
            return
        found.annotations = string_map(values, "/annotations")
    except SpecError as error:
        if problems is None:
            raise
        problems.append(error)
        return
    from sandboxfs.spec import annotations

    found.overrides = annotations.overrides(values, bundle, found.warnings, problems)
    found.hints = annotations.hints(values, found.warnings, problems)
