"""``sandboxfs uninstall``: take a registration back."""

import os

from sandboxfs import engines
from sandboxfs.cli import report
from sandboxfs.cli.install import add_place, place_of
from sandboxfs.engines import Wish, record
from sandboxfs.errors import SandboxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace


def add_arguments(parser: "ArgumentParser") -> None:
    """Add this command's arguments to an argparse parser."""
    add_place(parser)


def main(arguments: "Namespace") -> int:
    """Do it; returns the exit status."""
    perform(Wish(arguments.engine, place_of(arguments), arguments.dest,
                 engine_config=arguments.engine_config),
            arguments.force, arguments.log_format == "json")
    return 0


def perform(wish: Wish, force: bool, as_json: bool) -> None:
    """Remove what was written, unless somebody would miss it.

    SandboxError: it is in use, or was changed; nothing is removed then.
    """
    manifest = wish.recorded
    if not manifest.digests:
        print(f"nothing is installed in {os.path.dirname(manifest.path)}")
        return
    # With --force, too, so that nobody has to find out by himself.
    try:
        used = [*engines.users(wish)]
    except SandboxError as error:
        if not force:
            raise
        used = [f"who uses it can't be told: {error.line()}"]
    for text in used:
        report.warning(text, as_json)
    if used and not force:
        raise SandboxError("", "uninstall", wish.engine, "is in use; nothing was removed",
                           hint="stop what is named above, or --force")
    for path in record.uninstall(manifest):
        print(f"{'restored' if os.path.exists(path) else 'removed':<9} {path}")
    if wish.engine in ("containerd", "cri-o", "docker") and not wish.hooks:
        print(f"\nRestart {wish.engine}: it still knows the runtime.")
