"""How fast a run is: tokens, memory, and the share of the device's peak that the model's arithmetic uses."""

import resource
import sys
import time
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from zephyr.data.batch import Batch
from zephyr.gpus import named
from zephyr.observe.metrics import is_logged


class ModelSize(NamedTuple):
    """What the arithmetic of a decoder depends on. The input embedding is a look-up and costs none."""

    body: int  # parameters used once a token: all but the embedding and the head
    body_trained: int  # those of them that receive gradients
    head: int  # parameters of the output layer, used once a scored token
    head_trained: int
    layers: int
    width: int  # heads x head size


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


def model_size(policy: Any) -> ModelSize:
    """Count a causal language model (adapters and 4-bit weights too). A tied head is a head, no embedding."""
    config: Any = policy.config
    head = list(policy.get_output_embeddings().parameters())
    outside = {id(p) for p in (*head, *policy.get_input_embeddings().parameters())}
    body = [p for p in policy.parameters() if id(p) not in outside]
    heads = config.num_attention_heads
    return ModelSize(
        body=sum(map(_numel, body)),
        body_trained=sum(_numel(p) for p in body if p.requires_grad),
        head=sum(map(_numel, head)),
        head_trained=sum(_numel(p) for p in head if p.requires_grad),
        layers=config.num_hidden_layers,
        width=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
    )


class Load(NamedTuple):
    """What of a micro-batch its arithmetic depends on."""

    tokens: int
    scored: int
    context: float  # sum over tokens of how many positions each attends to


def load(batch: Batch) -> Load:
    """Attention is causal: q tokens behind a prefix of p attend to q (q + 1) / 2 + q p positions."""
    context = 0.0
    for start, end, prefix_start, prefix_end in batch.segments:
        queries = end - start
        context += queries * (queries + 1) / 2 + queries * (prefix_end - prefix_start)
    return Load(len(batch.ids), len(batch.targets), context)


def forward_flops(size: ModelSize, of: Load) -> tuple[float, float, float]:
    """Floating-point operations of one forward pass in the body's linear layers, the head, and attention."""
    # attention: two products, queries with keys and weights with values
    return 2.0 * size.body * of.tokens, 2.0 * size.head * of.scored, 4.0 * size.layers * size.width * of.context


def step_flops(size: ModelSize, batches: list[Batch], reference: bool) -> float:
    """Floating-point operations that an optimizer step needs by its mathematics, without recomputation.

    The backward pass takes the linear part of a forward pass once for the gradients of the inputs and once, where
    weights are trained, for those of the weights; and the attention part twice. A live reference is one more forward
    pass. With n packed and m scored tokens, and c their context, training all weights is thus the usual
    6 (body n + head m) + 12 layers width c.
    """
    return sum(needed_flops(size, load(batch), reference) for batch in batches)


def needed_flops(size: ModelSize, of: Load, reference: bool) -> float:
    """The same of one micro-batch."""
    body, head, attention = forward_flops(size, of)
    weights = 2.0 * (size.body_trained * of.tokens + size.head_trained * of.scored)
    return (2 + reference) * (body + head) + weights + (3 + reference) * attention


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


def _numel(parameter: Tensor) -> int:
    # bitsandbytes packs two weights into a byte and keeps the true shape aside.
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel() if state is not None else parameter.numel())
