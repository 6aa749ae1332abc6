"""The reference's stream beside the policy's: one pass through the layers gives what two passes give."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GemmaConfig

from tests import tiny
from tests.ranks import spawn
from tests.test_adapters import sft_adapter
from tests.test_decoder import CPU, KINDS, PAIRS, SIZES
from tests.test_parity import ADAMW
from zephyr import distributed
from zephyr.data.batch import pack_pairs
from zephyr.dpo import DPO
from zephyr.models import adapters, decoder
from zephyr.models.logps import token_scores
from zephyr.models.policy import Placement, load_policy
from zephyr.models.reference import AdapterOff

BATCH = pack_pairs(PAIRS)
PLACE = Placement(CPU, "32-true")


def base(config, folder):
    """A model whose weights are large enough that every part matters, and whose norms are not all ones."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(torch.randn_like(parameter) * 0.1 + (1 if "norm" in name else 0))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    return base(KINDS["mistral, window"], tmp_path_factory.mktemp("base"))


def moved(policy):
    """Away from the reference: adapters begin with B = 0."""
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(len(name))
            local = getattr(parameter.data, "_local_tensor", parameter.data)
            local += 0.02 * torch.randn(local.shape, generator=generator).to(local.dtype)
    return policy


def step(policy, follows=False, passes=1, mixed=False):
    """The reference's log-probabilities, the policy's, the losses, and the gradients."""
    task = DPO(policy, ADAMW, 1, 1.0, objective=tiny.objective(), reference=AdapterOff(follows))
    assert task.reference.beside(policy)
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        if passes == 2:
            patch.setattr(AdapterOff, "beside", lambda *_: False)
        pairs, _ = task.pairs(BATCH)
        loss, _ = task.loss(BATCH)
    trained = [p for p in policy.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, trained)
    return [torch.cat(pairs[2:4]), torch.cat(pairs[:2]).detach(), loss.detach()], gradients


def check(policy, **how):
    """Equal values, equal gradients; and the policy is not the reference."""
    (values, gradients), (truth, expected) = step(policy, passes=1, **how), step(policy, passes=2, **how)
    assert (truth[0] - truth[1]).abs().max() > 0.1
    for value, true in zip(values, truth, strict=True):
        assert_close(value, true, rtol=1e-6, atol=1e-6)
    for gradient, true in zip(gradients, expected, strict=True):
        assert true.norm() > 0
        assert (gradient.double() - true.double()).norm() <= 1e-5 * true.double().norm()


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_one_pass_is_two(mistral, quantization, precision, checkpointing):
    """Grouped queries and a sliding window among it."""
    settings = tiny.model_settings(tiny.lora(), quantization, checkpointing)
    policy = moved(load_policy(mistral, None, settings, Placement(CPU, precision)))
    check(policy, mixed=precision == "bf16-mixed")


@pytest.mark.parametrize("kind", ["qwen2, windowed above", "qwen3"])
def test_biases_norms_of_heads_and_layers_without_adapters(tmp_path, kind):
    settings = tiny.model_settings(tiny.lora(modules=["q_proj", "down_proj"]), "nf4", "selective")
    check(moved(load_policy(base(KINDS[kind], tmp_path), None, settings, PLACE)))


@pytest.mark.parametrize("follows", [False, True])
def test_the_reference_keeps_the_adapter_that_training_started_from(mistral, tmp_path, follows):
    """And has its own where it follows the policy."""
    sft_adapter(mistral, tmp_path / "sft")
    settings = tiny.model_settings(tiny.lora(), "nf4")
    policy = moved(load_policy(str(tmp_path / "sft"), None, settings, PLACE, follower=follows))
    if follows:
        adapters.sync(policy, 0.3)
    check(policy, follows=follows)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_dropout_is_the_policys_alone_and_falls_as_without_the_reference(mistral, checkpointing):
    """Whatever passes beside it draws no random number, not even where a layer is computed again."""
    settings = tiny.model_settings(tiny.lora(dropout=0.05), "nf4", checkpointing)
    policy = moved(load_policy(mistral, None, settings, PLACE))
    trained = [p for p in policy.parameters() if p.requires_grad]
    found = []
    for reference in (True, False):
        torch.manual_seed(3)
        scores = token_scores(policy, BATCH, reference=reference)
        found.append((scores, torch.autograd.grad(scores.logps.sum(), trained)))
    (both, gradients), (alone, expected) = found
    assert_close(both.logps, alone.logps, rtol=1e-6, atol=1e-6)
    assert_close(gradients, expected, rtol=1e-5, atol=1e-5)
    with adapters.default_off(policy), torch.no_grad():
        assert_close(both.reference, token_scores(policy, BATCH).logps, rtol=1e-6, atol=1e-6)
    assert (both.logps - token_scores(policy.eval(), BATCH).logps).abs().max() > 1e-4


def test_a_layer_computed_again_is_the_policys_alone(mistral, monkeypatch):
    """Three layers: attention of both streams forward, of one backward."""
    policy = moved(load_policy(mistral, None, tiny.model_settings(tiny.lora(), None, "full"), PLACE))
    calls, attend = [], decoder.attend
    monkeypatch.setattr(decoder, "attend", lambda *args: calls.append(args) or attend(*args))
    step(policy)
    assert len(calls) == 3 * 2 + 3 * (2 + 1)  # the log-probabilities' own pass, then that of the loss


def test_where_one_pass_cannot_be_there_are_two(mistral, tmp_path):
    """DoRA rescales the base's rows; compiled layers and other architectures carry one stream."""
    dora = load_policy(mistral, None, tiny.model_settings(tiny.lora(dora=True)), PLACE)
    compiled = load_policy(mistral, None, tiny.model_settings(tiny.lora()), replace(PLACE, compile=True))
    gemma = base(GemmaConfig(**SIZES, head_dim=16), tmp_path)
    other = load_policy(gemma, None, tiny.model_settings(tiny.lora()), PLACE)
    assert not any(AdapterOff(False).beside(policy) for policy in (dora, compiled, other))


def sharded(folder, quantization):
    with distributed.process_group("cpu"), pytest.MonkeyPatch.context() as patch:
        mesh = init_device_mesh("cpu", (2,))
        settings = tiny.model_settings(tiny.lora(), quantization, "selective")
        policy = moved(load_policy(folder, None, settings, replace(PLACE, mesh=mesh)))
        gathers, real = [], _fsdp_param_group.foreach_all_gather
        patch.setattr(_fsdp_param_group, "foreach_all_gather", lambda *a, **o: gathers.append(a) or real(*a, **o))
        found = []
        for passes in (1, 2):
            task = DPO(policy, ADAMW, 1, 1.0, objective=tiny.objective(), reference=AdapterOff(False))
            patch.setattr(AdapterOff, "beside", lambda *_, passes=passes: passes == 1)
            policy.zero_grad()
            gathers.clear()
            loss, sums = task.loss(BATCH)
            before = len(gathers)
            loss.backward()
            gradients = [p.grad.full_tensor() for p in policy.parameters() if p.requires_grad]
            found.append([before, len(gathers), [loss.detach(), *sums.values()], gradients])
        return found


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_sharded_layers_are_gathered_once_for_both(mistral, tmp_path, quantization):
    """Three layers, and the rest as one: four gathers forward. The numbers are those of two passes."""
    for one, two in spawn(partial(sharded, mistral), 2, tmp_path, quantization):
        assert (one[0], two[0]) == (4, 8)
        assert two[1] - one[1] == 4
        assert_close(one[2:], two[2:], rtol=1e-5, atol=1e-6)
