"""One checkpoint format for one process, DDP, FSDP2 and HSDP: written by any of them, read by any other."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.ways import HALF, STEPS, assert_equal, launch, step, train
from zephyr import distributed
from zephyr.checkpoints import checkpoint
from zephyr.checkpoints.checkpoint import FolderCheckpointIO, newest
from zephyr.checkpoints.shards import Stored, join
from zephyr.errors import UserError


def assert_near(result: dict[str, Any], truth: dict[str, Any]) -> None:
    assert result["losses"] == pytest.approx(truth["losses"][-len(result["losses"]) :], rel=1e-5)
    torch.testing.assert_close(result["end"], truth["end"], rtol=1e-4, atol=1e-6)


# every way to every way

PROCESSES = {"single": 1, "ddp": 2, "fsdp": 2, "hsdp": 4}  # of each way
TARGETS = {1: ("single",), 2: ("ddp", "fsdp"), 4: ("fsdp", "hsdp")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ways")


@pytest.fixture(scope="module")
def sources(folder: Path) -> dict[str, dict[str, Any]]:
    """An uninterrupted run of each way, with a checkpoint after HALF of its steps. As rank 0 saw it."""
    one = train(folder / "single")
    return {"single": one} | {
        way: launch(train, processes, folder / "results", folder / way, way)[0]
        for way, processes in PROCESSES.items()
        if processes > 1
    }


def resumed(folder: Path, ways: tuple[str, ...]) -> dict[str, Any]:
    return {
        f"{source} to {way}": train(
            folder / f"from-{source}-{way}-{distributed.world_size()}", way, step(folder / source)
        )
        for source in PROCESSES
        for way in ways
    }


def test_every_way_trains_alike(sources: dict[str, dict[str, Any]]) -> None:
    for result in sources.values():
        assert len(result["losses"]) == STEPS
        assert_near(result, sources["single"])


@pytest.mark.parametrize("processes", TARGETS)
def test_every_way_resumes_from_every_way(folder: Path, sources: dict[str, dict[str, Any]], processes: int) -> None:
    results = (
        [resumed(folder, TARGETS[1])]
        if processes == 1
        else launch(resumed, processes, folder / "results", folder, TARGETS[processes])
    )
    for of_rank in results:
        assert len(of_rank) == len(PROCESSES) * len(TARGETS[processes])
        for name, result in of_rank.items():
            truth = sources[name.split()[0]]
            assert len(result["half"]) == 4 + 3 * 4  # parameters, and of each a step count and two moments
            assert_equal(result["half"], truth["half"])
            assert_near(result, truth)


def test_who_wrote_what(folder: Path, sources: dict[str, dict[str, Any]]) -> None:
    def rows(way: str) -> dict[int, tuple[list[int], int]]:
        """Of the weight with 3 rows: shape of each rank's piece, and where it starts."""
        found = {}
        for shard in sorted(step(folder / way).glob("shard-*")):
            with safe_open(shard, "pt") as file:
                name = "/state_dict/policy.2.weight"
                start = json.loads(file.metadata()["rows"]).get(name, 0)
                found[int(shard.stem[6:])] = file.get_slice(name).get_shape(), start
        return found

    assert rows("single") == rows("ddp") == {0: ([3, 16], 0)}
    assert rows("fsdp") == rows("hsdp") == {0: ([2, 16], 0), 1: ([1, 16], 2)}
    for way in PROCESSES:
        manifest = json.loads((step(folder / way) / "MANIFEST.json").read_text())
        assert manifest["files"].keys() | {"MANIFEST.json"} == {file.name for file in step(folder / way).iterdir()}
        state = torch.load(step(folder / way) / "state.pt", weights_only=True)  # keeps nothing big
        assert all(value.is_meta for value in state["state_dict"].values())
        assert state["optimizer_states"][0]["state"][0]["step"] == HALF


# the same number of processes: bit by bit


def spied(folder: Path) -> dict[str, Any]:
    """Resumes, and says how many elements this rank read and which files it checked."""
    read, checked = [], []
    rows, fault = Stored.rows, checkpoint.fault
    Stored.rows = lambda self, start, stop: read.append(rows(self, start, stop)) or read[-1]
    checkpoint.fault = lambda file, facts: checked.append(file.name) or fault(file, facts)
    latest = distributed.from_first(lambda: newest(folder))
    result = train(folder.with_name("again"), "fsdp", latest, dropout=0.5)
    return result | {"read": sum(part.numel() for part in read), "checked": sorted(checked)}


