"""What a model takes in memory from step to step: weights, gradients, optimizer, a copied reference."""

import os
from typing import Any, NamedTuple

import torch
from torch import nn

from zephyr.models.policy import Placement, skeleton
from zephyr.settings import Model, Settings

_SCALES = 4 / 64, 1 / 64 + 4 / 64 / 256  # bytes a 4-bit weight, for the scale of its block; with scales in 8 bits


class State(NamedTuple):
    """Bytes on each device that stay there from step to step."""

    weights: float
    gradients: float
    optimizer: float
    reference: float

    @property
    def total(self) -> float:
        return sum(self)


class Counts(NamedTuple):
    """Parameters of a model."""

    total: int
    trained: int
    layers: int  # linear layers in 4 bits
    packed: int  # parameters in them


def counts(model: Model, config: Any) -> Counts:
    """Parameters of the model that `config` describes, with its new adapter if it gets one."""
    bare = skeleton(config)
    total = sum(p.numel() for p in bare.parameters())
    if (lora := model.lora) is None:
        return Counts(total, total, 0, 0)
    head: Any = bare.get_output_embeddings()
    linear = {name: m for name, m in bare.named_modules() if isinstance(m, nn.Linear) and m is not head}
    trained = sum(
        lora.rank * (m.in_features + m.out_features) + lora.dora * m.out_features
        for name, m in linear.items()
        if lora.target_modules == "all-linear" or name.rsplit(".", 1)[-1] in lora.target_modules
    )
    packed = sum(m.weight.numel() for m in linear.values()) if model.quantization else 0
    return Counts(total + trained, trained, len(linear) if packed else 0, packed)


def state(settings: Settings, config: Any, placement: Placement, shards: int, reference: str | None) -> State:
    """Memory of weights, gradients, optimizer and a `copy` reference; `config` is the model's."""
    model = settings.model
    number = counts(model, config)
    follows = reference == "adapter" and settings.reference is not None and settings.reference.sync_every_n_steps
    compute, trained_dtype = placement.compute.itemsize, placement.trained.itemsize
    trained = number.trained * trained_dtype / shards
    frozen = (number.total - number.trained - number.packed) * compute + number.packed / 2
    base = frozen / shards + number.packed * _SCALES[model.double_quantization]  # scales are not shared out
    copy = (
        base if model.lora is not None else number.total * (trained_dtype if placement.autocast else compute) / shards
    )
    # two moments: a byte each, or in fp32 whatever the weights are
    eight_bits = settings.optimizer.name.endswith("_8bit")
    return State(
        weights=base + trained + (trained if follows else 0.0),
        gradients=trained,
        optimizer=number.trained * (2 if eight_bits else 8) / shards,
        reference=copy if reference == "copy" else 0.0,
    )


def device_memory(device: torch.device) -> int:
    """Bytes of a CUDA device's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
