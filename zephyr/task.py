"""What supervised and preference training share: a step over micro-batches, its optimizer, its log."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from zephyr.data.batch import Batch
from zephyr.errors import UserError
from zephyr.schedule import schedule
from zephyr.settings import Optimizer as OptimizerSettings


class Task(L.LightningModule, ABC):
    """Fine-tunes a policy. A subclass says what the loss is, over what it is averaged, and nothing else.

    A Lightning batch is one optimizer step, a list of micro-batches. Losses are summed over the step's units (scored
    tokens, or pairs) and divided once by their number in the whole step; so neither the split into micro-batches
    nor their unequal sizes change the gradient.
    """

    policy: PreTrainedModel

    def __init__(
        self, policy: PreTrainedModel, optimizer: OptimizerSettings, total_steps: int, steps_per_epoch: float
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # a checkpoint holds what trains, no more
        self.policy = policy.train()  # from_pretrained returns eval mode, which switches checkpointing off
        self.settings, self.total_steps, self.steps_per_epoch = optimizer, total_steps, steps_per_epoch

    @abstractmethod
    def units(self, batch: Batch) -> int:
        """What the loss is averaged over: how many of it a micro-batch holds."""

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, summed over the micro-batch's units, and further sums worth watching (their mean is logged)."""

    def training_step(self, batches: list[Batch], step: int) -> None:
        optimizer: Any = self.optimizers()
        units = sum(self.units(batch) for batch in batches)
        logged: dict[str, Tensor] = {}
        optimizer.zero_grad()
        for batch in batches:
            loss, sums = self.loss(batch)
            self.manual_backward(loss / units)
            for name, value in {"loss": loss, **sums}.items():
                logged[name] = logged.get(name, 0) + value.detach() / units
        limit = self.settings.max_grad_norm
        norm = nn.utils.clip_grad_norm_(self.trainable(), math.inf if limit is None else limit)
        if not torch.isfinite(norm):  # the step's one wait for the device
            raise UserError(
                f"The gradient of step {self.trainer.global_step + 1} is not finite (norm {norm.item()}). "
                "The weights are still those of the step before. Lower optimizer.lr, or look at the data of that step."
            )
        optimizer.step()

        rates: Any = self.lr_schedulers()
        lr = rates.get_last_lr()[0]
        rates.step()
        epoch = (step + 1) / self.steps_per_epoch
        self.log_dict({f"train/{name}": value for name, value in logged.items()}, batch_size=1)
        self.log_dict({"train/grad_norm": norm, "train/learning_rate": lr, "epoch": epoch}, batch_size=1)

    def validation_step(self, batches: list[Batch], _: int) -> None:
        for batch in batches:
            loss, sums = self.loss(batch)
            units = self.units(batch)
            means = {f"eval/{name}": value / units for name, value in {"loss": loss, **sums}.items()}
            self.log_dict(means, batch_size=units, on_epoch=True, sync_dist=True)

    def trainable(self) -> Iterator[nn.Parameter]:
        """The parameters that the optimizer steps."""
        return (parameter for parameter in self.policy.parameters() if parameter.requires_grad)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = _optimizer(self.settings, list(self.trainable()))
        warmup = math.ceil(self.settings.warmup_ratio * self.total_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": schedule(self.settings.schedule, optimizer, warmup, self.total_steps),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        names = self._trainable_names()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in names}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        missing = self._trainable_names() ^ set(checkpoint["state_dict"])
        if missing:
            raise UserError(f"The checkpoint holds other weights than this model trains, first {min(missing)!r}.")

    def _trainable_names(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}


def _optimizer(settings: OptimizerSettings, parameters: list[nn.Parameter]) -> Optimizer:
    matrices = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay}
    vectors = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
    groups = [group for group in (matrices, vectors) if group["params"]]
    options: dict[str, Any] = {"lr": settings.lr, "betas": tuple(settings.betas), "eps": settings.eps}
    if settings.name == "paged_adamw_32bit":
        from bitsandbytes.optim import PagedAdamW32bit

        return PagedAdamW32bit(groups, **options)
    return torch.optim.AdamW(groups, **options, fused=True)
