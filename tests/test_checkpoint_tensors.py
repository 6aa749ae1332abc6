"""What a checkpoint holds comes back as it was, tied, overlapping and of any type, or is refused when it is saved."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.checkpointing import names, small
from zephyr.checkpoints.checkpoint import FolderCheckpointIO

NUMBERS = (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.int16, torch.int8)


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
