"""The one shape every model sees: a packed row without padding, plain for SFT and branched for DPO.

    SFT   [conversation 1] [conversation 2] ...
    DPO   [prompt 1 | chosen 1 | rejected 1] [prompt 2 | chosen 2 | rejected 2] ...

The prompt of a pair is stored, and computed, once. Positions of the rejected branch go on from its prompt, and
its tokens attend to that prompt and to their own branch, never to the chosen one.

Letters: T tokens of the row, N scored tokens, S scored sequences.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """Row positions [start, end) attend causally to themselves, after all of [prefix_start, prefix_end)."""

    start: int
    end: int
    prefix_start: int
    prefix_end: int


class Tail(NamedTuple):
    """The rows that a score is read from: all that the model's last layer has to compute, beside keys and values."""

    rows: Tensor  # [R] row positions, ascending
    segments: list[Segment]  # they tile these rows, and attend to what they attend to in the whole row
    sources: Tensor  # [N] index into `rows` of the one that predicts the target


class Batch(NamedTuple):
    """One packed row and the tokens of it that are scored. A Lightning batch is a list of these: one optimizer step."""

    ids: Tensor  # [T] token ids
    positions: Tensor  # [T] position of each token in its own sequence
    segments: list[Segment]  # who attends to whom; they tile the row in order
    sources: Tensor  # [N] row position whose hidden state predicts the target
    targets: Tensor  # [N] token id to predict
    sequences: Tensor  # [N] sequence, in 0..S-1, that the target belongs to
    tail: Tail
    examples: int  # conversations, or pairs (then S = 2 x pairs: the chosen ones first, then the rejected ones)
    reference: Tensor | None = None  # [S] precomputed log-probabilities of the sequences under the reference, in nats

    def to(self, device: torch.device) -> "Batch":
        """The same with its tensors on another device."""
        return self._replace(**_moved(self, device), tail=self.tail._replace(**_moved(self.tail, device)))


def _moved(parts: Any, device: torch.device) -> dict[str, Any]:
    return {k: v.to(device, non_blocking=True) for k, v in parts._asdict().items() if isinstance(v, Tensor)}


class Conversation(NamedTuple):
    """One tokenised conversation; a token is scored where its label is true."""

    ids: list[int]
    labels: list[bool]


class Pair(NamedTuple):
    """Two completions of one prompt, each with its end-of-turn token unless it was cut."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def pack_conversations(conversations: Iterable[Conversation]) -> Batch:
    """Lay conversations end to end. The first token of a conversation is never scored: nothing predicts it."""
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    sources, targets, sequences = [], [], []
    count = 0
    for count, (tokens, labels) in enumerate(conversations, start=1):
        start = len(ids)
        ids += tokens
        positions += range(len(tokens))
        segments.append(Segment(start, len(ids), start, start))
        scored = [i for i in range(1, len(tokens)) if labels[i]]
        sources += [start + i - 1 for i in scored]
        targets += [tokens[i] for i in scored]
        sequences += [count - 1] * len(scored)
    return _batch(ids, positions, segments, sources, targets, sequences, count)


def pack_pairs(pairs: list[Pair]) -> Batch:
    """Lay pairs end to end, each as prompt, chosen, rejected. The prompt's last token predicts both first tokens."""
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    sources, targets, sequences = [], [], []
    for pair, (prompt, chosen, rejected) in enumerate(pairs):
        start = len(ids)
        fork = start + len(prompt)
        branch = fork + len(chosen)
        ids += prompt + chosen + rejected
        positions += [*range(len(prompt) + len(chosen)), *range(len(prompt), len(prompt) + len(rejected))]
        segments += [Segment(start, branch, start, start), Segment(branch, len(ids), start, fork)]
        sources += [*range(fork - 1, branch - 1), fork - 1, *range(branch, len(ids) - 1)]
        targets += chosen + rejected
        sequences += [pair] * len(chosen) + [len(pairs) + pair] * len(rejected)
    return _batch(ids, positions, segments, sources, targets, sequences, len(pairs))


def _batch(
    ids: list[int],
    positions: list[int],
    segments: list[Segment],
    sources: list[int],
    targets: list[int],
    sequences: list[int],
    examples: int,
) -> Batch:
    tensors = (torch.tensor(column, dtype=torch.long) for column in (ids, positions, sources, targets, sequences))
    row, place, source, target, sequence = tensors
    return Batch(row, place, segments, source, target, sequence, _tail(segments, source, len(ids)), examples)


def _tail(segments: list[Segment], sources: Tensor, tokens: int) -> Tail:
    """Of each segment the rows from the first source to the last; what comes before is only attended to.

    Where nothing is scored, the first row stands for a result, so that every layer computes something.
    """
    if len(sources) == 0:
        return Tail(torch.tensor([0]), [Segment(0, 1, 0, 0)], sources)
    read = torch.zeros(tokens, dtype=torch.bool)
    read[sources] = True
    kept: list[Segment] = []
    for start, end, prefix_start, prefix_end in segments:
        found = read[start:end].nonzero()
        if len(found):
            first, last = start + int(found[0]), start + int(found[-1]) + 1
            if prefix_start == prefix_end:
                kept.append(Segment(first, last, start, first))
            else:  # keys come in two pieces at most: the prefix, and what the segment holds from its start on
                kept.append(Segment(start, last, prefix_start, prefix_end))
    rows = torch.cat([torch.arange(first, last) for first, last, *_ in kept])
    return Tail(rows, kept, torch.searchsorted(rows, sources))


# What a rank computes while others have one micro-batch more: collectives need every rank the same number of times.
IDLE = _batch([0], [0], [Segment(0, 1, 0, 0)], [], [], [], 0)
