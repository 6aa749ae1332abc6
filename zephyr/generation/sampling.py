"""How each row of a batch is written: its own temperature, nucleus, length and luck, whatever stands beside it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Sampling(NamedTuple):
    """How one answer is written."""

    max_new_tokens: int
    temperature: float = 0.0  # 0: the most likely token each time
    top_p: float = 1.0  # of the probability, which the likeliest tokens share
    seed: int = 0  # decides a sampled answer, together with the prompt alone


class Choice:
    """Each row's own choice of its next token."""

    def __init__(self, samplings: Sequence[Sampling], device: torch.device) -> None:
        self._temperature = torch.tensor([[row.temperature] for row in samplings], device=device)
        self._top_p = torch.tensor([[row.top_p] for row in samplings], device=device)
        self._sampled = any(row.temperature > 0 for row in samplings)
        self._nucleus = any(row.temperature > 0 and row.top_p < 1 for row in samplings)

    def __call__(self, logits: Tensor, draws: Tensor) -> Tensor:
        """The tokens, rows x 1, by logits, rows x vocabulary, and by draws from [0, 1), rows x 1."""
        likeliest = logits.argmax(-1, keepdim=True)
        if not self._sampled:
            return likeliest
        return torch.where(self._temperature > 0, self._drawn(logits.float(), draws), likeliest)

    def _drawn(self, logits: Tensor, draws: Tensor) -> Tensor:
        """The token in whose share of the probability the draw falls."""
        chances = torch.softmax(logits / self._temperature.clamp_min(1e-5), -1)
        plain = _place(chances.cumsum(-1, dtype=draws.dtype), draws)
        if not self._nucleus:
            return plain
        chances, tokens = chances.sort(descending=True, stable=True)
        below = chances.cumsum(-1, dtype=draws.dtype)
        inside = (below - chances < self._top_p).sum(-1, keepdim=True)  # at least the likeliest
        # a row that wants no nucleus is not put in order for another's sake: its draw would fall elsewhere
        return torch.where(self._top_p < 1, tokens.gather(1, _place(below, draws, inside)), plain)


def _place(below: Tensor, draws: Tensor, inside: Tensor | None = None) -> Tensor:
    """Of cumulated chances, those of the first `inside` tokens alone, the place where a draw from [0, 1) falls."""
    last = torch.full_like(draws, below.shape[1] - 1, dtype=torch.long) if inside is None else inside - 1
    place = torch.searchsorted(below, draws * below.gather(1, last), right=True)
    return torch.minimum(place, last)
