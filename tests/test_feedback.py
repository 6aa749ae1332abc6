"""The feedback command against a scripted server: what it asks, and what it writes."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import conf
from tests.collecting import EACH, FILES, ask, content, lines, report, said
from tests.openai_server import Answer, Server, text_of
from zephyr.data.sources import files, read
from zephyr.feedback.judge import ASPECTS, load_rubrics
from zephyr.feedback.prompts import Prompts
from zephyr.prepare import ultrafeedback


def test_every_prompt_is_answered_by_four_models_and_judged(whole: tuple[Path, Server]):
    output, server = whole
    rows = lines(output / "feedback.jsonl")
    assert [row["instruction"] for row in rows] == [f"question {n}?" for n in range(12)]
    assert server.requests.total() == len(server.requests) == 12 * EACH
    texts = {text_of(seen.body) for seen in server.seen}
    for row in rows:
        assert len(set(row["models"])) == 4 and set(row["models"]) < set("abcde")
        assert [judgement["aspect"] for judgement in row["judgements"]] == [*ASPECTS, *["critique"] * 4]
        assert row["judges"] == ["j-0613"]
        for one in row["completions"]:
            assert one["response"] in texts and one["generation"]["prompt_tokens"] == 10
            assert 1 <= one["overall_score"] <= 10 and set(one["annotations"]) == set(ASPECTS)
            assert row["source"] != "flan" or one["principle"] in ("helpfulness", "verbalized_calibration")
    assert sorted(path.name for path in output.iterdir()) == sorted(
        [*FILES, "report.json", "config.json", "ledger.sqlite", "ledger.sqlite.lock"]
    )
    assert (output / "failures.jsonl").read_bytes() == b""


def test_the_first_aspect_goes_ahead_of_the_others(tmp_path: Path):
    """So that they find prompt and texts in the server's cache: all four begin alike, until the rubric."""
    rubrics = load_rubrics(None)
    with Server(lambda seen: Answer(delay=0.1)) as server:
        ask(server.url, tmp_path, "limit=3", "judge.second=true")
        asked = [(seen.at, seen.body["messages"][-1]["content"]) for seen in server.seen if seen.body["model"] == "j"]
    for n in range(3):
        mine = [one for one in asked if f"\nquestion {n}?\n" in one[1] and "] Text 2 begins" in one[1]]
        assert len(mine) == 8
        for start in {text.split("] Text 2 begins")[0] for _, text in mine}:  # of either judgement
            (first, ahead), *others = [(at, text) for at, text in mine if text.startswith(start)]
            shared = ahead.index("Text 4 ends")
            assert ahead[shared:].startswith("Text 4 ends\n\n" + rubrics["instruction_following"].text)
            assert len(others) == 3 and all(text.startswith(ahead[:shared]) for _, text in others)
            assert all(at - first >= 0.1 for at, _ in others)


def test_no_judge_is_told_who_wrote_a_text(tmp_path: Path):
    with Server() as server:
        ask(server.url, tmp_path, "limit=3", names=["writer-one", "writer-two", "writer-six", "writer-ten"])
        asked = [json.dumps(seen.body["messages"]) for seen in server.seen if seen.body["model"] == "j"]
    assert len(asked) == 3 * 8 and not any("writer" in text for text in asked)


def test_the_report_counts_what_the_file_holds(whole: tuple[Path, Server]):
    output, _ = whole
    rows, told = lines(output / "feedback.jsonl"), report(output)
    made = [one for row in rows for one in row["completions"]]
    assert told["completions_by_model"] == dict(sorted(Counter(one["model"] for one in made).items()))
    assert told["completions_by_principle"] == dict(sorted(Counter(one["principle"] for one in made).items()))
    assert told["records_by_source"] == {"flan": 6, "sharegpt": 6}
    assert told["judgements_by_judge"] == {"j-0613": 96}
    scores = [one["overall_score"] for one in made if one["model"] == "a"]
    mean = told["mean_ratings"]["a"]["overall_score"]
    assert mean["n"] == len(scores) and mean["mean"] == pytest.approx(sum(scores) / len(scores))
    ran = told["this_run"]
    assert (ran["requests_sent"], ran["requests_replayed"], ran["retries"]) == (144, 0, {})
    assert (ran["prompt_tokens"], ran["completion_tokens"], ran["cached_tokens"]) == (1440, 720, 576)
    assert (told["prompts"], told["records"], told["prompts_left"], told["stopped_by"]) == (12, 12, 0, None)
    assert sum(total["number"] for total in told["ledger"]) == 144


