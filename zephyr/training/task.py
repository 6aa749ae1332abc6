"""What supervised and preference training share: a step over micro-batches, its optimizer, its log."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from zephyr.data.batch import Batch
from zephyr.errors import UserError
from zephyr.settings import Optimizer as OptimizerSettings
from zephyr.training.memory import keep_freed
from zephyr.training.optimizer import build
from zephyr.training.schedule import schedule

Sums = dict[str, Tensor]  # name -> a value summed over units; "loss" is what is minimised


class Task(L.LightningModule, ABC):
    """Fine-tunes a policy. A subclass says what the loss is, over what it is averaged, and nothing else.

    A Lightning batch is one optimizer step: this process's share of its micro-batches. Losses are summed over the
    units (scored tokens, or pairs) of all micro-batches of all processes, and divided once by their number; so neither
    the split into micro-batches nor that among processes, nor unequal sizes, change the gradient.
    """

    policy: PreTrainedModel

    def __init__(
        self, policy: PreTrainedModel, optimizer: OptimizerSettings, total_steps: int, steps_per_epoch: float
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # a checkpoint holds what trains, no more
        self.policy = policy
        self.settings, self.total_steps, self.steps_per_epoch = optimizer, total_steps, steps_per_epoch
        self._evaluated: Sums = {}

    @abstractmethod
    def units(self, batch: Batch) -> int:
        """What the loss is averaged over: how many of it a micro-batch holds."""

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[Tensor, Sums]:
        """The loss, summed over the micro-batch's units, and further sums worth watching (their mean is logged)."""

    def losses(self, batches: list[Batch]) -> Iterator[tuple[Tensor, Sums]]:
        """The loss of each micro-batch of a step, computed when asked for."""
        return (self.loss(batch) for batch in batches)

    def on_fit_start(self) -> None:
        if self.device.type == "cpu":
            keep_freed()

    def training_step(self, batches: list[Batch], step: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        step_sums: Sums = {}
        for batch, (loss, sums) in zip(batches, self.losses(batches), strict=True):
            self.manual_backward(loss)
            _add(step_sums, {"loss": loss, **sums}, self.units(batch))
        means = _means(_over_ranks(step_sums))
        norm = self._finish_gradient(step_sums["units"])
        optimizer.step()

        rates: Any = self.lr_schedulers()
        lr = rates.get_last_lr()[0]
        rates.step()
        epoch = (step + 1) / self.steps_per_epoch
        self.log_dict({f"train/{name}": value for name, value in means.items()}, batch_size=1)
        self.log_dict({"train/grad_norm": norm, "train/learning_rate": lr, "epoch": epoch}, batch_size=1)

    def validation_step(self, batches: list[Batch], _: int) -> None:
        for batch, (loss, sums) in zip(batches, self.losses(batches), strict=True):
            _add(self._evaluated, {"loss": loss, **sums}, self.units(batch))

    def on_validation_epoch_end(self) -> None:
        means = _means(_over_ranks(self._evaluated))
        self._evaluated = {}
        self.log_dict({f"eval/{name}": value for name, value in means.items()}, batch_size=1)

    def trainable(self) -> Iterator[nn.Parameter]:
        """The parameters that the optimizer steps."""
        return (parameter for parameter in self.policy.parameters() if parameter.requires_grad)

    def _finish_gradient(self, units: Tensor) -> float:
        """From this process's sums to the clipped mean gradient. Returns its norm before clipping."""
        gradients = [parameter.grad for parameter in self.trainable() if parameter.grad is not None]
        if dist.is_initialized():  # sharded gradients have been summed on the way
            pending = [dist.all_reduce(g, async_op=True) for g in gradients if not isinstance(g, DTensor)]
            for work in pending:
                work.wait()
        # torch's own norm is of the gradients' dtype: in bf16 it has two digits
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, torch.float32)))
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        norm_of_sum, count = torch.stack([norm.double(), units.to(norm.device)]).tolist()  # the step's one wait
        mean_norm = norm_of_sum / count
        if not math.isfinite(mean_norm):
            raise UserError(
                f"The gradient of step {self.trainer.global_step + 1} is not finite (norm {mean_norm}). "
                "The weights are still those of the step before. Lower optimizer.lr, or look at the data of that step."
            )
        limit = math.inf if self.settings.max_grad_norm is None else self.settings.max_grad_norm
        torch._foreach_mul_(gradients, min(1.0, limit / (mean_norm + 1e-6)) / count)
        return mean_norm

    def configure_optimizers(self) -> OptimizerLRScheduler:
        stepping = build(self.settings, self.trainable())
        warmup = math.ceil(self.settings.warmup_ratio * self.total_steps)
        return {
            "optimizer": stepping,
            "lr_scheduler": schedule(self.settings.schedule, stepping, warmup, self.total_steps),
        }

    def changing(self) -> set[str]:
        """Names in the state_dict of what a run changes, and a checkpoint must hold."""
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        names = self.changing()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in names}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        missing = self.changing() ^ set(checkpoint["state_dict"])
        if missing:
            raise UserError(f"The checkpoint holds other weights than this model trains, first {min(missing)!r}.")


def _add(total: Sums, sums: Sums, units: int) -> None:
    for name, value in {**sums, "units": torch.tensor(float(units), dtype=torch.float64)}.items():
        value = value.detach().double()
        total[name] = total[name] + value if name in total else value


def _over_ranks(sums: Sums) -> Sums:
    """The sums of all processes, in place and returned: one message."""
    if dist.is_initialized():
        device = sums["loss"].device
        message = torch.stack([value.to(device) for value in sums.values()])
        dist.all_reduce(message)
        sums.update(zip(sums, message, strict=True))
    return sums


def _means(sums: Sums) -> Sums:
    return {name: value / sums["units"].to(value.device) for name, value in sums.items() if name != "units"}
