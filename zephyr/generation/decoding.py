"""Many answers at once: what a model writes behind each prompt, token by token.

The rows of the batch stand flush right, padded on the left, so that all of them write into the same column. A row that
has ended leaves, and the next prompt takes its place: the batch stays full, and nobody waits for its longest answer.
Keys and values lie in memory with room to spare, since one more column would otherwise mean a copy of all.
"""

import math
import random
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from zephyr.generation.sampling import Choice, Sampling

ROOM = 64  # columns
EVERY = 8  # steps between two looks at the tokens on a GPU, which has to be waited for then


class Written(NamedTuple):
    """What has come behind a prompt since the last time."""

    row: int  # of the prompts
    tokens: list[int]  # without the end-of-turn token
    end: int | None  # the end-of-turn token that ended it


class _Row:
    """An answer under way."""

    def __init__(self, index: int, prompt: list[int], sampling: Sampling) -> None:
        self.index, self.prompt, self.sampling = index, prompt, sampling
        self.chance = random.Random(sampling.seed)  # of its own: no neighbour takes a number away
        self.left = sampling.max_new_tokens
        self.columns = len(prompt)  # whose keys there are
        self.done = False

    def draws(self, steps: int) -> list[float]:
        return [self.chance.random() if self.sampling.temperature > 0 else 0.0 for _ in range(steps)]

    def told(self, tokens: list[int], ends: Container[int]) -> Written:
        """Behind its end a row went on until somebody looked."""
        tokens = tokens[: self.left]
        end = next((n for n, token in enumerate(tokens) if token in ends), None)
        self.left -= len(tokens)
        self.done = end is not None or not self.left
        return Written(self.index, tokens, None) if end is None else Written(self.index, tokens[:end], tokens[end])


def decode(
    core: Any,
    prompts: Sequence[list[int]],
    samplings: Sequence[Sampling],
    ends: Container[int],
    rows: int,
    stopped: Callable[[], bool] = lambda: False,
    every: int = EVERY,
    more: Callable[[int], Iterable[tuple[list[int], Sampling]]] = lambda places: (),
) -> Iterator[Written]:
    """What `core`, a transformers model in evaluation mode, writes behind each prompt, at most `rows` at once.

    `ends` are the end-of-turn tokens. Each row depends on its own prompt and sampling alone, but for rounding. When
    `stopped` says so, which is asked every few tokens, all rows end where they are. Where there are places and nothing
    waits for them, `more` is asked for prompts, which are counted on.
    """
    known = len(prompts)
    each = zip(range(known), prompts, samplings, strict=True)
    waiting = deque(sorted(each, key=lambda one: -len(one[1])))  # what takes most memory first
    every = 1 if core.device.type == "cpu" else every  # a look costs nothing there
    batch = _Batch(core)
    live: list[_Row] = []
    while not stopped():
        room = not live or (batch.movable and 4 * len(live) <= 3 * rows)
        if room and not waiting:
            for prompt, sampling in more(rows - len(live)):
                waiting.append((known, prompt, sampling))
                known += 1
        if not waiting and not live:
            return
        if waiting and room:
            places = min(rows - len(live), len(waiting))
            written = [_Row(*waiting.popleft()) for _ in range(places)]
            tokens = batch.admit(written)
        else:
            written = batch.rows
            tokens = batch.write(min(every, max(row.left for row in live)))
        yield from [row.told(ids, ends) for row, ids in zip(written, tokens, strict=True) if not row.done]
        live = [row for row in batch.rows if not row.done]
        if live and batch.movable and 8 * len(live) <= 7 * len(batch.rows):
            batch.leave()


