"""The runtime in front: made as the documentation says, of a real runtime or of the recorder."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from sandboxfs.runtime import wrap
from tests.support.commands import ENVIRONMENT, Done, run, run_cli

RECORDER = Path(__file__).with_name("recorder.c")
RECORDED = 37  # its exit status


def front(directory: Path, runtime: str | Path, config: Path | None = None) -> Path:
    """Return a program in front of `runtime`, below `directory`, with the runtime's name."""
    place = directory / f"front-{Path(runtime).name}"
    place.mkdir(mode=0o755, exist_ok=True)
    program = place / Path(runtime).name
    if config is None:
        program.write_bytes(wrap.content(str(runtime)))
        program.chmod(0o755)
    else:
        run_cli("runtime", "wrap", str(runtime), program, "--config", config, check=0)
    return program


def recorder(directory: Path, name: str = "runc") -> Path:
    """Return the recorder, compiled, under a runtime's name."""
    place = directory / f"real-{name}"
    place.mkdir(mode=0o755, exist_ok=True)
    subprocess.run(["gcc", "-O1", "-Wall", "-Werror", "-o", place / name, RECORDER], check=True)
    return place / name


def recorded(text: str) -> dict[str, list[str]]:
    """Return what the recorder told, by name."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        found.setdefault(name, []).append(value)
    return found


def logged(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a runtime's log in JSON."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


class Runc:
    """Debian's runc behind the front; its state lies below `directory`."""

    def __init__(self, directory: Path, config: Path | None = None, program: str = "runc") -> None:
        self.state = directory / "state"
        real = shutil.which(program, path=ENVIRONMENT["PATH"])
        assert real, f"{program} is not installed: tools/setup test"
        self.real = real
        self.program = front(directory, real, config)

    def run(self, bundle: Path, *words: str, name: str = "tests", **how: Any) -> Done:
        """Run a container in the foreground."""
        return run(self.program, "--root", self.state, "run", "--bundle", bundle, *words, name,
                   **how)

    def call(self, *words: str | Path, **how: Any) -> Done:
        """Call another command, or the same in other words."""
        return run(self.program, "--root", self.state, *words, **how)
