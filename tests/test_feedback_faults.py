"""Feedback runs with faults, kills and budgets: nothing but the answers decides what is written, and what is missing is
named."""

import json
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.collecting import EACH, ask, content, lines, prompts, report, said, start
from tests.openai_server import FAULTS, Answer, Seen, Server
from zephyr.errors import UserError
from zephyr.feedback.collect import _Watch
from zephyr.feedback.judge import ASPECTS


def test_neither_faults_nor_their_order_nor_concurrency_change_a_byte(whole: tuple[Path, Server], tmp_path: Path):
    names = ["429", "500", "dropped", "closed", "truncated", "garbage", "no choice", "slow"]

    def script(seen: Any) -> Answer:
        draw = random.Random(f"{seen.key} {seen.attempt}")
        return FAULTS[draw.choice(names)] if draw.random() < 0.3 else Answer(delay=draw.random() * 0.03)

    with Server(script) as server:
        output = ask(server.url, tmp_path, "limits.concurrency=7", "limits.attempts=12", "limits.longest_wait=0.1")
    assert content(output) == content(whole[0])
    told = report(output)["this_run"]
    assert len(told["retries"]) >= 3 and told["requests_sent"] == 144 + sum(told["retries"].values())


def test_a_prompt_that_is_late_holds_its_place(whole: tuple[Path, Server], tmp_path: Path):
    slow = Answer(delay=0.4)
    with Server(lambda seen: slow if "question 0?" in json.dumps(seen.body) else Answer()) as server:
        assert content(ask(server.url, tmp_path)) == content(whole[0])


def test_the_same_command_again_sends_nothing(whole: tuple[Path, Server], tmp_path: Path):
    with Server() as server:
        ask(server.url, tmp_path)
        before = content(tmp_path / "out")
        ask(server.url, tmp_path, "limits.concurrency=3")
        assert server.requests.total() == 144
    assert content(tmp_path / "out") == before == content(whole[0])
    assert report(tmp_path / "out")["this_run"]["requests_replayed"] == 144


def test_another_configuration_in_the_folder_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with Server() as server:
        ask(server.url, tmp_path, "limit=2")
        capsys.readouterr()
        ask(server.url, tmp_path, "limit=3")
        assert capsys.readouterr().err == "" and server.requests.total() == 3 * EACH
        ask(server.url, tmp_path, "limit=3", "default.parameters={logit_bias: {7: -1}}")
        assert "was begun with other models." in capsys.readouterr().err
        ask(server.url, tmp_path, "limit=3", "default.parameters={logit_bias: {7: -1}}")
        assert capsys.readouterr().err == "" and server.requests.total() == 3 * EACH + 3 * 4
        ask(server.url, tmp_path, "limit=3")
        capsys.readouterr()
        ask(server.url, tmp_path, "limit=2", "judge.temperature=0.5")
        assert "was begun with other judge." in capsys.readouterr().err
        assert server.requests.total() == 3 * EACH + 3 * 4 + 2 * 8  # completions are the same requests


