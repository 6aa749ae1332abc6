"""Preference accuracy against a plain float64 forward, against what the trainer logs, and by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.test_adapters import CARD, trained
from tests.test_parity import ADAMW, perturbed
from zephyr import settings as training
from zephyr.data.batch import pack_pairs
from zephyr.data.modules import PreferenceData
from zephyr.data.render import render_pairs
from zephyr.dpo import DPO
from zephyr.errors import UserError
from zephyr.evaluation import preferences
from zephyr.evaluation.settings import Evaluation, Preferences
from zephyr.export import export
from zephyr.models.policy import Placement, load_policy
from zephyr.models.reference import AdapterOff, Copy

WORDS = ["moon", "tide", "wind", "salt", "boat", "rain", "field", "bread", "stone", "river"]
CPU = Placement(torch.device("cpu"), "32-true")


def rows(count=15):
    draw = np.random.default_rng(5)

    def text(most):
        return " ".join(draw.choice(WORDS, draw.integers(1, most)))

    def turns(answer):
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]

    made = []
    for number in range(count):
        asked = text(9)
        made.append({"chosen": turns(text(12)), "rejected": turns(text(12)), "source": ("a", "b", "c")[number % 3]})
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    same = {"chosen": rows(1)[0]["chosen"], "rejected": rows(1)[0]["chosen"]}
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows(), same, {"chosen": 1, "rejected": []}]))
    return str(path)


def saved(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A reference and a policy some way from it."""
    folder, reference = tmp_path_factory.mktemp("models"), tiny.model(0, initializer_range=0.1)
    policy = perturbed(reference)
    return saved(reference, folder / "reference"), saved(policy, folder / "policy")


def evaluated(folder, data, output, limit=None, **changes):
    own = {
        **{"data": data, "reference": None, "score": "auto", "beta": 0.1, "max_length": 256, "max_prompt_length": 128},
        **{"system": None, "micro_batch_tokens": 600, "quantization": "auto", "precision": "auto", "seed": 42},
    }
    named = dict.fromkeys(Evaluation.__dataclass_fields__)
    settings = Evaluation(
        **{**named, "name": "m", "folder": str(folder), "limit": limit, "preferences": Preferences(**own | changes)}
    )
    results = preferences.run(settings, output)
    json.dumps(results, allow_nan=False)
    return results, [json.loads(line) for line in (output / "margins.jsonl").open()]


def distance(lines, truth):
    """The largest, of any pair's margin, in nats."""
    return np.abs(np.array([line["margin"] for line in lines]) - truth).max()


