"""Checkpoints: a resumed run is the uninterrupted one, a step is saved when due, and another run's are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from tests.checkpointing import CLAIM, STEPS, Copy, Lines, Noisy, assert_same, names, small, train, whole
from zephyr.checkpoints.checkpoint import Checkpoints, FolderCheckpointIO, newest
from zephyr.errors import UserError


class Die(L.Callback):
    """Ends the run as a crash would, in the named hook, at the named step."""

    def __init__(self, hook: str, step: int) -> None:
        self.step = step
        setattr(self, hook, self._die)

    def _die(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise MemoryError


def test_validations_fall_where_expected() -> None:
    # Lightning numbers a step's log lines from 0: the validation after step 4 bears 3
    assert [step for step, name, _ in whole().lines if name == "eval/loss"] == [3, 7, 11]
    assert [step for step, name, _ in whole().lines if name == "train/loss"] == list(range(STEPS))


# crash at the next batch after a plain step, a validated step, and the last one
@pytest.mark.parametrize("hook, last", [("on_train_batch_start", 5), ("on_train_batch_start", 8), ("on_fit_end", 12)])
@pytest.mark.parametrize("every", [1, 4])
def test_resumed_equals_uninterrupted(tmp_path: Path, hook: str, last: int, every: int) -> None:
    lines = Lines()
    crash = Die(hook, last)
    with pytest.raises(MemoryError):
        train(tmp_path, every, callbacks=(crash, Copy(lines)))
    step = newest(tmp_path)
    assert step is not None and step.name == f"step-{last - last % every:08d}"
    rest = train(tmp_path, every, seed=99, resume=step)
    before = [line for line in lines.lines if line[0] < last - last % every]
    assert_same(rest, whole(), before + rest.lines)
    assert not any(name.startswith((".", "aside")) for name in names(tmp_path))


@pytest.mark.parametrize("step", [4, 12])
def test_validation_that_crashed_is_run_after_the_resume(tmp_path: Path, step: int) -> None:
    lines = Lines()
    with pytest.raises(MemoryError):
        train(tmp_path, 1, callbacks=(Die("on_validation_batch_end", step), Copy(lines)))
    checkpoint = newest(tmp_path)
    assert checkpoint is not None and checkpoint.name == f"step-{step - 1:08d}"
    rest = train(tmp_path, 1, seed=99, resume=checkpoint)
    assert_same(rest, whole(), [line for line in lines.lines if line[0] < step - 1] + rest.lines)


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


def test_another_optimizer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, every=6)
    configure = Noisy.configure_optimizers
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.RAdam)
    assert type(configure(Noisy())[0][0]).__name__ == "RAdam"
    with pytest.raises(UserError, match=r"state of \['AdamW'\], which \['RAdam'\] cannot go on from"):
        train(tmp_path, resume=tmp_path / "step-00000006")


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
