"""Products in 8-bit floating point, as a CPU can emulate them."""

import copy

import pytest
import torch
from torch import nn

from tests import tiny
from tests.test_parity import dpo_task, one_step, perturbed, random_pairs, worst
from zephyr.errors import UserError
from zephyr.models.adapters import DEFAULT, attach
from zephyr.models.attention import SEGMENTS
from zephyr.models.decoder import rewrite
from zephyr.models.float8 import check_float8, use_float8

pytest.importorskip("torchao", reason="torchao is an extra")


def converted(model):
    return {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}


def step_of(policy, reference):
    policy.set_attn_implementation(SEGMENTS)
    rewrite(policy)
    return one_step(dpo_task(reference, policy), random_pairs())


def test_a_step_differs_by_the_rounding_of_8_bits():
    """e4m3 keeps three bits behind the first: 3 % a number at most, and less in a sum of many."""
    reference = tiny.model(0)
    policy = perturbed(reference)
    rounded = copy.deepcopy(policy)
    assert use_float8(rounded, emulate=True) == 2 * 7
    truth, true_gradients = step_of(policy, copy.deepcopy(reference))
    values, gradients = step_of(rounded, copy.deepcopy(reference))
    assert values["logps/chosen"] != truth["logps/chosen"]
    assert values["logps/chosen"] == pytest.approx(truth["logps/chosen"], rel=0.02)
    assert values["loss"] == pytest.approx(truth["loss"], rel=0.1)
    assert 0.005 < worst(gradients, true_gradients) < 0.25


@pytest.mark.parametrize("lora", [False, True])
def test_parameters_keep_names_values_and_dtypes_and_the_head_its_precision(lora):
    policy = tiny.model(0)
    model = attach(policy, tiny.lora(16), None, dtype=torch.float32) if lora else policy
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    use_float8(policy, emulate=True)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    names = converted(model)
    assert len(names) == 14 and not any("lm_head" in name or "lora_" in name for name in names)
    assert not lora or any(DEFAULT in name for name in trained)


def test_what_it_saves_loads_as_any_model(tmp_path):
    policy = tiny.model(0)
    before = copy.deepcopy(policy.state_dict())
    use_float8(policy, emulate=True)
    policy.save_pretrained(tmp_path)
    again = type(policy).from_pretrained(tmp_path)
    assert not converted(again)
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())


def test_layers_of_odd_sizes_stay_as_they_are():
    policy = tiny.model(0, intermediate_size=100)
    assert use_float8(policy, emulate=True) == 2 * 4
    assert not any("mlp" in name for name in converted(policy))
    with pytest.raises(UserError, match="multiples of 16"):
        use_float8(tiny.model(0, hidden_size=24, intermediate_size=40), emulate=True)


def test_it_is_refused_without_its_gpu_and_on_4_bits():
    with pytest.raises(UserError, match="needs a GPU, and this run is on a CPU"):
        check_float8(torch.device("cpu"))
    policy = tiny.model(0)
    policy.model.layers[0].mlp.up_proj = type("Linear4bit", (nn.Linear,), {})(64, 128)
    with pytest.raises(UserError, match="exclude each other"):
        use_float8(policy, emulate=True)


def test_an_old_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    with pytest.raises(UserError, match=r"NVIDIA A100 has 8\.0"):
        check_float8(torch.device("cuda"))


def test_it_runs_in_bf16_on_any_number_of_tokens():
    """The sum over 7 tokens of the weights' gradient is padded; without that the GPU's kernel refuses."""
    policy = tiny.model(0).bfloat16()
    use_float8(policy, emulate=True)
    layer = policy.model.layers[0].mlp.up_proj
    assert layer.config.pad_inner_dim
    out = layer(torch.randn(7, 64, dtype=torch.bfloat16, requires_grad=True))
    out.float().sum().backward()
    assert out.dtype == layer.weight.grad.dtype == torch.bfloat16
