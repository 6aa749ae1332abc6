"""What is said of a feedback run: what it would take, how far it is, and nothing of a key."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import conf
from tests.collecting import SECRET, arguments, ask, lines, prompts, said, start
from tests.openai_server import Answer, Server
from zephyr.feedback.progress import Shown
from zephyr.feedback.run import run
from zephyr.feedback.settings import parse


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


def test_completions_of_a_file_are_requests_that_take_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Two prompts, four recorded completions of each, so what the judge is asked is known: 16 requests. Its answers,
    2 * (4 * 240 + 4 * 250) tokens at 40 a second, and half a second before each, take 106 s one after the other."""
    made = [{"prompt": f"question {n}?", "model": name, "response": f"{name} {n}"} for n in range(2) for name in "abcd"]
    (tmp_path / "made.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    given = [f"models=[{{name: '*', replay: {tmp_path}/made.jsonl}}]", "limit=2", "limits.concurrency=1"]
    given += ["default.price.prompt=1000", "default.price.completion=1000"]
    with Server() as server:
        ask(server.url, tmp_path, *given, "dry_run=true")
        text = capsys.readouterr().out
        rows = {line.split()[0]: line.split() for line in text.splitlines()[2:8]}
        for name in "abcd":
            assert rows[name][2:] == ["2", "0", "0", "0", "0.00", "0.00"]
        assert (rows["j"][2], rows["j"][5], rows["all"][1]) == ("16", "3,920", "24")
        assert "time: about 0:01:46" in text
        ask(server.url, tmp_path, *given, "max_requests=24")  # that the run counts alike
        assert server.requests.total() == 16
        told = capsys.readouterr().out  # and of no dollar
        assert re.search(r"\(24 requests sent, 0 answers found in the ledger, \d+ s\)", told), told
        asked = [seen.body for seen in server.seen]
    sent = sum(len(m["content"].encode()) + 16 for body in asked for m in body["messages"])
    sent += sum(len(json.dumps(body["response_format"]["json_schema"]["schema"])) for body in asked)
    assert rows["j"][4] == f"{sent / 4:,.0f}"


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
