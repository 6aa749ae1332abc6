"""The least time that a DPO step could take on this machine: its necessary arithmetic, as plain matrix products."""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.shapes import Shape
from zephyr.data.batch import Batch, Segment
from zephyr.models.products import product, product_over_rows


class Product(NamedTuple):
    """A linear layer's work: `rows` of `inputs` numbers become rows of `outputs` numbers, in `times` layers."""

    rows: int
    inputs: int
    outputs: int
    times: int


def products(shape: Shape, batch: Batch) -> list[Product]:
    """The linear layers of a forward pass over a packed row.

    The last layer's keys and values are needed of every token, all else there of those rows alone from which
    something is predicted.
    """
    hidden, values = shape.hidden, shape.hidden // shape.heads * shape.key_value_heads
    every, read, scored = len(batch.ids), len(batch.tail.rows), len(batch.targets)
    whole = [(hidden, hidden, 2), (hidden, shape.intermediate, 2), (shape.intermediate, hidden, 1)]
    found = [Product(every, hidden, values, 2 * shape.layers), Product(scored, hidden, shape.vocabulary, 1)]
    for inputs, outputs, times in whole:
        found += [Product(every, inputs, outputs, times * (shape.layers - 1)), Product(read, inputs, outputs, times)]
    return found


def attention_flops(shape: Shape, batch: Batch) -> float:
    """Floating-point operations of attention in a forward pass: two products over what each token attends to."""
    contexts = (shape.layers - 1) * _context(batch.segments) + _context(batch.tail.segments)
    return 4.0 * shape.hidden * contexts


def _context(segments: list[Segment]) -> float:
    # a token sees its prefix and, of its own segment, itself and what comes before
    return sum((q := s.end - s.start) * (q + 1) / 2 + q * (s.prefix_end - s.prefix_start) for s in segments)


def linear_flops(shape: Shape, batch: Batch) -> float:
    """Floating-point operations of the linear layers in a forward pass."""
    return sum(2.0 * p.rows * p.inputs * p.outputs * p.times for p in products(shape, batch))


def step_flops(shape: Shape, batch: Batch, live_reference: bool = True) -> float:
    """Those of a whole step: both passes of the policy (a backward pass costs two forward) and the reference's one."""
    return (3 + live_reference) * (linear_flops(shape, batch) + attention_flops(shape, batch))


def floor_seconds(shape: Shape, batch: Batch) -> tuple[float, float]:
    """CPU seconds of the products of a DPO step with live reference, timed on this machine, one thread.

    Of each linear layer the policy's pass, the reference's, the gradient of the inputs and that of the weights are
    run, as torch multiplies and by the faster of the two libraries that it has; attention, counted causally, is
    reckoned at the rate that these reach together.
    """
    spent = [0.0, 0.0]
    for rows, inputs, outputs, times in products(shape, batch):
        x, w, g = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
        y, by_x, by_w = torch.empty(rows, outputs), torch.empty(rows, inputs), torch.empty(outputs, inputs)
        plain = _spent(partial(_plain, x, w, g, (y, by_x, by_w)), times)
        chosen = _spent(partial(_chosen, x, w, g), times)
        spent = [spent[0] + plain, spent[1] + min(plain, chosen)]
    whole = 1 + attention_flops(shape, batch) / linear_flops(shape, batch)
    return spent[0] * whole, spent[1] * whole


def _plain(x: Tensor, w: Tensor, g: Tensor, out: tuple[Tensor, Tensor, Tensor]) -> None:
    torch.mm(x, w.T, out=out[0])
    torch.mm(x, w.T, out=out[0])
    torch.mm(g, w, out=out[1])
    torch.mm(g.T, x, out=out[2])


def _chosen(x: Tensor, w: Tensor, g: Tensor) -> None:
    product(x, w)
    product(x, w)
    product(g, w.T)
    product_over_rows(g, x)


def _spent(products: Callable[[], object], times: int) -> float:
    products()  # what is prepared for a shape is not the product
    start = time.process_time()
    for _ in range(times):
        products()
    return time.process_time() - start


def product_rate(size: int = 1024, seconds: float = 0.3) -> float:
    """FLOP/s that a square fp32 product reaches here, on as many threads as torch is set to; the best of several."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, _spent(lambda: torch.mm(a, b), 1), _spent(lambda: product(a, b), 1))
    return 2.0 * size**3 / best
