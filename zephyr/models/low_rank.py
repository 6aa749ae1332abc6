"""W x + scale B A x, where what a low-rank adapter adds is accumulated by its second product.

PEFT's layer writes the addend, scales it and adds it, in fp32 under autocast: up to four tensors as large as the
result, which take longer to write than the adapter's products to compute.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulate(layer: Any) -> None:
    """Let one of PEFT's LoRA layers compute that way, in place."""
    kind: Any = type(layer)
    layer.__class__ = _accumulating(kind)


@cache
def _accumulating(kind: Any) -> Any:
    # A class, as torch.compile compiles a forward that is an instance's own for each instance.
    return type(kind.__name__, (_Accumulating, kind), {})


class _Accumulating:
    def forward(self: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """The layer's output for x [T, in] -> [T, out]. Other shapes and other kinds of adapter are PEFT's."""
        if x.dim() != 2 or self.merged or self.lora_variant or args or options:
            result: Tensor = super().forward(x, *args, **options)  # type: ignore[misc]
            return result
        result = self.base_layer(x)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name in self.lora_A:
                down, up = self.lora_A[name].weight, self.lora_B[name].weight
                narrow = F.linear(self.lora_dropout[name](x), down.to(x.dtype))
                factors = narrow.to(result.dtype), up.T.to(result.dtype)
                # What a custom function returns as a view, autograd lets nobody change; a compiler sees to it itself.
                if torch.compiler.is_compiling() or result._is_view():
                    result = torch.addmm(result, *factors, alpha=self.scaling[name])
                else:
                    result = result.addmm_(*factors, alpha=self.scaling[name])
        return result
