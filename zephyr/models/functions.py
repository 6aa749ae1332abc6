"""A decoder layer's arithmetic but for attention, each function with a backward written by hand.

Left to autograd, a norm, a gate and a rotation write a dozen tensors a layer and keep half of them. These write what
they return, and keep their inputs; what later products keep of their results can be `recomputed`. Under torch.compile
the plain formulas are better: there the compiler does all this.

torch leaves fp32 products on a CPU to MKL, which on one that is not Intel's keeps to half the width of the machine's
vectors. oneDNN, which torch has too, takes what is there.

Letters: T tokens, H heads, E size of a head, D and I widths.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Layout = tuple[torch.Size, tuple[int, ...]]  # shape and stride

_FEW = 64  # rows, of which a product costs less than oneDNN's preparations
_silu_backward = torch.ops.aten.silu_backward.grad_input


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T; a [..., K], b [N, K] -> [..., N]."""
    if not _by_onednn(a, b):
        return a @ b.T
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return result


def product_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """a^T b; a [T, M], b [T, N] -> [M, N]."""
    if not _by_onednn(a, b):
        return a.T @ b
    # it copies a first factor that is transposed: let that be the narrower one
    return product(a.T, b.T) if a.shape[1] <= b.shape[1] else product(b.T, a.T).T


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether the two are fp32 on a CPU."""
    return a.device.type == "cpu" and a.dtype == b.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias; x [..., I], weight [O, I]."""
    ours = _by_onednn(x, weight) and not torch.is_autocast_enabled("cpu") and x.shape[:-1].numel() >= _FEW
    if torch.compiler.is_compiling() or not ours:
        return F.linear(x, weight, bias)
    result: Tensor = Product.apply(x, weight)  # type: ignore[no-untyped-call]
    return result if bias is None else result + bias


def add_product(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """x + scale a b^T, in place; x [M, N], a [M, K], b [N, K]."""
    if not _by_onednn(a, b):
        return x.addmm_(a, b.T, alpha=scale)
    result: Tensor = AddedProduct.apply(x, a, b, scale)  # type: ignore[no-untyped-call]
    return result


class Linear(nn.Linear):
    """torch's, but for who computes its products."""

    def forward(self, input: Tensor) -> Tensor:
        """x weight^T + bias; x [..., I], weight [O, I]."""
        return linear(input, self.weight, self.bias)


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


class Product(torch.autograd.Function):
    """x weight^T. With g the gradient of the result, that of x is g weight, that of the weight g^T x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        by_x, by_weight = ctx.needs_input_grad
        ctx.save_for_backward(x if by_weight else None, weight if by_x else None)
        return product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = None if weight is None else product(grad, weight.T)
        grad_weight = None if x is None else product_over_rows(grad.flatten(0, -2), x.flatten(0, -2))
        return grad_x, grad_weight


class AddedProduct(torch.autograd.Function):
    """x + scale a b^T, written over x. With g the gradient of the result, that of a is scale g b, of b scale g^T a."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.mark_dirty(x)
        ctx.save_for_backward(a, b)
        return x.addmm_(a, b.T, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        a, b = ctx.saved_tensors
        _, by_a, by_b, _ = ctx.needs_input_grad
        grad_a = product(grad, b.T).mul_(ctx.scale) if by_a else None
        return grad, grad_a, product_over_rows(grad, a).mul_(ctx.scale) if by_b else None, None


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
