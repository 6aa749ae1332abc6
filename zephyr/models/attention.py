"""Attention over the segments of a packed row, on an unmodified transformers model.

Each segment is ordinary causal attention: its tokens see the segment's prefix (the prompt of a branched pair) and
each other. No dense [T, T] mask exists. Importing this module registers it with transformers as "segments".
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from zephyr.data.batch import Segment

SEGMENTS = "segments"


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    segments: list[Segment] | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Attention of one packed row: query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D].

    `sliding_window` is the number of tokens, itself included, that a token may look back on.
    """
    if segments is None:
        raise ValueError("attention over segments needs the batch's segments")
    changed = [name for name in ("softcap", "s_aux") if others.get(name) is not None]
    if changed:
        raise ValueError(f"attention over segments does not do {', '.join(changed)}, which this model asks for")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)

    # One split, because its backward is one concatenation; a slice's is a zero-filled copy of the whole row.
    cuts = _cuts(segments)
    keys, values = key.split(cuts, 2), value.split(cuts, 2)
    queries = query.split([segment.end - segment.start for segment in segments], 2)
    piece_at = {start: index for index, start in enumerate(_starts(cuts))}

    outputs = []
    for segment, q in zip(segments, queries, strict=True):
        pieces = [*_covering(piece_at, cuts, segment.prefix_start, segment.prefix_end)]
        pieces += _covering(piece_at, cuts, segment.start, segment.end)
        k = torch.cat([keys[i] for i in pieces], 2)
        v = torch.cat([values[i] for i in pieces], 2)
        causal = q.shape[2] == k.shape[2] and (sliding_window is None or k.shape[2] <= sliding_window)
        mask = None if causal else _mask(q.shape[2], k.shape[2], sliding_window, q.device)
        outputs.append(
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scaling, dropout_p=dropout)
        )
    return torch.cat(outputs, 2).transpose(1, 2), None


def _cuts(segments: list[Segment]) -> list[int]:
    """Lengths of the pieces into which the row is cut: at every segment and at every prefix's end."""
    edges = sorted({edge for segment in segments for edge in (*segment[:2], *segment[2:])})
    return [after - before for before, after in pairwise(edges)]


def _starts(cuts: list[int]) -> list[int]:
    starts = [0]
    for length in cuts[:-1]:
        starts.append(starts[-1] + length)
    return starts


def _covering(piece_at: dict[int, int], cuts: list[int], start: int, end: int) -> list[int]:
    pieces = []
    while start < end:
        pieces.append(piece_at[start])
        start += cuts[pieces[-1]]
    return pieces


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """True where a query may look: causal, aligned at the bottom right, at most `window` tokens back."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask if window is None else mask.triu(keys - queries - window + 1)


AttentionInterface.register(SEGMENTS, segment_attention)
