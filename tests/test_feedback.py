"""The feedback command against a scripted server: what it asks, what it writes, and that nothing but the answers decides
what that is."""

import hashlib
import io
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import conf
from tests.openai_server import FAULTS, Answer, Server, text_of
from zephyr.data.sources import files, read
from zephyr.errors import UserError
from zephyr.feedback.collect import _Watch
from zephyr.feedback.judge import ASPECTS, load_rubrics
from zephyr.feedback.progress import Shown
from zephyr.feedback.prompts import Prompts
from zephyr.feedback.run import run
from zephyr.feedback.settings import parse
from zephyr.prepare import ultrafeedback

ROOT = Path(__file__).parents[1]
SECRET = "sk-very-secret-0123456789"
FILES = ("feedback.jsonl", "failures.jsonl")
EACH = 4 + 4 + 4  # requests of a prompt: completions, aspects, critiques


def prompts(folder: Path, number: int = 12) -> Path:
    path = folder / "prompts.jsonl"
    sources = ("flan", "sharegpt")
    rows = [{"prompt": f"question {n}?", "source": sources[n % 2]} for n in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(url: str, folder: Path, *overrides: str, names: Sequence[str] = "abcde") -> list[str]:
    """The command line of `names` as models and j as judge, all behind one address."""
    source = folder / "prompts.jsonl"
    models = ",".join(f"{{name: {name}, base_url: '{url}'}}" for name in names)
    given = [] if any(override.startswith("models=") for override in overrides) else [f"models=[{models}]"]
    return [
        f"prompts={source if source.exists() else prompts(folder)}", f"output={folder / 'out'}", *given,
        f"judge.base_url={url}", "judge.model=j", "limits.backoff=0.01", *overrides,
    ]  # fmt: skip


def ask(url: str, folder: Path, *overrides: str, names: Sequence[str] = "abcde") -> Path:
    run(conf.compose("feedback", arguments(url, folder, *overrides, names=names)))
    return folder / "out"


def start(url: str, folder: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "zephyr.feedback", *arguments(url, folder, *overrides)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def content(output: Path) -> tuple[bytes, ...]:
    return tuple((output / name).read_bytes() for name in FILES)


def report(output: Path) -> dict[str, Any]:
    return json.loads((output / "report.json").read_text())


def said(text: str) -> Answer:
    """A completion with this text."""
    patch = {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}
    return Answer(patch=patch) if text else Answer(patch={**patch, "usage": None})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Server]:
    """A run without a fault, and what its server saw."""
    folder = tmp_path_factory.mktemp("whole")
    with Server() as server:
        ask(server.url, folder)
    return folder / "out", server


# ---------------------------------------------------------------------------------------------------------------------
# What is asked, and what is written


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


def test_the_pool_may_stand_in_a_file(whole: tuple[Path, Server], tmp_path: Path):
    with Server() as server:
        pool = [{"name": name, "base_url": [server.url, server.url + "/"]} for name in "abcde"]
        (tmp_path / "pool.yaml").write_text(json.dumps(pool))
        assert content(ask(server.url, tmp_path, f"models={tmp_path / 'pool.yaml'}")) == content(whole[0])
    kept = json.loads((tmp_path / "out" / "config.json").read_text())["config"]
    assert kept["models"] == pool


# ---------------------------------------------------------------------------------------------------------------------
# The answers decide, and nothing else


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


# ---------------------------------------------------------------------------------------------------------------------
# Secrets, the dry run, what is shown


def test_the_key_is_in_no_file_and_on_no_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not even where the server writes it into its answers and its errors. W&B's files are among those searched."""
    monkeypatch.setenv("POOL_KEY", SECRET)
    monkeypatch.setenv("WANDB_MODE", "offline")

    def script(seen: Any) -> Answer:
        assert seen.headers["authorization"] == f"Bearer {SECRET}"
        if seen.attempt == 1:
            return Answer(500, {}, json.dumps({"error": {"message": f"your key {SECRET} met a fault"}}).encode())
        if seen.body["model"] == "a":
            return Answer(400, {}, json.dumps({"error": {"message": f"{SECRET} is not enough"}}).encode())
        return said(f"your key is {SECRET}") if seen.body["model"] != "j" else Answer()

    with Server(script) as server:
        logger = [] if not _has("wandb") else ["logger={project: zephyr, name: n, group: null, tags: []}"]
        keys = ["default.api_key_env=POOL_KEY", "judge.api_key_env=POOL_KEY", "max_failures=1", "limit=3"]
        process = start(server.url, tmp_path, *keys, *logger)
        out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    found = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(found) > 5 and lines(tmp_path / "out" / "failures.jsonl")
    for path in found:
        data = path.read_bytes()
        assert SECRET.encode() not in data and SECRET[8:].encode() not in data, path
    assert SECRET[3:] not in out + error
    assert "your key is <removed>" in (tmp_path / "out" / "feedback.jsonl").read_text()
    if logger:
        (run_file,) = (tmp_path / "out").glob("wandb/offline-run-*/*.wandb")
        assert b"requests_per_second" in run_file.read_bytes() and b"question 1?" not in run_file.read_bytes()


def _has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def test_a_dry_run_sends_nothing_and_knows_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """12 prompts, 4 models: 12 completions of each, 8 judgements of each prompt. A completion's price is 2 USD a
    million: 12 * 300 tokens to expect are 0.0072, and 12 * 1024 at most 0.0246."""
    dry = ["dry_run=true", "default.api_key_env=NOBODY_SET_THIS"]
    with Server() as server:
        ask(server.url, tmp_path, *dry, "default.price.completion=2000", names="abcd")
        rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[2:8]}
        for name in "abcd":
            assert rows[name][2:4] == ["12", "0"] and rows[name][5:] == ["3,600", "7.20", "24.58"]
        assert rows["j"][2:4] == ["96", "0"] and rows["all"][1:3] == ["144", "0"]
        assert rows["j"][5] == f"{12 * (4 * 240 + 4 * 250):,}"
        assert server.requests.total() == 0 and not (tmp_path / "out").exists()
        ask(server.url, tmp_path, "max_requests=60", "limits.concurrency=4", names="abcd")
        capsys.readouterr()
        ask(server.url, tmp_path, *dry, names="abcd")
        rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[2:8]}
        assert int(rows["all"][2]) == 60 and int(rows["all"][1]) == 144 - 60
        for most, stops in ((143, True), (144, False)):  # those that were sent count
            ask(server.url, tmp_path, *dry, f"max_requests={most}", names="abcd")
            assert (f"max_requests={most} will stop it before its end." in capsys.readouterr().out) == stops
        ask(server.url, tmp_path, names="abcd")
        capsys.readouterr()
        ask(server.url, tmp_path, *dry, names="abcd")
        assert " 0       144 " in capsys.readouterr().out
        assert server.requests.total() == 144


