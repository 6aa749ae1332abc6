"""The fast path against the plain one: transformers' own layers and dense attention, a sequence at a time, full logits."""

import contextlib
import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from tests import tiny
from tests.test_task import ADAMW
from zephyr.data.batch import IDLE, Conversation, Pair, pack_conversations, pack_pairs
from zephyr.dpo import DPO
from zephyr.models import decoder, functions, low_rank
from zephyr.models.logps import token_logps
from zephyr.models.policy import Placement, load_policy
from zephyr.models.reference import AdapterOff, Copy
from zephyr.objectives import Logps, preference_loss

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 258, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "eos_token_id": 256, "pad_token_id": 257,
    "tie_word_embeddings": False,
}  # fmt: skip
KINDS = {
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral, window": MistralConfig(**SIZES, sliding_window=16),
    "llama, biased": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, head_dim=32),
    "qwen2, windowed above": Qwen2Config(**SIZES, sliding_window=16, use_sliding_window=True, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
}


def words(length, seed):
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PAIRS = [Pair(words(p, 3 * i), words(c, 3 * i + 1), words(r, 3 * i + 2)) for i, (p, c, r) in enumerate(
    [(23, 31, 17), (5, 1, 40), (40, 12, 1), (1, 9, 9)])]  # fmt: skip


@pytest.fixture(params=KINDS)
def folder(request, tmp_path):
    """A model whose weights are large enough that every part matters, and whose norms are not all ones."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(KINDS[request.param])
    for name, parameter in model.named_parameters():
        parameter.data.copy_(torch.randn_like(parameter) * 0.1 + (1 if "norm" in name else 0))
    model.save_pretrained(tmp_path)
    return tmp_path


def plain_logps(model, pairs, wide=torch.float64):
    """Sum of log-probabilities of each completion, [2B]: every sequence by itself, nothing shared, nothing packed."""
    found = []
    for side in (1, 2):
        for pair in pairs:
            ids = torch.tensor([pair.prompt + pair[side]])
            logits = model(input_ids=ids).logits[0, len(pair.prompt) - 1 : -1].to(wide)
            found.append(F.log_softmax(logits, -1).gather(1, ids[0, len(pair.prompt) :, None]).double().sum())
    return torch.stack(found)


def plain_step(model, reference, pairs):
    """DPO's loss and gradients by transformers alone."""
    chosen, rejected = plain_logps(model, pairs).chunk(2)
    with torch.no_grad():
        base = plain_logps(reference, pairs).chunk(2)
    ones = torch.ones_like(chosen)
    loss = preference_loss(Logps(chosen, rejected, *base, ones, ones), tiny.objective(beta=0.1), None).sum()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return loss.item(), dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def fast_step(policy, reference, pairs, precision="32-true"):
    task = DPO(policy, None, 1, 1.0, objective=tiny.objective(beta=0.1), reference=Copy(reference))
    mixed = precision == "bf16-mixed"
    with torch.autocast("cpu", torch.bfloat16) if mixed else contextlib.nullcontext():
        loss, _ = task.loss(pack_pairs(pairs))
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    return loss.item(), dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def nudge(model):
    """Away from the reference, or the loss would be ln 2 whatever is computed."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    return model


def undo(policy):
    """transformers' own layers again, around PEFT's own."""
    assert sum(vars(module).pop("forward", None) is not None for module in policy.modules()) == 3
    for module in policy.modules():
        if isinstance(module, low_rank._Accumulating):
            module.__class__ = type(module).__mro__[2]


def distances(gradients, truth):
    """Relative L2 distance of each parameter's gradient."""
    assert gradients.keys() == truth.keys()
    return {
        n: ((g.double() - truth[n].double()).norm() / truth[n].double().norm()).item() for n, g in gradients.items()
    }


