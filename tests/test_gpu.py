"""What only a CUDA device shows: `python -m pytest -m gpu`. Elsewhere everything here is skipped."""

import copy
import math

import pytest
import torch
from torch.testing import assert_close

from tests import tiny
from tests.commands import metrics, train, world
from zephyr.models.float8 import check_float8, use_float8
from zephyr.training.optimizer import LeanAdamW

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHORT = ("trainer.accelerator=gpu", "trainer.max_steps=6", "trainer.eval_every_n_steps=null", "trainer.threads=null")
WAYS = {
    "plain": (),
    "bf16": ("trainer.precision=bf16-mixed",),
    "sharded bf16": ("trainer=fsdp", "trainer.precision=bf16-mixed", "model.activation_checkpointing=full"),
    "sharded, selective": ("trainer=fsdp", "trainer.precision=bf16-mixed", "model.activation_checkpointing=selective"),
    "sharded, offloaded": ("trainer=fsdp", "trainer.precision=bf16-mixed", "trainer.cpu_offload=true"),
    "compiled": ("trainer.precision=bf16-mixed", "trainer.compile=true"),
    "sharded, compiled": ("trainer=fsdp", "trainer.precision=bf16-mixed", "trainer.compile=true"),
    "8-bit state": ("optimizer.name=adamw_8bit", "trainer.precision=bf16-mixed"),
    "bf16 weights": ("trainer.precision=bf16-true",),
    "bf16 weights, 8-bit state": ("trainer.precision=bf16-true", "optimizer.name=adamw_8bit"),
    "sharded, 8-bit state": ("trainer=fsdp", "trainer.precision=bf16-true", "optimizer.name=adamw_8bit"),
    "sharded, offloaded, 8-bit state": (
        "trainer=fsdp",
        "trainer.precision=bf16-mixed",
        "trainer.cpu_offload=true",
        "optimizer.name=adamw_8bit",
    ),
    "qlora, 8-bit state": ("trainer=qlora", "trainer.precision=bf16-mixed", "optimizer.name=adamw_8bit"),
    "qlora, paged": ("trainer=qlora", "model.lora.rank=8", "trainer.precision=bf16-mixed"),
    "qlora, 8 bits": ("trainer=qlora", "optimizer.name=paged_adamw_8bit", "trainer.precision=bf16-mixed"),
    "qlora, sharded": ("trainer=qlora", "trainer.strategy=fsdp", "trainer.precision=bf16-mixed"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return world(tmp_path_factory.mktemp("gpu"))


@pytest.mark.parametrize("way", WAYS)
def test_dpo_starts_at_ln_2_and_learns(folder, way):
    output = folder / way.replace(" ", "-")
    train(folder, "dpo", output, *SHORT, *WAYS[way])
    rows = metrics(output)
    bound = 1e-6 if way == "plain" else 2e-3
    assert rows[0]["eval/loss"] == pytest.approx(math.log(2), abs=bound)
    assert rows[-1]["eval/loss"] < rows[0]["eval/loss"] - 0.01


def test_a_gpu_run_equals_a_cpu_run(folder):
    one, other = folder / "on-cpu", folder / "on-gpu"
    train(folder, "sft", one, *SHORT[1:])
    train(folder, "sft", other, *SHORT)
    for row, truth in zip(metrics(other), metrics(one), strict=True):
        assert row == pytest.approx(truth, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("eight_bits", [True, False])
def test_the_lean_optimizer_steps_there_as_on_a_cpu(dtype, eight_bits):
    """A compiled kernel there, plain operations here; the lots are the same. Logarithms, roots and sums may differ in
    the last bit, which turns the draw of one number in thousands."""
    found = []
    for device in ("cuda", "cpu"):
        generator = torch.Generator().manual_seed(0)
        weights = torch.nn.Parameter(torch.randn(300, 512, generator=generator).to(device, dtype))
        stepping = LeanAdamW([weights], 1e-3, (0.9, 0.999), 1e-8, 0.1, eight_bits=eight_bits)
        for _ in range(5):
            weights.grad = torch.randn(300, 512, generator=generator).to(device, dtype)
            stepping.step()
        found.append(weights.detach().cpu().float())
    assert ((found[0] - found[1]).abs() > 1e-6).float().mean() < (
        0.01 if eight_bits or dtype is torch.bfloat16 else 1e-4
    )
    assert_close(*found, rtol=0.01, atol=1e-3)


def test_the_lean_optimizer_needs_no_memory_of_its_own():
    """2^26 bf16 weights: weights, gradients and 8-bit state are 6 bytes a number; a step allocates a tenth of that."""
    weights = torch.nn.Parameter(torch.ones(2**14, 2**12, dtype=torch.bfloat16, device="cuda"))
    stepping = LeanAdamW([weights], 1e-3, (0.9, 0.999), 1e-8, eight_bits=True)
    weights.grad = torch.ones_like(weights)
    stepping.step()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    stepping.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - held < 0.1 * 6 * weights.numel()


def test_products_in_8_bits_equal_their_emulation():
    """Of 1000 tokens, which the kernel of the weights' gradient takes padded to 1008."""
    pytest.importorskip("torchao", reason="torchao is an extra")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs 8-bit floating point")
    check_float8(torch.device("cuda"))
    start, x = tiny.model(0, hidden_size=256, intermediate_size=512).bfloat16().cuda(), torch.randn(1000, 256)
    found = []
    for emulate in (False, True):
        policy = copy.deepcopy(start)
        assert use_float8(policy, emulate) == 14
        layer = policy.model.layers[0].mlp.up_proj
        inputs = x.bfloat16().cuda().requires_grad_()
        out = layer(inputs)
        out.float().square().sum().backward()
        found.append([tensor.float() for tensor in (out.detach(), inputs.grad, layer.weight.grad)])
    for real, emulated in zip(*found, strict=True):
        assert (real - emulated).norm() < 0.01 * emulated.norm()
