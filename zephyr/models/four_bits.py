"""4-bit weights: told without importing what makes them, and dequantised once for several products."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from zephyr.models.functions import recomputed


def in_four_bits(module: nn.Module) -> bool:
    """Whether a module is a linear layer with 4-bit weights, told without importing what makes them."""
    return isinstance(module, nn.Linear) and type(module).__name__ == "Linear4bit"


def opened(layer: Any) -> Callable[[Tensor], Tensor]:
    """The layer as a function of x [T, in] -> [T, out], its weight dequantised here, once for all calls.

    The weight lives as long as the function: backward passes dequantise it again.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import modules

    def dequantised() -> Tensor:
        modules.fix_4bit_weight_quant_state_from_module(layer)  # FSDP's gathered weight comes without
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(layer.compute_dtype)

    weight = dequantised()

    def product(x: Tensor) -> Tensor:
        with recomputed(weight, dequantised):
            return F.linear(x, weight, layer.bias)

    return product
