"""What a run takes, before it runs: memory of each device by part."""

from typing import Any, NamedTuple

import torch
from torch import nn

from zephyr.models.policy import Placement, skeleton
from zephyr.settings import Model, Settings

_NF4 = 0.5 + 4 / 64, 0.5 + 1 / 64 + 4 / 64 / 256  # bytes a weight: half one, and each block's scale; scales in 8 bits


class State(NamedTuple):
    """Bytes on each device that stay there from step to step."""

    weights: float
    gradients: float
    optimizer: float
    reference: float

    @property
    def total(self) -> float:
        return sum(self)


def state(settings: Settings, config: Any, placement: Placement, shards: int, reference: str | None) -> State:
    """Memory of weights, gradients, optimizer and a `copy` reference; `config` is the model's."""
    model = skeleton(config)
    frozen_dtype, trained_dtype = (_bytes(dtype) for dtype in (placement.compute, placement.trained))
    whole = sum(p.numel() for p in model.parameters())
    if settings.model.lora is None:
        trained, frozen_bytes = float(whole), 0.0
    else:
        trained = sum(
            settings.model.lora.rank * (m.in_features + m.out_features) for m in _targets(model, settings.model)
        )
        frozen_bytes = _frozen_bytes(model, whole, settings.model, frozen_dtype)
    copy_dtype = trained_dtype if placement.autocast else frozen_dtype
    copy = frozen_bytes if settings.model.lora is not None else whole * copy_dtype
    moments = 2 if settings.optimizer.name == "paged_adamw_8bit" else 2 * trained_dtype
    parts = (
        trained * trained_dtype + frozen_bytes,
        trained * trained_dtype,
        trained * moments,
        copy if reference == "copy" else 0.0,
    )
    return State(*(part / shards for part in parts))


def device_memory(device: torch.device) -> int:
    """Bytes of a CUDA device's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _targets(model: nn.Module, settings: Model) -> list[Any]:
    assert settings.lora is not None
    wanted = settings.lora.target_modules
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    return [
        module
        for name, module in linear.items()
        if module is not head and (wanted == "all-linear" or name.rsplit(".", 1)[-1] in wanted)
    ]


def _frozen_bytes(model: nn.Module, whole: int, settings: Model, dtype: int) -> float:
    if not settings.quantization:
        return whole * dtype
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    return linear * _NF4[settings.double_quantization] + (whole - linear) * dtype


def _bytes(dtype: torch.dtype) -> int:
    return torch.empty(0, dtype=dtype).element_size()
