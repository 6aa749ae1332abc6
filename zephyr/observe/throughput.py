"""How fast a run is: tokens, memory, and the share of the device's peak that the model's arithmetic uses."""

import resource
import sys
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from zephyr.data.batch import Batch
from zephyr.observe.metrics import is_logged
from zephyr.planning.flops import model_size, step_flops
from zephyr.planning.gpus import named


class Throughput(Callback):
    """Logs, at logged steps, what a step costs; nothing waits for the device in between.

    `tokens_per_second` (packed tokens of all ranks) and `mfu` (of rank 0's device, where its peak is
    known) cover the time since the last logged step without validation and checkpoints. `num_tokens`
    counts the packed tokens of all ranks and goes on after a resume. `peak_memory_gib` is the device's,
    or without CUDA the process's. Also logs `step`, the finished optimizer steps, which loggers then use
    instead of the index of the batch.
    """

    def __init__(self, reference: bool = False) -> None:
        self.reference = reference  # a live reference adds a forward pass
        self._restored = 0
        self._since: float | None = None  # None while the clock stands
        self._seconds = self._flops = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"num_tokens": int(self._num_tokens) if hasattr(self, "_num_tokens") else self._restored}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._restored = state["num_tokens"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._size = model_size(pl_module.policy)
        self._device = pl_module.device
        self._peak = peak_flops(self._device)
        # Counted on the device, so that the sum over ranks needs no wait.
        self._num_tokens = torch.tensor(self._restored, device=self._device)
        self._window = torch.zeros_like(self._num_tokens)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: list[Batch], batch_idx: int
    ) -> None:
        if self._since is None:
            self._since = self._now()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: list[Batch],
        batch_idx: int,
    ) -> None:
        tokens = torch.full_like(self._window, sum(len(micro.ids) for micro in batch))
        tokens = trainer.strategy.reduce(tokens, reduce_op="sum")
        self._num_tokens += tokens
        self._window += tokens
        self._flops += step_flops(self._size, batch, self.reference)
        if is_logged(trainer):
            self._log(trainer, pl_module)

    # The clock stands from here to the next training step; the wait for that step's data is lost with it.
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.stop()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.stop()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log("step", float(trainer.global_step), reduce_fx="max", sync_dist=True, batch_size=1)

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.stop()
        self._since = time.perf_counter()
        rates: dict[str, Any] = {
            "num_tokens": self._num_tokens.double(),
            "peak_memory_gib": peak_memory_gib(self._device),
        }
        if self._seconds > 0:
            rates["tokens_per_second"] = self._window.double() / self._seconds
            if self._peak is not None:
                rates["mfu"] = self._flops / self._seconds / self._peak
        pl_module.log_dict({"step": float(trainer.global_step), **rates}, batch_size=1)
        self._window.zero_()
        self._seconds = self._flops = 0.0

    def stop(self) -> None:
        """Let the clock stand until the next training step."""
        if self._since is not None:
            self._seconds += self._now() - self._since
            self._since = None

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a device, None where unknown."""
    if device.type != "cuda":
        return None
    gpu = named(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.peak * 1e12


def peak_memory_gib(device: torch.device) -> float:
    """The most memory in GiB that tensors took on a CUDA device, or else that the process took, so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB elsewhere
