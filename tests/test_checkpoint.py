"""Checkpoints: a resumed run is the uninterrupted one, and no damage goes unnoticed."""

import errno
import json
import logging
import multiprocessing
import os
import random
import shutil
import time
import warnings
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import Logger
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from zephyr.checkpoints.checkpoint import Checkpoints, FolderCheckpointIO, newest, verify
from zephyr.checkpoints.shards import fault
from zephyr.errors import UserError

STEPS, VALIDATE_EVERY = 12, 4
NUMBERS = (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.int16, torch.int8)
CLAIM = {"stage": "dpo", "objective.beta": 0.1, "batch_size": 32, "seed": 7}


class Noisy(L.LightningModule):
    """Manual optimisation whose every step draws from all of the process's random states."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 1))

    def training_step(self, batch: list[Tensor], _: int) -> None:
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        jitter = random.random() + np.random.rand()
        loss = sum((self.policy(part).square().mean() + jitter * self.policy(part).mean()) for part in batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        schedule.step()
        self.log_dict({"train/loss": loss, "train/learning_rate": schedule.get_last_lr()[0]})

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("eval/loss", self.policy(batch[0]).square().mean() + torch.rand(()), batch_size=1)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))]


class Remaining(Sampler[int]):
    """Steps `done`..STEPS-1, though its length is that of the whole run, as Lightning counts batches."""

    def __init__(self, done: int) -> None:
        self.done = done

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.done, STEPS))

    def __len__(self) -> int:
        return STEPS


class Steps(L.LightningDataModule):
    """A list of two micro-batches a step."""

    done = 0

    def state_dict(self) -> dict[str, int]:
        return {"done": self.trainer.global_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]

    def train_dataloader(self) -> DataLoader[Any]:
        rows = torch.randn(STEPS, 2, 3, 8, generator=torch.Generator().manual_seed(1))
        return DataLoader([list(row) for row in rows], batch_size=None, sampler=Remaining(self.done), collate_fn=list)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader([[torch.full((1, 8), float(i))] for i in range(3)], batch_size=None, collate_fn=list)


class Lines(Logger):
    """Keeps what reaches the loggers: (step, metric, value)."""

    name, version, experiment = "lines", 0, None

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines += [(step, name, value) for name, value in metrics.items() if name != "epoch"]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Result:
    def __init__(self, module: Noisy, lines: Lines, trainer: L.Trainer) -> None:
        self.lines = lines.lines
        self.weights = {name: value.clone() for name, value in module.state_dict().items()}
        self.optimizer = trainer.optimizers[0].state_dict()
        self.step = trainer.global_step


def train(
    folder: Path,
    every: int = 5,
    keep: int = 9,
    claim: dict[str, Any] = CLAIM,
    seed: int = 0,
    resume: Path | None = None,
    callbacks: tuple[L.Callback, ...] = (),
    checkpoints: Checkpoints | None = None,
    validate_every: int = VALIDATE_EVERY,
) -> Result:
    L.seed_everything(seed, verbose=False)
    module, lines = Noisy(), Lines()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        val_check_interval=validate_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        logger=lines,
        callbacks=[*callbacks, checkpoints or Checkpoints(folder, every, keep, claim)],
        plugins=[FolderCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*dataloader is not resumable|.*does not have many workers")
        trainer.fit(module, datamodule=Steps(), ckpt_path=str(resume) if resume else None)
    return Result(module, lines, trainer)


class Die(L.Callback):
    """Ends the run as a crash would, in the named hook, at the named step."""

    def __init__(self, hook: str, step: int) -> None:
        self.step = step
        setattr(self, hook, self._die)

    def _die(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise MemoryError


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return train(tmp_path_factory.mktemp("whole"), every=100)


def assert_same(result: Result, whole: Result, lines: list[tuple[int, str, float]]) -> None:
    assert lines == whole.lines
    assert result.step == STEPS
    torch.testing.assert_close(result.weights, whole.weights, rtol=0, atol=0)
    torch.testing.assert_close(result.optimizer, whole.optimizer, rtol=0, atol=0)


def small(folder: Path, step: int = 1, **extra: Any) -> Path:
    """A checkpoint that needs no training."""
    weights = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
    path = folder / f"step-{step:08d}"
    FolderCheckpointIO().save_checkpoint({"global_step": step, "state_dict": weights, **extra}, path)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_validations_fall_where_expected(whole: Result) -> None:
    # Lightning numbers a step's log lines from 0: the validation after step 4 bears 3
    assert [step for step, name, _ in whole.lines if name == "eval/loss"] == [3, 7, 11]
    assert [step for step, name, _ in whole.lines if name == "train/loss"] == list(range(STEPS))


# crash at the next batch after a plain step, a validated step, and the last one
@pytest.mark.parametrize("hook, last", [("on_train_batch_start", 5), ("on_train_batch_start", 8), ("on_fit_end", 12)])
@pytest.mark.parametrize("every", [1, 4])
def test_resumed_equals_uninterrupted(tmp_path: Path, whole: Result, hook: str, last: int, every: int) -> None:
    lines = Lines()
    crash = Die(hook, last)
    with pytest.raises(MemoryError):
        train(tmp_path, every, callbacks=(crash, Copy(lines)))
    step = newest(tmp_path)
    assert step is not None and step.name == f"step-{last - last % every:08d}"
    rest = train(tmp_path, every, seed=99, resume=step)
    before = [line for line in lines.lines if line[0] < last - last % every]
    assert_same(rest, whole, before + rest.lines)
    assert not any(name.startswith((".", "aside")) for name in names(tmp_path))


class Copy(L.Callback):
    """Shares the run's log lines with the test, since a crash returns no result."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(trainer.logger, Lines)
        self.lines.lines = trainer.logger.lines


