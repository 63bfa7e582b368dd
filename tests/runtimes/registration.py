"""The hooks, registered by the commands that the documentation gives."""

import json
from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path

from tests.runtimes.spaces import Space
from tests.support.specs import Document

STAGES = ("createRuntime", "createContainer", "poststop")


class Hooks:
    """What a runtime is told: `section`, of a document, and `files`, of a hooks.d directory."""

    def __init__(self, section: Document, files: dict[str, Document]) -> None:
        self.section = section
        self.files = files

    def write_files(self, directory: Path) -> None:
        """Write the files that podman and CRI-O read."""
        for name, document in self.files.items():
            (directory / name).write_text(json.dumps(document), "utf-8")
            (directory / name).chmod(0o644)

    def only(self, *stages: str) -> "Hooks":
        """Return the hooks of these stages alone."""
        return Hooks(
            {name: entries for name, entries in self.section.items() if name in stages},
            {name: each for name, each in self.files.items() if each["stages"][0] in stages},
        )

    def through(self, *command: str | Path, stage: str = "createContainer") -> "Hooks":
        """Return hooks of which that of `stage` is started by another program."""
        words = [str(word) for word in command]

        def started(hook: Document) -> None:
            hook["args"] = [*words, hook["path"], *hook["args"][1:]]
            hook["path"] = words[0]

        return self.changed(started, stage)

    def changed(self, change: Callable[[Document], object], *stages: str) -> "Hooks":
        """Return hooks after `change` was called with every one of `stages`."""
        section, files = deepcopy(self.section), deepcopy(self.files)
        for stage in stages:
            for hook in section[stage]:
                change(hook)
        for document in files.values():
            if document["stages"][0] in stages:
                change(document["hook"])
        return Hooks(section, files)


def install(directory: Path, options: Iterable[str] = (), space: Space | None = None) -> Hooks:
    """Register below `directory`, for containerd and for podman; returns what was written."""
    for runtime in ("containerd", "podman"):
        (space or Space()).sandboxfs(
            "hooks", "install", "--for", runtime, "--dest", directory / runtime, *options)
    base = json.loads((directory / "containerd/sandboxfs-base-spec.json").read_text("utf-8"))
    files = {path.name: json.loads(path.read_text("utf-8"))
             for path in (directory / "podman").glob("*.json")}
    assert sorted(base["hooks"]) == sorted(STAGES)
    assert sorted(each["stages"][0] for each in files.values()) == sorted(STAGES)
    return Hooks(base["hooks"], files)