class _Batch:
    """The rows that are being written, and the keys and values of all that they hold."""

    def __init__(self, core: Any) -> None:
        self.rows: list[_Row] = []
        self._core, self._device = core, core.device
        config = core.config.get_text_config(decoder=True)
        kinds = {type(layer) for layer in DynamicCache(config=core.config).layers}
        self.movable = kinds <= {DynamicLayer, DynamicSlidingWindowLayer}  # a column a token, and nothing else
        self._window = getattr(config, "sliding_window", None)
        self._last = (getattr(config, "max_position_embeddings", None) or 2**31) - 1
        self._options = {"logits_to_keep": 1} if core._supports_logits_to_keep() else {}
        self._cache: Any = None
        self._tokens = torch.zeros(0, 1, dtype=torch.long, device=self._device)  # chosen, and not yet read
        self._columns = 0
        self._positions, self._seeing = self._tokens, self._tokens.bool()
        self._pads: Tensor | None = None  # columns in front of each row's own; None: there are none
        self._choice = Choice([], self._device)

    @torch.no_grad()
    def admit(self, new: list[_Row]) -> list[list[int]]:
        """Let rows in, in place of those that are done; the first token of each."""
        width = max(row.columns for row in new)
        pads = torch.tensor([[width - row.columns] for row in new], device=self._device)
        ids = torch.tensor([[0] * (width - row.columns) + row.prompt for row in new], device=self._device)
        columns = torch.arange(width, device=self._device)
        mask = None if all(row.columns == width for row in new) else (columns >= pads).long()
        cache = self._fresh()
        logits = self._read(ids, (columns - pads).clamp_min(0), mask, cache)
        tokens = Choice([row.sampling for row in new], self._device)(logits, self._draws(new, 1))
        self._lay_out(new, tokens, cache)
        return tokens.tolist()

    @torch.no_grad()
    def write(self, steps: int) -> list[list[int]]:
        """So many more tokens of every row."""
        draws = self._draws(self.rows, steps)
        written = []
        for step in range(steps):
            logits = self._read(self._tokens, self._positions, self._seen(), self._cache)
            self._columns += 1
            self._positions = (self._positions + 1).clamp_max(self._last)  # those that are done go on, unread
            self._tokens = self._choice(logits, draws[:, step : step + 1])
            written.append(self._tokens)
        for row in self.rows:
            row.columns += steps
        return torch.cat(written, 1).tolist()

    @torch.no_grad()
    def leave(self) -> None:
        """Let those go that are done."""
        self._lay_out([], self._tokens[:0], None)

    def _read(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        """The logits behind the last column."""
        found = self._core(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **self._options,
        )
        logits: Tensor = found.logits[:, -1]
        return logits

    def _seen(self) -> Tensor | None:
        """Which columns each row reads in the next step, its own among them; None: all."""
        if self._pads is None:
            return None
        if self._columns == self._seeing.shape[1]:
            columns = torch.arange(self._columns + ROOM, device=self._device)
            self._seeing = columns >= self._pads
        seen = self._seeing[:, : self._columns + 1]
        # transformers makes the one of the other, but waits for a GPU to have a look at its values.
        plain = self._core.config._attn_implementation == "sdpa" and self.movable
        return seen[:, None, None] if plain and self._columns < (self._window or math.inf) else seen.long()

    def _draws(self, rows: list[_Row], steps: int) -> Tensor:
        kind = torch.float32 if self._device.type == "mps" else torch.float64
        return torch.tensor([row.draws(steps) for row in rows], dtype=kind).to(self._device)

    def _fresh(self) -> Any:
        cache = DynamicCache(config=self._core.config)
        if self.movable:
            cache.layers = [_Columns() for _ in cache.layers]  # type: ignore[no-untyped-call]
        return cache

    def _lay_out(self, new: list[_Row], tokens: Tensor, cache: Any) -> None:
        """Only rows that go on, and the new ones with what they hold; no wider than the longest."""
        stay = [n for n, row in enumerate(self.rows) if not row.done]
        self.rows = [*(self.rows[n] for n in stay), *new]
        self._columns = max(row.columns for row in self.rows)
        index = torch.tensor(stay, dtype=torch.long, device=self._device)
        self._tokens = torch.cat([self._tokens[index], tokens])
        self._choice = Choice([row.sampling for row in self.rows], self._device)
        own = torch.tensor([[row.columns] for row in self.rows], device=self._device)
        self._positions = own.clamp_max(self._last)
        even = all(row.columns == self._columns for row in self.rows)
        self._pads = None if even else self._columns - own
        self._seeing = torch.zeros(len(own), self._columns, dtype=torch.bool, device=self._device)
        if not stay:
            self._cache = cache
            return
        for place, layer in enumerate(self._cache.layers):
            layer.keep(index, self._columns, None if cache is None else cache.layers[place])


class _Columns(DynamicLayer):
    """Keys and values of one layer: rows x heads x columns x size, with room for more columns."""

    _room: tuple[Tensor, Tensor]
    _width = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add columns; all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return self._hold(key_states, value_states, key_states.shape[2])
        before, width = self._width, self._width + key_states.shape[2]
        keys, values = self._room
        if width > keys.shape[2]:
            keys, values = (_right(kept[:, :, :before], None, before) for kept in self._room)
        keys[:, :, before:width], values[:, :, before:width] = key_states, value_states
        return self._hold(keys, values, width)

    def keep(self, rows: Tensor, width: int, new: Any) -> None:
        """Only these rows, with those of another layer behind them, all flush right in so many columns."""
        if self.is_initialized:  # some layers read another's
            first = max(0, self._width - width)
            keys, values = (kept[:, :, first : self._width][rows.to(kept.device)] for kept in self._room)
            others = (None, None) if new is None else (new.keys, new.values)
            self._hold(_right(keys, others[0], width), _right(values, others[1], width), width)

    def _hold(self, keys: Tensor, values: Tensor, width: int) -> tuple[Tensor, Tensor]:
        self._room, self._width = (keys, values), width
        kept = keys[:, :, :width], values[:, :, :width]
        self.keys, self.values = kept
        return kept


def _right(first: Tensor, second: Tensor | None, width: int) -> Tensor:
    """One below the other, flush right in so many columns, and room behind them."""
    both = [first] if second is None else [first, second]
    rows = sum(len(part) for part in both)
    laid = first.new_zeros(rows, first.shape[1], width + ROOM, first.shape[3])
    for part, place in zip(both, (slice(len(first)), slice(len(first), None)), strict=False):
        laid[place, :, width - part.shape[2] : width] = part
    return laid
