"""Seeing a run: metrics, plots, progress, throughput, Weights & Biases, and no secrets in them."""

import io
import json
import math
import re
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch.utils.data import DataLoader

from tests.tiny import model, tokenizer
from zephyr.data.batch import Batch, Conversation, Pair, pack_conversations, pack_pairs
from zephyr.errors import UserError
from zephyr.models.attention import SEGMENTS
from zephyr.observe.metrics import MetricsFile, read, rewind
from zephyr.observe.plots import draw, smooth
from zephyr.observe.progress import Progress
from zephyr.observe.samples import Samples
from zephyr.observe.throughput import Throughput
from zephyr.planning.flops import ModelSize, model_size, step_flops
from zephyr.redact import redact

PROMPTS = [[{"role": "user", "content": "Hi"}], [{"role": "user", "content": "Who are you?"}]]


class Toy(L.LightningModule):
    """Logs as a Task does. The loss of a step is its number of packed tokens, which tells rows apart."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy = model(hidden_size=16, intermediate_size=32, num_hidden_layers=1)
        self.policy.set_attn_implementation(SEGMENTS)

    def training_step(self, batches: list[Batch], step: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.step()
        self.log_dict({"train/loss": float(len(batches[0].ids)), "epoch": (step + 1) / 8}, batch_size=1)

    def validation_step(self, batches: list[Batch], _: int) -> None:
        self.log("eval/loss", 2.5, on_epoch=True, batch_size=3)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.policy.parameters(), lr=0.1)


def steps(count: int, tokens: int = 10) -> DataLoader[Any]:
    """`count` optimizer steps of one micro-batch; step s (from 1) has `tokens` + s tokens."""
    row = [[pack_conversations([Conversation([1] * (tokens + s), [True] * (tokens + s))])] for s in range(1, count + 1)]
    return DataLoader(row, batch_size=None)


def fit(callbacks: list[Callback], logger: Any, every: int = 2, count: int = 8, **kwargs: Any) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=logger,
        callbacks=callbacks,
        log_every_n_steps=every,
        val_check_interval=4,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=any(isinstance(callback, Progress) for callback in callbacks),
    )
    toy = Toy()
    if kwargs.pop("validate_first", False):
        trainer.validate(toy, steps(1), verbose=False)
    trainer.fit(toy, steps(count), steps(1), **kwargs)
    return trainer


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


# Metrics


def test_metrics_are_strict_json_lines_at_finished_steps(tmp_path: Path) -> None:
    fit([Throughput()], MetricsFile(tmp_path), validate_first=True)
    rows = read(tmp_path / "metrics.jsonl")

    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 4, 8]
    train = {row["step"]: row for row in rows if "train/loss" in row}
    assert {step: row["train/loss"] for step, row in train.items()} == {2: 12, 4: 14, 6: 16, 8: 18}
    assert {step: row["epoch"] for step, row in train.items()} == {2: 0.25, 4: 0.5, 6: 0.75, 8: 1.0}
    assert not any("epoch" in row for row in rows if "eval/loss" in row)


def test_metrics_write_null_for_what_json_cannot_say(tmp_path: Path) -> None:
    log = MetricsFile(tmp_path)
    log.log_metrics({"a": math.nan, "b": math.inf, "c": 1, "epoch": 0}, step=3)
    log.log_metrics({"a": 1.0, "epoch": 0.5}, step=4)
    log.log_metrics({"epoch": 0}, step=5)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 3, "a": null, "b": null, "c": 1.0}', '{"step": 4, "a": 1.0, "epoch": 0.5}']


def test_rewind_drops_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 2, "a": 1.0}\n{"step": 4, "a": 2.0}\n{"step": 6, "a": 3.0}\n'
    path.write_bytes(whole + '{"step": 4, "text": "é'.encode()[:-1])
    assert [row["step"] for row in read(path)] == [2, 4, 6]

    MetricsFile(tmp_path).rewind(4)
    assert path.read_bytes() == b'{"step": 2, "a": 1.0}\n{"step": 4, "a": 2.0}\n'
    assert list(tmp_path.iterdir()) == [path]
    rewind(path, -1)
    assert read(path) == []
    rewind(tmp_path / "none.jsonl", 0)


# Plots


def test_plots_are_drawn_for_the_data_there_is(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"step": 0, "eval/loss": 0.69, "eval/rewards/chosen": 0.0, "mfu": None}]
    rows += [{"step": s, "train/loss": 0.6, "train/grad_norm": 1.0, "train/logps/chosen": None} for s in range(1, 90)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = draw(path, tmp_path / "plots")
    assert [file.name for file in written] == ["loss.png", "grad_norm.png", "rewards.png"]
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in written)


def test_the_loss_of_preferences_starts_at_a_fixed_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[float] = []
    monkeypatch.setattr("matplotlib.axes.Axes.axhline", lambda self, height, **_: lines.append(height))
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 2.0}\n')
    draw(path, tmp_path)
    assert lines == []
    path.write_text('{"step": 1, "train/loss": 0.69, "train/rewards/chosen": 0.0}\n')
    draw(path, tmp_path)
    assert lines == [pytest.approx(0.693147, abs=1e-6), 0.0]  # of the loss, of the rewards


def test_smoothing_leaves_a_straight_line_alone() -> None:
    line = torch.arange(10.0).numpy()
    assert smooth(line, reach=3) == pytest.approx(line)
    # Reach 1, by hand: 4; (4+1+1)/3; (1+1+7)/3; 7.
    assert smooth(torch.tensor([4.0, 1, 1, 7]).numpy(), reach=1) == pytest.approx([4, 2, 3, 7])


# Progress


def test_plain_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    fit([Throughput(), Progress("SFT", 8, Console(file=out), seconds=0)], logger=False)
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["2/8", "4/8", "4/8", "6/8", "8/8", "8/8"]
    assert lines[0].startswith("SFT  2/8  loss 12.0000  ") and " tokens/s  elapsed 0:00:" in lines[0]
    assert lines[2] == "SFT  4/8  eval loss 2.5000"
    assert lines[4].endswith("ETA 0:00:00")


def test_plain_lines_keep_their_distance() -> None:
    out = io.StringIO()
    fit([Progress("SFT", 8, Console(file=out), seconds=3600)], logger=False)
    assert [line.split()[1] for line in out.getvalue().splitlines() if "eval" not in line] == ["2/8", "8/8"]


def test_a_bar_on_a_terminal() -> None:
    out = io.StringIO()
    fit([Throughput(), Progress("DPO", 8, Console(file=out, force_terminal=True, width=120))], logger=False)
    bars = [line for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue()).splitlines() if "DPO" in line]
    last = bars[-1]
    assert "8/8" in last and "loss 18.0000" in last and "tokens/s" in last
    assert "validation" in out.getvalue() and "v_num" not in out.getvalue()
    assert "validation" not in out.getvalue()[out.getvalue().rindex("8/8") :]


# Throughput


def test_flops_of_a_step_worked_by_hand() -> None:
    size = ModelSize(body=100, body_trained=100, head=50, head_trained=50, layers=2, width=8)
    # 3 prompt + 2 chosen tokens, then 1 rejected one behind the prompt: 6 packed, 3 scored.
    pair = pack_pairs([Pair([1, 2, 3], [4, 5], [6])])
    linear = 2 * (100 * 6 + 50 * 3)
    context = (1 + 2 + 3 + 4 + 5) + (3 + 1)
    attention = 4 * 2 * 8 * context
    assert step_flops(size, [pair], reference=False) == 3 * (linear + attention) == 8148
    assert step_flops(size, [pair, pair], reference=True) == 2 * 4 * (linear + attention)
    # Adapters of 10 parameters: the frozen weights need no gradients of their own.
    adapted = size._replace(body=110, body_trained=10, head_trained=0)
    expected = 2 * 2 * (110 * 6 + 50 * 3) + 2 * 10 * 6 + 3 * attention
    assert step_flops(adapted, [pair], reference=False) == expected


def test_flops_of_mistral_7b_are_the_known_ones() -> None:
    body = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    size = ModelSize(body, body, 32000 * 4096, 32000 * 4096, layers=32, width=4096)
    block = pack_conversations([Conversation([5] * 2048, [True] * 2048)])
    assert step_flops(size, [block], reference=False) / 2048 == pytest.approx(44.3e9, rel=2e-3)
    lora = size._replace(body_trained=0, head_trained=0)
    assert step_flops(lora, [block], reference=False) / 2048 == pytest.approx(30.1e9, rel=2e-3)


def test_size_of_a_model() -> None:
    # Of 16 wide layers: q, o 16 x 16; k, v 16 x 8; three 16 x 32; two norms of 16. Then the last norm.
    body = 2 * 256 + 2 * 128 + 3 * 512 + 2 * 16 + 16
    policy = model(hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    assert model_size(policy) == ModelSize(body, body, 258 * 16, 258 * 16, 1, 16)
    policy.lm_head.requires_grad_(False)
    policy.model.norm.requires_grad_(False)
    assert model_size(policy) == ModelSize(body, body - 16, 258 * 16, 0, 1, 16)
    tied = model(hidden_size=16, intermediate_size=32, num_hidden_layers=1, tie_word_embeddings=True)
    assert model_size(tied) == ModelSize(body, body, 258 * 16, 258 * 16, 1, 16)


class Clock:
    """One second passes in each training step, and 100 in each validation and in each checkpoint."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Pass(Callback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_start(self, *_: Any) -> None:
        self.clock.now += 1

    def on_validation_batch_end(self, *_: Any) -> None:
        self.clock.now += 100


