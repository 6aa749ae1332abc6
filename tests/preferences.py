"""Pairs of completions by their log-probabilities, and each objective with parameters to try on them."""

import dataclasses
import itertools

import torch

from tests import tiny
from zephyr.objectives import Logps
from zephyr.settings import Objective

OWN = {  # the functions' own parameters, at values that tell them apart
    "cdpo": {"label_smoothing": 0.2},
    "robust": {"label_smoothing": 0.2},
    "exo_pair": {"label_smoothing": 0.01},
    "discopop": {"tau": 0.05},
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {"label_smoothing": 0.1},
    "simpo": {"gamma": 0.7},
}


def plain(name: str, beta: float = 0.1, **changes) -> Objective:
    """`name` with its parameters of OWN and without modifiers, but for `changes` of its fields."""
    return dataclasses.replace(tiny.objective(name, beta, **OWN.get(name, {})), **changes)


def logps(chosen, rejected, reference_chosen=0.0, reference_rejected=0.0, chosen_tokens=1.0, rejected_tokens=1.0):
    columns = (chosen, rejected, reference_chosen, reference_rejected, chosen_tokens, rejected_tokens)
    return Logps(*(torch.as_tensor(column, dtype=torch.float64).expand(len(chosen)) for column in columns))


def random_logps(seed: int, count: int = 8) -> Logps:
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(6, count, generator=generator, dtype=torch.float64)
    tokens = 1 + (60 * uniform[4:]).floor()
    policy = -3 * tokens * uniform[:2] - 0.1
    return Logps(*policy, *(policy + 40 * (uniform[2:4] - 0.5)), *tokens)


def extreme_logps() -> Logps:
    """Log-ratios up to 1e4 nats either way, in all combinations."""
    ratios = torch.tensor([*itertools.product([-1e4, -800.0, -30.0, 0.0, 30.0, 800.0, 1e4], repeat=2)]).double().T
    reference = torch.full((49,), -10_100.0, dtype=torch.float64)
    return Logps(
        *(reference + ratios), reference, reference, torch.full_like(reference, 7), torch.full_like(reference, 3)
    )