@pytest.mark.parametrize("step", [4, 12])
def test_validation_that_crashed_is_run_after_the_resume(tmp_path: Path, whole: Result, step: int) -> None:
    lines = Lines()
    with pytest.raises(MemoryError):
        train(tmp_path, 1, callbacks=(Die("on_validation_batch_end", step), Copy(lines)))
    checkpoint = newest(tmp_path)
    assert checkpoint is not None and checkpoint.name == f"step-{step - 1:08d}"
    rest = train(tmp_path, 1, seed=99, resume=checkpoint)
    assert_same(rest, whole, [line for line in lines.lines if line[0] < step - 1] + rest.lines)


@pytest.mark.parametrize("every", [4, 5])
@pytest.mark.parametrize("validate_every", [4, 5])
def test_finished_run_resumes_to_nothing(tmp_path: Path, every: int, validate_every: int) -> None:
    first = train(tmp_path, every, validate_every=validate_every)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = train(
        tmp_path,
        every,
        seed=99,
        resume=newest(tmp_path),
        callbacks=(Die("on_train_start", STEPS),),
        validate_every=validate_every,
    )
    assert_same(again, first, first.lines + again.lines)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_saves_when_due_and_at_the_end_and_keeps_the_newest(tmp_path: Path) -> None:
    train(tmp_path, every=3, keep=2)
    assert names(tmp_path) == ["step-00000009", "step-00000012"]
    manifest = json.loads((tmp_path / "step-00000009" / "MANIFEST.json").read_text())
    assert manifest["step"] == 9
    assert manifest["files"].keys() == {"state.pt", "shard-00000.safetensors"}
    assert manifest["versions"]["torch"] == torch.__version__


def test_no_step_is_saved_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    save = FolderCheckpointIO.save_checkpoint

    def count(self: FolderCheckpointIO, checkpoint: Any, path: Path, storage_options: Any = None) -> None:
        saved.append(path.name)
        save(self, checkpoint, path)

    monkeypatch.setattr(FolderCheckpointIO, "save_checkpoint", count)
    train(tmp_path, every=4)
    assert saved == ["step-00000004", "step-00000008", "step-00000012"]


