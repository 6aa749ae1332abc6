"""The Lightning strategy of every run of several processes, sharded or not; it leaves the module as it was built."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from zephyr import distributed
from zephyr.checkpoints.checkpoint import FolderCheckpointIO
from zephyr.checkpoints.shards import Stored, change
from zephyr.errors import UserError


class Ranks(DDPStrategy):
    """Runs the module itself, without DistributedDataParallel around it: the module sums its gradients over processes.

    Its parameters are either equal on all processes as they were loaded, or sharded. The launcher has started the
    processes and zephyr.distributed has connected them.
    """

    checkpoint_io: FolderCheckpointIO

    @property
    def global_rank(self) -> int:
        return distributed.rank()

    @property
    def world_size(self) -> int:
        return distributed.world_size()

    def _configure_launcher(self) -> None:
        pass

    def setup_distributed(self) -> None:
        assert torch.distributed.is_initialized()
        self.set_world_ranks()

    def setup(self, trainer: Trainer) -> None:
        Strategy.setup(self, trainer)  # DDP's would wrap the module and send everybody rank 0's weights

    def _setup_model(self, model: LightningModule) -> LightningModule:  # type: ignore[override]
        return model

    def model_to_device(self) -> None:
        if not any(isinstance(parameter, DTensor) for parameter in self._module.parameters()):
            super().model_to_device()

    def teardown(self) -> None:
        # Lightning's would move the module to the CPU, once a process, and unset WORLD_SIZE
        self.precision_plugin.teardown()
        assert self.accelerator is not None
        self.accelerator.teardown()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        self.checkpoint_io.save_checkpoint(checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.open(checkpoint_path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Fill each parameter with the rows that this process holds.

        Raises UserError at a tensor of another shape or, if `strict`, one that only one side has.
        """
        own, stored = self._module.state_dict(), checkpoint["state_dict"]
        strangers = own.keys() ^ stored.keys() if strict else stored.keys() - own.keys()
        if strangers:
            raise UserError(f"The checkpoint holds other weights than this model, first {min(strangers)!r}.")
        for name, value in stored.items():
            if isinstance(value, Stored):
                value.into(own[name])
        single = {name: value for name, value in stored.items() if not isinstance(value, Stored)}
        self._module.load_state_dict(single, strict=False)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each parameter its state: the same rows as its own if it is sharded, else the whole."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            own = {index: change(values, _of(parameters[index])) for index, values in state["state"].items()}
            optimizer.load_state_dict({**state, "state": own})

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module


def _of(parameter: Tensor) -> Any:
    """Reads what is stored of a parameter's state to where the parameter is."""

    def read(_: str, stored: Any) -> Any:
        if not isinstance(stored, Stored):
            return stored
        if stored.shape == parameter.shape:
            state = torch.empty_like(parameter, dtype=stored.dtype, requires_grad=False)
        else:
            state = torch.empty(stored.shape, dtype=stored.dtype, device=parameter.device)
        stored.into(state)
        return state

    return read
