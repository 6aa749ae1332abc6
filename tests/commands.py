"""Runs as commands: `python train.py` on a tiny model and tiny data, in processes of their own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests import tiny

ROOT = Path(__file__).parents[1]
TIMES = {"tokens_per_second", "peak_memory_gib"}  # metrics that differ between equal runs


def world(folder: Path) -> Path:
    """A base model, chats and pairs small enough to learn in seconds."""
    model = tiny.model(0)
    model.save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    rows = {name: [] for name in ("chats", "pairs")}
    for number in range(64):
        question = {"role": "user", "content": f"{number}?"}
        good, bad = ({"role": "assistant", "content": text} for text in (f"yes {number}", f"no {number % 7} no"))
        rows["chats"].append({"messages": [question, good, {"role": "user", "content": "sure?"}, good]})
        rows["pairs"].append({"chosen": [question, good], "rejected": [question, bad]})
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def command(folder: Path, stage: str, output: Path, *overrides: str) -> list[str]:
    data = folder / ("chats.jsonl" if stage == "sft" else "pairs.jsonl")
    prompt = ["data.max_prompt_length=64"] if stage == "dpo" else []
    flags = [override for override in overrides if override.startswith("-")]
    return [
        sys.executable, "train.py", *flags, f"stage={stage}", f"model.path={folder / 'base'}", f"output_dir={output}",
        f"data.train={data}", f"data.validation={data}", f"data.cache={folder / 'cache'}", "data.max_length=128",
        "data.batch_size=4", "data.micro_batch_tokens=256", *prompt, "logger=none", "trainer.threads=1",
        "trainer.max_steps=12", "trainer.log_every_n_steps=1", "trainer.eval_every_n_steps=5", "optimizer.lr=1e-3",
        "samples.count=2", "samples.max_new_tokens=8",
        *(override for override in overrides if override not in flags),
    ]  # fmt: skip


def train(
    folder: Path, stage: str, output: Path, *overrides: str, check: int = 0, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(folder, stage, output, *overrides), cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, **(environment or {})},
    )  # fmt: skip
    assert done.returncode == check, done.stderr
    return done


def start(folder: Path, stage: str, output: Path, *overrides: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(folder, stage, output, *overrides), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def metrics(output: Path) -> list[dict[str, Any]]:
    """The logged lines of a run, without what is a matter of the machine's mood."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def weights(output: Path) -> bytes:
    return (output / "model" / "model.safetensors").read_bytes()


def steps_done(output: Path) -> int:
    try:
        return max((line["step"] for line in metrics(output)), default=0)
    except (FileNotFoundError, json.JSONDecodeError):
        return 0


def kill(process: subprocess.Popen[bytes]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
