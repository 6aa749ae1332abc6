"""Feedback runs against a scripted server: their command lines, in this process or another, and what they leave."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import conf
from tests.openai_server import Answer
from zephyr.feedback.run import run

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