class Save(Callback):
    def __init__(self, clock: Clock, at: int, path: Path) -> None:
        self.clock, self.at, self.path = clock, at, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.path)
            self.clock.now += 100


def test_throughput_leaves_validation_and_checkpoints_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("zephyr.observe.throughput.time", clock)
    monkeypatch.setattr("zephyr.observe.throughput.peak_flops", lambda _: 1e6)
    throughput = Throughput()
    fit([throughput, Pass(clock), Save(clock, 5, tmp_path / "five.ckpt")], MetricsFile(tmp_path))
    rows = {row["step"]: row for row in read(tmp_path / "metrics.jsonl") if "train/loss" in row}

    # Tokens of steps 1 to 8: 11 to 18. Two seconds between logged steps.
    assert {s: row["tokens_per_second"] for s, row in rows.items()} == {2: 11.5, 4: 13.5, 6: 15.5, 8: 17.5}
    assert {s: row["num_tokens"] for s, row in rows.items()} == {2: 23, 4: 50, 6: 81, 8: 116}
    size = model_size(Toy().policy)
    flops = sum(step_flops(size, batches, False) for batches in list(steps(8))[4:6])
    assert rows[6]["mfu"] == pytest.approx(flops / 2 / 1e6, rel=1e-5)
    assert 0.05 < rows[8]["peak_memory_gib"] < 100
    assert throughput.state_dict() == {"num_tokens": 116}


