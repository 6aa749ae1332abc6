"""The metrics of a run as strict JSON lines, which outlive a kill and stay true after a resume.

A line is `{"step": int, "train/loss": float, ...}`, the step being the number of finished optimizer steps.
Training and evaluation of one step are two lines.
"""

import json
import math
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only


class MetricsFile(Logger):
    """Appends what Lightning logs to `output_dir/metrics.jsonl`; a run calls `rewind` once before it logs.

    Lightning passes the index of the batch, one less than the finished steps, unless a metric named `step` is
    logged as well; Throughput logs one.
    """

    def __init__(self, output_dir: Path) -> None:
        super().__init__()
        self.path = output_dir / "metrics.jsonl"
        self._last: deque[str] = deque(maxlen=2)  # a step's, and what was said of its samples

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        # Lightning fills in its count of epochs, an integer, where none was logged.
        counted = type(metrics.get("epoch")) is int
        values = {key: _finite(value) for key, value in metrics.items() if not (counted and key == "epoch")}
        if not values:
            return
        line = json.dumps({"step": step, **values}, allow_nan=False) + "\n"
        if line in self._last:
            return  # Promptly was first
        self._last.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Forget every step behind `step`; -1 forgets all."""
        rewind(self.path, step)


class Promptly(Callback):
    """Writes a step's line before the step's checkpoint: a run killed between the two would have lost the line.

    Lightning gives it to the loggers only after every callback is done.
    """

    def __init__(self, file: MetricsFile) -> None:
        self.file = file

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if is_logged(trainer):
            values = convert_tensors_to_scalars(trainer._results.metrics(on_step=True)["log"])  # type: ignore
            self.file.log_metrics(values, int(values.pop("step")))


def is_logged(trainer: Trainer) -> bool:
    """Whether Lightning passes the step that has just finished to its loggers."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and trainer.global_step % every == 0


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file in order, without a last line that was not written to its end."""
    return [json.loads(line) for line in _whole_lines(path)]


def rewind(path: Path, step: int) -> None:
    """Drop the rows whose `step` is larger than `step`, and a torn last line; all or nothing."""
    if not path.exists():
        return
    kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
    draft = path.with_name(path.name + ".tmp")
    with draft.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _whole_lines(path: Path) -> list[str]:
    # What follows the last line break is empty, or was cut off by a kill (perhaps inside a character).
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    return [line for line in whole.decode("utf-8").split("\n") if line]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
