"""Loading what trains: in full, as an adapter, on 4-bit base weights."""

import json
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from tests import tiny
from tests.test_parity import ADAMW, random_pairs
from zephyr.data.batch import pack_pairs
from zephyr.dpo import DPO
from zephyr.errors import UserError
from zephyr.models import decoder
from zephyr.models.logps import sequence_sums, token_logps
from zephyr.models.policy import Placement, check_policy, load_policy
from zephyr.models.reference import AdapterOff

LORA = tiny.lora(dropout=0.05, modules=["q_proj", "down_proj"])
CPU = Placement(torch.device("cpu"), "32-true")
BATCH = pack_pairs(random_pairs())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.model(0).save_pretrained(folder)
    return str(folder)


def load(base, lora=None, quantization=None, checkpointing="none", frozen=False):
    return load_policy(base, None, tiny.model_settings(lora, quantization, checkpointing), CPU, frozen)


def sequence_logps(policy, batch):
    return sequence_sums(token_logps(policy, batch), batch, 2 * batch.examples)


def gradients(policy):
    policy.train()
    sequence_logps(policy, BATCH).sum().backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}


def test_a_full_policy_is_the_saved_model_on_segment_attention(base):
    policy = load(base)
    assert policy.config._attn_implementation == "segments" and not policy.config.use_cache
    for name, parameter in tiny.model(0).named_parameters():
        assert_close(policy.get_parameter(name), parameter, rtol=0, atol=0)


def test_activation_checkpointing_gives_the_same_gradients_and_is_really_on(base, monkeypatch):
    plain = gradients(load(base))
    calls = []
    checkpoint = decoder.checkpoint
    policy = load(base, checkpointing="full")
    monkeypatch.setattr(decoder, "checkpoint", lambda *args, **kwargs: calls.append(1) or checkpoint(*args, **kwargs))
    for name, gradient in gradients(policy).items():
        assert_close(gradient, plain[name], rtol=1e-5, atol=1e-7)
    assert len(calls) == 2  # one a layer


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_an_adapter_trains_alone_from_ln_2(base, quantization):
    if quantization:
        pytest.importorskip("bitsandbytes")
    policy = load(base, LORA, quantization)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2 and all("lora_" in name for name in trained)  # A and B, two layers, two modules
    task = DPO(policy, ADAMW, 10, 10.0, objective=tiny.objective(), reference=AdapterOff(follows=False))
    loss, sums = task.loss(BATCH)
    assert loss.item() / 4 == pytest.approx(0.693147, abs=1e-6) and sums["rewards/margins"] == 0
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in policy.named_parameters() if "lora_B" in n)


def test_nf4_really_holds_the_base_in_four_bits(base):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    policy = load(base, LORA, "nf4")
    quantised = [m for m in policy.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(quantised) == 7 * 2  # every linear layer but the head
    assert all(m.weight.dtype == torch.uint8 and m.weight.quant_type == "nf4" for m in quantised)


def test_gradients_survive_a_validation_between_steps_on_four_bits(base):
    """On some CPUs an evaluation pass repacks 4-bit weights so that no gradient comes back through them."""
    pytest.importorskip("bitsandbytes")
    policy = load(base, replace(LORA, dropout=0.0), "nf4")
    before = {name: gradient.clone() for name, gradient in gradients(policy).items()}
    policy.zero_grad()
    with torch.no_grad():
        sequence_logps(policy.eval(), BATCH)
    for name, gradient in gradients(policy).items():
        assert_close(gradient, before[name])


def test_misspelt_target_modules_are_named_beside_the_real_ones(base):
    lora = tiny.lora(modules=["q_porj"])
    with pytest.raises(UserError, match="q_porj name no linear layer; there are .*q_proj"):
        load(base, lora)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": {"model_type": "gemma2", "final_logit_softcapping": 30.0}}, "final_logit_softcapping"),
        ({"model/config.json": {}}, "Did you mean .*model"),
        ({}, "holds no model"),
    ],
    ids=["softcapped", "output folder", "empty"],
)
def test_what_cannot_be_trained_is_refused_before_weights_load(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        check_policy(str(tmp_path), None)