def test_as_many_processes_resume_bitwise_and_read_their_own_rows_only(tmp_path: Path) -> None:
    first = launch(train, 2, tmp_path / "results", tmp_path / "run", "fsdp", None, HALF, None, 0.5)
    shutil.rmtree(step(tmp_path / "run", STEPS))
    again = launch(spied, 2, tmp_path / "results", tmp_path / "run")
    for result, truth in zip(again, first, strict=True):
        assert_equal(result["end"], truth["end"])
        assert result["losses"] == truth["losses"][HALF:]
        assert result["draws"] == truth["draws"][HALF:]
    assert first[0]["draws"] != first[1]["draws"]
    # weight and two moments of: 8 of 16 rows of 8, 8 of 16 biases, 2 or 1 of 3 rows of 16, 2 or 1 of 3 biases
    assert [result["read"] for result in again] == [3 * (64 + 8 + 32 + 2), 3 * (64 + 8 + 16 + 1)]
    assert [result["checked"] for result in again] == [
        ["shard-00000.safetensors", "shard-00001.safetensors", "state.pt"],
        [],
    ]

    more = launch(train, 4, tmp_path / "results", tmp_path / "more", "fsdp", step(tmp_path / "run"))
    fresh = launch(train, 4, tmp_path / "results", tmp_path / "fresh", "fsdp")
    draws = [result["draws"][0] for result in more]
    assert draws == [first[0]["draws"][HALF], first[1]["draws"][HALF], fresh[2]["draws"][0], fresh[3]["draws"][0]]


# tensors


def save_pieces(folder: Path) -> str:
    mesh = init_device_mesh("cpu", (4,))
    five, three = torch.arange(10.0).reshape(5, 2), torch.arange(3).to(torch.bfloat16)
    tied = distribute_tensor(five, mesh, [Shard(0)])
    FolderCheckpointIO().save_checkpoint({"state_dict": {"five": tied, "also": tied}}, folder / "step-1")
    uneven = distribute_tensor(three, mesh, [Shard(0)])
    FolderCheckpointIO().save_checkpoint({"state_dict": {"three": uneven}}, folder / "step-2")
    columns = distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)])
    with pytest.raises((TypeError, RuntimeError)) as refused:
        FolderCheckpointIO().save_checkpoint({"state_dict": {"columns": columns}}, folder / "step-3")
    back = FolderCheckpointIO().open(folder / "step-2")["state_dict"]["three"]
    back.into(copy := torch.zeros_like(uneven))
    assert torch.equal(copy.full_tensor(), three)
    return str(refused.value)


def test_pieces_of_uneven_and_tied_tensors(tmp_path: Path) -> None:
    refused = launch(save_pieces, 4, tmp_path / "results", tmp_path / "run")
    assert all("only rows are shared out among processes" in text for text in refused)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step-1", "step-2"]
    shards = [f"shard-0000{rank}.safetensors" for rank in range(4)]
    assert sorted(path.name for path in (tmp_path / "run" / "step-1").glob("shard*")) == shards[:3]  # 2 + 2 + 1 + 0
    assert sorted(path.name for path in (tmp_path / "run" / "step-2").glob("shard*")) == shards[:3]  # 1 + 1 + 1 + 0
    stored = FolderCheckpointIO().open(tmp_path / "run" / "step-1")["state_dict"]
    five = torch.arange(10.0).reshape(5, 2)
    for name in ("five", "also"):
        assert torch.equal(stored[name].whole(), five)
        for start in range(6):
            for stop in range(start, 6):
                assert torch.equal(stored[name].rows(start, stop), five[start:stop])
    numbers = sum(file.stat().st_size for file in (tmp_path / "run" / "step-1").glob("shard*"))
    assert numbers < 3 * 300 + 40 and load_file(tmp_path / "run" / "step-1" / shards[0]).keys() == {"/state_dict/five"}
    assert FolderCheckpointIO().load_checkpoint(tmp_path / "run" / "step-2")["state_dict"]["three"].tolist() == [
        0,
        1,
        2,
    ]

    skeleton = {"state_dict": {"five": torch.empty(5, 2, device="meta")}}
    part = join(skeleton, [tmp_path / "run" / "step-1" / shards[0], tmp_path / "run" / "step-1" / shards[2]])
    assert part["state_dict"]["five"].rows(0, 2).tolist() == [[0, 1], [2, 3]]
    with pytest.raises(UserError, match=r"lacks rows 1 to 5 of /state_dict/five"):
        part["state_dict"]["five"].rows(1, 5)
