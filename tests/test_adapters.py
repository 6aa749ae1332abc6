"""Adapters over a frozen base: what the policy and its reference are, and what is exported of them."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from tests import tiny
from tests.test_export import CARD
from tests.test_parity import random_pairs
from zephyr.data.batch import pack_pairs
from zephyr.errors import UserError
from zephyr.export import export
from zephyr.models import adapters
from zephyr.models.adapters import DEFAULT, START, attach
from zephyr.models.lineage import Lineage, check_lineage, lineage
from zephyr.models.logps import token_logps
from zephyr.models.policy import Placement, load_policy, weights_fingerprint

peft = pytest.importorskip("peft")
bitsandbytes = pytest.importorskip("bitsandbytes")

IDS = torch.arange(60)[None]
BATCH = pack_pairs(random_pairs())
SFT = tiny.lora(rank=4, alpha=8.0, modules=["q_proj", "v_proj", "down_proj"])
DPO = tiny.lora(rank=3, alpha=5.0)  # another rank, and more layers


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "base"
    tiny.model(0).save_pretrained(folder)
    return folder


def core(base: Path, quantization: str | None = None, dtype: torch.dtype = torch.float32):
    options = {}
    if quantization:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quantization, bnb_4bit_compute_dtype=dtype
        )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # else evaluation rounds to bf16 on some CPUs
    return model


def trained(model, seed: int = 0, adapter: str = DEFAULT):
    """Give an adapter weights as if it had trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if f"lora_B.{adapter}." in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
            elif f"magnitude_vector.{adapter}." in name:
                weight.mul_(1 + 0.1 * torch.rand(weight.shape, generator=generator))
    return model


