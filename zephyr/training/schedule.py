"""Learning-rate schedules, as the share of the peak at each optimizer step.

The numbers are those of transformers' schedules of the same names; importing these from there would import peft and
bitsandbytes as well, seconds on every start.
"""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def schedule(name: str, optimizer: Optimizer, warmup_steps: int, total_steps: int) -> LambdaLR:
    """Linear warm-up from 0, then `cosine` (half a period) or `linear` decay to 0, or `constant_with_warmup`."""

    def share(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return _DECAY[name](min(1.0, done))

    return LambdaLR(optimizer, share)


_DECAY: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant_with_warmup": lambda done: 1.0,
}