def test_prepare_makes_pairs_of_it(whole: tuple[Path, Server], tmp_path: Path):
    sizes = ["splits.test_prefs=2", "splits.test_sft=1", "splits.test_gen=1", "processes=1"]
    done = ultrafeedback.run(
        conf.compose(
            "prepare/ultrafeedback", [f"input={whole[0]}/feedback.jsonl", f"output={tmp_path / 'pairs'}", *sizes]
        )
    )
    rows = [row for split in ("train_prefs", "test_prefs") for _, row in read(files(f"{done}:{split}", "input"))]
    means = {
        row["instruction"]: {one["response"]: one["fine-grained_score"] for one in row["completions"]}
        for row in lines(whole[0] / "feedback.jsonl")
    }
    assert len(rows) == 12 and {row["prompt"] for row in rows} == set(means)
    for row in rows:
        scores = means[row["prompt"]]
        assert scores[row["chosen"][-1]["content"]] == max(scores.values()) == pytest.approx(row["score_chosen"])
        assert row["score_rejected"] == pytest.approx(scores[row["rejected"][-1]["content"]])


def test_a_conversation_is_sent_as_it_is_and_comes_back_in_the_pair(tmp_path: Path):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Ann."},
        {"role": "user", "content": "And when?"},
    ]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    with Server() as server:
        output = ask(server.url, tmp_path)
        asked = [seen.body["messages"] for seen in server.seen if seen.body["model"] != "j"]
    (row,) = lines(output / "feedback.jsonl")
    for messages in asked:
        assert messages[1:] == turns[1:] and messages[0]["role"] == "system"
        assert messages[0]["content"].startswith("Be brief.\n\n")
    assert row["instruction"] == "System: Be brief.\n\nUser: Who?\n\nAssistant: Ann.\n\nUser: And when?"
    assert row["source"] == "unknown"
    config = conf.compose("prepare/ultrafeedback", ["input=x", "output=y", "ties=keep"])
    pair = ultrafeedback.job(config).work(("here", row))[0]
    assert pair["chosen"][:-1] == pair["rejected"][:-1] == turns and pair["chosen"][-1]["role"] == "assistant"


def test_a_second_judgement_takes_a_liking_for_places_out_of_the_mean(tmp_path: Path):
    """The judge gives 5, 4, 3, 2 by place alone. Reversed, each text gets 3.5 in the mean; the two differ by 3, 1, 1
    and 3 points, and rank every pair the other way round."""

    def script(seen: Any) -> Answer:
        schema = seen.body.get("response_format", {}).get("json_schema", {}).get("schema", {})
        if "text_1" not in schema.get("properties", {}):
            return Answer()
        return said(json.dumps({f"text_{n}": {"rationale": "", "rating": str(6 - n)} for n in range(1, 5)}))

    with Server(script) as server:
        output = ask(server.url, tmp_path, "judge.second=true", "judge.critique=false", "limit=5")
        assert server.requests.total() == 5 * (4 + 8)
    for row in lines(output / "feedback.jsonl"):
        assert [one["fine-grained_score"] for one in row["completions"]] == [3.5] * 4
    for found in report(output)["second_judgement"].values():
        assert (found["ratings"], found["mean_absolute"], found["reversed"]) == (20, 2.0, 1.0)


def test_replies_as_text_where_a_server_takes_no_schema(tmp_path: Path):
    with Server() as server:
        output = ask(server.url, tmp_path, "judge.structured=false", "limit=4")
        assert not any("response_format" in seen.body for seen in server.seen)
    assert not lines(output / "failures.jsonl")
    assert all(
        set(one["annotations"]) == set(ASPECTS)
        for row in lines(output / "feedback.jsonl")
        for one in row["completions"]
    )


PRICES = ["default.price.prompt=100000", "judge.price.prompt=100000"]  # of 10 tokens: 1 USD a reply


