"""One bar for the whole run, or plain lines where the output is no terminal."""

import time
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.progress import TimeRemainingColumn as TimeRemaining

from zephyr.observe.metrics import is_logged


class Progress(ProgressBar):
    """Shows steps, loss, tokens per second, elapsed and remaining time of a fit (one Lightning epoch).

    Metrics are read at logged steps alone, since reading waits for the device. Put it behind Throughput.
    """

    def __init__(self, description: str, total: int, console: Console | None = None, seconds: float = 10.0) -> None:
        super().__init__()
        self.description = description
        self.total = total  # optimizer steps of the whole run, those before a resume included
        self.seconds = seconds  # at least so long between two plain lines
        self._console = console or Console()
        self._enabled = True
        self._bars: Bars | None = None
        self._train: TaskID | None = None
        self._validation: TaskID | None = None
        self._printed = -float("inf")

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first, self._started = trainer.global_step, time.monotonic()
        if self._enabled and self._console.is_interactive:
            self._train = self._open().add_task(
                self.description, total=self.total, completed=self._first, metrics=_metrics(trainer)
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._enabled:
            return
        step = trainer.global_step
        logged = step == self.total or is_logged(trainer)
        if self._bars is not None and self._train is not None:
            self._bars.update(self._train, completed=step)
            if logged:
                self._bars.update(self._train, metrics=_metrics(trainer))
        elif logged and (step == self.total or time.monotonic() - self._printed >= self.seconds):
            self._printed = time.monotonic()
            self._print(f"{step}/{self.total}", _metrics(trainer), self._times(step))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._enabled and self._console.is_interactive:
            batches = sum(trainer.num_val_batches)
            total = batches if batches != float("inf") else None
            self._validation = self._open().add_task("validation", total=total, metrics="")

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._bars is not None and self._validation is not None:
            self._bars.advance(self._validation)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._bars is not None and self._validation is not None:
            self._bars.remove_task(self._validation)
            self._validation = None
        elif self._enabled and (loss := trainer.callback_metrics.get("eval/loss")) is not None:
            self._print(f"{trainer.global_step}/{self.total}", f"eval loss {float(loss):.4f}")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def _open(self) -> Bars:
        if self._bars is None:
            self._bars = Bars(
                TextColumn("{task.description:<10}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[metrics]}", style="cyan"),
                TimeElapsedColumn(),
                TextColumn("ETA", style="dim"),
                TimeRemaining(),
                console=self._console,
                speed_estimate_period=300,
            )
            self._bars.start()
        return self._bars

    def _close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars = self._train = self._validation = None

    def _times(self, step: int) -> str:
        elapsed = time.monotonic() - self._started
        remaining = elapsed / (step - self._first) * (self.total - step)
        return f"elapsed {_clock(elapsed)}  ETA {_clock(remaining)}"

    def _print(self, *parts: str) -> None:
        line = "  ".join(part for part in (self.description, *parts) if part)
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _metrics(trainer: L.Trainer) -> str:
    values = trainer.callback_metrics
    loss, speed = values.get("train/loss"), values.get("tokens_per_second")
    parts = [
        f"loss {float(loss):.4f}" if loss is not None else "",
        f"{float(speed):,.0f} tokens/s" if speed is not None else "",
    ]
    return "  ".join(part for part in parts if part)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
