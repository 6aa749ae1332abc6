"""Completions of a file, answered as a server's are."""

import asyncio
import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from conf import compose
from zephyr.errors import UserError
from zephyr.feedback.client import Client
from zephyr.feedback.draw import Drawn
from zephyr.feedback.ledger import Ledger
from zephyr.feedback.pool import Model
from zephyr.feedback.replay import Replay, as_recorded, held, holding, recordings, replayed
from zephyr.feedback.request import Failure, Reply, Request
from zephyr.feedback.server import Endpoint
from zephyr.feedback.settings import parse
from zephyr.feedback.verdict import Critique, read_critique

RECORDS = Path(__file__).parents[2] / "shared" / "data" / "feedback.jsonl.gz"
RAW = [
    {
        "source": "by_hand",
        "instruction": "What do ants eat?",
        "models": ["ant", "bee"],
        "completions": [
            {"model": "ant", "principle": "honesty", "custom_system_prompt": "Be honest.", "response": "Crumbs."},
            {
                "model": "bee",
                "response": "Honey, I think.",
                "generation": {
                    "model": "bee-v2",
                    "finish_reason": "length",
                    "prompt_tokens": 9,
                    "completion_tokens": 4,
                },
            },
        ],
    },
    {"instruction": "Why?\n", "completions": [{"model": "ant", "response": "Because."}]},
    {"instruction": "Why?", "completions": [{"model": "ant", "response": "The second does not count."}]},
]
DRAWN = Drawn("ant", "helpfulness", "Be helpful.")


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def models(path: str, *names: str, **options) -> list[Model]:
    return [Model(name, (Replay(path),), **options) for name in names]


def turn(text: str, role: str = "user") -> dict[str, str]:
    return {"role": role, "content": text}


def ask(ledger: Path, pool, requests):
    async def run():
        with Ledger(ledger) as book:
            async with Client(pool, book) as client:
                return await asyncio.gather(*map(client.ask, requests), return_exceptions=True), client

    return asyncio.run(run())


def test_a_recorded_completion_is_the_answer(tmp_path):
    path = write(tmp_path / "raw.jsonl", RAW)
    requests = [
        Request("ant", [turn("Be kind.", "system"), turn("What do ants eat?")], {"temperature": 0.5}),
        Request("bee", [turn("Hi"), turn("Hello", "assistant"), turn("What do ants eat? ")]),
        Request("ant", [turn("Why?")]),
        Request("bee", [turn("Why?")]),
        Request("ant", [turn("Hi")]),
    ]
    (ant, bee, why, *missing), client = ask(tmp_path / "l.sqlite", models(path, "ant", "bee"), requests)
    assert ant == Reply("Crumbs.", "ant", "stop", cost=0.0, seconds=ant.seconds)  # nobody knows its tokens
    assert bee == Reply("Honey, I think.", "bee-v2", "length", 9, 4, None, 0.0, bee.seconds)
    assert why.text == "Because."
    assert [(failure.cause, failure.detail) for failure in missing] == [
        ("not_recorded", f"{path} holds no completion of 'bee' for this prompt."),
        ("not_recorded", f"{path} holds no completion of 'ant' for this prompt."),
    ]
    assert all(isinstance(failure, Failure) for failure in missing)
    assert client.tally.failures == {"not_recorded": 2}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "model": "ant", "response": "So."},
        {"instruction": "Why?", "generator": "ant", "output": "So."},
        {"prompt": "Why?", "generator": "ant", "response": "So.", "completions": None},
    ],
)
def test_rows_of_one_completion_are_understood(tmp_path, row):
    (reply,), _ = ask(
        tmp_path / "l.sqlite", models(write(tmp_path / "r.jsonl", [row]), "ant"), [Request("ant", [turn("Why?")])]
    )
    assert reply.text == "So."


def test_a_file_that_changed_is_asked_again(tmp_path):
    path = write(tmp_path / "r.jsonl", RAW)
    request = Request("ant", [turn("Why?")])

    def text():
        recordings.cache_clear()  # as another process finds it
        (reply,), client = ask(tmp_path / "l.sqlite", models(path, "ant"), [request])
        return reply.text, client.tally.sent

    assert [text(), text()] == [("Because.", 1), ("Because.", 0)]
    write(tmp_path / "r.jsonl", [{"prompt": "Why?", "model": "ant", "response": "No."}])
    assert text() == ("No.", 1)


