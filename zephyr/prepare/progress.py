"""How far a preparation is: a bar on a terminal, else a plain line on standard error every half minute."""

from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from zephyr.progress import Lines


class Shown(Lines):
    """Rows done, rows per second and the time that is left, by the share of the input's bytes that are done."""

    def __init__(self, total: int, console: Console | None = None, seconds: float = 30.0) -> None:
        super().__init__(console, seconds)
        self.total = max(1, total)
        self.rows = 0
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
        return self.rows / max(1e-9, self.elapsed)

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
        elif self.due():
            gone = self._done - (self._first or 0)
            left = self.elapsed * (self.total - self._done) / max(1, gone)
            self.say(f"{self._done / self.total:.0%}  {speed}  ETA {timedelta(seconds=round(left))}")
