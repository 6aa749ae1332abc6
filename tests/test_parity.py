"""One DPO step and one SFT step against TRL, transformers and a float64 oracle, on the same pairs and weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tests import tiny
from zephyr import settings
from zephyr.data.batch import Conversation, Pair, pack_conversations, pack_pairs
from zephyr.dpo import DPO
from zephyr.models.attention import SEGMENTS
from zephyr.models.reference import Copy
from zephyr.objectives import REFERENCE_FREE
from zephyr.sft import SFT

ADAMW = settings.Optimizer("adamw", 1e-3, [0.9, 0.999], 1e-8, 0.0, "linear", 0.1, 1.0)


def random_pairs(count: int = 4, seed: int = 5, vocabulary: int = 256, eos: int = 256) -> list[Pair]:
    generator = torch.Generator().manual_seed(seed)

    def text(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(vocabulary, (length,), generator=generator).tolist()

    return [Pair(text(20, 60), [*text(10, 40), eos], [*text(10, 40), eos]) for _ in range(count)]


def perturbed(model, seed: int = 1):
    """A policy that differs from its reference, so that rewards are far from zero."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def dpo_task(reference, policy, beta: float = 0.1, name: str = "sigmoid", **options: float) -> DPO:
    for model in (reference, policy):
        model.set_attn_implementation(SEGMENTS)
    objective = tiny.objective(name, beta, **options)
    compared = None if name in REFERENCE_FREE else Copy(reference)
    return DPO(policy.train(), ADAMW, 10, 10.0, objective=objective, reference=compared)


def oracle(reference, policy, pairs: list[Pair], beta: float = 0.1):
    """DPO written from the paper in float64: two padded-free forward passes a pair, full logits."""
    reference, policy = (copy.deepcopy(m).double() for m in (reference, policy))
    for model in (reference, policy):
        model.set_attn_implementation("eager")

    def logp(model, prompt, completion):
        ids = torch.tensor([prompt + completion])
        logps = F.log_softmax(model(ids, use_cache=False).logits[0, :-1], -1)
        return logps.gather(1, ids[0, 1:, None]).squeeze(1)[len(prompt) - 1 :].sum()

    rows = []
    for prompt, chosen, rejected in pairs:
        with torch.no_grad():
            ref = [logp(reference, prompt, side) for side in (chosen, rejected)]
        rows.append(torch.stack([logp(policy, prompt, side) for side in (chosen, rejected)] + ref))
    w, r, ref_w, ref_r = torch.stack(rows).T
    loss = -F.logsigmoid(beta * ((w - ref_w) - (r - ref_r))).mean()
    loss.backward()
    rewards = beta * (w - ref_w).detach(), beta * (r - ref_r).detach()
    values = {
        "loss": loss,
        "rewards/chosen": rewards[0].mean(),
        "rewards/rejected": rewards[1].mean(),
        "rewards/margins": (rewards[0] - rewards[1]).mean(),
        "rewards/accuracies": (rewards[0] > rewards[1]).double().mean(),
        "logps/chosen": w.mean(),
        "logps/rejected": r.mean(),
    }
    return {k: v.item() for k, v in values.items()}, {n: p.grad for n, p in policy.named_parameters()}


def one_step(task: DPO, pairs: list[Pair]):
    batch = pack_pairs(pairs)
    loss, sums = task.loss(batch)
    (loss / len(pairs)).backward()
    values = {name: (value / len(pairs)).item() for name, value in {"loss": loss, **sums}.items()}
    return values, {n: p.grad for n, p in task.policy.named_parameters()}


def worst(gradients, truth) -> float:
    """Largest relative L2 error over the parameters."""
    return max(
        ((g.double() - truth[n].double()).norm() / truth[n].double().norm()).item() for n, g in gradients.items()
    )


@pytest.mark.parametrize("model", [{}, {"sliding_window": 24}, {"num_key_value_heads": 4}], ids=str)
def test_dpo_step_equals_a_float64_oracle(model):
    reference = tiny.model(0, **model)
    policy, pairs = perturbed(reference), random_pairs()
    truth, true_gradients = oracle(reference, policy, pairs)
    values, gradients = one_step(dpo_task(reference, policy), pairs)
    assert values == pytest.approx(truth, rel=1e-6)
    assert worst(gradients, true_gradients) < 5e-6


def test_dpo_step_equals_trl(tmp_path):
    pytest.importorskip("trl", reason="TRL is a development dependency")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    reference = tiny.model(0)
    policy, pairs = perturbed(reference), random_pairs()
    args = DPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(pairs),
        bf16=False,
        use_cpu=True,
        report_to=[],
        gradient_checkpointing=False,
        max_length=1024,
        beta=0.1,
    )
    columns = {f"{name}_ids": [list(getattr(pair, name)) for pair in pairs] for name in Pair._fields}
    tokenizer = tiny.tokenizer()
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    theirs = copy.deepcopy(policy)
    trainer = DPOTrainer(
        model=theirs, ref_model=copy.deepcopy(reference), args=args, train_dataset=rows, processing_class=tokenizer
    )
    batch = trainer.data_collator([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])
    theirs.train()
    loss = trainer.compute_loss(theirs, batch)
    loss.backward()
    logged = {name: value[-1] for name, value in trainer._metrics["train"].items()}

    values, gradients = one_step(dpo_task(reference, policy), pairs)
    assert values["loss"] == pytest.approx(loss.item(), rel=1e-5)
    names = [name for name in values if name != "loss"]
    assert {name: values[name] for name in names} == pytest.approx({name: logged[name] for name in names}, rel=1e-5)
    assert worst(gradients, {n: p.grad for n, p in theirs.named_parameters()}) < 5e-5


def test_step_zero_is_ln_2_with_a_gradient():
    policy = tiny.model(0)
    values, gradients = one_step(dpo_task(copy.deepcopy(policy), policy), random_pairs())
    assert values["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert values["rewards/margins"] == 0 and values["rewards/accuracies"] == 0.5
    assert max(g.norm() for g in gradients.values()) > 1e-3


def test_sft_loss_and_gradient_equal_transformers_on_unpacked_rows():
    pairs = random_pairs()
    conversations = [Conversation(p + c, [False] * len(p) + [True] * len(c)) for p, c, _ in pairs]
    ours, theirs = tiny.model(0, attn_implementation=SEGMENTS), tiny.model(0)
    batch = pack_conversations(conversations)
    loss, _ = SFT(ours, ADAMW, 10, 10.0).loss(batch)
    (loss / len(batch.targets)).backward()

    total = 0
    for ids, labels in conversations:
        marked = torch.tensor([[i if scored else -100 for i, scored in zip(ids, labels, strict=True)]])
        total = total + theirs(torch.tensor([ids]), labels=marked, use_cache=False).loss * sum(labels)
    mean = total / len(batch.targets)
    mean.backward()
    assert_close(loss / len(batch.targets), mean.double(), rtol=1e-6, atol=0)
    assert (
        worst({n: p.grad for n, p in ours.named_parameters()}, {n: p.grad for n, p in theirs.named_parameters()}) < 1e-5
    )


@pytest.mark.parametrize("sliding_window", [None, 16])
def test_packed_equals_unpacked(sliding_window):
    reference = tiny.model(0, sliding_window=sliding_window)
    policy, pairs = perturbed(reference), random_pairs()
    task = dpo_task(reference, policy)
    together, _ = one_step(task, pairs)
    alone = [one_step(task, [pair])[0] for pair in pairs]
    assert together == pytest.approx({k: sum(v[k] for v in alone) / len(pairs) for k in together}, rel=1e-6)
