"""W x + scale B A x in place: what a low-rank adapter adds is accumulated by its second product.

PEFT's layer writes the addend, scales it and adds it, in fp32 under autocast: up to four tensors as large as the result,
which take longer to write than the adapter's products to compute.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor


def forward(layer: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
    """A PEFT LoRA layer's output for x [T, in] -> [T, out]. Other shapes and other kinds of adapter are PEFT's."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if x.dim() != 2 or layer.merged or layer.lora_variant or args or options:
        result: Tensor = type(layer).forward(layer, x, *args, **options)
        return result
    result = layer.base_layer(x)
    if layer.disable_adapters:
        return result
    for name in active:
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        narrow = F.linear(layer.lora_dropout[name](x), down.to(x.dtype))
        result = result.addmm_(narrow.to(result.dtype), up.T.to(result.dtype), alpha=layer.scaling[name])
    return result
