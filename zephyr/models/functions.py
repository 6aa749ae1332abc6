"""A decoder layer's elementwise arithmetic, each with a backward written by hand.

Left to autograd, a norm, a gate and a rotation write a dozen tensors a layer and keep half of them. These write what
they return, and keep their inputs; what later products keep of their results can be `recomputed`. Under torch.compile
the plain formulas are better: there the compiler does all this.

Letters: T tokens, H heads, E size of a head, D and I widths.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Layout = tuple[torch.Size, tuple[int, ...]]  # shape and stride

_silu_backward = torch.ops.aten.silu_backward.grad_input


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, 2019), over the last dimension, in fp32 inside."""
    if torch.compiler.is_compiling():
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, 2020); both [..., I]. Without gradient it is written over `gate`."""
    if torch.compiler.is_compiling():
        return F.silu(gate) * up
    if not torch.is_grad_enabled() and not gate.requires_grad:  # else a backward pass computes it again, and needs it
        return F.silu(gate, inplace=True).mul_(up)
    return SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary position embedding (Su et al., 2021): the halves of each head are the axes of planes, which turn.

    x [T, H, E]; cosines and sines [T, E / 2], of each plane's angle at each position.
    """
    if torch.compiler.is_compiling():
        first, second = x.chunk(2, -1)
        cosines, sines = cosines[:, None], sines[:, None]
        turned = torch.cat([first * cosines - second * sines, second * cosines + first * sines], -1)
        return turned.to(x.dtype)
    return Rotation.apply(x, cosines, sines)  # type: ignore[no-untyped-call]


class recomputed(torch.autograd.graph.saved_tensors_hooks):
    """Inside, operations do not keep `tensor` for their backward; `make` computes it again, once for all of them."""

    def __init__(self, tensor: Tensor, make: Callable[[], Tensor]) -> None:
        storage, size = tensor.untyped_storage()._cdata, tensor.numel()
        again: list[Tensor] = []
        uses = 0

        def pack(saved: Tensor) -> Tensor | Layout:
            nonlocal uses
            if saved.untyped_storage()._cdata != storage or saved.numel() != size:
                return saved
            uses += 1
            return saved.shape, saved.stride()

        def unpack(kept: Tensor | Layout) -> Tensor:
            nonlocal uses
            if isinstance(kept, Tensor):
                return kept
            if not again:
                again.append(make())
            uses -= 1
            return (again[0] if uses else again.pop()).as_strided(*kept)

        super().__init__(pack, unpack)


class RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight, with rms(x)^2 = mean(x^2) + eps; x [..., D].

    With n = x / rms(x) and g the gradient of the result, that of x is (g w - n mean(g w n)) / rms(x), that of the
    weight the sum of g n over tokens.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = inverse.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).to(x.dtype) * weight if x.dtype != wide.dtype else (wide * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        width = x.shape[-1]
        wide, weighing = grad.float(), weight.float()
        products = (x.float() * inverse).mul_(wide)  # g n
        grad_weight = products.reshape(-1, width).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        means = (products @ weighing)[..., None].mul_(inverse.square()).div_(-width)
        grad_x = torch.mul(wide, weighing, out=products).mul_(inverse)
        return grad_x.addcmul_(x.float(), means).to(x.dtype), grad_weight, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up. The backward computes silu(gate) again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = grad * up
        _silu_backward(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, F.silu(gate).mul_(grad)


class Rotation(torch.autograd.Function):
    """A turn by each plane's angle. The backward turns back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _turn(x, cosines, sines)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return _turn(grad, cosines, -sines), None, None


def _turn(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    if x.dtype != cosines.dtype:
        return _turn(x.to(cosines.dtype), cosines, sines).to(x.dtype)
    cosines, sines = cosines[:, None], sines[:, None]
    first, second = x.chunk(2, -1)
    turned = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    left, right = turned.chunk(2, -1)
    torch.mul(first, cosines, out=left).addcmul_(second, sines, value=-1)
    torch.mul(second, cosines, out=right).addcmul_(first, sines)
    return turned