def by_hand(folder):
    """Log-probabilities [pairs, 2] and lengths: one answer at a time, full logits, float64, transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    tokenizer, sums, lengths = tiny.tokenizer(), [], []
    for row in rows():
        for side in ("chosen", "rejected"):
            text = tokenizer.apply_chat_template(row[side], tokenize=False)
            prompt = tokenizer.apply_chat_template(row[side][:1], tokenize=False, add_generation_prompt=True)
            start = len(tokenizer(prompt).input_ids)
            ids = torch.tensor([tokenizer(text).input_ids[:-1]])  # the line break behind the end of the turn
            with torch.no_grad():
                logps = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            sums.append(logps[start - 1 :].sum().item())
            lengths.append(ids.shape[1] - start)
    return np.array(sums).reshape(-1, 2), np.array(lengths).reshape(-1, 2)


def test_margins_are_those_of_a_plain_forward(models, data, tmp_path):
    reference, policy = models
    (own, lengths), (others, _) = by_hand(policy), by_hand(reference)
    truths = {
        "reward": 0.3 * ((own[:, 0] - others[:, 0]) - (own[:, 1] - others[:, 1])),
        "sum": own[:, 0] - own[:, 1],
        "mean": own[:, 0] / lengths[:, 0] - own[:, 1] / lengths[:, 1],
    }
    for score, truth in truths.items():
        against = str(reference) if score == "reward" else None
        results, lines = evaluated(policy, data, tmp_path, score=score, reference=against, beta=0.3)
        assert distance(lines, truth) < 2e-5
        assert results["accuracy"] == pytest.approx((truth > 0).mean())
        assert 0 < results["accuracy"] < 1
        assert results["margin"] == pytest.approx(truth.mean(), abs=1e-5)
        assert results["low"] <= results["accuracy"] <= results["high"]
    assert [[line["chosen_tokens"], line["rejected_tokens"]] for line in lines] == lengths.tolist()
    assert results["longer_preferred"] == np.mean((np.sign(lengths[:, 0] - lengths[:, 1]) + 1) / 2)
    assert results["failed"] == 2
    assert results["dropped"] == {"identical completions": 1, "unusable row": 1}
    for name in "abc":
        inside = ["abc"[number % 3] == name for number in range(15)]
        assert results["by_source"][name]["accuracy"] == pytest.approx((truth[inside] > 0).mean())
        assert results["by_source"][name]["n"] == 5
    assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")


def test_the_accuracy_is_what_the_trainer_logs(models, data, tmp_path):
    reference, policy = (load_policy(str(path), None, tiny.model_settings(), CPU, frozen=True) for path in models)
    task = DPO(policy, ADAMW, 10, 10.0, objective=tiny.objective(beta=0.1), reference=Copy(reference))
    how = training.PreferenceData(data, data, 256, 4, 700, None, "drop", 0, str(tmp_path / "cache"), 128)
    module = PreferenceData(how, tiny.tokenizer(), 1, None, 42)
    module.load()
    logged = []
    task.log_dict = lambda values, **_: logged.append(values)
    with torch.no_grad():
        for batches in module.val_dataloader():
            task.validation_step(batches, 0)
    task.on_validation_epoch_end()
    results, _ = evaluated(models[1], data, tmp_path / "out", reference=str(models[0]))
    assert results["score"] == "reward"
    assert results["accuracy"] == logged[0]["eval/rewards/accuracies"].item()
    assert results["margin"] == pytest.approx(logged[0]["eval/rewards/margins"].item(), rel=1e-6)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_an_adapter_is_compared_with_its_base_and_held_as_it_was_trained(models, data, tmp_path, quantization):
    base = str(models[0])
    policy = trained(load_policy(base, None, tiny.model_settings(tiny.lora(), quantization), CPU))
    export(policy, tiny.tokenizer(), tmp_path / "adapter", CARD)
    task = DPO(policy.eval(), ADAMW, 10, 10.0, objective=tiny.objective(beta=0.1), reference=AdapterOff(False))
    results, lines = evaluated(tmp_path / "adapter", data, tmp_path / "one")
    assert (results["score"], results["reference"], results["n"]) == ("reward", base, 15)
    pairs = render_pairs(tiny.tokenizer(), [(row["chosen"], row["rejected"]) for row in rows()])
    with torch.no_grad():
        logps, _ = task.pairs(pack_pairs(pairs))
    truth = 0.1 * (logps.c - logps.r).numpy()
    assert np.abs(truth).max() > 0.05
    assert distance(lines, truth) < 2e-6
    if quantization is None:  # the same by a reference of its own
        _, others = evaluated(tmp_path / "adapter", data, tmp_path / "two", reference=base)
        assert distance(others, truth) < 2e-6
    else:
        whole, _ = evaluated(tmp_path / "adapter", data, tmp_path / "two", quantization="none")
        assert abs(whole["margin"] - results["margin"]) > 1e-4


def test_groups_and_calibration_by_hand():
    margins = np.array([3.0, -3.0, 3.0, 0.0, math.log(3), -math.log(3), math.log(3), math.log(3)])
    found = preferences.group(margins)
    assert (found.n, found.accuracy, found.margin) == (8, 5.5 / 8, margins.mean())
    bins = {(round(b.start, 2), b.n, b.accuracy): b.confidence for b in preferences.calibration(margins) if b.n}
    # 3 nats are a probability of 0.9526, in the bin from 0.95; log 3 is one of 3/4, in that from 0.75; 0 of 1/2
    assert {key: pytest.approx(value) for key, value in bins.items()} == {
        (0.5, 1, 0.5): 0.5,
        (0.75, 4, 0.75): 0.75,
        (0.95, 3, 2 / 3): 1 / (1 + math.exp(-3)),
    }
    error = 3 * (1 / (1 + math.exp(-3)) - 2 / 3) / 8
    assert preferences.calibration_error(preferences.calibration(margins)) == pytest.approx(error)
    quarters = preferences._quartiles(np.array([1, 1, 2, 3, 4, 5, 9, 9]), margins)
    assert [(part["from"], part["to"], part["n"]) for part in quarters] == [(1, 1, 2), (2, 3, 2), (4, 5, 2), (9, 9, 2)]
    assert [part["accuracy"] for part in quarters] == [0.5, 0.75, 0.5, 1.0]
    assert [part["n"] for part in preferences._quartiles(np.zeros(5), margins[:5])] == [5]


def test_the_first_pairs_alone(models, data, tmp_path):
    results, lines = evaluated(models[1], data, tmp_path, limit=5)
    assert results["n"] == len(lines) == 5 and results["score"] == "mean" and results["failed"] == 0
    assert [line["row"] for line in lines] == [f"pairs.jsonl line {n}" for n in range(1, 6)]


def test_mistakes_are_named(models, data, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"chosen": 1, "rejected": []}\n')
    for changes, message in (
        ({"data": None}, "preferences.data is not set"),
        ({"score": "reward"}, "needs preferences.reference=FOLDER"),
        ({"score": "sum", "reference": str(models[0])}, "takes no reference"),
        ({"max_prompt_length": 256}, "must be below"),
        ({"data": str(empty)}, r"no pair that can be scored \(1 unusable row\)"),
        ({"reference": str(tmp_path)}, "holds no model"),
        ({"reference": "./nowhere"}, "There is no folder nowhere"),
    ):
        with pytest.raises(UserError, match=message):
            evaluated(models[1], **{"data": data, **changes}, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="need a model's folder"):
        preferences.run(Evaluation(**dict.fromkeys(Evaluation.__dataclass_fields__)), tmp_path)
