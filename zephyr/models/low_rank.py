"""W x + scale B A x, where what a low-rank adapter adds is accumulated by its second product.

PEFT's layer writes the addend, scales it and adds it, in fp32 under autocast: up to four tensors as large as the
result, which take longer to write than the adapter's products to compute.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from zephyr.models.four_bits import in_four_bits, opened
from zephyr.models.products import add_product, linear

DEFAULT = "default"  # the adapter that trains; all others are frozen


def accumulate(layer: Any) -> None:
    """Let one of PEFT's LoRA layers compute that way, in place."""
    kind: Any = type(layer)
    layer.__class__ = _accumulating(kind)


def project(projection: Any, streams: list[Tensor]) -> list[Tensor]:
    """A layer's outputs for the policy's x [T, in] and, if given, for the reference's, which leaves out `default`.

    The base weight is read, and if it has four bits dequantised, once for both.
    """
    if len(streams) == 1:
        return [projection(streams[0])]
    base = getattr(projection, "base_layer", projection)
    policy, reference = map(opened(base) if in_four_bits(base) else base, streams)
    if base is not projection:
        policy = projection.add(policy, streams[0], projection.active_adapters)
        reference = projection.add(reference, streams[1], [name for name in projection.lora_A if name != DEFAULT])
    return [policy, reference]


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
        return result if self.disable_adapters else self.add(result, x, self.active_adapters)

    def add(self: Any, result: Tensor, x: Tensor, names: list[str]) -> Tensor:
        """What the base makes of x, with what adapters add to it, in place where that is possible."""
        for name in names:
            if name in self.lora_A:
                down, up = self.lora_A[name].weight, self.lora_B[name].weight
                narrow = linear(self.lora_dropout[name](x), down.to(x.dtype))
                factors = narrow.to(result.dtype), up.to(result.dtype)
                # What a custom function returns as a view, autograd lets nobody change; a compiler sees to it itself.
                if torch.compiler.is_compiling() or result._is_view():
                    result = torch.addmm(result, factors[0], factors[1].T, alpha=self.scaling[name])
                else:
                    result = add_product(result, *factors, self.scaling[name])
        return result