def test_the_estimate_of_prompt_tokens_is_that_of_the_bytes_that_are_sent(
    whole: tuple[Path, Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    prompts(tmp_path)
    (tmp_path / "out").mkdir()
    ask("http://localhost:1/v1", tmp_path, "dry_run=true", "default.max_tokens=5")
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[2:9]}
    asked = [seen.body for seen in whole[1].seen if seen.body["model"] == "j"]
    sent = sum(
        sum(len(message["content"]) for message in body["messages"])
        + len(json.dumps(body["response_format"]["json_schema"]["schema"]))
        for body in asked
    )
    assert float(rows["j"][4].replace(",", "")) == pytest.approx(sent / 4, rel=0.05)


def test_plain_lines_and_a_panel_say_how_far_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from zephyr.feedback.client import Tally

    class Asked:
        tally = Tally(sent=30, prompt_tokens=500, completion_tokens=100, cost=0.25)
        in_flight = 7

    Asked.tally.retries["rate_limited"] = 2
    settings = parse(conf.compose("feedback", arguments("http://localhost:1/v1", tmp_path)))
    shown = Shown(10, settings, {}, tmp_path, Console(file=io.StringIO()))
    shown.started -= 10  # seconds
    shown.done = 4
    figures = shown.figures(Asked())  # type: ignore[arg-type]
    assert figures["prompts"] == "4/10" and figures["requests/s"] == "3.0" and figures["tokens/s"] == "60"
    assert (figures["in flight"], figures["cost"], figures["retries"]) == ("7", "0.2500 USD", "2 rate_limited")
    assert figures["ETA"] == "0:00:15" and "failures" not in figures
    with Server(lambda seen: Answer(delay=0.3)) as server:
        settings = arguments(server.url, tmp_path, "limit=2")
        terminal = io.StringIO()
        import zephyr.feedback.run as module

        original = module.Shown
        try:
            module.Shown = lambda *a: original(*a, Console(file=terminal, force_terminal=True))  # type: ignore[misc, assignment]
            run(conf.compose("feedback", settings))
            module.Shown = lambda *a: original(*a, Console(file=io.StringIO()), seconds=0.0)  # type: ignore[misc, assignment]
            run(conf.compose("feedback", [*settings, "seed=1"]))
        finally:
            module.Shown = original  # type: ignore[misc]
    assert "requests/s" in terminal.getvalue() and "prompts" in terminal.getvalue()
    assert re.search(r"prompts 0/2  requests/s [\d.]+  tokens/s", capsys.readouterr().err)


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
