"""One checkpoint format for one process, DDP, FSDP2 and HSDP: written by any of them, read by any other."""

import errno
import json
import logging
import os
import re
import shutil
import signal
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch.plugins.environments import LightningEnvironment
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.data import DataLoader, Sampler

from tests import ranks
from zephyr import distributed
from zephyr.checkpoints import checkpoint
from zephyr.checkpoints.checkpoint import Checkpoints, FolderCheckpointIO, newest
from zephyr.checkpoints.shards import Stored, join
from zephyr.errors import UserError
from zephyr.running.strategy import Ranks

STEPS, HALF = 6, 3
State = dict[str, Tensor]


class Toy(L.LightningModule):
    """Steps on sums over all ranks. Its last layer has 3 rows: 2 + 1 on two ranks, none for the fourth of four."""

    def __init__(self, dropout: float = 0.0, optimizer: str = "AdamW", width: int = 16, bias: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.kind = optimizer
        torch.manual_seed(0)
        self.policy = nn.Sequential(nn.Linear(8, width), nn.Dropout(dropout), nn.Linear(width, 3, bias))
        self.losses: list[float] = []
        self.draws: list[float] = []

    def training_step(self, rows: Tensor, _: int) -> None:
        optimizer, rates = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()
        self.draws.append(torch.rand(()).item())
        share = rows[distributed.rank() :: distributed.world_size()]
        loss = self.policy(share).square().sum() if len(share) else self.policy(rows).sum() * 0
        self.manual_backward(loss)
        total = loss.detach().clone()
        if dist.is_initialized():
            for gradient in [p.grad for p in self.parameters() if not isinstance(p.grad, DTensor)]:
                dist.all_reduce(gradient)
            dist.all_reduce(total)
        optimizer.step()
        rates.step()
        self.losses.append(total.item())

    def configure_optimizers(self) -> Any:
        optimizer = getattr(torch.optim, self.kind)(self.parameters(), lr=0.05, fused=True)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))]


def shard(module: nn.Module, mesh: Any) -> None:
    for layer in (module[0], module[2], module):
        fully_shard(layer, mesh=mesh)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)


class Remaining(Sampler[int]):
    done = 0

    def __iter__(self) -> Any:
        return iter(range(self.done, STEPS))

    def __len__(self) -> int:
        return STEPS


