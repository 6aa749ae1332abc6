"""The demo's server: its models and its teacher behind one address, and the loop of feedback closed with them."""

import asyncio
import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import conf
from tests import commands, tiny
from tests.commands import ROOT
from tests.test_demo_judge import GOOD, PROMPT, WRONG
from zephyr.chat import find_model, load
from zephyr.data.sources import files, read
from zephyr.demo import teacher, world
from zephyr.demo.examination import against_baseline, two_turns
from zephyr.demo.judge import out_of_ten
from zephyr.demo.serve import TEACHER, main, serving
from zephyr.evaluate import main as evaluate
from zephyr.feedback.judge import critique_asks, load_rubrics
from zephyr.feedback.run import run
from zephyr.feedback.verdict import read_critique
from zephyr.prepare import ultrafeedback


@contextmanager
def served(folders: dict[str, Path]) -> Iterator[str]:
    """The address of a server in a thread of its own."""
    ready, addresses, ends = threading.Event(), list[str](), list[Any]()

    async def serve() -> None:
        ends.extend([asyncio.get_running_loop(), asyncio.Event()])
        async with serving(folders) as url:
            addresses.append(url)
            ready.set()
            await ends[1].wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(30)
    yield addresses[0]
    ends[0].call_soon_threadsafe(ends[1].set)
    thread.join(30)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A model for each of four names, in the layout of training runs."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate("abcd"):
        tiny.model(seed).save_pretrained(folder / name / "model")
        tiny.tokenizer().save_pretrained(folder / name / "model")
    return {name: folder / name for name in "abcd"}


@pytest.fixture(scope="module")
def url(folders) -> Iterator[str]:
    with served(folders) as address:
        yield address


def post(url: str, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def said(url: str, **body: Any) -> str:
    return post(url, messages=[{"role": "user", "content": PROMPT}], **body)["choices"][0]["message"]["content"]


def test_models_are_listed_and_answer(url):
    with urllib.request.urlopen(f"{url}/models") as response:
        assert [model["id"] for model in json.load(response)["data"]] == [*"abcd", TEACHER]
    answers = [said(url, model=name, temperature=1.0, max_tokens=12, seed=1) for name in "abab"]
    assert answers[:2] == answers[2:] and answers[0] != answers[1]
    assert said(url, model="a", temperature=1.0, max_tokens=12, seed=2) != answers[0]
    greedy = said(url, model="a", temperature=0.0, max_tokens=12, seed=1)
    assert greedy == said(url, model="a", temperature=0.0, max_tokens=12, seed=2) != answers[0]
    assert greedy == said(url, model="a", temperature=1.0, top_p=1e-6, max_tokens=12)
    whole = post(url, model="a", messages=[{"role": "user", "content": PROMPT}], temperature=0.0, max_tokens=5)
    assert whole["model"] == "a" and whole["choices"][0]["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] == 5


def test_the_teacher_judges_behind_the_same_address(url):
    for structured in (True, False):
        asks = critique_asks(TEACHER, {}, load_rubrics(None), PROMPT, {0: GOOD, 1: WRONG}, structured=structured)
        for ask, score in zip(asks, (10, 4), strict=True):
            form = {"response_format": {"type": "json_schema"}} if structured else {}
            reply = post(url, model=TEACHER, messages=list(ask.request.messages), **form)
            assert read_critique(reply["choices"][0]["message"]["content"], 10).score == score
            assert reply["choices"][0]["message"]["content"].startswith("{") == structured


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "nobody", "messages": [{"role": "user", "content": "Hi"}]}, 404),
        ({"model": "a"}, 400),
        ({"model": "a", "messages": [{"role": "user", "content": None}]}, 400),
        ({"model": TEACHER, "messages": []}, 400),
        ({"model": "a", "messages": [{"role": "user", "content": "Hi " * 999}]}, 400),  # longer than its window
    ],
)
def test_what_cannot_be_answered_is_refused(url, body, status):
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(url, **body)
    assert refused.value.code == status and json.load(refused.value)["error"]["message"]


