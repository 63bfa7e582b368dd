"""Switching the root of a machine; each name is loaded when it is first used.

`switch_root` leaves an initramfs for another root, `to_tmpfs` takes its files along to a tmpfs,
`from_image` makes an EROFS or squashfs image the root, `user_root` makes pivot_root work in an
initramfs, `make_early_mounts` mounts what an init needs first, `is_initramfs` tells where this
process is.
"""

import sys

_HOMES = {
    "from_image": "sandboxfs.boot.image",
    "is_initramfs": "sandboxfs.boot.switch",
    "make_early_mounts": "sandboxfs.boot.early_mounts",
    "switch_root": "sandboxfs.boot.leave",
    "to_tmpfs": "sandboxfs.boot.tmpfs",
    "user_root": "sandboxfs.boot.leave",
}

__all__ = [
    "from_image", "is_initramfs", "make_early_mounts", "switch_root", "to_tmpfs", "user_root",
]


def __getattr__(name):
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'sandboxfs.boot' has no attribute {name!r}")
    __import__(home)
    value = getattr(sys.modules[home], name)
    globals()[name] = value
    return value