class Rows(L.LightningDataModule):
    """Four rows a step, alike on all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.sampler = Remaining()

    def state_dict(self) -> dict[str, int]:
        return {"done": self.trainer.global_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.sampler.done = state["done"]

    def train_dataloader(self) -> DataLoader[Any]:
        rows = torch.randn(STEPS, 4, 8, generator=torch.Generator().manual_seed(1))
        return DataLoader(rows, batch_size=None, sampler=self.sampler)


class Watch(L.Callback):
    """Whole weights and optimizer state after HALF of the steps, be they just trained or just loaded."""

    state: State

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == HALF:
            self.state = whole(trainer)

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == HALF:
            self.state = whole(trainer)


def whole(trainer: L.Trainer) -> State:
    """By an independent way: collectives of DTensor."""
    state = dict(trainer.lightning_module.state_dict())
    for index, values in trainer.optimizers[0].state_dict()["state"].items():
        state |= {f"{index}.{name}": value for name, value in values.items()}
    return {name: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for name, v in state.items()}


def train(
    folder: Path,
    way: str = "single",
    resume: Path | None = None,
    every: int = HALF,
    claim: dict[str, Any] | None = None,
    dropout: float = 0.0,
    **toy: Any,
) -> dict[str, Any]:
    """`way`: single, ddp, fsdp, or hsdp (two copies of a model sharded in two)."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module, rank, world = Toy(dropout, **toy), distributed.rank(), distributed.world_size()
    if way in ("fsdp", "hsdp"):
        sizes, names = ((2, 2), ("replicate", "shard")) if way == "hsdp" else ((world,), ("shard",))
        shard(module.policy, init_device_mesh("cpu", sizes, mesh_dim_names=names))
    torch.manual_seed(100 + rank)
    watch = Watch()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="auto" if way == "single" else Ranks(),
        max_epochs=1,
        limit_val_batches=0,
        use_distributed_sampler=False,
        logger=False,
        callbacks=[watch, Checkpoints(folder, every, 9, claim or {"seed": 7})],
        plugins=[FolderCheckpointIO(), LightningEnvironment()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*dataloader is not resumable|.*does not have many workers")
        trainer.fit(module, datamodule=Rows(), ckpt_path=resume and str(resume))
    assert os.environ.get("WORLD_SIZE", "1") == str(world)
    return {"half": watch.state, "losses": module.losses, "draws": module.draws, "end": whole(trainer)}


def launch(function: Callable[..., Any], processes: int, folder: Path, *args: Any) -> list[Any]:
    """tests.ranks.spawn, with processes forked from one that has done the imports: 1 s instead of 5 s each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    of_rank = (joined, processes, port, folder, (function, args))
    mp.start_processes(ranks._rank, of_rank, processes, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def joined(function: Callable[..., Any], args: Any) -> Any:
    with distributed.process_group("cpu"):
        return function(*args)


mp.set_forkserver_preload(["tests.test_strategy"])


def assert_equal(state: State, truth: State) -> None:
    torch.testing.assert_close(state, truth, rtol=0, atol=0)


def assert_near(result: dict[str, Any], truth: dict[str, Any]) -> None:
    assert result["losses"] == pytest.approx(truth["losses"][-len(result["losses"]) :], rel=1e-5)
    torch.testing.assert_close(result["end"], truth["end"], rtol=1e-4, atol=1e-6)


# every way to every way

SOURCES = {"single": 1, "ddp": 2, "fsdp": 2, "hsdp": 4}  # way -> processes
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
        for way, processes in SOURCES.items()
        if processes > 1
    }


def step(folder: Path, number: int = HALF) -> Path:
    return folder / f"step-{number:08d}"


def resumed(folder: Path, ways: tuple[str, ...]) -> dict[str, Any]:
    return {
        f"{source} to {way}": train(
            folder / f"from-{source}-{way}-{distributed.world_size()}", way, step(folder / source)
        )
        for source in SOURCES
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
        assert len(of_rank) == len(SOURCES) * len(TARGETS[processes])
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
    for way in SOURCES:
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


# what goes wrong


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


def test_what_does_not_fit_is_refused_on_every_rank(
    tmp_path: Path, folder: Path, sources: dict[str, dict[str, Any]]
) -> None:
    shutil.copytree(step(folder / "fsdp"), damaged := step(tmp_path / "damaged"))
    shard = damaged / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + bytes([shard.read_bytes()[-1] ^ 1]))
    first, second = launch(refusals, 2, tmp_path / "results", tmp_path / "run", step(folder / "fsdp"), damaged)
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
    tmp_path: Path, sources: dict[str, dict[str, Any]]
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    first, second = launch(broken, 2, tmp_path / "results", tmp_path / "run", full)
    assert list((tmp_path / "run").iterdir()) == []
    assert [re.sub(" at .*?: ", ": ", line) for line in first["logged"]] == [
        "ERROR no checkpoint: rank 1: [Errno 28] No space left on device. Training goes on."
    ] * 3
    assert second["logged"] == []
    for result in (first, second):
        assert result["losses"] == sources["fsdp"]["losses"]
        assert_equal(result["end"], sources["fsdp"]["end"])


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
    tmp_path: Path, sources: dict[str, dict[str, Any]], moment: str
) -> None:
    run = tmp_path / "run"
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
        launch(killed, 2, tmp_path / "results", run, moment)
    last = 2 if moment == "after the commit" else 1
    assert sorted(run.glob("step-*")) == [step(run, number) for number in range(1, last + 1)]
    assert newest(run) == step(run, last)
    rest, _ = launch(train, 2, tmp_path / "results", run, "fsdp", step(run, last))
    assert rest["losses"] == sources["fsdp"]["losses"][last:]
    assert_equal(rest["end"], sources["fsdp"]["end"])
    assert not any(path.name.startswith(".") for path in run.iterdir())
