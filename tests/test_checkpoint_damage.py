"""Checkpoints on disks that fail, in folders that cannot be written, and under kills: no damage goes unnoticed."""

import errno
import multiprocessing
import os
import random
import shutil
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpointing import assert_same, names, small, train, whole
from zephyr.checkpoints.checkpoint import FolderCheckpointIO, newest, verify
from zephyr.checkpoints.shards import fault
from zephyr.errors import UserError


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


def test_damaged_folder_is_replaced_and_a_whole_one_left_alone(tmp_path: Path) -> None:
    step = small(tmp_path)
    inode = step.stat().st_ino
    small(tmp_path)
    assert step.stat().st_ino == inode and names(tmp_path) == [step.name]
    (step / "state.pt").unlink()
    small(tmp_path)
    verify(step)
    assert [name.startswith("aside-step-00000001-") for name in names(tmp_path)] == [True, False]


Usage = namedtuple("Usage", "total used free")


def test_disk_that_would_fill_up_skips_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    truth = whole()  # before there is anything wrong with the disk
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
    assert_same(result, truth, result.lines)


def test_disk_that_does_fill_up_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    truth = whole()

    def full(tensors: dict[str, Tensor], file: Path) -> None:
        file.write_bytes(bytes(100))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("zephyr.checkpoints.checkpoint.write", full)
    result = train(tmp_path, every=5)
    assert names(tmp_path) == []
    assert "No space left on device" in caplog.text
    assert_same(result, truth, result.lines)


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


def save_for_ever(folder: Path, weights: Tensor, started: Any) -> None:
    io = FolderCheckpointIO()
    started.set()
    for step in range(1, 10**6):
        io.save_checkpoint({"global_step": step, "state_dict": {"w": weights}, "o": weights}, folder / f"step-{step}")
        for old in list(folder.glob("step-*"))[:-2]:
            io.remove_checkpoint(old)


def test_kill_at_any_moment_leaves_no_damaged_step(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    fork = multiprocessing.get_context("fork")
    weights = torch.randn(500_000)
    moments = random.Random()
    leftovers = 0
    for trial in range(2 * pytestconfig.getoption("--kills")):
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