def test_a_new_run_moves_an_older_runs_checkpoints_aside(tmp_path: Path) -> None:
    small(tmp_path, 500)
    (tmp_path / ".tmp-step-00000600-abc").mkdir()
    (tmp_path / ".del-step-00000100-abc").mkdir()
    with pytest.warns(UserWarning, match="step-00000500 is not part of this run"):
        train(tmp_path, every=100)
    assert newest(tmp_path) == tmp_path / "step-00000012"
    aside, last = names(tmp_path)
    assert aside.startswith("aside-step-00000500-") and last == "step-00000012"


@pytest.mark.parametrize("file", ["state.pt", "shard-00000.safetensors", "MANIFEST.json"])
def test_every_damage_is_found_named_and_passed_over(tmp_path: Path, file: str) -> None:
    good, bad = small(tmp_path, 1), small(tmp_path, 2)
    path = bad / file
    content = path.read_bytes()
    places = {0, 1, len(content) // 3, len(content) // 2, len(content) - 2, len(content) - 1}
    places |= set(random.Random(0).sample(range(len(content)), 60))
    damages = [content[:i] + bytes([content[i] ^ bit]) + content[i + 1 :] for i in places for bit in (1, 0x2A)]
    damages += [content[:size] for size in (0, 1, len(content) // 2, len(content) - 1)]
    damages += [content + b"\n", None]
    for damage in damages:
        if damage is None:
            path.unlink()
        else:
            path.write_bytes(damage)
        with pytest.raises(UserError, match=rf"step-00000002 is damaged: {file} ") as found:
            verify(bad)
        if damage is not None and len(damage) != len(content) and file != "MANIFEST.json":
            assert f"has {len(damage)} bytes, {len(content)} were written" in str(found.value)
    with pytest.raises(UserError, match=file):
        FolderCheckpointIO().load_checkpoint(bad)
    with pytest.warns(UserWarning, match=file):
        assert newest(tmp_path) == good
    verify(good)


def test_what_was_verified_is_read_again_only_if_someone_wrote_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = small(tmp_path)
    read = []
    monkeypatch.setattr(
        "zephyr.checkpoints.checkpoint.fault", lambda file, facts: read.append(file.name) or fault(file, facts)
    )
    verify(step)
    verify(step)
    FolderCheckpointIO().load_checkpoint(step)
    assert sorted(read) == ["shard-00000.safetensors", "state.pt"]
    time.sleep(0.02)  # a file's times are as coarse as the kernel's clock
    shard = step / "shard-00000.safetensors"
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    with pytest.raises(UserError, match="checksum"):
        verify(step)


def test_newest_takes_steps_as_numbers_and_nothing_else(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    assert newest(tmp_path / "absent") is None
    small(tmp_path, 99_999_999)
    last = small(tmp_path, 100_000_000)
    for name in (
        ".tmp-step-200000000-a",
        ".del-step-200000000-a",
        "aside-step-200000000-a",
        "step-200000000.bak",
    ):
        shutil.copytree(last, tmp_path / name)
    assert newest(tmp_path) == last


def test_damaged_folder_is_replaced_and_a_whole_one_left_alone(tmp_path: Path) -> None:
    step = small(tmp_path)
    inode = step.stat().st_ino
    small(tmp_path)
    assert step.stat().st_ino == inode and names(tmp_path) == [step.name]
    (step / "state.pt").unlink()
    small(tmp_path)
    verify(step)
    assert [name.startswith("aside-step-00000001-") for name in names(tmp_path)] == [True, False]


def test_tied_and_overlapping_weights_come_back(tmp_path: Path) -> None:
    table = torch.randn(100, 50)
    weights = {
        "embed": table,
        "head": table,
        "rows": table[1:3],
        "columns": table.T,
        "one": torch.tensor(1.5, dtype=torch.bfloat16),
        "none": torch.empty(0, 2),
        "nothing": torch.empty(0, 2),
        "packed": torch.arange(5, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        **{str(dtype): torch.arange(6).reshape(3, 2).to(dtype) for dtype in NUMBERS},
        "quantisation": {"kind": "nf4", "blocks": [64]},
    }
    io = FolderCheckpointIO()
    io.save_checkpoint({"global_step": 1, "state_dict": dict(weights)}, tmp_path / "step-1")
    back = io.load_checkpoint(tmp_path / "step-1")["state_dict"]
    assert back.keys() == weights.keys()
    assert back["quantisation"] == weights.pop("quantisation")
    for name, value in weights.items():
        assert back[name].dtype == value.dtype and torch.equal(back[name].double(), value.double()), name
    shard = tmp_path / "step-1" / "shard-00000.safetensors"
    readable = load_file(shard)  # by the format's own library
    assert torch.equal(readable["/state_dict/embed"], table) and "/state_dict/head" not in readable
    size = table.numel() * 4  # stored once, then its transpose and two of its rows as copies
    assert 2 * size < shard.stat().st_size < 2.5 * size


def test_optimizer_state_of_any_shape_comes_back(tmp_path: Path) -> None:
    code = torch.linspace(-1, 1, 256)  # shared by all parameters, as bitsandbytes does
    moments = [{"state1": torch.arange(6, dtype=torch.uint8), "qmap1": code, "absmax1": torch.rand(3)} for _ in "ab"]
    optimizer = {
        "state": {0: {"step": 7, "nested": moments[0]}, 5: {"step": torch.tensor(7.0), "nested": moments[1]}},
        "param_groups": [{"params": [0, 5], "lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.0}],
    }
    io = FolderCheckpointIO()
    io.save_checkpoint({"optimizer_states": [optimizer]}, tmp_path / "step-1")
    assert io.load_checkpoint(tmp_path / "step-1").keys() == {"optimizer_states"}
    (back,) = io.load_checkpoint(tmp_path / "step-1")["optimizer_states"]
    torch.testing.assert_close(back, optimizer, rtol=0, atol=0)
    assert [type(value) for value in back["state"]] == [int, int]
    assert (tmp_path / "step-1" / "shard-00000.safetensors").stat().st_size < 2 * 256 * 4
    assert (tmp_path / "step-1" / "state.pt").stat().st_size < 4000


def test_another_optimizer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, every=6)
    configure = Noisy.configure_optimizers
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.RAdam)
    assert type(configure(Noisy())[0][0]).__name__ == "RAdam"
    with pytest.raises(UserError, match=r"state of \['AdamW'\], which \['RAdam'\] cannot go on from"):
        train(tmp_path, resume=tmp_path / "step-00000006")


def test_tensors_that_the_format_does_not_know_are_refused_when_saving(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"/state_dict/z is of torch.complex64"):
        FolderCheckpointIO().save_checkpoint(
            {"state_dict": {"z": torch.ones(2, dtype=torch.complex64)}}, tmp_path / "a"
        )
    assert names(tmp_path) == []


def test_what_weights_only_refuses_is_refused_when_saving(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"numpy\S+ that weights_only=True does not"):
        small(tmp_path, generator=np.random.default_rng())
    assert names(tmp_path) == []


Usage = namedtuple("Usage", "total used free")


def test_disk_that_would_fill_up_skips_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, whole: Result
) -> None:
    step = small(tmp_path)
    size = sum(file.stat().st_size for file in step.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, int(1.2 * size) - 1))
    small(tmp_path, 2)
    assert names(tmp_path) == [step.name]
    assert [record.levelname for record in caplog.records] == ["ERROR"] and "free" in caplog.text
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, int(1.2 * size) + 1))
    small(tmp_path, 2)
    verify(tmp_path / "step-00000002")

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 0))
    result = train(tmp_path / "run", every=2)  # the first has nothing to go by and succeeds
    assert names(tmp_path / "run") == ["step-00000002"]
    assert_same(result, whole, result.lines)


