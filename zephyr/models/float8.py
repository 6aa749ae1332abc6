"""Matrix products in 8-bit floating point (Micikevicius et al., 2022), by torchao, on GPUs that have them.

Each product's two operands are scaled by their largest number and rounded to 8 bits (activations and weights e4m3,
gradients e5m2); sums are wider, and weights stay what they are. A scale is that of a whole row of packed examples, so
that an example's numbers depend, by some rounding, on what it is packed with.
"""

import logging
from typing import Any

import torch
from torch import nn

from zephyr.errors import UserError

_SIDE = 16  # what the kernels want sizes to be multiples of


def check_float8(device: torch.device) -> None:
    """Raise UserError where there is no product in 8 bits."""
    if device.type != "cuda":
        raise UserError("model.float8=true needs a GPU, and this run is on a CPU. Set model.float8=false.")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise UserError(
            f"model.float8=true needs a GPU with 8-bit floating point (compute capability 8.9: Ada, Hopper or later); "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}. Set model.float8=false."
        )


def use_float8(core: nn.Module, emulate: bool = False) -> int:
    """Let the decoder's linear layers compute in 8 bits, in place; returns how many do.

    Adapters, the head and layers whose sizes are no multiples of 16 stay as they are. Call it before the model is
    sharded and after adapters are attached. Parameters keep their names, values and dtypes. `emulate` rounds as the
    GPU would, and multiplies what was rounded in full precision. Raises UserError without torchao, or on 4-bit weights.
    """
    try:
        logging.getLogger("torchao").setLevel(logging.ERROR)  # it warns of kernels for other devices
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise UserError('model.float8=true needs torchao: pip install "zephyr[float8]".') from error
    decoder: Any = core.get_decoder()  # type: ignore[operator]
    if any(type(module).__name__ == "Linear4bit" for module in decoder.modules()):
        raise UserError("model.float8=true and model.quantization exclude each other: 4-bit weights compute in bf16.")
    # The weights' gradients are sums over tokens, of which there may be any number: padded to a multiple of 16.
    config = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
    chosen: list[str] = []

    def wanted(module: nn.Module, name: str) -> bool:
        assert isinstance(module, nn.Linear)
        fits = module.in_features % _SIDE == 0 and module.out_features % _SIDE == 0
        if ".lora_" in name or not fits:
            return False
        chosen.append(name)
        return True

    convert_to_float8_training(decoder, module_filter_fn=wanted, config=config)
    if not chosen:
        raise UserError("model.float8=true, but no linear layer of this model has sizes that are multiples of 16.")
    return len(chosen)
