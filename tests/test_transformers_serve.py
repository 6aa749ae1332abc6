"""The command against a server that is not ours: `transformers serve` in a process of its own, with a tiny model."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import conf
from tests import tiny
from tests.test_local import save
from zephyr.errors import UserError
from zephyr.feedback.run import run

COMMAND = Path(sys.executable).with_name("transformers")
READY = COMMAND.exists() and all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn"))
pytestmark = pytest.mark.skipif(not READY, reason='needs `transformers serve`: pip install "transformers[serving]"')
PROMPTS = ["Why is the sky blue?", "Name a city.", "How many legs has an ant?"]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address, and the name that the server knows the model by."""
    folder = save(tmp_path_factory.mktemp("served"), tiny.model(max_position_embeddings=4096)) / "model"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "HF_HOME": str(folder.parent), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [str(COMMAND), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = folder.parent / "serve.log"
    with log.open("w") as said, subprocess.Popen(command, env=environment, stdout=said, stderr=said) as process:
        try:
            for _ in range(1200):
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5).close()
                    break
                except (urllib.error.URLError, OSError):
                    assert process.poll() is None, log.read_text()
                    time.sleep(0.1)
            yield f"{address}/v1", str(folder)
        finally:
            process.terminate()


def feedback(served, folder: Path, *overrides: str, name: str | None = None) -> Path:
    url, model = served
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    shared = f"base_url: '{url}', model: '{name or model}'"
    models = f"[{{name: hot, {shared}}}, {{name: cold, {shared}, temperature: 0.0}}, {{name: brief, {shared}, max_tokens: 3}}]"
    run(
        conf.compose(
            "feedback",
            [
                f"prompts={folder / 'prompts.jsonl'}", f"output={folder / 'out'}", f"models={models}", "completions=3",
                f"judge.base_url={url}", f"judge.model={model}", "judge.structured=false", "judge.max_tokens=8",
                "default.max_tokens=6", "max_failures=1.0", *overrides,
            ],
        )
    )  # fmt: skip
    return folder / "out"


def test_generation_and_judging_run_through_a_real_server(served, tmp_path):
    output = feedback(served, tmp_path)
    rows = [json.loads(line) for line in (output / "feedback.jsonl").read_text().splitlines()]
    assert [row["instruction"] for row in rows] == PROMPTS
    name = f"{served[1]}@main"  # it names folder and revision
    for row in rows:
        assert {completion["model"] for completion in row["completions"]} <= {"hot", "cold", "brief"}
        assert row["judges"] == [name] and row["cost"] == 0.0
        for completion in row["completions"]:
            made = completion["generation"]
            most = 3 if completion["model"] == "brief" else 6
            # one token a byte, the end of the turn among them where it was written
            assert made["model"] == name and 0 < made["completion_tokens"] <= most
            assert made["finish_reason"] == ("length" if made["completion_tokens"] == most else "stop")
            system = f"<|system|>\n{completion['custom_system_prompt']}</s>\n"
            prompt = f"{system}<|user|>\n{row['instruction']}</s>\n<|assistant|>\n"
            assert made["prompt_tokens"] == len(prompt.encode()) - 2 * len("</s>") + 2
            assert completion["overall_score"] is None and completion["annotations"] == {}  # nothing was understood
        assert all(one["ratings"] == [None] * len(one["order"]) for one in row["judgements"])
    report = json.loads((output / "report.json").read_text())
    assert report["this_run"]["requests_sent"] + report["this_run"]["requests_replayed"] >= 3 * (3 + 4)
    assert report["this_run"]["retries"] == {}
    lost = sum(report["failures"].get("generate", {}).values())  # texts of blanks alone
    assert sum(len(row["completions"]) for row in rows) == 9 - lost
    unread = sum(report["failures"]["judge"].values())
    assert unread == sum(4 + len(row["completions"]) for row in rows)  # every judgement, each accounted for
    again = feedback(served, tmp_path)
    sent = json.loads((again / "report.json").read_text())["this_run"]["requests_sent"]
    assert sent == 0


def test_a_name_that_a_real_server_does_not_know_is_explained(served, tmp_path):
    with pytest.raises(UserError) as error:
        feedback(served, tmp_path, name="another")
    assert f"Server is pinned to '{served[1]}'; requested 'another'." in str(error.value)
    assert "Check base_url" in str(error.value)


def test_what_a_real_server_refuses_is_a_failure(served, tmp_path):
    with pytest.raises(UserError, match="9 refused .*Unexpected fields in the request.*; 3 too_few_completions"):
        feedback(served, tmp_path, "default.parameters={nonsense: 1}")
