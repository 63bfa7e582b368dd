"""Engines: how podman, containerd, CRI-O and Docker are told of us, and how that is taken back."""

from sandboxfs.engines import containerd, crio, docker, hooks, living, podman
from sandboxfs.engines.record import Manifest, Registration, checked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

ENGINES = {"podman": podman, "cri-o": crio, "containerd": containerd, "docker": docker}


class Wish:
    """What is to be registered, and where.

    engine: its name.  hooks: the hooks, not the runtime.  dest: a directory for everything of
    ours.  config: absolute path of the operator's file.  engine_config: the engine's file
    (containerd, docker) or directory of drop-ins (podman, cri-o).  None: the default one.
    For hooks: launcher (its path), annotated (only for containers with annotations of ours), base
    (the spec that containerd's is made from, parsed; None where none is needed).
    recorded: the list of what is installed; where the engine's configuration was then, it is looked
    for again.
    """

    __slots__ = ("annotated", "base", "config", "dest", "engine", "engine_config", "hooks",
                 "launcher", "recorded")

    def __init__(self, engine: str, hooks: bool = False, dest: "str | None" = None,
                 config: "str | None" = None, engine_config: "str | None" = None,
                 launcher: "str | None" = None, annotated: bool = False,
                 base: "dict[str, Any] | None" = None) -> None:
        self.engine = engine
        self.hooks = hooks
        self.dest = dest
        self.config = config
        self.engine_config = None if engine_config is None else checked(engine_config)
        self.launcher = launcher
        self.annotated = annotated
        self.base = base
        self.recorded = Manifest(_room(self).manifest(self))
        if engine_config is None:
            self.engine_config = self.recorded.engine_config


def _room(wish: Wish) -> "Any":
    return hooks if wish.hooks else ENGINES[wish.engine]


def registration(wish: Wish) -> Registration:
    """Return the `Registration` that was asked for."""
    found: Registration = _room(wish).registration(wish)
    found.engine_config = wish.engine_config
    return found


def real_runtimes(wish: Wish) -> list[str]:
    """Return the paths of the runtimes that the engine starts, or that we stand in front of."""
    found: list[str] = ENGINES[wish.engine].real(wish)
    return found


def users(wish: Wish) -> "Iterator[str]":
    """Yield, in words, who would miss what is installed: configurations, containers, pods."""
    ours = [*wish.recorded.digests]
    yield from ENGINES[wish.engine].users(wish, ours)
    states = [containerd.state(wish)] if wish.engine == "containerd" else []
    yield from living.containers(ours, states)
    yield from living.pods()