def test_disk_that_does_fill_up_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, whole: Result
) -> None:
    def full(tensors: dict[str, Tensor], file: Path) -> None:
        file.write_bytes(bytes(100))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("zephyr.checkpoints.checkpoint.write", full)
    result = train(tmp_path, every=5)
    assert names(tmp_path) == []
    assert "No space left on device" in caplog.text
    assert_same(result, whole, result.lines)


def test_folder_that_cannot_be_written_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write checkpoints to .*file/checkpoints: Not a directory"):
        train(tmp_path / "file" / "checkpoints")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_is_refused_before_the_first_step(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(UserError, match="Permission denied"):
        train(tmp_path)


def test_staging_ignores_the_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    renamed = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (renamed.append((Path(a), Path(b))), replace(a, b)))
    step = small(tmp_path / "checkpoints")
    assert [(a.parent, b) for a, b in renamed] == [(step.parent, step)]


def test_everything_is_on_the_disk_before_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a power cut cannot be staged; the order of the calls can
    order = []
    sync, replace = os.fsync, os.replace

    def log_sync(descriptor: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.split("-")[0])
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", log_sync)
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("commit"), replace(a, b)))
    small(tmp_path / "checkpoints")
    assert order == ["state.pt", "shard", "MANIFEST.json", ".tmp", "commit", "checkpoints"]


