"""How a command says how far it is: drawn on a terminal, else a plain line on standard error every half minute."""

import sys
import time

from rich.console import Console


class Lines:
    """A terminal to draw on, or lines of which each says all."""

    def __init__(self, console: Console | None = None, seconds: float = 30.0) -> None:
        self.console = console or Console(stderr=True)
        self.seconds = seconds  # between two plain lines
        self.started = self._printed = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds."""
        return time.monotonic() - self.started

    def due(self) -> bool:
        """Whether it is time for a plain line."""
        now = time.monotonic()
        if now - self._printed < self.seconds:
            return False
        self._printed = now
        return True

    def say(self, line: str) -> None:
        """A line of its own."""
        if self.console.is_interactive:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)
