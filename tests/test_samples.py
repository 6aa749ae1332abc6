"""Answers in the middle of training: what is said of them, when they come, and that training does not notice."""

import json
import math
import random
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

import conf
from tests import tiny
from tests.commands import command, metrics, weights, world
from tests.test_generate import ends_after
from tests.test_observe import Toy, fit
from zephyr import run as module
from zephyr.data.sources import question
from zephyr.errors import UserError
from zephyr.generation import generate
from zephyr.models.attention import SEGMENTS
from zephyr.models.reference import Copy
from zephyr.observe import samples
from zephyr.observe.metrics import MetricsFile, Promptly, read
from zephyr.observe.samples import Samples, repeated
from zephyr.observe.throughput import Throughput
from zephyr.settings import parse

PROMPTS = [[{"role": "user", "content": "Hi"}], [{"role": "user", "content": "Who are you?"}]]


def alone(callback: Samples) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, callbacks=[callback]
    )


def likelihood(model: Any, prompt: list[int], tokens: list[int]) -> float:
    """Log-probability of the tokens by plain transformers."""
    model = model.eval()
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        logps = model(torch.tensor([prompt + tokens])).logits[0].double().log_softmax(-1)
    return sum(float(logps[len(prompt) - 1 + place, token]) for place, token in enumerate(tokens))