def test_a_model_may_have_another_name_in_the_file(tmp_path):
    path = write(tmp_path / "r.jsonl", RAW)
    (reply,), _ = ask(tmp_path / "l.sqlite", models(path, "x", served_as="ant"), [Request("x", [turn("Why?")])])
    assert (reply.text, reply.model) == ("Because.", "ant")
    (error,), _ = ask(tmp_path / "l.sqlite", models(path, "cat"), [Request("cat", [turn("Why?")])])
    assert str(error) == f"{path} holds no completion of model 'cat'; it has those of ant, bee."


@pytest.mark.parametrize(
    "row",
    [{"text": "Why?"}, {"prompt": "Why?", "response": "So."}, {"instruction": "Why?", "completions": ["So."]}],
)
def test_other_rows_are_named(tmp_path, row):
    path = write(tmp_path / "r.jsonl", [RAW[0], row])
    with pytest.raises(UserError, match=r"r\.jsonl line 2: no recorded completions\. A row must have"):
        ask(tmp_path / "l.sqlite", models(path, "ant"), [])


def test_files_without_completions_are_named(tmp_path):
    path = write(tmp_path / "r.jsonl", [{"instruction": "Why?", "completions": []}])
    with pytest.raises(UserError, match="holds no completion"):
        ask(tmp_path / "l.sqlite", models(path, "ant"), [])


def test_only_models_that_hold_a_prompt_can_be_drawn_for_it(tmp_path):
    path = write(tmp_path / "r.jsonl", RAW)
    asked = Model("asked", (Endpoint("http://127.0.0.1:1/v1"),))
    pool = [*models(path, "ant", "bee"), asked]
    assert holding(pool, "What do ants eat?") == ["ant", "bee", "asked"]
    assert holding(pool, "Why?") == ["ant", "asked"]
    assert holding(pool, "Hi") == ["asked"]


def test_what_was_heeded_is_what_the_file_says(tmp_path):
    path = write(tmp_path / "r.jsonl", RAW)
    asked = Model("asked", (Endpoint("http://127.0.0.1:1/v1"),))
    pool = {model.name: model for model in (*models(path, "ant", "bee"), asked)}
    prompt = "What do ants eat?"
    assert as_recorded(pool, prompt, DRAWN) == Drawn("ant", "honesty", "Be honest.")
    assert as_recorded(pool, prompt, DRAWN._replace(model="bee")) == Drawn("bee", "", "")  # nobody knows
    assert as_recorded(pool, prompt, DRAWN._replace(model="asked")) == DRAWN._replace(model="asked")
    assert held(pool["ant"], f" {prompt}").text == "Crumbs." and held(pool["bee"], "Why?") is None
    assert held(pool["asked"], prompt) is None
    assert [replayed(model) for model in pool.values()] == [True, True, False]


def test_a_star_is_every_model_of_the_file(tmp_path):
    path = write(tmp_path / "r.jsonl", RAW)
    given = f"models=[{{name: '*', replay: {path}}}, {{name: m, base_url: 'http://127.0.0.1:1/v1', structured: true}}]"
    arguments = ["prompts=p", "output=o", given, "judge.model=j", f"judge.path={tmp_path}"]
    settings = parse(compose("feedback", arguments))
    assert [(one.name, one.replay, one.structured) for one in settings.models] == [
        ("ant", path, False),
        ("bee", path, False),
        ("m", None, True),
    ]
    assert settings.judge.backend.structured is False  # a model in this process takes no schema
    assert [model.pooled().servers for model in settings.models[:2]] == [(Replay(path),)] * 2


@pytest.mark.skipif(not RECORDS.exists(), reason="the recorded completions of real models are not here")
def test_recorded_feedback_comes_back_through_the_client(tmp_path):
    """1,699 records of four. Those whose critique is not of one text are looked at in tests/test_verdict.py."""
    with gzip.open(RECORDS, "rt") as file:
        rows = [json.loads(line) for line in file]
    recorded = [(row["instruction"], one) for row in rows for one in row["completions"]]
    names = sorted({one["model"] for _, one in recorded})
    requests = [Request(one["model"], [turn(prompt)]) for prompt, one in recorded]
    replies, client = ask(tmp_path / "l.sqlite", models(str(RECORDS), *names), requests)
    assert [reply.text for reply in replies] == [one["response"] for _, one in recorded]
    assert client.tally.sent == len(recorded) == 4 * 1699 and client.tally.failures == {}
    met: Counter[bool] = Counter()
    for reply, (_, one) in zip(replies, recorded, strict=True):
        assert reply.finish_reason == "stop"
        read = read_critique(one.get("critique") or "", 10)
        met[isinstance(read, Critique)] += 1
        assert not isinstance(read, Critique) or read.score == one["overall_score"]
    assert met == {True: 6156, False: 256 + 384}  # reviews of pairs, and texts without a critique
