"""The optimizer step: micro-batches, normalisation, what trains, what is saved."""

import copy
from dataclasses import replace
from itertools import pairwise

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch.distributed.device_mesh import init_device_mesh
from torch.testing import assert_close

from tests import tiny
from tests.ranks import spawn
from tests.test_parity import ADAMW, dpo_task, perturbed, random_pairs
from zephyr import distributed
from zephyr.data.batch import IDLE, Conversation, Pair, pack_conversations, pack_pairs
from zephyr.errors import UserError
from zephyr.models.attention import SEGMENTS
from zephyr.models.sharding import shard, whole
from zephyr.running.strategy import Ranks
from zephyr.sft import SFT


def conversations(count=8):
    """Of very different lengths and shares of scored tokens."""
    found = []
    for number, (prompt, chosen, _) in enumerate(random_pairs(count)):
        kept = chosen[: 2 + 5 * number]
        found.append(Conversation(prompt + kept, [False] * len(prompt) + [True] * len(kept)))
    return found


def step_gradient(task, batches, **several):
    """The clipped gradient of one training step, which moves nothing, and what the step logs."""
    optimizer = torch.optim.SGD([*task.trainable()], lr=0.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    task.configure_optimizers = lambda: {"optimizer": optimizer, "lr_scheduler": schedule}
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, limit_val_batches=0, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, use_distributed_sampler=False, **several,
    )  # fmt: skip
    trainer.fit(task, torch.utils.data.DataLoader([batches], batch_size=None))
    gradient = {name: whole(p.grad) for name, p in task.policy.named_parameters()}
    return gradient, {name: torch.as_tensor(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("split", [[8], [1] * 8, [1, 4, 3]], ids=str)
@pytest.mark.parametrize("stage", ["sft", "dpo", "aot", "nll", "modified"])
def test_the_split_into_micro_batches_changes_nothing(stage, split):
    items, pack, task = step_of(stage)
    edges = [sum(split[:i]) for i in range(len(split) + 1)]
    whole_step = step_gradient(task, [pack(items)])
    items, pack, task = step_of(stage)
    assert_same(step_gradient(task, [pack(items[a:b]) for a, b in pairwise(edges)]), whole_step)


SHARES = ([[[0, 1, 2, 3]], [[4, 5, 6, 7]]], [[[0], [1, 2], [3]], [[4, 5, 6, 7], [], []]])  # of two ranks


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_split_among_processes_changes_nothing(tmp_path, strategy):
    """Two ranks with four examples each, and with one to three micro-batches."""
    for found in spawn(gradients_of_a_rank, 2, tmp_path, strategy):
        for stage in STAGES:
            items, pack, task = step_of(stage)
            whole_step = step_gradient(task, [pack(items)])
            for gradient_and_metrics in found[stage]:
                assert_same(gradient_and_metrics, whole_step)


def gradients_of_a_rank(strategy):
    with distributed.process_group("cpu"):
        return {stage: [gradient_of_a_rank(stage, strategy, s) for s in SHARES] for stage in STAGES}


def gradient_of_a_rank(stage, strategy, shares):
    items, pack, task = step_of(stage)
    if strategy == "fsdp":
        mesh = init_device_mesh("cpu", (2,))
        for model in (task.policy, *([task.reference.model] if getattr(task, "reference", None) else [])):
            shard(model, mesh, None, cpu_offload=False)
    own = [pack([items[i] for i in part]) if part else IDLE for part in shares[distributed.rank()]]
    return step_gradient(task, own, strategy=Ranks(), devices=2, plugins=[LightningEnvironment()])


OBJECTIVES = {  # aot sorts the pairs of a step against each other, sft divides by the tokens of a step
    "dpo": {},
    "aot": {"name": "aot", "label_smoothing": 0.1},
    "nll": {"name": "sft"},
    "modified": {"ld_alpha": 0.5, "weighting": "wpo"},
}
STAGES = ["sft", *OBJECTIVES]


def step_of(stage):
    """Eight examples, how to pack them, and a task that neither clips nor moves."""
    unclipped = replace(ADAMW, max_grad_norm=None)
    reference = tiny.model(0)
    policy = perturbed(reference)
    policy.set_attn_implementation(SEGMENTS)
    if stage == "sft":
        return conversations(), pack_conversations, SFT(policy, unclipped, 10, 10.0)
    task = dpo_task(reference, policy, **OBJECTIVES[stage])
    task.settings = unclipped
    return random_pairs(8), pack_pairs, task


def assert_same(found, truth):
    (gradient, metrics), (true_gradient, true_metrics) = found, truth
    for name, value in true_gradient.items():
        assert (gradient[name] - value).norm() <= 1e-6 * value.norm() + 1e-9, name
    assert metrics.keys() == true_metrics.keys()
    for name, value in true_metrics.items():
        assert_close(metrics[name], value, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_the_gradient_is_clipped_by_its_global_norm():
    policy = tiny.model(0, attn_implementation=SEGMENTS)
    tight = replace(ADAMW, max_grad_norm=0.5)
    gradient, metrics = step_gradient(SFT(policy, tight, 10, 10.0), [pack_conversations(conversations())])
    norm = torch.stack([g.norm() for g in gradient.values()]).norm()
    assert_close(norm, torch.tensor(0.5), rtol=1e-4, atol=0)
    assert metrics["train/grad_norm"] > 0.5  # what is logged is the norm before clipping


@pytest.mark.parametrize("seed", range(3))
def test_the_norm_of_a_bf16_gradient_is_more_precise_than_bf16(seed):
    """Which has steps of 1/256; clipping would be off by as much."""
    task = SFT(tiny.model(seed, attn_implementation=SEGMENTS).bfloat16(), ADAMW, 10, 10.0)
    batch = pack_conversations(conversations())
    task.loss(batch)[0].backward()
    norm = torch.stack([p.grad.double().norm() for p in task.trainable()]).norm() / task.units(batch)
    task.policy.zero_grad()
    _, metrics = step_gradient(task, [batch])
    assert metrics["train/grad_norm"].item() == pytest.approx(norm.item(), rel=1e-5)


def test_a_gradient_that_is_not_finite_stops_before_the_update():
    policy = tiny.model(0, attn_implementation=SEGMENTS)
    with torch.no_grad():
        policy.lm_head.weight[3, 3] = torch.inf
    before = copy.deepcopy(policy.state_dict())
    with pytest.raises(UserError, match="gradient of step 1 is not finite"):
        step_gradient(SFT(policy, ADAMW, 10, 10.0), [pack_conversations(conversations())])
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


def test_only_the_policy_trains_and_only_what_trains_is_saved():
    task = dpo_task(tiny.model(0), tiny.model(0))
    assert task.policy.training and not task.reference.model.training
    assert all(p.requires_grad for p in task.policy.parameters())
    assert not any(p.requires_grad for p in task.reference.parameters())
    [group] = [{id(p) for group in task.configure_optimizers()["optimizer"].param_groups for p in group["params"]}]
    assert group == {id(p) for p in task.policy.parameters()}
    checkpoint = {"state_dict": task.state_dict()}
    task.on_save_checkpoint(checkpoint)
    assert set(checkpoint["state_dict"]) == {f"policy.{name}" for name, _ in task.policy.named_parameters()}


def test_a_checkpoint_of_other_weights_is_refused():
    task = SFT(tiny.model(0), ADAMW, 10, 10.0)
    with pytest.raises(UserError, match="holds other weights than this model trains, first 'policy.x'"):
        task.on_load_checkpoint({"state_dict": {**dict(task.named_parameters()), "policy.x": torch.zeros(1)}})


def test_dpo_trains_without_dropout():
    policy = tiny.model(0, attention_dropout=0.5)
    task = dpo_task(copy.deepcopy(policy), policy)
    loss, sums = task.loss(pack_pairs(random_pairs()))
    assert sums["rewards/margins"] == 0 and loss.item() / 4 == pytest.approx(0.693147, abs=1e-6)


def test_weight_decay_spares_vectors():
    optimizer = replace(ADAMW, weight_decay=0.1)
    groups = SFT(tiny.model(0), optimizer, 10, 10.0).configure_optimizers()["optimizer"].param_groups
    decays = {group["weight_decay"]: {p.ndim for p in group["params"]} for group in groups}
    assert decays == {0.1: {2}, 0.0: {1}}


def test_warmup_is_a_share_of_all_steps_rounded_up():
    configured = SFT(tiny.model(0), ADAMW, 25, 10.0).configure_optimizers()
    scheduler = configured["lr_scheduler"]
    rates = []
    for _ in range(5):
        rates.append(scheduler.get_last_lr()[0])
        configured["optimizer"].step()
        scheduler.step()
    assert rates == pytest.approx([0, 1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3 * 21 / 22])  # 3 of 25 steps, then 22 of decay


def test_validation_weighs_by_units():
    """A micro-batch of three pairs counts three times one of a single pair."""
    reference = tiny.model(0)
    task = dpo_task(reference, perturbed(reference))
    pairs = random_pairs(4)
    batches = [[pack_pairs(pairs[:3])], [pack_pairs(pairs[3:])]]
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    [found] = trainer.validate(task, torch.utils.data.DataLoader(batches, batch_size=None), verbose=False)
    loss, sums = task.loss(pack_pairs(pairs))
    expected = {f"eval/{name}": value.item() / 4 for name, value in {"loss": loss, **sums}.items()}
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_step_wise_nll_is_that_of_the_steps_tokens():
    """Six pairs in two micro-batches: one mean over all chosen tokens, not a mean of means."""
    reference = tiny.model(0)
    task, pairs = dpo_task(reference, perturbed(reference), name="sft"), random_pairs(6)
    batches = [pack_pairs(pairs[:1]), pack_pairs(pairs[1:])]
    loss = sum(loss for loss, _ in task.losses(batches)) / 6
    chosen = torch.cat([task.pairs(batch)[0].chosen for batch in batches])
    assert_close(loss, -chosen.sum() / sum(len(pair.chosen) for pair in pairs), rtol=1e-6, atol=0)


def test_length_desensitised_sums_by_hand():
    """Of 3 chosen and 5 rejected tokens, the last 2 rejected count half."""
    task = dpo_task(tiny.model(0), tiny.model(0), ld_alpha=0.5)
    batch = pack_pairs([Pair([1, 2], [3, 4, 256], [5, 6, 7, 8, 256])])
    logps = torch.tensor([-1.0, -2.0, -4.0, -1.0, -2.0, -4.0, -8.0, -16.0])
    assert task._sums(logps, batch).tolist() == [-7.0, -19.0]