def test_what_is_said_of_an_answer(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    policy, other = ends_after(tokenizer("yes").input_ids), ends_after(tokenizer("no").input_ids)
    with torch.no_grad():
        policy.lm_head.weight.mul_(0.02)  # not quite sure
    for model in (policy, other):
        model.set_attn_implementation(SEGMENTS)
    task = SimpleNamespace(policy=policy, reference=Copy(other), device=torch.device("cpu"))
    path = tmp_path / "out" / "samples.jsonl"
    scorer = {"Hi": 4.0, "Who are you?": None}
    callback = Samples(
        tokenizer, PROMPTS, 20, path, ["Hello", None], beta=0.1, scorer=lambda chat, text: scorer[chat[-1]["content"]]
    )
    callback.on_validation_end(alone(callback), task)  # type: ignore[arg-type]
    first, second = read(path)
    assert all(part.training for part in policy.modules())

    tokens = [*tokenizer("yes").input_ids, 256]
    prompt = tokenizer.apply_chat_template(PROMPTS[0], add_generation_prompt=True, return_dict=True)["input_ids"]
    expected, reference = likelihood(policy, prompt, tokens), likelihood(other, prompt, tokens)
    assert first.pop("logp") == pytest.approx(expected / 4, rel=1e-5)
    assert first.pop("reward") == pytest.approx(0.1 * (expected - reference), rel=1e-5) and expected > reference
    assert first == {
        "step": 0, "prompt": "Hi", "answer": "yes", "reference": "Hello", "tokens": 3, "ended": 1, "repeated": 0.0,
        "score": 4.0,
    }  # fmt: skip
    assert (second["answer"], second["reference"], second["score"]) == ("yes", None, None)


def test_answers_are_measured_without_dropout(tmp_path: Path) -> None:
    logps = []
    for dropout in (0.0, 0.5):
        policy = tiny.model(attention_dropout=dropout)
        policy.set_attn_implementation(SEGMENTS)
        callback = Samples(tiny.tokenizer(), PROMPTS, 9, path := tmp_path / f"{dropout}.jsonl")
        task = SimpleNamespace(policy=policy, device=torch.device("cpu"))
        callback.on_validation_end(alone(callback), task)  # type: ignore[arg-type]
        logps.append([row["logp"] for row in read(path)])
    assert logps[0] == logps[1]


def test_repetition_worked_by_hand() -> None:
    assert repeated([1, 2, 3]) == 0.0
    assert repeated([1, 2, 3, 4, 5]) == 0.0
    assert repeated([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)  # 1234 2341 3412 4123 1234
    assert repeated([7] * 12) == pytest.approx(8 / 9)


@pytest.mark.parametrize(
    ("every", "steps"), [(None, [0, 4, 8]), (3, [0, 3, 4, 6, 8]), (2, [0, 2, 4, 6, 8]), (50, [0, 4, 8])]
)
def test_when_answers_come(tmp_path: Path, every: int | None, steps: list[int]) -> None:
    """Validation is at 0, 4 and 8; of a step there is one set, and one line of metrics."""
    file = MetricsFile(tmp_path)
    callback = Samples(tiny.tokenizer(), PROMPTS, 3, tmp_path / "samples.jsonl", every_n_steps=every)
    fit([Throughput(), Promptly(file), callback], file, every=1, validate_first=True)
    rows = read(tmp_path / "samples.jsonl")
    assert [row["step"] for row in rows] == [step for step in steps for _ in PROMPTS]
    logged = read(tmp_path / "metrics.jsonl")
    means = {row["step"]: row for row in logged if "samples/logp" in row}
    assert [row["step"] for row in logged if "samples/logp" in row] == steps
    assert [row["step"] for row in logged if "train/loss" in row] == [*range(1, 9)]
    of_last = [row["logp"] for row in rows if row["step"] == 8]
    assert means[8]["samples/logp"] == pytest.approx(sum(of_last) / 2)
    assert means[8]["samples/tokens"] == 3.0 and means[8]["samples/ended"] == 0.0
    assert "samples/score" not in means[8] and "samples/reward" not in means[8]


def test_the_clock_of_training_stands_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr("zephyr.observe.throughput.time", SimpleNamespace(perf_counter=lambda: now.seconds))

    def slow(*given: Any) -> Any:
        now.seconds += 1000
        return generate.answer(*given)

    def step(self: Any, *given: Any) -> None:
        now.seconds += 1
        of_toy(self, *given)

    of_toy = Toy.training_step
    monkeypatch.setattr(samples, "answer", slow)
    monkeypatch.setattr(Toy, "training_step", step)
    callback = Samples(tiny.tokenizer(), PROMPTS, 2, tmp_path / "samples.jsonl", every_n_steps=1)
    fit([Throughput(), callback], MetricsFile(tmp_path))
    rates = [row["tokens_per_second"] for row in read(tmp_path / "metrics.jsonl") if "tokens_per_second" in row]
    assert rates == [11.5, 13.5, 15.5, 17.5]


# Training with and without


def draws(conversation: Any, answer: str) -> float:
    """A scorer that takes numbers from every generator there is."""
    return torch.rand(3).sum().item() + random.random() + np.random.rand()


@pytest.fixture
def sampling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Answers are drawn, and so are their scores."""
    monkeypatch.setattr(samples, "answer", partial(generate.answer, temperature=1.0))
    monkeypatch.setattr(module, "_scorer", lambda settings: draws)
    yield


def train(folder: Path, stage: str, output: Path, *overrides: str) -> None:
    arguments = command(folder, stage, output, "checkpoint.every_n_steps=5", *overrides)[2:]
    config = conf.compose("train", arguments)
    module.run(parse(config), config)


def end_of(output: Path) -> dict[str, Any]:
    """What the last checkpoint holds of the process: its random states."""
    state = torch.load(output / "checkpoints" / "step-00000012" / "state.pt", weights_only=True)
    (checkpoints,) = (value for name, value in state["callbacks"].items() if name.startswith("Checkpoints"))
    (random_states,) = checkpoints["random"]
    return {**random_states, "torch": random_states["torch"].tolist()}


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_run_ends_the_same_with_and_without(tmp_path: Path, stage: str, sampling: None) -> None:
    """Bit for bit, with dropout, at steps with and without a validation, and behind a resume."""
    folder = world(tmp_path)
    adapter = ["trainer=lora", "model.lora.rank=4", "model.lora.dropout=0.3"]
    train(folder, stage, tmp_path / "without", *adapter, "samples.count=0")
    train(folder, stage, tmp_path / "with", *adapter, "samples.every_n_steps=2")
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "with", resumed)
    (resumed / "summary.json").unlink()
    shutil.rmtree(resumed / "checkpoints" / "step-00000012")
    train(folder, stage, resumed, *adapter, "samples.every_n_steps=2", "resume=auto")

    asked = read(tmp_path / "with" / "samples.jsonl")
    assert [row["step"] for row in asked[::2]] == [0, 2, 4, 5, 6, 8, 10, 12]
    assert ("reward" in asked[0]) == (stage == "dpo")
    if stage == "dpo":
        assert asked[0]["reward"] == 0.0 and asked[-1]["reward"] != 0.0
    plain = [row for row in metrics(tmp_path / "without")]
    name = "model/adapter_model.safetensors"
    for output in (tmp_path / "with", resumed):
        assert (output / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
        assert [row for row in metrics(output) if "samples/tokens" not in row] == plain
        assert end_of(output) == end_of(tmp_path / "without")
    assert read(resumed / "samples.jsonl") == asked


def test_prompts_of_a_file_without_validation(tmp_path: Path) -> None:
    folder, output = world(tmp_path), tmp_path / "out"
    prompts = folder / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n{"instruction": "two"}\n{"prompt": "three"}\n')
    chosen = [f"samples.prompts={prompts}", "data.system=Short.", "trainer.max_steps=3"]
    with pytest.raises(UserError, match=r"Set samples\.every_n_steps=N"):
        train(folder, "sft", output, *chosen, "data.validation=null")
    train(folder, "sft", output, *chosen, "data.validation=null", "samples.every_n_steps=2")
    rows = read(output / "samples.jsonl")
    expected = [(step, prompt, None) for step in (0, 2, 3) for prompt in ("one", "two")]
    assert [(row["step"], row["prompt"], row["reference"]) for row in rows] == expected
    assert weights(output)


def test_what_of_a_row_is_asked() -> None:
    ask, say = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    system = {"role": "system", "content": "s"}
    assert question(("r", {"messages": [system, ask, say, ask, say]})) == ([system, ask], "a")
    assert question(("r", {"messages": [ask]})) == ([ask], None)
    pair = {"chosen": [ask, say, ask, say], "rejected": [ask, say, ask, {**say, "content": "b"}]}
    assert question(("r", pair)) == ([ask, say, ask], "a")
    assert question(("r", {"instruction": "q", "completions": []})) == ([ask], None)
    for row in ({"prompt": " "}, {"text": "q"}, {"messages": [system]}, {"prompt": 3}):
        with pytest.raises(UserError, match="^r: "):
            question(("r", row))


def test_the_demos_teacher_scores(tmp_path: Path) -> None:
    arguments = ["recipe=demo", "logger=none"]
    scorer = module._scorer(parse(conf.compose("train", arguments)))
    assert scorer is not None
    row = json.loads(Path(module.demo.locate("demo:feedback-test.jsonl")).read_text().splitlines()[0])
    asked = [{"role": "user", "content": row["instruction"]}]
    assert 1 <= scorer(asked, row["completions"][0]["response"]) <= 5
    assert scorer([{"role": "user", "content": "What is the capital of France?"}], "Paris.") is None
    own = parse(conf.compose("train", [*arguments, f"data.validation={tmp_path / 'own.jsonl'}"]))
    assert module._scorer(own) is None
    assert math.isfinite(draws(None, ""))
