"""fp32 products on a CPU, by the faster of the two libraries that torch has for them.

torch leaves them to MKL, which on a CPU of AMD's keeps to half the width of the machine's vectors; oneDNN takes what is
there. All other products are torch's, as is everything that is compiled.
"""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_FEW = 64  # rows of which a product costs less than oneDNN's preparations
_LEAST = 1e8  # floating-point operations that make their half a millisecond worth while
REPEATED = 10  # times at least that the layers of a model, or the heads of a layer, ask for products of a shape
_SHAPES = 256  # of products, for which oneDNN keeps its preparations: half a MiB each and more, and rows differ
_torchs_own = False


@contextmanager
def torchs_own() -> Iterator[None]:
    """All products are torch's, as on a GPU, while one is simulated."""
    global _torchs_own
    before, _torchs_own = _torchs_own, True
    try:
        yield
    finally:
        _torchs_own = before


def onednn_is_faster() -> bool:
    """Whether this is a CPU that MKL does not make full use of, and that stands for nothing else."""
    return not _torchs_own and _held_back()


@cache
def _held_back() -> bool:
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    for keeper in ("ONEDNN_PRIMITIVE_CACHE", "LRU_CACHE"):  # torch keeps them too; both read it at a first product
        os.environ.setdefault(f"{keeper}_CAPACITY", str(_SHAPES))
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux
        return "AuthenticAMD" in platform.processor()


def product(a: Tensor, b: Tensor, times: int = 1) -> Tensor:
    """a b^T; a [..., K], b [N, K] -> [..., N]. `times` is how often in a step this shape is asked for."""
    if not _by_onednn(a, b, times):
        return a @ b.T
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return result


def product_over_rows(a: Tensor, b: Tensor, times: int = 1) -> Tensor:
    """a^T b; a [T, M], b [T, N] -> [M, N]."""
    if not _by_onednn(a.T, b.T, times):
        return a.T @ b
    # it copies a first factor that is transposed: let that be the narrower one
    return product(a.T, b.T, times) if a.shape[1] <= b.shape[1] else product(b.T, a.T, times).T


def _by_onednn(a: Tensor, b: Tensor, times: int) -> bool:
    plain = a.device.type != "cpu" or not a.dtype == b.dtype == torch.float32
    return not plain and 2 * a.numel() * b.shape[0] * times >= _LEAST and onednn_is_faster()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias; x [..., I], weight [O, I]."""
    if torch.compiler.is_compiling():  # first of all: a question about sizes would be a graph for each answer
        return F.linear(x, weight, bias)
    ours = _by_onednn(x, weight, REPEATED) and not torch.is_autocast_enabled("cpu") and x.shape[:-1].numel() >= _FEW
    if not ours:
        return F.linear(x, weight, bias)
    result: Tensor = Product.apply(x, weight)  # type: ignore[no-untyped-call]
    return result if bias is None else result + bias


def add_product(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """x + scale a b^T, in place; x [M, N], a [M, K], b [N, K]."""
    if not _by_onednn(a, b, REPEATED):
        return x.addmm_(a, b.T, alpha=scale)
    result: Tensor = AddedProduct.apply(x, a, b, scale)  # type: ignore[no-untyped-call]
    return result


class Linear(nn.Linear):
    """torch's, but for who computes its products."""

    def forward(self, input: Tensor) -> Tensor:
        """x weight^T + bias; x [..., I], weight [O, I]."""
        return linear(input, self.weight, self.bias)


class Product(torch.autograd.Function):
    """x weight^T. With g the gradient of the result, that of x is g weight, that of the weight g^T x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        by_x, by_weight = ctx.needs_input_grad
        ctx.save_for_backward(x if by_weight else None, weight if by_x else None)
        return product(x, weight, REPEATED)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = None if weight is None else product(grad, weight.T, REPEATED)
        grad_weight = None if x is None else product_over_rows(grad.flatten(0, -2), x.flatten(0, -2), REPEATED)
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
        grad_a = product(grad, b.T, REPEATED).mul_(ctx.scale) if by_a else None
        return grad, grad_a, product_over_rows(grad, a, REPEATED).mul_(ctx.scale) if by_b else None, None
