"""A run as small as can be, to be cut short and gone on with, and what its checkpoints must come to."""

import logging
import random
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from zephyr.checkpoints.checkpoint import Checkpoints, FolderCheckpointIO

STEPS = 12
CLAIM = {"stage": "dpo", "objective.beta": 0.1, "batch_size": 32, "seed": 7}
Line = tuple[int, str, float]  # step, metric, value


class Noisy(L.LightningModule):
    """Manual optimisation whose every step draws from all of the process's random states."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 1))

    def training_step(self, batch: list[Tensor], _: int) -> None:
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        jitter = random.random() + np.random.rand()
        loss = sum((self.policy(part).square().mean() + jitter * self.policy(part).mean()) for part in batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        schedule.step()
        self.log_dict({"train/loss": loss, "train/learning_rate": schedule.get_last_lr()[0]})

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("eval/loss", self.policy(batch[0]).square().mean() + torch.rand(()), batch_size=1)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))]


class Remaining(Sampler[int]):
    """The steps from `done` on, though its length is that of the whole run, as Lightning counts batches."""

    done = 0

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.done, self.steps))

    def __len__(self) -> int:
        return self.steps


class Steps(L.LightningDataModule):
    """The batches of a run, one a step."""

    def __init__(self, batches: Sequence[Any]) -> None:
        super().__init__()
        self.batches, self.remaining = batches, Remaining(len(batches))

    def state_dict(self) -> dict[str, int]:
        return {"done": self.trainer.global_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.remaining.done = state["done"]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.batches, batch_size=None, sampler=self.remaining)


class Validated(Steps):
    """Batches of two micro-batches, and three for validation."""

    def __init__(self) -> None:
        rows = torch.randn(STEPS, 2, 3, 8, generator=torch.Generator().manual_seed(1))
        super().__init__([list(row) for row in rows])

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader([[torch.full((1, 8), float(i))] for i in range(3)], batch_size=None)


def fit(
    module: L.LightningModule,
    steps: Steps,
    callbacks: Sequence[L.Callback],
    resume: Path | None,
    plugins: Sequence[Any] = (),
    **options: Any,
) -> L.Trainer:
    """One epoch on the CPU, or from a checkpoint on what is left of it."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        use_distributed_sampler=False,
        callbacks=[*callbacks],
        plugins=[FolderCheckpointIO(), *plugins],
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*dataloader is not resumable|.*does not have many workers")
        trainer.fit(module, datamodule=steps, ckpt_path=str(resume) if resume else None)
    return trainer


class Lines(Logger):
    """Keeps what reaches the loggers."""

    name, version, experiment = "lines", 0, None

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Line] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines += [(step, name, value) for name, value in metrics.items() if name != "epoch"]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Copy(L.Callback):
    """Shares the run's log lines with the test, since a crash returns no result."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(trainer.logger, Lines)
        self.lines.lines = trainer.logger.lines


class Result:
    def __init__(self, module: Noisy, lines: Lines, trainer: L.Trainer) -> None:
        self.lines = lines.lines
        self.weights = {name: value.clone() for name, value in module.state_dict().items()}
        self.optimizer = trainer.optimizers[0].state_dict()
        self.step = trainer.global_step


def train(
    folder: Path,
    every: int = 5,
    keep: int = 9,
    claim: dict[str, Any] = CLAIM,
    seed: int = 0,
    resume: Path | None = None,
    callbacks: tuple[L.Callback, ...] = (),
    checkpoints: Checkpoints | None = None,
    validate_every: int = 4,
) -> Result:
    L.seed_everything(seed, verbose=False)
    module, lines = Noisy(), Lines()
    trainer = fit(
        module,
        Validated(),
        [*callbacks, checkpoints or Checkpoints(folder, every, keep, claim)],
        resume,
        val_check_interval=validate_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=lines,
    )
    return Result(module, lines, trainer)


@cache
def whole() -> Result:
    """A run without an interruption."""
    with TemporaryDirectory() as folder:
        return train(Path(folder), every=100)


def assert_same(result: Result, whole: Result, lines: list[Line]) -> None:
    assert lines == whole.lines, (lines, whole.lines)
    assert result.step == STEPS
    torch.testing.assert_close(result.weights, whole.weights, rtol=0, atol=0)
    torch.testing.assert_close(result.optimizer, whole.optimizer, rtol=0, atol=0)


def small(folder: Path, step: int = 1, **extra: Any) -> Path:
    """A checkpoint that needs no training."""
    weights = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
    path = folder / f"step-{step:08d}"
    FolderCheckpointIO().save_checkpoint({"global_step": step, "state_dict": weights, **extra}, path)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
