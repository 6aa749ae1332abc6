"""What befalls a rank, and what does not fit: refused or said on every rank, and nothing that was whole is lost."""

import errno
import logging
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as mp

from tests.ways import State, assert_equal, launch, step, train
from zephyr import distributed
from zephyr.checkpoints import checkpoint
from zephyr.checkpoints.checkpoint import newest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a sharded run that nothing befell."""
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def truth(folder: Path) -> dict[str, Any]:
    """That run, as rank 0 saw it."""
    return launch(train, 2, folder / "results", folder, "fsdp")[0]


def attempt(*args: Any, **options: Any) -> str:
    try:
        train(*args, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


def refusals(folder: Path, whole: Path, damaged: Path) -> dict[str, str]:
    return {
        "damaged": attempt(folder, "fsdp", damaged),
        "claim": attempt(folder, "fsdp", whole, claim={"seed": 8}),
        "shape": attempt(folder, "fsdp", whole, width=12),
        "names": attempt(folder, "fsdp", whole, bias=False),
        "optimizer": attempt(folder, "fsdp", whole, optimizer="SGD"),
        "nothing": attempt(folder, "fsdp", whole),
    }


def test_what_does_not_fit_is_refused_on_every_rank(tmp_path: Path, folder: Path, truth: dict[str, Any]) -> None:
    shutil.copytree(step(folder), damaged := step(tmp_path / "damaged"))
    shard = damaged / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + bytes([shard.read_bytes()[-1] ^ 1]))
    first, second = launch(refusals, 2, tmp_path / "results", tmp_path / "run", step(folder), damaged)
    assert re.match("UserError: .*step-00000003 is damaged: shard-00001.safetensors is not what", first.pop("damaged"))
    assert second.pop("damaged").startswith("PartnerFailed: ")
    assert first == second
    assert re.match(r"UserError: this is not the run.*\n  seed: 7 -> 8\n", first.pop("claim"))
    assert re.match(r"UserError: /state_dict/policy.0.weight is .* \[16, 8\] .* \[12, 8\] here", first.pop("shape"))
    assert re.match(r"UserError: .* other weights than this model, first 'policy.2.bias'", first.pop("names"))
    assert re.match(r"UserError: .* state of \['AdamW'\], which \['SGD'\] cannot go on from", first.pop("optimizer"))
    assert first == {"nothing": "trained"}


def broken(folder: Path, error: Exception) -> dict[str, Any]:
    """Rank 1 cannot write the whole of its shard."""
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(f"{record.levelname} {record.getMessage()}")
    logging.getLogger("zephyr.checkpoints.checkpoint").addHandler(handler)
    if distributed.rank() == 1:

        def write(tensors: State, file: Path) -> None:
            file.write_bytes(bytes(100))
            raise error

        checkpoint.write = write
    try:
        result = train(folder, "fsdp", every=2)
    except Exception as raised:
        result = {"raised": f"{type(raised).__name__}: {raised}"}
    return result | {"logged": logged}


def test_one_rank_whose_disk_is_full_costs_the_checkpoint_and_not_the_run(
    tmp_path: Path, truth: dict[str, Any]
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    first, second = launch(broken, 2, tmp_path / "results", tmp_path / "run", full)
    assert list((tmp_path / "run").iterdir()) == []
    assert [re.sub(" at .*?: ", ": ", line) for line in first["logged"]] == [
        "ERROR no checkpoint: rank 1: [Errno 28] No space left on device. Training goes on."
    ] * 3
    assert second["logged"] == []
    for result in (first, second):
        assert result["losses"] == truth["losses"]
        assert_equal(result["end"], truth["end"])


def test_another_error_of_one_rank_ends_them_all(tmp_path: Path) -> None:
    first, second = launch(broken, 2, tmp_path / "results", tmp_path / "run", ValueError("no such thing"))
    assert (first["raised"], second["raised"]) == ("RuntimeError: rank 1: no such thing", "ValueError: no such thing")
    assert list((tmp_path / "run").iterdir()) == []


def killed(folder: Path, moment: str) -> None:
    """kill -9 of one rank as the second checkpoint is being written."""
    write, replace = checkpoint.write, os.replace

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def half(tensors: State, file: Path) -> Any:
        if (step(folder, 1)).exists():
            write(tensors, file)
            os.truncate(file, file.stat().st_size // 2)
            die()
        return write(tensors, file)

    def commit(source: Path, target: Path) -> None:
        if target == step(folder, 2) and moment == "before the commit":
            die()
        replace(source, target)
        if target == step(folder, 2):
            die()

    if moment == "amid a shard" and distributed.rank() == 1:
        checkpoint.write = half
    elif moment != "amid a shard":
        os.replace = commit
    train(folder, "fsdp", every=1)


@pytest.mark.parametrize("moment", ["amid a shard", "before the commit", "after the commit"])
def test_kill_of_a_rank_leaves_whole_checkpoints_to_go_on_from(
    tmp_path: Path, truth: dict[str, Any], moment: str
) -> None:
    run = tmp_path / "run"
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
        launch(killed, 2, tmp_path / "results", run, moment)
    last = 2 if moment == "after the commit" else 1
    assert sorted(run.glob("step-*")) == [step(run, number) for number in range(1, last + 1)]
    assert newest(run) == step(run, last)
    rest, _ = launch(train, 2, tmp_path / "results", run, "fsdp", step(run, last))
    assert rest["losses"] == truth["losses"][last:]
    assert_equal(rest["end"], truth["end"])
    assert not any(path.name.startswith(".") for path in run.iterdir())
