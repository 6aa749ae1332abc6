"""Where a run takes place: which strategy on how many processes of which kind, and why."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.distributed.device_mesh import init_device_mesh

from zephyr import distributed
from zephyr.errors import UserError
from zephyr.models.policy import Placement
from zephyr.settings import Settings, Trainer

_log = logging.getLogger("zephyr")
_ROOM = 0.7  # of a device's memory for what stays from step to step; activations get the rest


@dataclass(frozen=True)
class Choice:
    """What the settings come down to on this machine."""

    strategy: Literal["single", "ddp", "fsdp"]
    device_type: Literal["cpu", "cuda"]
    devices: int  # of each node
    num_nodes: int
    why: str

    @property
    def processes(self) -> int:
        return self.devices * self.num_nodes


def choose(trainer: Trainer, bytes_needed: Callable[[], float]) -> Choice:
    """Settle `auto`. `bytes_needed` is asked for only where it decides: memory on a device that holds the whole model.

    Raises UserError when the machine lacks what the settings name.
    """
    on_gpu = torch.cuda.is_available() if trainer.accelerator == "auto" else trainer.accelerator == "gpu"
    if on_gpu and not torch.cuda.is_available():
        raise UserError("trainer.accelerator=gpu, but torch sees no GPU. Take auto or cpu, or mend the installation.")
    gpus = torch.cuda.device_count() if on_gpu else 0
    devices, nodes = trainer.devices, trainer.num_nodes
    if distributed.joined():
        here = int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size()))
        if devices not in ("auto", here) or nodes not in (1, distributed.nodes()):
            raise UserError(
                f"The launcher has started {here} processes on each of {distributed.nodes()} nodes, the settings say "
                f"trainer.devices={devices} trainer.num_nodes={nodes}. Leave them out, or make them agree."
            )
        devices, nodes = here, distributed.nodes()
    elif devices == "auto":
        devices = max(gpus, 1)
    assert isinstance(devices, int)
    if on_gpu and devices > gpus:
        raise UserError(f"trainer.devices={devices}, but torch sees {gpus} GPUs here.")
    device_type: Literal["cpu", "cuda"] = "cuda" if on_gpu else "cpu"
    where = f"{devices * nodes} {'GPU' if on_gpu else 'CPU'} process{'es' if devices * nodes > 1 else ''}"
    choice = Choice("single", device_type, devices, nodes, where)
    if trainer.strategy == "fsdp":
        return replace(choice, strategy="fsdp")
    if choice.processes == 1:
        return choice
    if trainer.strategy == "ddp":
        return replace(choice, strategy="ddp")
    if not on_gpu:
        return replace(choice, strategy="ddp", why=f"{where}, whose memory is one: nothing to gain by sharing out")
    memory = torch.cuda.get_device_properties(0).total_memory
    needed = bytes_needed()
    fits = needed <= _ROOM * memory
    why = f"{where}; the whole model takes {needed / 2**30:.1f} of the {memory / 2**30:.0f} GiB of each"
    return replace(choice, strategy="ddp" if fits else "fsdp", why=why)


@contextmanager
def placed(choice: Choice, settings: Settings) -> Iterator[Placement]:
    """Inside, this process is one of the run's; yields where its models go."""
    if choice.processes != distributed.world_size():
        raise RuntimeError(f"{distributed.world_size()} processes run where {choice.processes} were chosen")
    trainer = settings.trainer
    if trainer.threads is not None:
        torch.set_num_threads(trainer.threads)
    device = torch.device("cpu") if choice.device_type == "cpu" else torch.device("cuda", distributed.local_rank())
    here = Placement(device, trainer.precision, compile=trainer.compile)
    if choice.strategy == "single":
        yield here
        return
    with distributed.process_group(choice.device_type):
        if choice.strategy == "fsdp":
            here = replace(here, mesh=_mesh(choice, trainer.replicas), cpu_offload=trainer.cpu_offload)
        yield here


def _mesh(choice: Choice, replicas: int | None) -> Any:
    """[processes], or [replicas, processes of each]: by default a sharded copy on each node."""
    copies = choice.num_nodes if replicas is None else replicas
    if choice.processes % copies:
        raise UserError(f"trainer.replicas={copies} does not divide the {choice.processes} processes.")
    if copies == 1:
        return init_device_mesh(choice.device_type, (choice.processes,), mesh_dim_names=("shard",))
    shape = (copies, choice.processes // copies)
    return init_device_mesh(choice.device_type, shape, mesh_dim_names=("replicate", "shard"))
