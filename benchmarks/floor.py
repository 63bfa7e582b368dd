"""Compiles floor.c."""

import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("floor.c")


def compiled(directory):
    """Return the path of the floor's program, made in `directory`."""
    program = Path(directory) / "floor"
    subprocess.run(["gcc", "-O2", "-Wall", "-o", str(program), str(SOURCE)], check=True)
    return program
