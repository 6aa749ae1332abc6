"""How often a step of QLoRA turns a 4-bit weight back into numbers: what checkpointing costs there."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from tests.test_parity import dpo_task, random_pairs
from zephyr.data.batch import pack_pairs
from zephyr.models.policy import Placement, load_policy
from zephyr.models.reference import AdapterOff

OPENED = ("bitsandbytes.gemm_4bit", "bitsandbytes.dequantize_4bit")  # a product with a 4-bit weight; that weight alone


class Openings(TorchDispatchMode):
    """Counts both, by the memory of the packed weight."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removesuffix(".default").removesuffix(".out")
        if name in OPENED:
            self.of[args[name == OPENED[0]].data_ptr()] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.model(0, num_hidden_layers=3).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("checkpointing", "most"), [("none", 2), ("selective", 2), ("full", 3)])
def test_each_weight_is_opened_once_a_pass(base, checkpointing, most):
    """One forward pass for policy and reference, and a backward pass; full checkpointing adds the second forward.

    Nothing that trains lies before the first layer's queries, keys and values, so that they need no backward pass.
    """
    settings = tiny.model_settings(tiny.lora(4), "nf4", checkpointing)
    policy = load_policy(base, None, settings, Placement(torch.device("cpu"), "32-true"))
    task = dpo_task(tiny.model(1), tiny.model(1))
    task.policy, task.reference = policy, AdapterOff(False)
    weights = {
        module.weight.data_ptr(): name
        for name, module in policy.named_modules()
        if type(module).__name__ == "Linear4bit"
    }
    assert len(weights) == 3 * 7
    batch = pack_pairs(random_pairs(2))
    with Openings() as openings:
        loss, _ = task.loss(batch)
        forward = dict(openings.of)
        loss.backward()
    assert forward == dict.fromkeys(weights, 1)
    for memory, name in weights.items():
        first = ".layers.0." in name and any(part in name for part in ("q_proj", "k_proj", "v_proj"))
        assert openings.of[memory] == most - first, name
