"""The random states of a process, as plain values that a checkpoint can hold."""

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """States of this process's generators, in types that weights_only=True reads."""
    mersenne = np.random.get_state(legacy=False)
    mersenne["state"]["key"] = mersenne["state"]["key"].tolist()
    on_cuda = torch.cuda.is_initialized()
    return {
        "python": random.getstate(),
        "numpy": mersenne,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if on_cuda else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go on from what `random_state` returned, in this process or another."""
    random.setstate(state["python"])
    mersenne = state["numpy"]
    key = np.array(mersenne["state"]["key"], dtype=np.uint32)
    np.random.set_state({**mersenne, "state": {**mersenne["state"], "key": key}})
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