def test_claim_that_changed_is_listed(tmp_path: Path) -> None:
    train(tmp_path, every=6)
    step = tmp_path / "step-00000006"
    other = {"stage": "dpo", "objective.beta": 0.01, "batch_size": 32, "objective.label_smoothing": 0.1}
    message = (
        "this is not the run that wrote the checkpoint:\n"
        "  objective.beta: 0.1 -> 0.01\n"
        "  objective.label_smoothing: (not set) -> 0.1\n"
        "  seed: 7 -> (not set)\n"
    )
    with pytest.raises(UserError) as resumed:
        train(tmp_path, claim=other, resume=step)
    with pytest.raises(UserError) as asked:
        Checkpoints(tmp_path, 1, 1, other).check(step)
    assert str(asked.value) == str(resumed.value)
    assert str(resumed.value).startswith(message) and "model.path=" in str(resumed.value)
    Checkpoints(tmp_path, 1, 1, dict(CLAIM)).check(step)


def save_for_ever(folder: Path, weights: Tensor, started: Any) -> None:
    io = FolderCheckpointIO()
    started.set()
    for step in range(1, 10**6):
        io.save_checkpoint({"global_step": step, "state_dict": {"w": weights}, "o": weights}, folder / f"step-{step}")
        for old in list(folder.glob("step-*"))[:-2]:
            io.remove_checkpoint(old)


def test_kill_at_any_moment_leaves_no_damaged_step(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    weights = torch.randn(500_000)
    moments = random.Random()
    leftovers = 0
    for trial in range(int(os.environ.get("ZEPHYR_KILLS", "4"))):
        folder = tmp_path / str(trial)
        small(folder, 0)
        started = fork.Event()
        child = fork.Process(target=save_for_ever, args=(folder, weights, started))
        child.start()
        assert started.wait(30)
        time.sleep(moments.uniform(0, 0.4))
        child.kill()
        child.join()
        leftovers += any(name.startswith(".") for name in names(folder))
        for step in folder.glob("step-*"):
            verify(step)
        last = newest(folder)
        assert last is not None
        assert FolderCheckpointIO().load_checkpoint(last)["global_step"] == int(last.name[5:])
        shutil.rmtree(folder)
    print(f"killed while writing or deleting: {leftovers}")
