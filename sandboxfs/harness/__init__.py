"""For programs that run commands in throw-away roots: `Sandbox`, `Pool`, the warm process."""
