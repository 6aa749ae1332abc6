"""A tiny run on one process, DDP, FSDP2 or HSDP, each with checkpoints, and such runs on several forked processes."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from tests import ranks
from tests.checkpointing import Steps, fit
from zephyr import distributed
from zephyr.checkpoints.checkpoint import Checkpoints
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
    module, rank, world = Toy(dropout, **toy), distributed.rank(), distributed.world_size()
    if way in ("fsdp", "hsdp"):
        sizes, names = ((2, 2), ("replicate", "shard")) if way == "hsdp" else ((world,), ("shard",))
        shard(module.policy, init_device_mesh("cpu", sizes, mesh_dim_names=names))
    torch.manual_seed(100 + rank)
    watch = Watch()
    trainer = fit(
        module,
        Steps(torch.randn(STEPS, 4, 8, generator=torch.Generator().manual_seed(1))),  # alike on all ranks
        [watch, Checkpoints(folder, every, 9, claim or {"seed": 7})],
        resume,
        plugins=[LightningEnvironment()],
        devices=world,
        strategy="auto" if way == "single" else Ranks(),
        limit_val_batches=0,
        logger=False,
    )
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


mp.set_forkserver_preload(["tests.ways"])


def assert_equal(state: State, truth: State) -> None:
    torch.testing.assert_close(state, truth, rtol=0, atol=0)


def step(folder: Path, number: int = HALF) -> Path:
    return folder / f"step-{number:08d}"