def test_the_loop_is_closed(folders, url, tmp_path):
    """Feedback on models' own answers, rated as the teacher rates, becomes pairs, and DPO trains on them."""
    asked = [question.instruction for question in world.bank().values()][::701]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text, "source": "village"}) + "\n" for text in asked))
    output = tmp_path / "feedback"
    models = ",".join(f"{{name: {name}}}" for name in folders)
    run(
        conf.compose(
            "feedback",
            [
                f"prompts={prompts}",
                f"output={output}",
                f"models=[{models}]",
                f"default.base_url={url}",
                "default.max_tokens=12",
                f"judge.model={TEACHER}",
                f"judge.base_url={url}",
                "judge.second=true",
            ],
        )
    )
    assert (output / "failures.jsonl").read_text() == ""
    records = [json.loads(line) for line in (output / "feedback.jsonl").read_text().splitlines()]
    assert [record["instruction"] for record in records] == asked and len(asked) == 14
    for record in records:
        assert record["judges"] == [TEACHER] and sorted(record["models"]) == [*"abcd"]
        for completion in record["completions"]:
            given = {aspect: found["Rating"] for aspect, found in completion["annotations"].items()}
            rated = teacher.rate(record["instruction"], completion["response"])
            assert given == {aspect: "N/A" if rating is None else str(rating) for aspect, rating in rated.items()}

    pairs = output / "pairs"
    splits = ["splits.test_prefs=4", "splits.test_sft=0", "splits.test_gen=0", "processes=1"]
    ultrafeedback.run(
        conf.compose("prepare/ultrafeedback", [f"input={output / 'feedback.jsonl'}", f"output={pairs}", *splits])
    )
    names = {
        split: [row["prompt"] for _, row in read(files(f"{pairs}:{split}", ""))]
        for split in ("train_prefs", "test_prefs")
    }
    assert sorted([*names["train_prefs"], *names["test_prefs"]]) == sorted(asked)
    trained = tmp_path / "dpo"
    commands.train(
        tmp_path, "dpo", trained, f"model.path={folders['a'] / 'model'}", f"data.train={pairs}:train_prefs",
        f"data.validation={pairs}:test_prefs", "trainer.max_steps=2", "checkpoint.every_n_steps=1",
    )  # fmt: skip
    last = json.loads((trained / "summary.json").read_text())
    assert last["steps"] == 2 and last["data"]["train"]["examples"] == 10

    # a checkpoint is a model to whoever loads one
    steps = sorted((trained / "checkpoints").iterdir())
    first, second = (load(find_model(step), "cpu")[0].state_dict() for step in steps)
    end = load(find_model(trained), "cpu")[0].state_dict()
    assert [step.name for step in steps] == ["step-00000001", "step-00000002"]
    assert all(weight.equal(end[name]) for name, weight in second.items())
    assert not all(weight.equal(end[name]) for name, weight in first.items())


def test_it_serves_while_a_command_runs_and_ends_as_that_does(folders, tmp_path):
    asking = (
        "import json, os, sys, urllib.request; url = os.environ['ZEPHYR_DEMO_URL']; assert url == sys.argv[1];"
        "print([m['id'] for m in json.load(urllib.request.urlopen(url + '/models'))['data']]); sys.exit(7)"
    )
    port = tmp_path / "port"
    done = subprocess.run(
        [sys.executable, "-m", "zephyr.demo.serve", f"a={folders['a']}", "--port-file", port,
         "--", sys.executable, "-c", asking, "{url}"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (7, f"['a', '{TEACHER}']\n"), done.stderr
    assert 1024 < int(port.read_text()) < 65536


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["teacher=a"], "none teacher"),
        (["a"], "write name=folder"),
        (["a={a}", "a={b}"], "each name once"),
        (["a=nowhere"], "no folder nowhere"),
        (["a={a}", "--", "no-such-program"], "cannot run no-such-program"),
    ],
)
def test_mistakes_are_told_in_one_line(folders, capsys, arguments, message):
    assert main([word.format(**folders) for word in arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("Error: ") and message in told and told.count("\n") == 1


def test_benchmarks_are_judged_by_the_teacher(folders, url, tmp_path):
    """Scores of the commands are those of the teacher's rules on the answers in their files."""
    questions, baseline = [*two_turns(seed=1, of_each=1)], against_baseline(seed=1, count=5)
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (tmp_path / "baseline.json").write_text(json.dumps(baseline))
    output = tmp_path / "evaluation"
    done = evaluate(
        [
            str(folders["a"]), "benchmarks=[mt_bench,alpaca_eval]", f"output={output}", "answer.max_tokens=12",
            f"mt_bench.questions={tmp_path / 'question.jsonl'}", f"alpaca_eval.baseline={tmp_path / 'baseline.json'}",
            f"judge.base_url={url}", f"judge.model={TEACHER}",
        ]
    )  # fmt: skip
    assert done == 0
    (answers,) = (output / "mt_bench" / "model_answer").iterdir()
    said = {row["question_id"]: row["choices"][0]["turns"] for row in map(json.loads, answers.read_text().splitlines())}
    marks = []
    for row in questions:
        for turn, before in enumerate(["", row["turns"][0]]):
            marks.append(out_of_ten(teacher.score(row["turns"][turn], said[row["question_id"]][turn], before)))
    found = json.loads((output / "mt_bench" / "results.json").read_text())
    assert (found["n"], found["failed"], found["score"]) == (12, 0, pytest.approx(sum(marks) / 12))
    outputs = json.loads((output / "alpaca_eval" / "outputs.json").read_text())
    gains = [
        teacher.score(old["instruction"], new["output"]) - teacher.score(old["instruction"], old["output"])
        for old, new in zip(baseline, outputs, strict=True)
    ]
    rate = 100 * sum((gain > 0) + (gain == 0) / 2 for gain in gains) / len(gains)
    found = json.loads((output / "alpaca_eval" / "results.json").read_text())
    assert (found["n"], found["failed"], found["win_rate"]) == (5, 0, pytest.approx(rate))