def test_a_reply_that_texts_share_is_paid_once(tmp_path: Path):
    """Two of four texts are the same, so they share a critique: a record is made of 4 + 4 + 3 replies of 1 USD."""
    with Server(lambda seen: said("The same.") if seen.body["model"] in "ab" else Answer()) as server:
        output = ask(server.url, tmp_path, "limit=2", *PRICES, names="abcd")
        assert server.requests.total() == 22
    assert [row["cost"] for row in lines(output / "feedback.jsonl")] == [11, 11]
    assert sum(total["cost"] for total in report(output)["ledger"]) == 22


def test_a_completion_that_prompts_share_is_paid_once(tmp_path: Path):
    """Each question comes plain, and behind a system prompt with which a principle makes one that is drawn as well."""
    (tmp_path / "principles.yaml").write_text(
        json.dumps(
            {"wordings": {"kindness": ["Be kind.", "Be brief.\n\nBe kind."]}, "mixtures": {"default": {"kindness": 1}}}
        )
    )
    brief = {"role": "system", "content": "Be brief."}
    turns = [{"role": "user", "content": f"question {n}?"} for n in range(8)]
    rows = [{"prompt": messages} for turn in turns for messages in ([turn], [brief, turn])]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [f"principles={tmp_path}/principles.yaml", "judge.critique=false", *PRICES]
    with Server() as server:
        output = ask(server.url, tmp_path, *given, names="abcd")
    rows, shared = lines(output / "feedback.jsonl"), []
    for plain, behind in zip(rows[::2], rows[1::2], strict=True):
        drawn = [{one["model"]: one["custom_system_prompt"] for one in row["completions"]} for row in (plain, behind)]
        shared.append(sum(drawn[0][m] == "Be brief.\n\nBe kind." and drawn[1][m] == "Be kind." for m in "abcd"))
        assert (plain["cost"], behind["cost"]) == (8, 8 - shared[-1])
    assert sum(shared) > 0 and server.requests.total() == 16 * 8 - sum(shared)
    assert sum(total["cost"] for total in report(output)["ledger"]) == sum(row["cost"] for row in rows)


def test_the_pool_may_stand_in_a_file(whole: tuple[Path, Server], tmp_path: Path):
    with Server() as server:
        pool = [{"name": name, "base_url": [server.url, server.url + "/"]} for name in "abcde"]
        (tmp_path / "pool.yaml").write_text(json.dumps(pool))
        assert content(ask(server.url, tmp_path, f"models={tmp_path / 'pool.yaml'}")) == content(whole[0])
    kept = json.loads((tmp_path / "out" / "config.json").read_text())["config"]
    assert kept["models"] == pool


# ---------------------------------------------------------------------------------------------------------------------
# What a file of prompts may look like


@pytest.mark.parametrize(
    ("row", "text", "turns"),
    [
        ({"prompt": "Why?"}, "Why?", 1),
        ({"instruction": "Why?", "completions": []}, "Why?", 1),
        ({"prompt": [{"role": "user", "content": "Why?"}]}, "Why?", 1),
        ({"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}, "Why?", 1),
        ({"prompt": "Why?", "messages": [{"role": "user", "content": "Why?"}]}, "Why?", 1),
        ({"data": ["Why?", "So.", "Really?", "Yes."]}, "Why?", 1),
    ],
)
def test_rows_that_ask(row: dict[str, Any], text: str, turns: int, tmp_path: Path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(row))
    (prompt,) = Prompts(str(path), None, "error")
    assert (prompt.text, len(prompt.messages), prompt.source) == (text, turns, None)


def test_the_demo_has_prompts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from zephyr import demo

    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Why?"}]}))
    monkeypatch.setattr(demo, "locate", lambda name: str(path) if name == "demo:chats-test.jsonl" else name)
    (prompt,) = Prompts("demo:chats-test.jsonl", None, "error")
    assert prompt.text == "Why?"


def test_prompt_ids_are_hashes_of_what_is_asked(whole: tuple[Path, Server]):
    for row in lines(whole[0] / "feedback.jsonl"):
        assert row["prompt_id"] == hashlib.sha256(row["instruction"].encode()).hexdigest()
