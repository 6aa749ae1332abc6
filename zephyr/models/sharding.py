"""FSDP2: a policy whose layers are shared out among processes, from the first byte on.

The model is built without weights, every layer is sharded, and each process then reads its own rows from the files:
nobody ever holds the whole model. 4-bit weights are the exception: they are quantised whole, a quarter of bf16, and
sharded afterwards.
"""

import json
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from zephyr.errors import UserError
from zephyr.models.logps import score


def shard(core: Any, mesh: DeviceMesh, compute: torch.dtype | None, cpu_offload: bool) -> None:
    """Share out a causal LM in place: each layer, then what is left (embedding, last norm, head) as one.

    `mesh` is [devices] or, for several copies of the sharded model, [copies, devices]. Weights keep their dtype;
    layers compute in `compute`, gradients are summed in fp32. They are sums over processes, not means: the trainer
    divides once.
    """
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32 if compute else None),
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy(),
    }
    for layer in core.get_decoder().layers:
        fully_shard(layer, **options)
    # Left gathered after a validation, the root would show its whole weights to the optimizer and to checkpoints.
    fully_shard(core, reshard_after_forward=True, **options)
    for module in core.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    core.score = MethodType(score, core)
    register_fsdp_forward_method(core, "score")


def load_rows(core: nn.Module, files: dict[str, Path], device: torch.device) -> None:
    """Fill a sharded model that has no weights yet: each process reads its rows of every tensor.

    `files` says where each tensor is. Raises UserError at a tensor that is nowhere or of another shape.
    """
    opened: dict[Path, Any] = {}
    filled: dict[str, Any] = {}
    tied: dict[str, str] = getattr(core, "all_tied_weights_keys", {})
    for name, parameter in core.named_parameters():
        if parameter.device.type != "meta":
            continue
        stored = name.replace(".base_layer.", ".")
        if (path := files.get(stored)) is None:
            raise UserError(f"The weights lack {stored}, or have it under another name. Get the whole model again.")
        file = opened.setdefault(path, safe_open(path, "pt")) if path not in opened else opened[path]
        filled[name] = _rows(file.get_slice(stored), stored, parameter, device)
    for name, kept in tied.items():
        if kept in filled:
            filled[name] = filled[kept]
    core.load_state_dict(filled, strict=False, assign=True)


def weight_files(path: str, revision: str | None) -> dict[str, Path]:
    """Where each tensor of a local folder or a hub model is stored; of the hub, the weights are fetched first."""
    folder = Path(path)
    if not folder.is_dir():
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=["*.safetensors", "*.json"]))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    single = folder / "model.safetensors"
    if not single.exists():
        raise UserError(f"{path} has no model.safetensors, from which processes could read their parts.")
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single)


def whole(tensor: Tensor) -> Tensor:
    """A parameter as one tensor on every process, which all must ask for at the same time; itself if not sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _rows(stored: Any, name: str, parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    if tuple(stored.get_shape()) != tuple(parameter.shape):
        raise UserError(f"{name} has the shape {stored.get_shape()}; config.json asks for {list(parameter.shape)}.")
    assert isinstance(parameter, DTensor)
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    rows = stored[offset[0] : offset[0] + shape[0]] if shape[0] else torch.empty(shape)
    local = rows.to(device, parameter.dtype)
    sharded = DTensor.from_local(
        local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(sharded, requires_grad=parameter.requires_grad)
