"""What a user can get wrong: one message that names the mistake, status 2, in seconds, and nothing left behind."""

import gzip
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.commands import ROOT, command, world
from tests.test_conf import load
from zephyr import run as runner
from zephyr.errors import UserError
from zephyr.running import assemble
from zephyr.settings import parse


def refused(line: list[str], *words: str, lines: int = 3) -> None:
    """Run a command from the repository's root: it must fail with status 2 and a short message of these words."""
    done = subprocess.run([sys.executable, *line], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and 1 <= len(done.stderr.splitlines()) <= lines, done.stderr
    for word in words:
        assert word in done.stderr


def test_every_mistake_below_is_one_of_a_run_that_works(tmp_path: Path):
    assert parse(load()).recipe == "demo" and parse(load("stage=dpo")).objective
    for stage in ("sft", "dpo"):
        parse(load(*command(tmp_path, stage, tmp_path / "out")[2:]))


# ---------------------------------------------------------------------------------------------------------------------
# Of the command line and the settings: answered without torch.

LORA = "model.lora={rank: 4, alpha: 8, dropout: %s, target_modules: %s, dora: false, rslora: false}"
SETTINGS = [
    (["stage=dp0"], "Unknown stage 'dp0'. Choose one of: dpo, sft. Did you mean 'dpo'?"),
    (["recipe=zephyr-7b-bet"], "Unknown recipe", "Did you mean 'zephyr-7b-beta'?"),
    (["trainer=atuo"], "Unknown trainer 'atuo'. Choose one of: auto"),
    (["logger=null"], "Unknown logger 'null'. Choose one of: none, wandb"),
    (["stage=dpo", "objective=sigmiod"], "Unknown objective 'sigmiod'", "'sigmoid'?"),
    (["sed=3"], "has no key 'sed'. Did you mean 'seed'?"),
    (["trainer.max_stpes=10"], "trainer has no key 'max_stpes'. Did you mean 'max_steps'?"),
    (["optimzer.lr=1e-3"], "no group 'optimzer'. Did you mean 'optimizer'?"),
    (["objective.beta=0.1"], "objective.beta belongs to stage=dpo"),
    (["stage=dpo", "data.loss_on=all"], "data.loss_on belongs to stage=sft"),
    (["model.lora.rank=4"], "model.lora is null here, so it has no 'rank': choose 'model.lora={rank: ..., ...}'"),
    (["+new.key=1"], "has no key 'new'"),
    (["trainer.strategy=deepspeed"], "trainer.strategy must be one of auto, ddp, fsdp; got 'deepspeed'"),
    (["stage=dpo", "objective.label_smooting=0.1"], "objective has no key 'label_smooting'"),
    (["stage=dpo", "reference=precomputed", "reference.sync_every_n_steps=9"], "cannot follow the policy"),
    (["~data.train"], "data.train is not set"),
    (["optimizer.lr=???"], "optimizer.lr is not set: give optimizer.lr=VALUE"),
    (["seed=${nowhere}"], "seed: Interpolation key 'nowhere' not found"),
    (["optimizer.lr=1e-6x"], "optimizer.lr must be a finite number, got '1e-6x'"),
    (["data.batch_size=2.5"], "data.batch_size must be a whole number, got 2.5"),
    (["data.batch_size=abc"], "data.batch_size must be a whole number, got 'abc'"),
    (["model.activation_checkpointing=yes"], "must be one of none, full, selective; got 'yes'"),
    (["trainer.compile=yes please"], "must be true or false, got 'yes please'"),
    (["data.train=null"], "data.train must be a text, got null"),
    (["output_dir="], "output_dir must be a text that is not empty"),
    (["stage=dpo", "objective.beta=0"], "objective.beta must be above 0", "Zephyr used 0.1", "got 0"),
    (["stage=dpo", "objective.beta=-0.1"], "objective.beta must be above 0"),
    (["stage=dpo", "objective.beta=nan"], "objective.beta must be a finite number"),
    (["optimizer.lr=0"], "optimizer.lr must be above 0, got 0"),
    (["optimizer.lr=inf"], "optimizer.lr must be a finite number"),
    (["optimizer.betas=[0.9]"], "optimizer.betas must be a list of two numbers"),
    (["optimizer.warmup_ratio=2"], "optimizer.warmup_ratio must be in [0, 1), got 2"),
    (["data.max_length=-5"], "data.max_length must be at least 1, got -5"),
    (["stage=dpo", "data.max_prompt_length=512"], "max_prompt_length=512 must be below data.max_length=512"),
    (["seed=-1"], "seed must be in [0, 2^32), got -1"),
    (["trainer.precision=bf16-mixd"], "must be one of 32-true, bf16-mixed, bf16-true", "Did you mean 'bf16-mixed'?"),
    (["trainer.devices=0"], "trainer.devices must be at least 1, got 0"),
    (["model.quantization=nf4"], "cannot be trained in full: set model.lora"),
    ([LORA % (0, "[]")], "model.lora.target_modules must be all-linear or a list of names"),
    ([LORA % (1.5, "[q_proj]")], "model.lora.dropout must be in [0, 1)"),
    (["data.train==x"], "Cannot read 'data.train==x'", "two pairs of quotes"),
    (["optimizer.lr"], "Cannot read 'optimizer.lr': write key=value"),
    (["data.train=my", "file.jsonl"], "Cannot read 'file.jsonl'", "in quotes as a whole if the value holds a space"),
    (["data.train=my=file.jsonl"], "two pairs of quotes: 'data.train=\"my=file.jsonl\"'"),
    (["data.train=a (copy).jsonl"], "two pairs of quotes: 'data.train=\"a (copy).jsonl\"'"),
    (["seed=1,2"], "Cannot read 'seed=1,2'", "To run each of several values, add -m"),
    (["-m", "seed=1,abc"], "seed must be a whole number, got 'abc'"),
    (["-m", "stage=dpo", "objective.beta=0.1,0"], "objective.beta must be above 0"),
    (["stage=sft,dp0", "-m"], "Unknown stage 'dp0'"),
]


@pytest.mark.parametrize("mistake", SETTINGS, ids=lambda mistake: " ".join(mistake[0]))
def test_settings(mistake: tuple[Any, ...], tmp_path: Path):
    overrides, *words = mistake
    output = [] if any(override.startswith("output_dir") for override in overrides) else [f"output_dir={tmp_path}/out"]
    started = time.monotonic()
    refused(["train.py", *output, *overrides], *words, lines=1)
    assert time.monotonic() - started < 10  # 0.3 s, on a machine that has nothing else to do
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Of files and machine: a run in this process, to import torch but once. A mistake returns its overrides.

Mistake = Callable[[Path], list[str]]

HI, YES, NO = (
    {"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "y"), ("assistant", "n"))
)


def chats(*messages: Any, rows: int = 8, key: str = "messages") -> bytes:
    return b"".join(json.dumps({key: messages}).encode() + b"\n" for _ in range(rows))


def pairs(chosen: Any, rejected: Any, **columns: Any) -> bytes:
    return json.dumps({"chosen": chosen, "rejected": rejected, **columns}).encode() + b"\n"


def file(name: str, content: bytes, *overrides: str) -> Mistake:
    def make(tmp_path: Path) -> list[str]:
        (tmp_path / name).write_bytes(content)
        return [f"data.train='{tmp_path / name}'", *overrides]

    return make


def model(change: Callable[[Path], Any], *overrides: str) -> Mistake:
    def make(tmp_path: Path) -> list[str]:
        change(shutil.copytree(tmp_path / "world" / "base", tmp_path / "model"))
        return [f"model.path={tmp_path / 'model'}", *overrides]

    return make


def write(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def cut(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])


def sharded(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    tiny.model().save_pretrained(folder, max_shard_size="100KB")
    (folder / "model-00002-of-00005.safetensors").unlink()


def nested(folder: Path) -> None:
    shutil.copytree(folder, folder / "model")
    (folder / "config.json").unlink()


def adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def edited(name: str, **values: Any) -> Callable[[Path], Any]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return edit


def without(*names: str) -> Callable[[Path], Any]:
    return lambda folder: [(folder / name).unlink() for name in names]


def set_to(*overrides: str) -> Mistake:
    return lambda tmp_path: [override.replace("TMP", str(tmp_path)) for override in overrides]


GZIPPED = gzip.compress(chats(HI, YES, rows=500))
LONG = {"role": "assistant", "content": "x" * 300}
RUNS: dict[str, tuple[str, Mistake, str]] = {
    # data
    "missing": ("sft", set_to("data.train=no.jsonl"), "data.train: 'no.jsonl' does not exist (looked in"),
    "missing validation": ("sft", set_to("data.validation=no.jsonl"), "data.validation: 'no.jsonl' does not exist"),
    "not on the hub": ("sft", set_to("data.train=some/set@main:train"), "no reachable hub data set 'some/set@main:"),
    "no demo file": ("sft", set_to("data.train=demo:chat"), "'demo:chat' is no part of the demo. Take one of"),
    "suffix": ("sft", file("a.csv", b"x"), "a.csv is none of .jsonl, "),
    "empty": ("sft", file("a.jsonl", b""), "a.jsonl is empty"),
    "empty gz": ("sft", file("a.jsonl.gz", gzip.compress(b"")), "a.jsonl.gz is empty"),
    "cut gz": ("sft", file("a.jsonl.gz", GZIPPED[:-20]), "a.jsonl.gz is not a complete gzip file"),
    "damaged gz": ("sft", file("a.jsonl.gz", GZIPPED[:15] + b"xxxxxxx" + GZIPPED[22:]), "not a complete gzip file"),
    "no gz": ("sft", file("a.jsonl.gz", b"{}"), "not a complete gzip file: Not a gzipped file"),
    "no parquet": ("sft", file("a.parquet", b"PAR1xxx"), "a.parquet is not a readable Parquet file"),
    "bad JSON": ("sft", file("a.jsonl", chats(HI, YES) + b'{"a":\n'), "a.jsonl line 9: invalid JSON"),
    "deep JSON": ("sft", file("a.jsonl", b"[" * 100_000), "a.jsonl line 1: JSON beyond what Python reads"),
    "latin-1": ("sft", file("a.jsonl", '{"a": "é"}'.encode("latin1")), "not UTF-8 (byte 0xE9 at 7). Re-save it"),
    "chats for DPO": ("dpo", file("ü =1.jsonl", chats(HI, YES)), "ü =1.jsonl line 1: stage=dpo needs"),
    "pairs for SFT": ("sft", file("a.jsonl", pairs([HI, YES], [HI, NO])), "Preference data trains with stage=dpo"),
    "role": ("sft", file("a.jsonl", chats(HI, {"role": "asistant", "content": "y"})), "messages[1].role='asistant'"),
    "null": ("sft", file("a.jsonl", chats(HI, {"role": "assistant", "content": None})), "messages[1].content is null"),
    "half a character": ("sft", file("a.jsonl", chats({"role": "user", "content": "\ud800"})), "half a character"),
    "two user turns": ("sft", file("a.jsonl", chats(HI, HI, YES)), "messages[1].role is 'user' where"),
    "only user turns": ("sft", file("a.jsonl", chats(HI)), "none of the 8 rows"),
    "equal pairs": ("dpo", file("a.jsonl", pairs([HI, YES], [HI, YES]) * 9), "9 identical completions"),
    "two prompts": ("dpo", file("a.jsonl", pairs([HI, YES], [{**HI, "content": "ho"}, NO])), "do not share one prompt"),
    "prompt": ("dpo", file("a.jsonl", pairs("y", "n", prompt=5)), "prompt is int, not a list"),
    "all cut": ("sft", file("a.jsonl", chats({**HI, "content": "x" * 300}, YES)), "8 no scored token within"),
    "cut alike": ("dpo", file("a.jsonl", pairs([HI, LONG], [HI, {**LONG, "content": "x" * 301}])), "identical within"),
    "too few": ("sft", file("a.jsonl", chats(HI, YES)), "one optimizer step takes data.batch_size=4"),
    "cache": ("sft", set_to("data.cache=TMP/world/chats.jsonl/x"), "Cannot write tokenised data under"),
    # model
    "no model": ("sft", set_to("model.path=./no"), "the folder ./no does not exist (looked in"),
    "no hub id": ("sft", set_to("model.path=gpt2"), "A hub id is OWNER/NAME"),
    "not fetched": ("sft", set_to("model.path=some/model"), "Cannot load the model 'some/model' (model.path"),
    "a file": ("sft", set_to("model.path=TMP/world/chats.jsonl"), "chats.jsonl holds no model (config.json)"),
    "no config": ("sft", model(without("config.json")), "holds no model (config.json)"),
    "output folder": ("sft", model(nested), "Did you mean"),
    "adapter": ("sft", model(adapter), "is damaged ('base_model_name_or_path'"),
    "bad config": ("sft", model(write("config.json", b"{")), "is not a valid JSON file"),
    "bad value": ("sft", model(edited("config.json", hidden_size="x")), "'hidden_size' expected int, got str"),
    "not causal": ("sft", model(write("config.json", b'{"model_type": "t5"}')), "Unrecognized configuration class"),
    "no weights": ("sft", model(without("model.safetensors")), "it has no weights (model.safetensors)"),
    "cut weights": ("sft", model(cut), "model.safetensors is missing or damaged"),
    "no shard": ("sft", model(sharded), "model-00002-of-00005.safetensors is missing or damaged"),
    "no tokenizer": ("sft", model(without("tokenizer.json", "tokenizer_config.json")), "Cannot load a tokenizer from"),
    "bad tokenizer": ("sft", model(write("tokenizer.json", b"{}")), "Cannot load a tokenizer from"),
    "no eos": ("sft", model(edited("tokenizer_config.json", eos_token=None)), "has no eos_token"),
    "small model": ("sft", model(edited("config.json", vocab_size=200, eos_token_id=0, pad_token_id=0)), "258 tokens"),
    "too long": ("sft", set_to("data.max_length=513"), "data.max_length=513 exceeds the 512 positions"),
    "targets": ("sft", set_to(LORA % (0, "[q_porj]")), "q_porj name no linear layer; there are down_proj"),
    "no SFT": ("dpo", set_to("recipe=zephyr-7b-beta", "model.path=null"), "Make it with `python train.py recipe"),
    # folders and machine
    "output is a file": ("sft", set_to("output_dir=TMP/world/chats.jsonl"), "is not a folder that you may write to"),
    "output in a file": ("sft", set_to("output_dir=TMP/world/chats.jsonl/x"), "is not a folder that you may write to"),
    "output of the model": ("sft", set_to("output_dir=TMP/world"), "lies in output_dir="),
    "no checkpoint": ("sft", set_to("resume=atuo"), "there is no checkpoint at atuo; resume=auto takes the newest"),
    "a run": ("sft", set_to("resume=TMP/world"), "is no checkpoint: they are the folders output_dir/checkpoints/step-"),
    "no GPU": ("sft", set_to("trainer.accelerator=gpu"), "torch sees no GPU. Take auto or cpu"),
}  # fmt: skip


@pytest.fixture(scope="module")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def folder(shared_world: Path, tmp_path: Path) -> Path:
    (tmp_path / "world").symlink_to(shared_world)
    return tmp_path


def attempt(folder: Path, stage: str, *overrides: str) -> None:
    cfg = load(*command(folder / "world", stage, folder / "out", "trainer.threads=null", *overrides)[2:])
    runner.run(parse(cfg), cfg)


@pytest.mark.parametrize(("stage", "mistake", "words"), RUNS.values(), ids=RUNS)
def test_runs(stage: str, mistake: Mistake, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr(assemble, "load_policy", lambda *_, **__: pytest.fail("weights were loaded"))
    overrides, before = mistake(folder), sorted((folder / "world").iterdir())
    with pytest.raises(UserError) as refusal:
        attempt(folder, stage, *overrides)
    message = str(refusal.value)
    assert words in message
    assert len(message.splitlines()) <= 3 and len(message) < 600
    assert not (folder / "out").exists()
    assert {path.name for path in {*(folder / "world").iterdir()} - {*before}} <= {"cache"}


@pytest.mark.parametrize("change", [{"num_hidden_layers": 1}, {"hidden_size": 32}], ids=["missing", "another shape"])
def test_weights_of_another_model(change: dict[str, int], folder: Path):
    """Left alone, transformers would draw what is missing at random, and training would go on."""
    other = model(
        lambda path: tiny.model(**change).save_pretrained(path) or shutil.copy(folder / "world/base/config.json", path)
    )
    with pytest.raises(UserError, match="are missing or of another shape, first "):
        attempt(folder, "sft", *other(folder))
    assert not (folder / "out").exists()


def test_resuming_another_run(folder: Path):
    attempt(folder, "sft", "trainer.max_steps=2", "data.validation=null")
    (folder / "out" / "summary.json").unlink()
    step = folder / "out" / "checkpoints" / "step-00000002"
    before = sorted(folder.rglob("*"))
    for resume in ("auto", step):
        with pytest.raises(
            UserError, match=r"not the run that wrote(.|\n)*optimizer.lr: 0.001 -> 0.0001\nPut these back"
        ):
            attempt(
                folder, "sft", "trainer.max_steps=2", "data.validation=null", "optimizer.lr=1e-4", f"resume={resume}"
            )
    (step / "state.pt").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"is damaged: state.pt has 3 bytes"):
        attempt(folder, "sft", "trainer.max_steps=2", "data.validation=null", f"resume={step}")
    assert sorted(folder.rglob("*")) == before


def test_a_learning_rate_of_sft_in_full_dpo_is_a_warning(folder: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.setattr(runner._log, "warning", lambda text, *values: said.append(text % values))
    monkeypatch.setattr(assemble, "load_policy", lambda *_, **__: 1 / 0)
    lora = LORA % (0, "[q_proj]")
    for mild in (["optimizer.lr=5e-7"], [lora], ["model.base=demo:base"], ["stage=sft"]):
        stage = "sft" if mild == ["stage=sft"] else "dpo"
        with pytest.raises(ZeroDivisionError):
            attempt(folder, stage, "model.base=some/model", "optimizer.lr=2e-5", *(mild if stage == "dpo" else []))
    assert said == []
    with pytest.raises(ZeroDivisionError):
        attempt(folder, "dpo", "model.base=some/model", "optimizer.lr=2e-5")
    assert said == ["optimizer.lr=2e-05 is typical of SFT; DPO of all weights usually takes 5e-7."]


# ---------------------------------------------------------------------------------------------------------------------
# The same as commands, a few of them.


def test_commands(folder: Path):
    (folder / "bad.jsonl").write_bytes(chats(HI, HI))
    base = folder / "world" / "base"
    cut(shutil.copytree(base, folder / "cut"))
    commands = [
        (command(folder / "world", "sft", folder / "out", f"data.train={folder / 'bad.jsonl'}")[1:],
         "Error: bad.jsonl line 1: messages[1].role is 'user'", "data.bad_rows=drop"),
        (["-m", "zephyr.chat", str(folder / "cut"), "--prompt", "Hi"], "Cannot load", "incomplete metadata"),
        (["-m", "zephyr.demo", str(folder)], "There is no model in", "Make it with: python train.py"),
    ]  # fmt: skip
    before = sorted(folder.iterdir())
    with ThreadPoolExecutor(len(commands)) as pool:
        list(pool.map(lambda mistake: refused(*mistake), commands))
    assert sorted(folder.iterdir()) == before
