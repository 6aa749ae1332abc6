"""How far a preparation is: a bar on a terminal, else a plain line on standard error every half minute."""

import sys
import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_SECONDS = 30.0  # between two plain lines


class Shown:
    """Rows done, rows per second and the time that is left, by the share of the input's bytes that are done."""

    def __init__(self, total: int, console: Console | None = None, seconds: float = _SECONDS) -> None:
        self.total, self.seconds = max(1, total), seconds
        self.console = console or Console(stderr=True)
        self.rows, self._started = 0, time.monotonic()
        self._printed = self._started
        self._first: int | None = None  # bytes that were done before this run did anything
        self._done = 0
        self._bar: Progress | None = None

    def __enter__(self) -> "Shown":
        if self.console.is_interactive:
            columns = (
                TextColumn("{task.description:<8}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[speed]}", style="cyan"),
                TextColumn("ETA", style="dim"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.console, speed_estimate_period=300)
            self._task = self._bar.add_task("rows", total=self.total, speed="")
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def rows_per_second(self) -> float:
        """Of this run alone."""
        return self.rows / max(1e-9, time.monotonic() - self._started)

    def skipped(self, done: int) -> None:
        """So many bytes of the input were done by an earlier run."""
        self._first = done

    def advance(self, rows: int, done: int) -> None:
        """Rows that were done now, and the bytes of the input that are done so far."""
        self.rows += rows
        self._done = max(done, self._done)
        speed = f"{self.rows:,} rows  {self.rows_per_second:,.0f} rows/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, speed=speed)
        elif (now := time.monotonic()) - self._printed >= self.seconds:
            self._printed = now
            gone = self._done - (self._first or 0)
            left = (now - self._started) * (self.total - self._done) / max(1, gone)
            self.say(f"{self._done / self.total:.0%}  {speed}  ETA {timedelta(seconds=round(left))}")

    def say(self, line: str) -> None:
        """A line of its own."""
        if self.console.is_interactive:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)
