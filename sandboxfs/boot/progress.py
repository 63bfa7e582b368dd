"""A progress bar on a terminal."""

import os
import sys
import time

_WIDTH = 80
_NARROWEST = 30
_SECONDS = 0.1


class Progress:
    """How far something has come, drawn on standard error if that is a terminal.

    what: a word or two.  total: bytes.  Call `advance` with each number of bytes, `end` in the
    end.  A terminal that fails is nobody's loss.
    """

    def __init__(self, what, total, stream=None):
        self.what = what
        self.total = total
        self.done = 0
        self.drawn = float("-inf")
        self.stream = sys.stderr if stream is None else stream
        try:
            self.is_shown = self.stream is not None and self.stream.isatty()
        except (OSError, ValueError):
            self.is_shown = False

    def advance(self, count):
        """Count so many bytes more."""
        self.done += count
        if self.is_shown and time.monotonic() - self.drawn >= _SECONDS:
            self._draw("")

    def end(self):
        """Draw the last state and leave the line."""
        if self.is_shown:
            self._draw("\n")

    def _draw(self, end):
        self.drawn = time.monotonic()
        # What grows while it is measured could be more than all.
        share = min(self.done / self.total, 1.0) if self.total else 1.0
        text = f"{self.what} {mebibytes(self.done)} of {mebibytes(self.total)} MiB, {share:4.0%} "
        room = max(self._columns() - len(text) - 3, 0)
        filled = round(share * room)
        bar = f"[{'#' * filled}{' ' * (room - filled)}]" if room else ""
        try:
            self.stream.write(f"\r{text}{bar}{end}")
            self.stream.flush()
        except OSError:
            self.is_shown = False

    def _columns(self):
        try:
            columns = os.get_terminal_size(self.stream.fileno()).columns
        except (OSError, ValueError):
            columns = 0
        # A serial console doesn't know its width.
        return max(columns, _NARROWEST) if columns else _WIDTH


def mebibytes(size):
    """Return a number of bytes in MiB, with one digit behind the point."""
    return f"{size / (1 << 20):.1f}"
