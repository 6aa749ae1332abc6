"""Products of our own choosing, against the same in float64."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from zephyr.models import products
from zephyr.models.products import _FEW, Linear, add_product, linear, product, product_over_rows


@pytest.fixture(autouse=True, params=[True, False], ids=["onednn", "mkl"])
def library(request, monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param)
    monkeypatch.setattr(products, "_LEAST", 0)
    return request.param


@pytest.mark.parametrize("shape", [(_FEW, 24), (2, 100, 24), (_FEW - 1, 24), (1, 24)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outputs", [8, 24, 40])
def test_a_linear_layer_and_its_gradients(shape, bias, outputs):
    torch.manual_seed(0)
    layer = nn.Linear(24, outputs, bias)
    truth = nn.Linear(24, outputs, bias, dtype=torch.float64)
    truth.load_state_dict(layer.state_dict())
    layer.__class__ = Linear
    x = torch.randn(shape, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    ours, theirs = layer(x), truth(wide)
    assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(ours.shape)
    mine = torch.autograd.grad(ours, [x, *layer.parameters()], upstream)
    right = torch.autograd.grad(theirs, [wide, *truth.parameters()], upstream.double())
    for a, b in zip(mine, right, strict=True):
        assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_a_gradient_that_is_one_number_everywhere():
    """The gradient of a sum is a view of a single number."""
    x, weight = torch.randn(100, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    linear(x, weight).sum().backward()
    assert_close(x.grad, weight.detach().sum(0).expand(100, 8))
    assert_close(weight.grad, x.detach().sum(0).expand(5, 8))


@pytest.mark.parametrize("trains", ["x", "weight"])
def test_nothing_is_kept_for_a_gradient_that_nobody_wants(trains):
    x, weight = torch.randn(100, 8, requires_grad=trains == "x"), torch.randn(5, 8, requires_grad=trains == "weight")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        linear(x, weight)
    assert kept == [weight.numel() if trains == "x" else x.numel()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n"), [(3, 7), (7, 3)])
def test_products_of_either_orientation(m, n, dtype):
    a, b = torch.randn(90, m, dtype=dtype), torch.randn(90, n, dtype=dtype)
    assert_close(product_over_rows(a, b), torch.einsum("tm,tn->mn", a, b))
    assert_close(product(a.T, b.T), torch.einsum("tm,tn->mn", a, b))


def test_a_product_added_in_place():
    torch.manual_seed(0)
    x, a, b = torch.randn(9, 5), torch.randn(9, 2, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    start = x.clone().requires_grad_()
    base = start * 1.0
    result = add_product(base, a, b, 0.5)
    assert result.data_ptr() == base.data_ptr()
    upstream = torch.randn(9, 5)
    mine = torch.autograd.grad(result, [start, a, b], upstream)
    truth = start + 0.5 * F.linear(a, b)
    assert_close(result, truth)
    for one, other in zip(mine, torch.autograd.grad(truth, [start, a, b], upstream), strict=True):
        assert_close(one, other)


def test_a_compiler_finds_one_graph_whatever_the_size(monkeypatch):
    monkeypatch.setattr(products, "_LEAST", 2 * 300 * 8 * 5 * products.REPEATED)
    graphs, weight = [], torch.randn(5, 8)

    def compiler(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: linear(x, weight), backend=compiler, dynamic=True, fullgraph=True)
    for rows in (200, 400):
        x = torch.randn(rows, 8)
        assert_close(compiled(x), F.linear(x, weight))
    assert len(graphs) == 1


SHAPES = """
import re
from pathlib import Path
import torch
from zephyr.models import products
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
products._LEAST, products._SHAPES = 0, 16
products.onednn_is_faster()
products.onednn_is_faster = lambda: True
x, weight = torch.randn(600, 512), torch.randn(512, 512)
products.product(x, weight)
before = resident()
for rows in range(100, 500):
    products.product(x[:rows], weight)
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells what is resident")
def test_preparations_are_kept_for_few_shapes(library):
    """400 shapes take 270 MiB where all are kept; torch keeps them beside oneDNN."""
    if not library:
        pytest.skip("once is enough")
    clean = {
        name: value for name, value in os.environ.items() if not name.endswith("_CAPACITY")
    }  # this process has set
    command = [sys.executable, "-c", SHAPES]
    found = subprocess.run(command, env=clean, capture_output=True, text=True, check=True).stdout
    assert int(found) < 100
