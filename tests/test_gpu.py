"""What only a CUDA device shows: `python -m pytest -m gpu`. Elsewhere everything here is skipped."""

import math

import pytest
import torch

from tests.commands import metrics, train, world

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
