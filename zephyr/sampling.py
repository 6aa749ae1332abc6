"""How each row of a batch is written: its own temperature, nucleus, length and luck, whatever stands beside it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria


class Sampling(NamedTuple):
    """How one answer is written."""

    max_new_tokens: int
    temperature: float = 0.0  # 0: the most likely token each time
    top_p: float = 1.0  # of the probability, which the likeliest tokens share
    seed: int = 0  # decides a sampled answer, together with the prompt alone


class Choice(LogitsProcessor):
    """Leaves of each row's scores one token: the row's own choice."""

    def __init__(self, samplings: Sequence[Sampling], width: int, device: torch.device) -> None:
        self._width = width  # of the prompts, in tokens
        self._temperature = torch.tensor([row.temperature for row in samplings], device=device)[:, None]
        self._top_p = torch.tensor([row.top_p for row in samplings], device=device)[:, None]
        self._sampled = any(row.temperature > 0 for row in samplings)
        self._nucleus = any(row.temperature > 0 and row.top_p < 1 for row in samplings)
        steps = max(row.max_new_tokens for row in samplings)
        self._draws = torch.zeros(len(samplings), steps)
        for draws, row in zip(self._draws, samplings, strict=True):
            if row.temperature > 0:  # from a generator of its own: no neighbour takes a number away
                source = torch.Generator().manual_seed(row.seed)
                draws[: row.max_new_tokens] = torch.rand(row.max_new_tokens, generator=source)
        self._draws = self._draws.to(device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = scores.argmax(-1, keepdim=True)
        if self._sampled:
            draw = self._draws[:, input_ids.shape[1] - self._width, None]
            chosen = torch.where(self._temperature > 0, self._draw(scores, draw), chosen)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)

    def _draw(self, scores: Tensor, draw: Tensor) -> Tensor:
        """The token in whose share of the probability the draw falls."""
        chances = torch.softmax(scores / self._temperature.clamp_min(1e-5), -1)
        plain = _place(chances.cumsum(-1, dtype=torch.float64), draw)
        if not self._nucleus:
            return plain
        chances, tokens = chances.sort(descending=True, stable=True)
        below = chances.cumsum(-1, dtype=torch.float64)
        inside = (below - chances < self._top_p).sum(-1, keepdim=True)  # at least the likeliest
        # a row that wants no nucleus is not put in order for another's sake: its draw would fall elsewhere
        return torch.where(self._top_p < 1, tokens.gather(1, _place(below, draw, inside)), plain)


class Ends(StoppingCriteria):
    """Rows that have their tokens, and all of them when nobody wants the answers any more."""

    def __init__(self, samplings: Sequence[Sampling], width: int, device: torch.device, stopped: Callable[[], bool]):
        self._widths = torch.tensor([width + row.max_new_tokens for row in samplings], device=device)
        self._stopped = stopped

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return (self._widths <= input_ids.shape[1]) | self._stopped()


def _place(below: Tensor, draw: Tensor, inside: Tensor | None = None) -> Tensor:
    """Of cumulated chances, those of the first `inside` tokens alone, the place where a draw from [0, 1) falls."""
    last = torch.full_like(draw, below.shape[1] - 1, dtype=torch.long) if inside is None else inside - 1
    place = torch.searchsorted(below, draw * below.gather(1, last), right=True)
    return torch.minimum(place, last)