def sft_adapter(base: Path, folder: Path, lora=SFT, quantization=None) -> tuple[Lineage, torch.Tensor]:
    """An exported SFT adapter, and its policy's logits."""
    policy = trained(attach(core(base, quantization), lora, None, dtype=torch.float32))
    export(policy, tiny.tokenizer(), folder, CARD)
    return lineage(str(folder), None), logits(policy)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def by_hand(base: Path, policy, quantization: str | None, scalings: dict[str, float]):
    """A plain model whose weights are W + sum of scaling B A, W being what 4 bits left of it."""
    plain, held = core(base), core(base, quantization)
    factors = dict(policy.named_parameters())
    with torch.no_grad():
        for name, module in held.named_modules():
            if not isinstance(module, torch.nn.Linear) or name == "lm_head":
                continue
            weight = module.weight
            if quantization:
                weight = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            total = weight.clone()
            for adapter, scaling in scalings.items():
                a, b = (factors.get(f"base_model.model.{name}.lora_{x}.{adapter}.weight") for x in "AB")
                if a is not None:
                    total += scaling * b @ a
            plain.get_submodule(name).weight.copy_(total)
    return plain


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_on_an_adapter(base: Path, tmp_path: Path, quantization, rslora):
    """It starts as the SFT model, is that again when switched off, and is exported as one adapter of the base."""
    start, sft = sft_adapter(base, tmp_path / "sft", replace(SFT, rslora=rslora), quantization)
    policy = attach(core(base, quantization), replace(DPO, rslora=rslora), start, dtype=torch.float32)
    assert torch.equal(logits(policy), sft)
    assert {name.split(".")[-2] for name, p in policy.named_parameters() if p.requires_grad} == {DEFAULT}

    trained(policy, seed=1)
    both = logits(policy)
    assert (both - sft).abs().max() > 0.01
    with adapters.default_off(policy):
        assert torch.equal(logits(policy), sft)
    assert torch.equal(logits(policy), both)
    scalings = {START: 8 / math.sqrt(4), DEFAULT: 5 / math.sqrt(3)} if rslora else {START: 8 / 4, DEFAULT: 5 / 3}
    assert_close(both, logits(by_hand(base, policy, quantization, scalings)), rtol=0, atol=1e-6)

    export(policy, tiny.tokenizer(), tmp_path / "dpo", CARD)
    config = json.loads((tmp_path / "dpo/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (7, 7, False)
    assert len(config["target_modules"]) == 7 and config["base_model_name_or_path"] == str(base)
    alone = peft.PeftModel.from_pretrained(core(base, quantization), tmp_path / "dpo")
    assert_close(logits(alone), both, rtol=0, atol=1e-6)
    again = attach(core(base, quantization), None, lineage(str(tmp_path / "dpo"), None), dtype=torch.float32)
    assert torch.equal(logits(again), logits(alone)) and not any(p.requires_grad for p in again.parameters())


def test_default_off_is_disable_adapter_where_there_is_no_start_and_changes_no_flag(base: Path):
    policy = trained(attach(core(base), DPO, None, dtype=torch.float32))
    flags = {name: p.requires_grad for name, p in policy.named_parameters()}
    with pytest.raises(KeyboardInterrupt), adapters.default_off(policy):
        off = logits(policy)
        assert {name: p.requires_grad for name, p in policy.named_parameters()} == flags
        raise KeyboardInterrupt
    assert {name: p.requires_grad for name, p in policy.named_parameters()} == flags
    on = logits(policy)
    assert torch.equal(off, logits(core(base))) and not torch.equal(on, off)
    with policy.disable_adapter():
        assert torch.equal(logits(policy), off)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_gradients_do_not_see_references_computed_in_between(base: Path, tmp_path: Path, quantization):
    """Not even where the policy's layers are computed a second time in the backward pass."""
    start, _ = sft_adapter(base, tmp_path / "sft", quantization=quantization)

    def gradients(checkpointing: str, references: bool):
        model = tiny.model_settings(DPO, quantization, checkpointing)
        policy = load_policy(str(start.folder), None, model, Placement(torch.device("cpu"), "32-true"), follower=True)
        trained(policy, seed=1)
        loss = token_logps(policy, BATCH).sum()
        if references:
            for other in (adapters.default_off, adapters.reference_on):
                with torch.no_grad(), other(policy):
                    token_logps(policy, BATCH)
        loss.backward()
        return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}

    plain, other = gradients("none", False), gradients("full", True)
    assert len(plain) == 2 * 14 and all(gradient.abs().sum() > 0 for gradient in plain.values())
    assert_close(other, plain, rtol=0, atol=0)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_dora_alone(base: Path, tmp_path: Path, quantization):
    lora = replace(SFT, dora=True)
    policy = attach(core(base, quantization), lora, None, dtype=torch.float32)
    assert torch.equal(logits(policy), logits(core(base, quantization)))
    trained(policy)
    factors = dict(policy.named_parameters())
    plain = by_hand(base, policy, quantization, {DEFAULT: 8 / 4})
    with torch.no_grad():
        for name, module in plain.named_modules():
            magnitude = factors.get(f"base_model.model.{name}.lora_magnitude_vector.default.weight")
            if magnitude is not None:
                module.weight *= (magnitude / module.weight.norm(dim=1))[:, None]
    assert_close(logits(policy), logits(plain), rtol=0, atol=1e-6)
    export(policy, tiny.tokenizer(), tmp_path / "dora", CARD)
    alone = peft.PeftModel.from_pretrained(core(base, quantization), tmp_path / "dora")
    assert_close(logits(alone), logits(policy), rtol=0, atol=1e-6)


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_starts_as_its_base_whatever_the_precision(base: Path, monkeypatch, quantization, dtype):
    policy = attach(core(base, quantization, torch.bfloat16), replace(SFT, dora=True), None, dtype=dtype)
    real = torch.is_autocast_enabled  # asked without a device, it speaks of CUDA: there, 4-bit layers cast otherwise
    monkeypatch.setattr("torch.is_autocast_enabled", lambda *device: real(*device) if device else True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        on = logits(policy)
        with adapters.default_off(policy):
            assert torch.equal(on, logits(policy))


def test_dora_below_or_above_another_adapter_is_refused_with_the_way_out(base: Path, tmp_path: Path):
    plain, _ = sft_adapter(base, tmp_path / "sft")
    dora, _ = sft_adapter(base, tmp_path / "dora", replace(SFT, dora=True))
    with pytest.raises(UserError, match=r"dora=true, .*python -m zephyr.merge .*/sft FOLDER"):
        attach(core(base), replace(DPO, dora=True), plain, dtype=torch.float32)
    with pytest.raises(UserError, match=r"/dora is a DoRA, .*python -m zephyr.merge .*/dora FOLDER"):
        attach(core(base), DPO, dora, dtype=torch.float32)
    frozen = attach(core(base), None, dora, dtype=torch.float32)
    assert_close(logits(frozen), logits(peft.PeftModel.from_pretrained(core(base), dora.folder)), rtol=0, atol=1e-6)


def test_a_base_without_weights_takes_the_same_adapters(base: Path, tmp_path: Path):
    """Its dtype changes nothing either, nor do random numbers drawn before."""
    start, _ = sft_adapter(base, tmp_path / "sft")
    torch.manual_seed(7)
    real = attach(core(base, dtype=torch.bfloat16), DPO, start, dtype=torch.float32)
    torch.rand(5)
    with init_empty_weights(include_buffers=False):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    empty = attach(skeleton, DPO, start, dtype=torch.float32)
    assert skeleton.get_input_embeddings().weight.is_meta
    expected = adapters.adapter_state(real)
    assert len(expected) == 2 * (6 + 14)
    assert_close(adapters.adapter_state(empty), expected, rtol=0, atol=0)
    drawn = expected["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"]
    assert (
        drawn.dtype == torch.float32
        and drawn.abs().max() <= 1 / 8
        and drawn.std() == pytest.approx(1 / 8 / 3**0.5, 0.2)
    )
    torch.manual_seed(8)
    other = adapters.adapter_state(attach(core(base), DPO, start, dtype=torch.bfloat16))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert other[name].dtype == torch.bfloat16 and not torch.equal(other[name].float(), drawn)


@pytest.mark.parametrize("dora", [False, True])
def test_a_sharded_policy(base: Path, dora):
    """One process, whose parameters are DTensors all the same."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = tiny.model_settings(replace(DPO, dora=dora))
        here = Placement(torch.device("cpu"), "32-true")
        whole = load_policy(str(base), None, model, here, follower=True)
        sharded = load_policy(str(base), None, model, replace(here, mesh=mesh), follower=True)
        assert all(isinstance(p, DTensor) for p in sharded.parameters())
        for policy in (whole, sharded):
            token_logps(policy, BATCH).sum().backward()
            with torch.no_grad():
                for p in policy.parameters():
                    if p.requires_grad:
                        p -= 0.1 * p.grad
            adapters.sync(policy, 0.25)
        assert_close(adapters.adapter_state(sharded), adapters.adapter_state(whole), rtol=0, atol=1e-6)
        for state in (adapters.default_off, adapters.reference_on):
            with torch.no_grad(), state(sharded), state(whole):
                assert_close(token_logps(sharded, BATCH), token_logps(whole, BATCH), rtol=0, atol=1e-5)
        late = load_policy(str(base), None, model, replace(here, mesh=mesh))
        with pytest.raises(RuntimeError, match="before the model is sharded"):
            adapters.add_reference(late)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dora", [False, True])
def test_a_reference_follows(base: Path, dora):
    policy = attach(core(base), replace(SFT, dora=dora, dropout=0.5), None, dtype=torch.float32)
    trained(policy)
    adapters.add_reference(policy)
    adapters.add_reference(policy)  # changes nothing
    before = {name: p.clone() for name, p in adapters.reference_parameters(policy)}
    assert len(before) == 6 * (2 + dora) and not any(p.requires_grad for _, p in adapters.reference_parameters(policy))
    on = logits(policy)
    with adapters.reference_on(policy), torch.no_grad():
        assert torch.equal(logits(policy), on)
        assert torch.equal(policy.train()(IDS).logits, on)  # dropout is not for it
    assert not torch.equal(policy.train()(IDS).logits, on)

    trained(policy, seed=1)
    with adapters.reference_on(policy):
        assert torch.equal(logits(policy), on)
    adapters.sync(policy, 0.25)
    own = dict(policy.named_parameters())
    for name, p in adapters.reference_parameters(policy):
        assert_close(p, 0.25 * own[name.replace(".reference.", ".default.")] + 0.75 * before[name])
    adapters.sync(policy, 1.0)
    with adapters.reference_on(policy):
        followed = logits(policy)
    assert torch.equal(followed, logits(policy)) and not torch.equal(followed, on)


def test_the_size_is_counted_and_quantisation_checked(base: Path):
    # A layer: q, o 64 x 64; k, v 64 x 32; gate, up, down 64 x 128; two norms. Embedding and head 258 x 64, one norm.
    total = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 2 * 258 * 64 + 64
    assert adapters.count(core(base)) == (0, total, total)
    policy = attach(core(base, "nf4"), DPO, None, dtype=torch.float32)
    adapter = sum(p.numel() for name, p in policy.named_parameters() if ".lora_" in name)
    assert adapter == 2 * 3 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))  # A and B of each layer, rank 3
    assert adapters.count(policy) == (14, adapter, total + adapter)
    assert adapters.counted(policy) == "6,144 of 113,216 parameters train (5.43%); 14 linear layers in 4 bits"

    adapters.check_quantised(policy)
    with pytest.raises(UserError, match=r"14 of 14 linear layers were left in full, first .*q_proj"):
        adapters.check_quantised(attach(core(base), DPO, None, dtype=torch.float32))
    half = core(base, "nf4")
    half.model.layers[1].mlp.up_proj = torch.nn.Linear(64, 128)
    with pytest.raises(UserError, match=r"1 of 14 linear layers were left in full, first model.layers.1.mlp.up_proj"):
        adapters.check_quantised(half)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "q_porj"])
def test_what_takes_no_adapter_is_refused(base: Path, name):
    """The head is computed without its layer, so an adapter there would do nothing."""
    with pytest.raises(UserError, match=f"{name} name no linear layer; there are down_proj, gate_proj"):
        adapters.check_targets(core(base), tiny.lora(modules=["q_proj", name]))


def test_an_adapter_of_some_layers_is_combined_by_name(base: Path, tmp_path: Path):
    config = peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[1], rank_pattern={"q_proj": 2})
    other = trained(peft.get_peft_model(core(base), config))
    other.save_pretrained(tmp_path / "foreign")
    start = lineage(str(tmp_path / "foreign"), None)
    assert start == Lineage(str(base), None, folder=tmp_path / "foreign")
    policy = attach(core(base), replace(DPO, target_modules=["q_proj"]), start, dtype=torch.float32)
    assert torch.equal(logits(policy), logits(other))
    config, _ = adapters.combined(trained(policy))
    assert config.r == 5 and config.target_modules == {"q_proj"}
    export(policy, tiny.tokenizer(), tmp_path / "both", CARD)
    alone = peft.PeftModel.from_pretrained(core(base), tmp_path / "both")
    assert_close(logits(alone), logits(policy), rtol=0, atol=1e-6)

    first = attach(core(base), None, start, dtype=torch.float32)
    assert adapters._shortest_names(first, [name for name, _ in adapters._layers(first)]) == [
        "model.layers.1.self_attn.q_proj"
    ]


def test_weights_that_do_not_fit_are_named(base: Path, tmp_path: Path):
    start, _ = sft_adapter(base, tmp_path / "sft")
    file = tmp_path / "sft/adapter_model.safetensors"
    weights = load_file(file)
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    for change, message in (
        ({name: torch.zeros(4, 3)}, r"it has no .*down_proj.lora_A.weight of shape \[4, 128\]"),
        ({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)}, "its .*lm_head.lora_A.weight has no place"),
    ):
        save_file({**weights, **change}, file)
        with pytest.raises(UserError, match=message):
            attach(core(base), DPO, start, dtype=torch.float32)
    head = peft.get_peft_model(core(base), peft.LoraConfig(target_modules=["lm_head"]))
    head.save_pretrained(tmp_path / "head", save_embedding_layers=False)
    with pytest.raises(UserError, match="changes the head"):
        attach(core(base), DPO, lineage(str(tmp_path / "head"), None), dtype=torch.float32)
    file.write_bytes(b"cut")
    with pytest.raises(UserError, match="Cannot read the adapter's weights"):
        attach(core(base), DPO, start, dtype=torch.float32)


def test_an_adapter_knows_its_base(base: Path, tmp_path: Path):
    start, _ = sft_adapter(base, tmp_path / "sft", quantization="nf4")
    fingerprint = weights_fingerprint(str(base), None)
    assert start == Lineage(str(base), None, fingerprint, "nf4", False, "float32", tmp_path / "sft")
    assert lineage(str(base), None) is None and lineage("no/such", None) is None and lineage("./no/such", None) is None

    check_lineage(start, str(base), None, fingerprint)
    check_lineage(start, str(base / ".." / "base"), None)
    with pytest.raises(UserError, match=r"trained on .*/base, but model.base=other/model.*set model.base=.*/base"):
        check_lineage(start, "other/model", None)
    with pytest.raises(UserError, match=f"weights in .*/base have changed .*{fingerprint}, now another"):
        check_lineage(start, str(base), None, "another")
    hub = start._replace(base="owner/model", base_revision="abc")
    check_lineage(hub, "owner/model", "abc")
    check_lineage(hub, "owner/model", None)
    with pytest.raises(UserError, match=r"revision abc of owner/model, but model.base_revision=def"):
        check_lineage(hub, "owner/model", "def")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3', which is not supported"),
        ({"bias": "all"}, "bias='all', which is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),  # it changed its base
        ({"modules_to_save": ["lm_head"]}, "changes whole modules"),
        ({"base_model_name_or_path": None}, "names no base"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_other_adapters_are_refused(base: Path, tmp_path: Path, change, message):
    peft.LoraConfig(target_modules=["q_proj"], base_model_name_or_path=str(base)).save_pretrained(tmp_path)
    assert lineage(str(tmp_path), None).base == str(base)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        lineage(str(tmp_path), None)
    file.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        lineage(str(tmp_path), None)


def test_a_base_of_the_hub_is_told_by_its_commit(base: Path, tmp_path: Path, monkeypatch):
    """Snapshots as huggingface_hub keeps them stand in for downloads."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"

    def published(name: str, folder: Path) -> None:
        place = tmp_path / f"models--org--{name}"
        shutil.copytree(folder, place / "snapshots" / commit)
        for reference in ("main", "v1"):
            (place / "refs").mkdir(exist_ok=True)
            (place / "refs" / reference).write_text(commit)

    published("base", base)
    assert lineage("org/base", None) is None and lineage("org/none", None) is None
    policy = trained(attach(core("org/base"), SFT, None, dtype=torch.float32, base_revision="v1"))
    export(policy, tiny.tokenizer(), tmp_path / "sft", CARD)
    published("adapter", tmp_path / "sft")
    start = lineage("org/adapter", commit)
    assert start[:3] == ("org/base", commit, None)
    assert torch.equal(logits(attach(core("org/base"), DPO, start, dtype=torch.float32)), logits(policy))
    check_lineage(start, "org/base", "v1")
    with pytest.raises(UserError, match="but model.base_revision=v2"):
        check_lineage(start, "org/base", "v2")
