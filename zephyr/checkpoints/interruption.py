"""Stopping on SIGTERM or Ctrl-C: after the optimizer step, with a checkpoint, and never with status 0."""

import signal
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from zephyr.checkpoints.checkpoint import Checkpoints
from zephyr.command import install, restore
from zephyr.errors import Stopped


class StopOnSignal(Callback):
    """Lets the optimizer step end that a signal falls into, saves it through `checkpoints`, raises Stopped.

    It takes the signals over from zephyr.command.stoppable while training. A second Ctrl-C does not wait. A validation
    that is due or under way is left to the resumed run. All ranks stop at the same step, whichever of them got the
    signal.
    """

    # Stopped is raised one hook after on_train_batch_end: only then do the loggers have the step's metrics

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self._received: int | None = None
        self._stopping = False
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # here, because Lightning registers handlers of its own shortly before
        self._before = install(self._receive)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._stopping:
            raise self._stopped()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.checkpoints.wanted = self._agree(trainer)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn == "fit" and self._agree(trainer):
            if trainer.global_step > 0:
                self.checkpoints.save(trainer, validated=False)
            raise self._stopped()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.checkpoints.wanted = self._agree(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        restore(self._before)
        if self._agree(trainer):
            self.checkpoints.save(trainer)
            raise self._stopped()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        restore(self._before)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self._received is not None:
            raise Stopped(signum)
        self._received = self._received or signum

    def _agree(self, trainer: Trainer) -> bool:
        self._stopping = trainer.strategy.reduce_boolean_decision(self._received is not None, all=False)
        return self._stopping

    def _stopped(self) -> Stopped:
        return Stopped(self._received or signal.SIGTERM)  # another rank got the signal: SIGTERM, most likely
