"""AdamW in the forms that memory asks for: torch's own, paged, and a lean one for bf16 weights and 8-bit state.

    name                weights   state of a weight
    adamw               fp32      8 bytes; torch's fused kernel
    adamw               bf16      8 bytes; weights rounded stochastically
    adamw_8bit          any       2 bytes; bf16 weights rounded stochastically
    paged_adamw_32bit   whole     8 bytes, which move to the host's memory when the device's runs short (bitsandbytes)
    paged_adamw_8bit    whole     2 bytes, likewise

The lean one holds plain tensors of the weights' rows, so that checkpoints of it are read by any number of processes.
"""

import hashlib
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from zephyr.settings import Optimizer as OptimizerSettings

_log = logging.getLogger(__name__)
_BLOCK = 256  # numbers that share a scale, at most
_SMALL = 4096  # tensors of fewer numbers keep their state in fp32, as in Dettmers et al. (2022)
_PIECE = 2**24  # numbers that are stepped at once: without a compiler, temporary memory is some twenty times their size
_NARROW = 64  # rows whose blocks would be narrower, too: a scale costs as much as four numbers
_LARGE = 2**22  # on a CPU, parameters of so many numbers are worth the seconds of compiling
_TINY = torch.finfo(torch.float32).tiny


def build(settings: OptimizerSettings, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The optimizer of these parameters, whole or sharded; norms and biases are never decayed."""
    parameters = list(parameters)
    matrices = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay}
    vectors = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
    groups = [group for group in (matrices, vectors) if group["params"]]
    options: dict[str, Any] = {"lr": settings.lr, "betas": tuple(settings.betas), "eps": settings.eps}
    sharded = any(isinstance(parameter, DTensor) for parameter in parameters)
    halves = any(parameter.dtype == torch.bfloat16 for parameter in parameters)
    eight_bits = settings.name.endswith("_8bit")
    if settings.name.startswith("paged_") and not sharded:
        from bitsandbytes.optim import PagedAdamW8bit, PagedAdamW32bit

        if halves:
            _log.warning(
                "%s rounds bf16 weights to the nearest, which loses updates below 1/512 of a weight. adamw_8bit "
                "keeps them, and so do weights in fp32 (trainer.precision=bf16-mixed).",
                settings.name,
            )
        paged: Any = PagedAdamW8bit if eight_bits else PagedAdamW32bit
        return paged(groups, **options)
    if settings.name.startswith("paged_"):
        instead = "adamw_8bit" if eight_bits else "adamw"
        _log.info("%s is for whole weights; sharded ones get %s, whose state is shared out.", settings.name, instead)
    if eight_bits or halves:
        return LeanAdamW(groups, **options, eight_bits=eight_bits)
    return torch.optim.AdamW(groups, **options, fused=True)


class LeanAdamW(Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) whose bf16 weights, and whose 8-bit state, are rounded up or down by lot.

    In the mean nothing is lost, however small an update is. The lots are a hash of step, parameter and place in the
    whole parameter: copies of the weights on several processes stay equal, sharded weights draw what whole ones would,
    and a resumed run what it would have without the stop. No random state is read or changed.

    With `eight_bits` both moments of matrices are a byte a number, with a scale in fp32 for up to 256 neighbours in a
    row (after Dettmers et al., 2022): of the first moment its sign and fourth root, of the second the eighth root. The
    second is never rounded to zero, as it divides.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        *,
        eight_bits: bool,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.eight_bits = eight_bits

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient. A `closure` is called first, and its result returned."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for number, (group, parameter) in enumerate(self._parameters()):
            if parameter.grad is not None:
                self._step(number, parameter, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state, whole or of the rows that this process holds."""
        super().load_state_dict({**state_dict, "state": {}})  # torch's would cast the state to the weights' dtype
        parameters = [parameter for _, parameter in self._parameters()]
        for number, kept in state_dict["state"].items():
            parameter = parameters[number]
            self.state[parameter] = {name: _placed(value, parameter) for name, value in kept.items()}

    def _parameters(self) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
        return ((group, parameter) for group in self.param_groups for parameter in group["params"])

    def _step(self, number: int, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(self._fresh(parameter))
        state["step"] += 1
        step, (beta1, beta2) = int(state["step"]), group["betas"]
        # What changes from step to step goes in as tensors: a compiled function would be compiled for each number.
        rate = torch.tensor(group["lr"] / (1 - beta1**step))
        keep = torch.tensor(1 - group["lr"] * group["weight_decay"])
        root = torch.tensor(math.sqrt(1 - beta2**step))
        salt = torch.tensor(int.from_bytes(hashlib.blake2b(b"%d %d" % (number, step), digest_size=4).digest()))

        block = _block(parameter) if "exp_avg_scale" in state else 1
        numbers = [parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]]
        scales = [state[name] for name in ("exp_avg_scale", "exp_avg_sq_scale") if name in state]
        views = [_local(t).reshape(-1, block) for t in numbers] + [_local(t).reshape(-1, 1) for t in scales]
        first, at_once = _first(parameter), _PIECE // block
        advance = _advance_on(parameter.device.type, parameter.numel() >= _LARGE)
        for index, piece in enumerate(zip(*(view.split(at_once) for view in views), strict=True)):
            if piece[0].numel():
                place = torch.tensor(first + index * at_once * block)
                advance(*piece, rate=rate, keep=keep, root=root, salt=salt, place=place, **_constants(group))

    def _fresh(self, parameter: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = {"step": torch.tensor(0.0)}
        if not self.eight_bits or parameter.ndim < 2 or parameter.numel() < _SMALL or _block(parameter) < _NARROW:
            zeros = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
            return state | {"exp_avg": zeros, "exp_avg_sq": zeros.clone()}
        scales = torch.zeros(len(_local(parameter)), parameter[0].numel() // _block(parameter), device=parameter.device)
        return state | {
            "exp_avg": torch.zeros_like(parameter, dtype=torch.int8, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.uint8, requires_grad=False),
            "exp_avg_scale": _shared_out(scales, parameter),
            "exp_avg_sq_scale": _shared_out(scales.clone(), parameter),
        }


@cache
def _advance_on(device: str, large: bool) -> Callable[..., None]:
    """A compiler makes one pass over memory of what is some forty otherwise."""
    compiles = device == "cuda" or (large and shutil.which(os.environ.get("CXX", "g++")) is not None)
    return torch.compile(_advance) if compiles else _advance


def _advance(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    first_scale: Tensor | None = None,
    second_scale: Tensor | None = None,
    *,
    rate: Tensor,
    keep: Tensor,
    root: Tensor,
    salt: Tensor,
    place: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """AdamW on a piece of a parameter, [N, block], in place; scales are [N, 1], or None for state in fp32.

    `rate` is lr / (1 - beta1^step), `keep` 1 - lr decay, `root` sqrt(1 - beta2^step); `place` is that of the piece's
    first number in the whole parameter.
    """
    g = gradient.float()
    lots = _lots(torch.arange(weight.numel(), device=weight.device).view(weight.shape) + place, salt)
    m = first if first_scale is None else _level(first.abs(), 127) * first.sign() * first_scale
    v = second if second_scale is None else (_level(second, 255) * second_scale).square()
    m = m + (g - m) * (1 - beta1)
    v = v * beta2 + g * g * (1 - beta2)
    deviation = v.sqrt()
    stepped = weight.float() * keep - rate * m / (deviation / root + eps)
    weight.copy_(_by_lot(stepped, lots) if weight.dtype == torch.bfloat16 else stepped)
    if first_scale is None or second_scale is None:
        first.copy_(m)
        second.copy_(v)
        return
    share = ((lots >> 16) + 0.5) / 2**16  # the weights use the lower half
    first_scale.copy_(m.abs().amax(1, keepdim=True))
    first.copy_(_code(m.abs() / first_scale.clamp(min=_TINY), 127, share) * m.sign())
    second_scale.copy_(deviation.amax(1, keepdim=True))
    code = _code(deviation / second_scale.clamp(min=_TINY), 255, share)
    second.copy_(torch.where(deviation > 0, code.clamp(min=1), code))


def _level(code: Tensor, levels: int) -> Tensor:
    """What a code from 0 to `levels` stands for, as a share of the scale: even steps of the fourth root."""
    return (code.float() / levels).square().square()


def _code(share: Tensor, levels: int, lot: Tensor) -> Tensor:
    """The code below or above a share of the scale, so drawn that its level is the share in the mean."""
    low = (share.sqrt().sqrt() * levels).floor().clamp(max=levels - 1)
    below = _level(low, levels)
    return low + (lot < (share - below) / (_level(low + 1, levels) - below))


def _by_lot(x: Tensor, lots: Tensor) -> Tensor:
    """fp32 to bf16: one of its two neighbours, the nearer the likelier, so that the mean is x."""
    bits = x.view(torch.int32) + (lots & 0xFFFF).int()  # carries into the upper half as often as the lower is large
    return (bits & -0x10000).view(torch.float32).bfloat16()


def _lots(places: Tensor, salt: Tensor) -> Tensor:
    """32 bits for each place, as if drawn at random: a multiplicative hash in two rounds."""
    x = (places ^ salt) & 0xFFFFFFFF
    for _ in range(2):
        x = ((x >> 16 ^ x) * 0x45D9F3B) & 0xFFFFFFFF  # below 2^59: nothing overflows
    return x >> 16 ^ x


def _constants(group: dict[str, Any]) -> dict[str, float]:
    return {"beta1": group["betas"][0], "beta2": group["betas"][1], "eps": group["eps"]}


def _block(parameter: Tensor) -> int:
    """How many neighbours share a scale: they are of one row, so that rows can be shared out anew."""
    return math.gcd(parameter[0].numel(), _BLOCK)


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _first(parameter: Tensor) -> int:
    """The place of this process's first number in the whole parameter."""
    if not isinstance(parameter, DTensor):
        return 0
    return _rows(parameter)[0] * parameter[0].numel()


def _rows(parameter: DTensor) -> tuple[int, int]:
    """First row and number of rows that this process holds."""
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offset[0], shape[0]


def _shared_out(local: Tensor, parameter: Tensor) -> Tensor:
    """This process's rows of a tensor that is sharded as the parameter is; itself if that is whole."""
    if not isinstance(parameter, DTensor):
        return local
    shape = torch.Size((len(parameter), *local.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    made = DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )
    return made.to(parameter.device)  # offloaded parameters are on the host, and their mesh is not


def _placed(value: Any, parameter: Tensor) -> Any:
    """A parameter's stored state, where the parameter is."""
    if not isinstance(value, Tensor) or isinstance(value, DTensor) or value.ndim == 0:
        return value
    if isinstance(parameter, DTensor):
        start, count = _rows(parameter)
        return _shared_out(value[start : start + count].to(parameter.device, copy=True), parameter)
    return value.to(parameter.device, copy=True)