def whole_distance(gradients, truth):
    apart = sum((gradients[n].double() - t.double()).square().sum() for n, t in truth.items())
    return math.sqrt(apart / sum(t.double().square().sum() for t in truth.values()))


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_all_weights_in_fp32(folder, checkpointing):
    settings = tiny.model_settings(checkpointing=checkpointing)
    place = Placement(CPU, "32-true")
    policy = nudge(load_policy(str(folder), None, settings, place))
    loss, gradients = fast_step(policy, load_policy(str(folder), None, settings, place, frozen=True), PAIRS)
    plain = nudge(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32))
    truth, expected = plain_step(
        plain, AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"), PAIRS
    )
    assert abs(truth / len(PAIRS) - math.log(2)) > 0.001
    assert loss == pytest.approx(truth, rel=1e-5)
    apart = distances(gradients, expected)
    assert max(apart.values()) < 1e-5, max(apart.items(), key=lambda item: item[1])


@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_an_adapter_in_fp32(folder, checkpointing):
    settings = tiny.model_settings(tiny.lora(), checkpointing=checkpointing)
    place = Placement(CPU, "32-true")
    torch.manual_seed(0)
    policy = nudge(load_policy(str(folder), None, settings, place))
    loss, gradients = fast_step(policy, load_policy(str(folder), None, settings, place, frozen=True), PAIRS)
    undo(policy)
    policy.get_base_model().set_attn_implementation("eager")
    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    truth, expected = plain_step(policy, reference, PAIRS)
    assert loss == pytest.approx(truth, rel=1e-5)
    assert max(distances(gradients, expected).values()) < 1e-5


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("adapter", [None, tiny.lora()])
def test_bf16_is_as_near_the_truth_as_the_plain_path(folder, precision, adapter):
    """Rounding to 8 bits moves both by about a per cent; ours may be no further from float64 than transformers'."""
    settings = tiny.model_settings(adapter)
    place = Placement(CPU, precision)
    torch.manual_seed(0)
    policy = nudge(load_policy(str(folder), None, settings, place))
    loss, gradients = fast_step(policy, load_policy(str(folder), None, settings, place, frozen=True), PAIRS, precision)
    undo(policy)
    core = policy.get_base_model() if adapter else policy
    core.set_attn_implementation("eager")
    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=core.dtype)
    with torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext():
        rounded, plain = plain_step(policy, reference, PAIRS)
    truth, expected = plain_step(policy.double(), reference.double(), PAIRS)
    assert whole_distance(gradients, expected) < 1.1 * whole_distance(plain, expected) + 1e-4
    assert whole_distance(plain, expected) < 0.1
    assert abs(loss - truth) < 1.1 * abs(rounded - truth) + 0.02 * abs(truth)


def test_the_last_layer_computes_the_rows_that_are_read(tmp_path):
    AutoModelForCausalLM.from_config(KINDS["mistral"]).save_pretrained(tmp_path)
    place = Placement(CPU, "32-true")
    policy = load_policy(str(tmp_path), None, tiny.model_settings(), place)
    rows = []
    for layer in policy.get_decoder().layers:
        layer.mlp.gate_proj.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    fast_step(policy, load_policy(str(tmp_path), None, tiny.model_settings(), place, frozen=True), PAIRS)
    tokens, read = len(pack_pairs(PAIRS).ids), sum(len(p.chosen) + len(p.rejected) for p in PAIRS) - len(PAIRS)
    # The prompt's last token is read, the two last tokens of the completions are not.
    assert rows == [tokens, tokens, read] and read < 0.75 * tokens


@pytest.mark.parametrize("turns", [[0, 1, 1, 0, 0, 1, 0], [1] * 7, [0] * 6 + [1]])
def test_conversations_whatever_is_scored_of_them(folder, turns):
    settings, place = tiny.model_settings(), Placement(CPU, "32-true")
    policy = load_policy(str(folder), None, settings, place)
    rows = [Conversation(words(28, 7), [bool(turns[i % 7]) for i in range(28)]), Conversation(words(9, 8), [True] * 9)]
    batch = pack_conversations(rows)
    ours = token_logps(policy, batch)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    theirs = []
    for row in rows:
        logps = F.log_softmax(plain(torch.tensor([row.ids])).logits[0], -1)
        theirs += [logps[i - 1, row.ids[i]] for i in range(1, len(row.ids)) if row.labels[i]]
    assert_close(ours, torch.stack(theirs), rtol=1e-4, atol=1e-5)
    assert len(token_logps(policy, IDLE)) == 0
    token_logps(policy, IDLE).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in policy.parameters())


