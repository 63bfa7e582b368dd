"""``sandboxfs switch-root``: leave an initramfs, or make it a root like any other.

    switch-root [OPTION…] NEWROOT [INIT [ARG…]]
    switch-root MODE [OPTION…] [INIT [ARG…]]

Everything after INIT belongs to it, also what looks like an option.
"""

import argparse

# Loaded now: after the switch there is nothing left to load from.
import json  # noqa: F401
import traceback  # noqa: F401

from sandboxfs.boot import init, leave
from sandboxfs.cli import report
from sandboxfs.errors import SandboxError, UsageError

# Option → the modes it belongs to; NEWROOT is the mode without a word.
_BELONGS = {
    "keep": ("NEWROOT",), "preserve": ("NEWROOT",), "size": ("--to-tmpfs",),
    "overlay": ("--image",), "ephemeral": ("--image",), "ephemeral_file": ("--image",),
}


def add_arguments(parser):
    """Add this command's arguments to an argparse parser."""
    parser.usage = "sandboxfs switch-root [OPTION…] {NEWROOT | MODE} [INIT [ARG…]]"
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--to-tmpfs", action="store_true",
        help="move the initramfs's files to a tmpfs, a root like any other",
    )
    mode.add_argument(
        "--image", metavar="IMAGE",
        help="an EROFS or squashfs image (a file or block device) becomes the root, immutable",
    )
    mode.add_argument(
        "--user-root", action="store_true",
        help="stay in the initramfs, with a root that pivot_root can leave; nothing is copied",
    )
    parser.add_argument(
        "--keep", action="store_true", help="don't delete what the old root holds",
    )
    parser.add_argument(
        "--preserve", action="append", default=[], metavar="PATH",
        help="don't delete PATH, a directory with all it holds; repeatable",
    )
    parser.add_argument(
        "--size", metavar="SIZE",
        help="of the tmpfs: bytes, or with K M G T, or N%% of memory; half of it by default",
    )
    parser.add_argument(
        "--overlay", choices=("none", "tmpfs"),
        help="of an image: none, the default, or a tmpfs that takes what is written",
    )
    parser.add_argument(
        "--ephemeral", metavar="DIR",
        help="directory of an image that gets a tmpfs for the files below; /ephemeral by default",
    )
    parser.add_argument(
        "--ephemeral-file", action="append", default=[], metavar="PATH",
        help="file of an image to redirect there, besides /etc/hosts, /etc/machine-id and "
        "/etc/resolv.conf; repeatable",
    )
    parser.add_argument(
        "--force", action="store_true", help="even if this is not process 1",
    )
    parser.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="[NEWROOT] [INIT [ARG…]]",
        help="a mount to switch to, unless a mode is given; the program that becomes the init, "
        "/sbin/init by default, and its arguments, whatever they look like",
    )
    parser.set_defaults(parser=parser)


def main(arguments):
    """Switch, and become INIT; returns an exit status only where that fails."""
    how = ["--log-format", arguments.log_format, *(["--debug"] if arguments.debug else [])]
    try:
        mode, new_root, command = _understood(arguments)
        _start(arguments, mode, new_root, command)
    except SandboxError as error:
        # Not by __main__: it would take INIT's arguments for ours.
        return report.failure(error, how)
    raise AssertionError("INIT returned")


def _understood(arguments):
    """Return (mode, NEWROOT or None, INIT and its arguments) of a command line."""
    mode = _mode(arguments)
    words = _without_dashes(arguments.words)
    new_root = None
    if mode == "NEWROOT":
        if not words:
            raise UsageError("", "switch-root", "", "neither NEWROOT nor a mode is given",
                             hint="sandboxfs switch-root --help")
        new_root, *words = words
        if words and words[0].startswith("-"):
            # Options may stand after NEWROOT, too: nothing belongs to INIT before INIT.
            arguments.parser.parse_args(words, arguments)
            words = _without_dashes(arguments.words)
            mode = _mode(arguments)
    for option, modes in _BELONGS.items():
        if getattr(arguments, option) and mode not in modes:
            name = "--" + option.replace("_", "-")
            raise UsageError(name, "switch-root", "", f"has no meaning with {mode}")
    if mode != "NEWROOT" and new_root is not None:
        raise UsageError("", "switch-root", new_root, f"{mode} takes no NEWROOT",
                         hint="options stand before INIT")
    return mode, new_root, words or [init.DEFAULT]


def _mode(arguments):
    modes = {
        "--to-tmpfs": arguments.to_tmpfs, "--image": arguments.image is not None,
        "--user-root": arguments.user_root,
    }
    return next((mode for mode, given in modes.items() if given), "NEWROOT")


def _without_dashes(words):
    return words[1:] if words[:1] == ["--"] else words


def _start(arguments, mode, new_root, command):
    program, *rest = command

    def warn(text):
        report.warning(text, arguments.log_format == "json")

    if init.witnessed():
        report.write(f"sandboxfs: {init.WITNESS} is set: the root was switched, now {program}\n")
        init.execute(program, rest)
    if mode == "--to-tmpfs":
        _to_tmpfs(arguments, program, rest, warn)
    if mode == "--image":
        from sandboxfs.boot.image import from_image

        from_image(
            arguments.image, program, rest, overlay=arguments.overlay or "none",
            ephemeral=arguments.ephemeral, ephemeral_files=arguments.ephemeral_file,
            force=arguments.force, warn=warn,
        )
    if mode == "--user-root":
        leave.user_root(program, rest, force=arguments.force, warn=warn)
    leave.switch_root(
        new_root, program, rest, keep=arguments.keep, preserve=arguments.preserve,
        force=arguments.force, warn=warn,
    )


def _to_tmpfs(arguments, program, rest, warn):
    from sandboxfs.boot.tmpfs import to_tmpfs
    from sandboxfs.spec.annotations import size

    try:
        limit = None if arguments.size is None else size(arguments.size)
    except ValueError as error:
        raise UsageError("--size", "", arguments.size, str(error)) from None
    to_tmpfs(program, rest, size=limit, force=arguments.force, warn=warn)