@pytest.mark.filterwarnings("ignore:You.re resuming")  # this loader cannot
def test_token_count_goes_on_after_a_resume(tmp_path: Path) -> None:
    clock = Clock()
    fit([Throughput(), Save(clock, 5, tmp_path / "five.ckpt")], logger=False)
    resumed = Throughput()
    fit([resumed], MetricsFile(tmp_path), ckpt_path=tmp_path / "five.ckpt", weights_only=True)
    counts = [row["num_tokens"] for row in read(tmp_path / "metrics.jsonl") if "num_tokens" in row]
    # The loader starts over here, so the three steps after the fifth have 11, 12 and 13 tokens.
    assert resumed.state_dict() == {"num_tokens": 65 + 11 + 12 + 13}
    assert counts == [65 + 11, 65 + 11 + 12 + 13]


def test_no_mfu_on_a_cpu(tmp_path: Path) -> None:
    fit([Throughput()], MetricsFile(tmp_path))
    assert not any("mfu" in row for row in read(tmp_path / "metrics.jsonl"))


# Weights & Biases


def records(path: Path) -> Iterator[Any]:
    """The records of an offline run: a LevelDB log of 32 KiB blocks behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if kind == 0 or position + 7 + length > len(data):
            break
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def finished(path: Path) -> list[Any]:
    """The records of a finished run, the last of which wandb's service writes a little after finish()."""
    for _ in range(1000):
        whole = list(records(path))
        if any(record.WhichOneof("record_type") == "exit" for record in whole):
            return whole
        time.sleep(0.01)
    raise AssertionError(f"{path} has no end")