def test_layers_built_otherwise_stay_as_they_are():
    from transformers import GemmaConfig

    model = AutoModelForCausalLM.from_config(GemmaConfig(**SIZES, head_dim=16))
    assert not decoder.rewrite(model)
    assert all("forward" not in vars(layer) for layer in model.get_decoder().layers)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_hand_written_backwards_are_those_of_the_formulas(dtype):
    """rms_norm, swiglu and rotate against autograd through their definitions, as the compiler sees them."""
    torch.manual_seed(0)
    x, w = torch.randn(7, 4, 8, dtype=dtype, requires_grad=True), torch.randn(8, dtype=dtype, requires_grad=True)
    angles = torch.randn(7, 4, dtype=dtype)
    y = torch.randn(7, 4, 8, dtype=dtype, requires_grad=True)
    cases = [
        (functions.RMSNorm, functions.rms_norm, (x, w, 1e-5), (x, w)),
        (functions.SwiGLU, functions.swiglu, (x, y), (x, y)),
        (functions.Rotation, functions.rotate, (x, angles.cos(), angles.sin()), (x,)),
    ]
    for written, formula, inputs, wanted in cases:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            plain = formula(*inputs)
        ours = written.apply(*inputs)
        upstream = torch.randn_like(plain)
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-6, "atol": 1e-6}
        assert_close(ours, plain, **tolerance)
        for mine, theirs in zip(
            torch.autograd.grad(ours, wanted, upstream), torch.autograd.grad(plain, wanted, upstream), strict=True
        ):
            assert_close(mine, theirs, **tolerance)


def test_selective_checkpointing_keeps_a_third_less(tmp_path):
    """What a layer's products keep of the norms' and the gate's results is gone: 2 D + I of the numbers a token."""
    AutoModelForCausalLM.from_config(KINDS["mistral"]).save_pretrained(tmp_path)
    kept = {}
    for checkpointing in ("none", "selective", "full"):
        policy = load_policy(
            str(tmp_path), None, tiny.model_settings(checkpointing=checkpointing), Placement(CPU, "32-true")
        )
        batch = pack_pairs(PAIRS)
        weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
        alive: dict[int, int] = {}

        def pack(tensor, weights=weights, alive=alive):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                alive[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            x = policy.get_decoder()(
                input_ids=batch.ids[None], position_ids=batch.positions[None], use_cache=False,
                plan=decoder.Plan(batch.segments, len(batch.ids), CPU), tail=batch.tail,
            ).last_hidden_state  # fmt: skip
        kept[checkpointing] = sum(alive.values())
        x.sum().backward()
    saved = 4 * (2 * 64 + 128) * (2 * len(batch.ids) + len(batch.tail.rows))
    assert kept["none"] - kept["selective"] > 0.9 * saved
    assert kept["full"] < 0.25 * kept["none"]


@pytest.mark.parametrize("mode", ["copy", "adapter"])
def test_a_step_waits_for_the_device_once(tmp_path, mode):
    """Whatever reads a number from a tensor would, on a GPU, wait for all that is queued. A step does so at its end."""
    AutoModelForCausalLM.from_config(KINDS["mistral"]).save_pretrained(tmp_path)
    settings, place = tiny.model_settings(tiny.lora() if mode == "adapter" else None), Placement(CPU, "32-true")
    policy = load_policy(str(tmp_path), None, settings, place)
    reference = (
        AdapterOff(False) if mode == "adapter" else Copy(load_policy(str(tmp_path), None, settings, place, frozen=True))
    )
    waits = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}:
                waits.append(func)
            return func(*args, **(kwargs or {}))

    task = DPO(policy, ADAMW, 4, 1.0, objective=tiny.objective(), reference=reference)
    step, tolist = task.training_step, torch.Tensor.tolist

    def watched(*args):
        with Watch(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", lambda tensor: waits.append("tolist") or tolist(tensor))
            step(*args)

    task.training_step = watched
    steps = [[pack_pairs(PAIRS[:2]), pack_pairs(PAIRS[2:])]] * 2
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(task, DataLoader(steps, batch_size=None))
    assert waits == ["tolist"] * len(steps)