def test_a_budget_leaves_whole_prompts_and_a_larger_one_goes_on(
    whole: tuple[Path, Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with Server(lambda seen: Answer(delay=0.01)) as server:
        output = ask(server.url, tmp_path, "max_requests=80", "limits.concurrency=4")
        assert server.requests.total() == 80
        some, told = lines(output / "feedback.jsonl"), report(output)
        assert 3 <= len(some) == told["records"] < 12 and told["prompts_left"] == 12 - len(some)
        assert told["stopped_by"] == "budget" and "Stopped by the budget (max_requests=80" in capsys.readouterr().out
        assert [row["instruction"] for row in some] == sorted(
            (row["instruction"] for row in some), key=lambda text: int(text[9:-1])
        )
        every = {row["instruction"]: row for row in lines(whole[0] / "feedback.jsonl")}
        assert all(row == every[row["instruction"]] for row in some)
        assert content(ask(server.url, tmp_path, "max_requests=200")) == content(whole[0])
        assert server.requests.total() == 144 and set(server.completed.values()) == {1}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_and_the_same_command_goes_on(number: int, whole: tuple[Path, Server], tmp_path: Path):
    with Server(lambda seen: Answer(delay=0.1)) as server:
        process = start(server.url, tmp_path, "limits.concurrency=8")
        while server.requests.total() < 40:
            time.sleep(0.01)
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
        assert process.returncode == 128 + number
        assert error == f"Stopped by {signal.Signals(number).name}. The same command goes on.\n"
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
            "config.json", "ledger.sqlite", "ledger.sqlite.lock",
        ]  # fmt: skip
        sent = server.requests.total()
        assert 40 <= sent < 100
        assert content(ask(server.url, tmp_path)) == content(whole[0])
        assert server.requests.total() == 144 and set(server.completed.values()) == {1}


def test_killed_at_once_it_loses_nothing_that_was_answered(whole: tuple[Path, Server], tmp_path: Path):
    with Server(lambda seen: Answer(delay=0.05)) as server:
        for goal in (20, 70):
            process = start(server.url, tmp_path, "limits.concurrency=8")
            while server.requests.total() < goal:
                time.sleep(0.005)
            process.kill()
            process.communicate()
        assert not (tmp_path / "out" / "feedback.jsonl").exists()
        assert content(ask(server.url, tmp_path)) == content(whole[0])
        assert len(server.requests) == server.requests.total() == 144


# ---------------------------------------------------------------------------------------------------------------------
# What is missing is named


def test_every_completion_and_judgement_that_is_missing_has_a_line(tmp_path: Path):
    """Model a refuses, b says nothing, and the judge talks nonsense for one prompt and is cut off for another."""

    def script(seen: Any) -> Answer:
        text = json.dumps(seen.body["messages"])
        if seen.body["model"] == "a":
            return Answer(400, {}, b'{"error": {"message": "not this one"}}')
        if seen.body["model"] == "b":
            return said("")
        if seen.body["model"] == "j" and "question 3?" in text:
            return said("I would rather not.")
        if seen.body["model"] == "j" and "question 5?" in text:
            return Answer(patch={"choices": [{"message": {"content": '{"text_1": {"ra'}, "finish_reason": "length"}]})
        return Answer()

    with Server(script) as server:
        output = ask(server.url, tmp_path, "max_failures=1", "limits.attempts=2")
    rows = {row["prompt_id"]: row for row in lines(output / "feedback.jsonl")}
    failures = lines(output / "failures.jsonl")
    expected = Counter(seen.body["model"] for seen in server.seen if seen.body["model"] in "ab")
    made = Counter((line["model"], line["cause"]) for line in failures if line["stage"] == "generate")
    assert made["a", "refused"] == expected["a"] > 5 and made["b", "empty_response"] == expected["b"] > 5
    for prompt_id, row in rows.items():
        mine = [line for line in failures if line["prompt_id"] == prompt_id]
        assert len(row["completions"]) + sum(line["stage"] == "generate" for line in mine) == 4
        named = {(line["model"], line["aspect"]) for line in mine if line["stage"] == "judge"}
        for one in row["completions"]:
            absent = set(ASPECTS) - set(one["annotations"]) | ({"critique"} if one["overall_score"] is None else set())
            assert all((one["model"], aspect) in named or (None, aspect) in named for aspect in absent)
            lost = row["instruction"] in ("question 3?", "question 5?")
            assert (one["fine-grained_score"] is None) == lost == bool(absent), row["instruction"]
    told = report(output)
    assert sum(told["failures"]["generate"].values()) + sum(told["failures"]["judge"].values()) == len(failures)
    assert told["too_few_completions"] == 12 - len(rows)


def test_too_many_failures_stop_the_run_with_their_causes(tmp_path: Path):
    prompts(tmp_path, 200)
    with Server(lambda seen: said("Splendid, all of them.") if seen.body["model"] == "j" else Answer()) as server:
        process = start(server.url, tmp_path, "limits.concurrency=16")
        out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert re.match(
        r"Error: \d+ of the latest \d+ requests ended without an answer that can be used, more than max_failures=0.05: ",
        error,
    )
    assert error.count("\n") == 1 and "missing_text (instruction_following: Text " in error
    assert "the judge wrote 'Splendid, all of them.'" in error
    assert server.requests.total() < 500 and not (tmp_path / "out" / "feedback.jsonl").exists()


def test_a_run_without_a_rating_has_failed(tmp_path: Path):
    """The first trial of a few prompts too: records without a number are of no use to anybody."""

    def script(seen: Seen) -> Answer:
        useless = {"choices": [{"index": 0, "message": {"content": "Splendid."}, "finish_reason": "stop"}]}
        return Answer(patch=useless) if seen.body["model"] == "j" and unwilling else Answer()

    with Server(script) as server:
        unwilling = True
        with pytest.raises(UserError) as stopped:
            ask(server.url, tmp_path, "limit=2")
        message = str(stopped.value)
        assert message.startswith(
            "no reply of the judge held a rating that can be read, for any of 2 prompts: 8 missing"
        )
        assert "Splendid." in message and not list((tmp_path / "out").glob("*.jsonl*"))
        assert report(ask(server.url, tmp_path, "limit=2", "max_failures=1"))["records"] == 2  # who wants them so
        unwilling = False
        assert report(ask(server.url, tmp_path, "limit=2", "judge.max_tokens=2000"))["mean_ratings"]


def test_a_run_without_a_record_has_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """However few prompts it had, and however many failures are allowed; but not where the budget was too small."""
    refusal = Answer(400, {}, b'{"error": {"message": "not this one"}}')
    with Server(lambda seen: refusal if server.script_on else Answer()) as server:
        server.script_on = True  # type: ignore[attr-defined]
        with pytest.raises(UserError) as stopped:
            ask(server.url, tmp_path, "limit=3", "max_failures=1")
        message = str(stopped.value)
        assert message.startswith("none of 3 prompts got two completions, so there is nothing to record: 12 refused (")
        assert "not this one" in message and "; 3 too_few_completions (0 of 4 have a text). Mend that" in message
        assert not list((tmp_path / "out").glob("*.jsonl*")) and not (tmp_path / "out" / "report.json").exists()
        server.script_on = False  # type: ignore[attr-defined]
        output = ask(server.url, tmp_path, "limit=3", "max_requests=15")
        assert report(output)["records"] == 0 and report(output)["prompts_left"] == 3
        assert report(ask(server.url, tmp_path, "limit=3"))["records"] == 3


def test_what_the_judge_wrote_is_said_beside_what_is_wrong_with_it(tmp_path: Path):
    """Each critique says something else, and nothing of a score."""
    prompts(tmp_path, 200)

    def script(seen: Any) -> Answer:
        asked = json.dumps(seen.body["messages"])
        return said(f"of {seen.key}") if seen.body["model"] == "j" and "Text 2 begins" not in asked else Answer()

    with Server(script) as server, pytest.raises(UserError) as stopped:
        ask(server.url, tmp_path, "limits.concurrency=16")
    assert re.search(r"missing_rating \(critique: of (\w+); the judge wrote 'of \1'\)", str(stopped.value))


def test_duplicates_are_asked_once_and_rows_without_a_prompt_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = ['{"prompt": "Why?"}', '{"instruction": "Why?"}', "not json", '{"prompt": " "}', '{"prompt": "How?"}']
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    with Server() as server:
        output = ask(server.url, tmp_path)
        assert server.requests.total() == 2 * EACH
    told = report(output)
    assert (told["prompts"], told["duplicate_prompts"], told["bad_rows"]["number"]) == (2, 1, 2)
    assert "line 3" in told["bad_rows"]["first"][0] and "line 4" in told["bad_rows"]["first"][1]
    assert "Note: 2 rows are left out, the first: prompts.jsonl line 3" in capsys.readouterr().err


def test_what_was_answered_long_ago_does_not_hide_what_fails_now():
    """Of 5,000 requests 4,900 were answered; then all fail: 51 of the latest 1,000 are more than a twentieth."""
    watch = _Watch(0.05)
    for _ in range(4_900):
        watch.ended(None)
    for _ in range(50):
        watch.ended("server_error", "500")
    with pytest.raises(UserError, match="51 of the latest 1000 requests .*: 51 server_error .500."):
        watch.ended("server_error", "500")
    watch = _Watch(0.05)  # four in a hundred, for ever, are allowed
    for number in range(10_000):
        watch.ended("server_error" if number % 25 == 0 else None, "500")