def test_a_run_without_an_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    from zephyr.observe.weights_and_biases import wandb_logger

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(sys, "argv", ["train.py", "feedback.api_key=sesame"])
    config = {"seed": 7, "feedback": {"api_key": "sesame", "max_new_tokens": 5}}
    logger = wandb_logger(tmp_path, config, {"train": "ab12"}, project="zephyr", name="n", group="g", tags=["t"])
    fit([Throughput(), Samples(tokenizer(), PROMPTS, 20, tmp_path / "samples.jsonl")], logger)
    rows = read(tmp_path / "samples.jsonl")
    identity = logger.version
    logger.experiment.finish()

    assert (tmp_path / "wandb_run_id").read_text() == identity
    (file,) = (tmp_path / "wandb").glob(f"offline-run-*/run-{identity}.wandb")
    history, settings, run = [], {}, None
    for record in finished(file):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
        elif record.WhichOneof("record_type") == "run":
            run = record.run
            settings |= {item.key: json.loads(item.value_json) for item in run.config.update}
    assert run is not None and (run.project, run.display_name) == ("zephyr", "n")
    assert (run.run_group, list(run.tags)) == ("g", ["t"])
    assert settings["seed"] == 7 and settings["fingerprints"] == {"train": "ab12"}
    assert settings["feedback"] == {"api_key": "<removed>", "max_new_tokens": 5}
    assert b"sesame" not in file.read_bytes()
    losses = {row["trainer/global_step"]: row["train/loss"] for row in history if "train/loss" in row}
    assert losses == {2: 12, 4: 14, 6: 16, 8: 18}
    (table, *_) = sorted(file.parent.glob("files/media/table/samples*.table.json"))
    assert json.loads(table.read_text())["data"] == [list(row.values()) for row in rows[:2]]
    lengths = {row["trainer/global_step"]: row["samples/tokens"] for row in history if "samples/tokens" in row}
    assert lengths == {step: sum(row["tokens"] for row in rows if row["step"] == step) / 2 for step in (4, 8)}

    again = wandb_logger(tmp_path, {}, {}, project="zephyr")
    assert again.version == identity
    again.experiment.finish()
    fresh = wandb_logger(tmp_path, {}, {}, project="zephyr", fresh=True)
    assert fresh.version != identity and (tmp_path / "wandb_run_id").read_text() == fresh.version
    fresh.experiment.finish()


def test_credentials_decide_where_nobody_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    from zephyr.observe import weights_and_biases

    settings = wandb.setup().settings.model_copy()
    settings.mode = "online"
    monkeypatch.setattr(wandb.setup(), "_settings", settings, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert wandb.setup().settings.mode == "online"
    assert weights_and_biases._mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    assert weights_and_biases._mode() == "online"


def test_a_run_that_cannot_start_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    from zephyr.observe.weights_and_biases import wandb_logger

    def fail(**_: Any) -> None:
        raise wandb.errors.CommError("no route to host")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(UserError, match=r"no route to host.*WANDB_MODE=offline"):
        wandb_logger(tmp_path, {}, {}, project="zephyr")


# Secrets


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("api_key", "sk-1"),
        ("apiKey", "sk-1"),
        ("judge-api-key", "sk-1"),
        ("OPENAI_API_KEY", "sk-1"),
        ("token", "hf_1"),
        ("hf_token", "hf_1"),
        ("client_secret", "s"),
        ("secret", ["s"]),
        ("db_password", 1234),
        ("aws_secret_access_key", "s"),
    ],
)
def test_secrets_are_removed(key: str, value: Any) -> None:
    assert redact({"a": [{key: value, "b": 1}]}) == {"a": [{key: "<removed>", "b": 1}]}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_tokens", 5),
        ("micro_batch_tokens", 8192),
        ("max_new_tokens", "5"),
        ("tokens_per_second", 1.5),
        ("cls_token", "[CLS]"),
        ("eos_token", "</s>"),
        ("add_bos_token", False),
        ("tokenizer", "path"),
        ("secretary", "Ann"),
        ("secret", {"place": "vault"}),
        ("api_key", None),
        ("api_key", "${oc.env:OPENAI_API_KEY}"),
        ("api_key_env", "OPENAI_API_KEY"),
        ("token_file", "/run/token"),
        ("email", "ann@example.org"),
        ("url", "http://localhost:8000/v1?to=a@b"),
    ],
)
def test_what_is_no_secret_stays(key: str, value: Any) -> None:
    assert redact({key: value}) == {key: value}


def test_urls_lose_their_user_info() -> None:
    assert redact("see https://ann:pw@example.org/x") == "see https://<removed>@example.org/x"
    assert redact({"urls": ("s3://key:a@b@host/p", 3)}) == {"urls": ["s3://<removed>@host/p", 3]}
