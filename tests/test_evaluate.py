"""python -m zephyr.evaluate: what all benchmarks share."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import conf
from tests import tiny
from tests.openai_server import Answer, Server, completion
from zephyr import evaluate
from zephyr.errors import UserError
from zephyr.evaluation import alpaca_eval, mt_bench
from zephyr.evaluation.settings import parse

ROOT = Path(__file__).parents[1]
SERVED = ("model=m", "answer.base_url=http://localhost:1/v1", "output=o")


def settings(*arguments):
    return parse(conf.compose("evaluate", arguments))


def judging(seen):
    """Whatever is asked is worth a seven."""
    answer = completion(seen.body)
    if seen.body["model"] == "j":
        answer["choices"][0]["message"]["content"] = "Rating: [[7]]"
    return Answer(body=json.dumps(answer).encode())


@pytest.fixture
def questions(tmp_path):
    rows = [{"question_id": n, "category": "writing", "turns": [f"Say {n}.", "Again."]} for n in range(8)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"mt_bench.questions={tmp_path / 'q.jsonl'}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "dpo"
    tiny.model().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    return folder


def test_a_local_model_is_found_named_and_given_a_place_for_its_results(run):
    for given in (run, run / "model"):
        found = settings(f"model={given}")
        assert (found.name, found.folder, found.output) == ("dpo", str(run / "model"), str(run / "evaluation"))
        assert found.answer.backend.path == found.folder and found.judge is None
    named = settings(f"model={run}", "answer.name=mine", "output=o")
    assert (named.name, named.answer.backend.name, named.output) == ("mine", "mine", "o")


def test_a_served_model_is_called_by_its_name():
    found = settings("model=org/m", *SERVED[1:])
    assert (found.name, found.folder, found.answer.backend.model) == ("org/m", None, "org/m")
    own = settings(*SERVED, "answer.name=mine", "judge.base_url=http://localhost:1/v1", "judge.model=j").answer
    assert (own.backend.name, own.backend.model) == ("mine", "m")
    assert own.sampling(0.7, 99) == {"temperature": 0.7, "top_p": 1.0, "max_tokens": 99}
    fixed = settings(*SERVED, "answer.temperature=0.0", "answer.max_tokens=7", "answer.parameters={seed: 1}").answer
    assert fixed.sampling(0.7, 99) == {"temperature": 0.0, "top_p": 1.0, "max_tokens": 7, "seed": 1}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model=nowhere"], "no folder nowhere"),
        (["benchmarks=[mt_bench]"], "output is not set"),
        (["answer.base_url=http://h/v1", "output=o"], "which model"),
        ([*SERVED, "answer.path=x"], "answer must have one of base_url, path and replay; it has base_url and path"),
        ([*SERVED, "judge.base_url=http://h/v1"], "judge.model is not set"),
        ([*SERVED, "benchmarks=[mtbench]"], "Did you mean 'mt_bench'"),
        ([*SERVED, "benchmarks=[]"], "benchmarks is empty: give some of mt_bench, alpaca_eval"),
        ([*SERVED, "mt_bench.question=q"], "mt_bench has no key 'question'. Did you mean 'questions'"),
        ([*SERVED, "answer.temperature=hot"], "answer.temperature must be a finite number"),
        ([*SERVED, "limits.attempts=0.5"], "limits.attempts must be a whole number"),
    ],
)
def test_mistakes_in_the_settings_are_named(arguments, said):
    with pytest.raises(UserError, match=said.replace("[", r"\[")):
        settings(*arguments)


def test_the_model_and_the_judge_may_be_one_but_not_two_of_a_name(capsys, questions, tmp_path):
    same = ["m", "answer.base_url=http://localhost:1/v1", "judge.model=m", questions, f"output={tmp_path / 'o'}"]
    assert evaluate.main([*same, "judge.base_url=http://localhost:2/v1"]) == 2
    assert "both named 'm'" in capsys.readouterr().err
    assert len(evaluate._pool(settings(*SERVED, "judge.base_url=http://localhost:1/v1", "judge.model=m"))) == 2 - 1


def test_results_are_written_said_and_the_same_command_asks_nothing(tmp_path, questions, capsys):
    with Server(judging) as server:
        command = ["m", f"answer.base_url={server.url}", f"judge.base_url={server.url}", "judge.model=j", questions]
        command += [f"output={tmp_path / 'o'}", "limit=2"]
        assert evaluate.main(command) == 0
        results = json.loads((tmp_path / "o/mt_bench/results.json").read_text())
        assert len(server.seen) == 8
        said = capsys.readouterr().out
        assert evaluate.main(command) == 0 and len(server.seen) == 8
    assert capsys.readouterr().out == said and "MT-Bench  m: 7.000" in said
    assert json.loads((tmp_path / "o/mt_bench/results.json").read_text()) == results
    assert (results["benchmark"], results["model"], results["score"]) == ("mt_bench", "m", 7)
    assert dict(evaluate._numbers({"mt_bench": results}))["mt_bench/turns/2/score"] == 7


def test_a_spent_budget_ends_with_three_and_a_larger_one_goes_on(tmp_path, questions, capsys):
    with Server(judging) as server:
        command = ["m", f"answer.base_url={server.url}", f"judge.base_url={server.url}", "judge.model=j", questions]
        command += [f"output={tmp_path / 'o'}"]
        assert evaluate.main([*command, "max_requests=20"]) == 3
        assert "budget is spent: max_requests=20" in capsys.readouterr().err
        assert not (tmp_path / "o/mt_bench/results.json").exists() and len(server.seen) == 20
        assert evaluate.main([*command, "max_requests=32"]) == 0 and len(server.seen) == 32
        assert set(server.requests.values()) == {1}


def test_an_interrupted_run_goes_on_without_asking_again(tmp_path, questions):
    def slowly(seen):
        answer = judging(seen)
        answer.delay = 0.05
        return answer

    with Server(slowly) as server:
        command = [sys.executable, "-m", "zephyr.evaluate", "m", f"answer.base_url={server.url}", "judge.model=j"]
        command += [f"judge.base_url={server.url}", questions, f"output={tmp_path / 'o'}", "limits.concurrency=2"]
        first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while len(server.seen) < 5:
            time.sleep(0.01)
        first.send_signal(signal.SIGINT)
        assert "The same command goes on." in first.communicate(timeout=30)[1] and first.returncode == 130
        assert evaluate.main(command[3:]) == 0
        assert len(server.requests) == 32 and set(server.requests.values()) == {1}


def test_a_model_in_this_process_answers(run, tmp_path, questions):
    with Server(judging) as server:
        command = [str(run), f"judge.base_url={server.url}", "judge.model=j", questions, f"output={tmp_path / 'o'}"]
        assert evaluate.main([*command, "answer.max_tokens=4", "limit=2"]) == 0
        asked = len(server.seen)
        written = (tmp_path / "o/mt_bench/model_answer/dpo.jsonl").read_bytes()
        assert evaluate.main([*command, "answer.max_tokens=4", "limit=2"]) == 0
        assert len(server.seen) == asked == 4 and {seen.body["model"] for seen in server.seen} == {"j"}
    assert (tmp_path / "o/mt_bench/model_answer/dpo.jsonl").read_bytes() == written
    assert json.loads((tmp_path / "o/mt_bench/results.json").read_text())["n"] == 4


def test_benchmarks_that_ask_nobody_come_after_those_that_do(tmp_path, monkeypatch, capsys):
    came = []

    async def asks(client, settings, folder):
        came.append("asks")
        return {"score": 1.0}

    def counts(settings, folder):
        came.append("counts")
        return {"score": float("nan")}

    for module, act in ((mt_bench, counts), (alpaca_eval, asks)):
        monkeypatch.setattr(module, "run", act)
        monkeypatch.setattr(module, "check", lambda settings: None)
        monkeypatch.setattr(module, "summary", lambda results: f"{results['benchmark']} {results['score']}")
    keys = ["m", "answer.base_url=http://localhost:1/v1", f"output={tmp_path}", "benchmarks=[mt_bench,alpaca_eval]"]
    assert evaluate.main(keys) == 2 and came == ["asks", "counts"]
    out, err = capsys.readouterr()
    assert "alpaca_eval 1.0" in out and "a score is not a finite number" in err
    assert (tmp_path / "alpaca_eval/results.json").exists() and not list((tmp_path / "mt_bench").glob("*"))


@pytest.mark.parametrize(
    ("benchmark", "said"),
    [
        ("alpaca_eval", "alpaca_eval.baseline is not set"),
        ("preferences", "preferences need a model's folder"),
        ("leaderboard", "give that as MODEL"),
    ],
)
def test_mistakes_of_every_benchmark_are_told_before_one_asks(tmp_path, questions, capsys, benchmark, said):
    with Server(judging) as server:
        command = ["m", f"answer.base_url={server.url}", f"judge.base_url={server.url}", "judge.model=j", questions]
        command += [f"output={tmp_path / 'o'}", f"benchmarks=[mt_bench,{benchmark}]"]
        assert evaluate.main(command) == 2 and said in capsys.readouterr().err
        assert not server.seen and not (tmp_path / "o").exists()


@pytest.mark.parametrize("key", ["mt_bench.judgments", "alpaca_eval.annotations"])
def test_a_file_that_cannot_be_counted_leaves_nothing(tmp_path, capsys, key):
    (tmp_path / "wrong.jsonl").write_text('{"question_id": 1, "preference": {"is": 2}}\n')
    benchmark = key.partition(".")[0]
    command = [f"{key}={tmp_path / 'wrong.jsonl'}", f"benchmarks=[{benchmark}]", f"output={tmp_path / 'o'}"]
    assert evaluate.main(command) == 2 and "wrong.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_help_is_the_defaults_and_needs_no_torch():
    command = [sys.executable, "-X", "importtime", "-m", "zephyr.evaluate", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "python -m zephyr.evaluate MODEL" in done.stdout and "judge_prompts: null" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "zephyr.evaluation.settings" in imported and "torch" not in imported
    assert evaluate.main([]) == 2


def test_results_of_another_model_are_not_written_over(tmp_path, questions, capsys):
    results = tmp_path / "out" / "mt_bench" / "results.json"
    results.parent.mkdir(parents=True)
    results.write_text('{"benchmark": "mt_bench", "model": "other", "score": 7.0}')
    served = (
        "model=m",
        "answer.base_url=http://localhost:1/v1",
        "judge.base_url=http://localhost:1/v1",
        "judge.model=j",
    )
    assert evaluate.main([*served, questions, f"output={tmp_path / 'out'}"]) == 2
    assert "mt_bench holds the results of 'other'. Give output=FOLDER for those of 'm'." in capsys.readouterr().err
    assert json.loads(results.read_text())["score"] == 7.0 and not (tmp_path / "out" / "ledger.sqlite").exists()
