"""Attention over the segments of a packed row.

Each segment is ordinary causal attention: its tokens see the segment's prefix (the prompt of a branched pair) and
each other. No dense [T, T] mask exists. On CUDA all segments are one call of a variable-length flash kernel, whose
keys are gathered so that a branch finds its prompt in front of it. Elsewhere each segment, on a CPU a block of its
queries at a time, is a call of torch's scaled-dot-product attention, or written out where `products` has faster ones
than that kernel uses. Importing this module registers it with transformers as "segments".

Letters: T tokens of the row, R rows that ask, H heads of queries, K heads of keys, E size of a head.
"""

import inspect
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

from zephyr.data.batch import Segment
from zephyr.models.products import REPEATED, onednn_is_faster, product, product_over_rows, torchs_own

SEGMENTS = "segments"
_block: float = 128  # queries, about; of 64 to 256 the fastest on a CPU at heads of 32 and of 64
_log = logging.getLogger(__name__)


@contextmanager
def undivided() -> Iterator[None]:
    """Segments are asked whole and products are torch's own, as on a GPU, while one is simulated."""
    global _block
    before, _block = _block, math.inf
    try:
        with torchs_own():
            yield
    finally:
        _block = before


class Gather(NamedTuple):
    """What a variable-length kernel wants to know of the segments."""

    keys: Tensor  # [M] row positions of every segment's keys, prefix first
    query_starts: Tensor  # [segments + 1], int32
    key_starts: Tensor  # [segments + 1], int32
    most_queries: int
    most_keys: int


class Block(NamedTuple):
    """Some queries of a segment, and the keys that they see."""

    queries: int  # their number; blocks are in the order of the rows that ask
    pieces: list[int]  # which of the row's pieces hold the keys
    mask: Tensor | None  # what is added to the scores, [queries, keys]; None where a kernel's own causal mask will do


class Plan:
    """The segments of one forward pass, and what its layers share: masks, or indices.

    The segments' own tokens are the rows that ask, in order; keys are those of the whole row.
    """

    def __init__(self, segments: list[Segment], tokens: int, device: torch.device) -> None:
        self.segments, self.tokens, self.device = segments, tokens, device
        self.divided = device.type == "cpu" and math.isfinite(_block)  # into blocks of queries, each with its mask
        self._blocks: dict[tuple[int | None, torch.dtype], tuple[list[int], list[Block]]] = {}

    def blocks(self, window: int | None, dtype: torch.dtype) -> tuple[list[int], list[Block]]:
        """Lengths of the pieces that the row's keys are cut into, and the blocks of queries.

        On a CPU a segment's queries are asked a block at a time: of the keys behind the last query of a block, as of
        those before the first one's window, the scores would be computed and then hidden.
        """
        if (window, dtype) not in self._blocks:
            self._blocks[window, dtype] = self._cut(window, dtype)
        return self._blocks[window, dtype]

    def _cut(self, window: int | None, dtype: torch.dtype) -> tuple[list[int], list[Block]]:
        spans = []  # of each block: number of queries, and its keys as ranges of the row
        for start, end, prefix_start, prefix_end in self.segments:
            prefix = prefix_end - prefix_start
            # equal but for the last, so that few shapes of products occur: oneDNN makes itself ready for each of them
            parts = max(1, round((end - start) / _block)) if self.divided else 1
            edges = [*(start + int(_block) * i for i in range(parts)), end] if self.divided else [start, end]
            for first, last in pairwise(edges):
                unseen = 0 if window is None else max(0, prefix + first - start - window + 1)
                before = min(prefix_start + unseen, prefix_end), prefix_end
                own = start + max(0, unseen - prefix), last
                spans.append((last - first, [before, own]))
        edges = sorted({0, self.tokens, *(edge for _, keys in spans for span in keys for edge in span)})
        piece_at = {edge: index for index, edge in enumerate(edges)}
        masks: dict[tuple[int, int], Tensor | None] = {}
        blocks = []
        for queries, keys in spans:
            size = queries, sum(end - start for start, end in keys)
            if size not in masks:
                causal = not self.divided and size[0] == size[1] and (window is None or size[1] <= window)
                masks[size] = None if causal else _mask(*size, window, dtype, self.device)
            pieces = [index for start, end in keys for index in range(piece_at[start], piece_at[end])]
            blocks.append(Block(queries, pieces, masks[size]))
        return [after - before for before, after in pairwise(edges)], blocks

    @cached_property
    def gather(self) -> Gather:
        """The segments for a variable-length kernel."""
        rows = [torch.arange(a, b) for s in self.segments for a, b in ((s[2], s[3]), (s[0], s[1]))]
        queries = [s.end - s.start for s in self.segments]
        keys = [s.end - s.start + s.prefix_end - s.prefix_start for s in self.segments]
        starts = [torch.tensor([0, *counts]).cumsum(0).int() for counts in (queries, keys)]
        sent = [_sent(x, self.device) for x in (torch.cat(rows), *starts)]
        return Gather(sent[0], sent[1], sent[2], max(queries), max(keys))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    scale: float,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of the plan's segments: query [R, H, E], key [T, K, E] and value [T, K, V] -> [R, H, V].

    V is E, but for models that make their heads' values of another size. `window` is the number of tokens, itself
    included, that a token may look back on.
    """
    if query.is_cuda and query.dtype != torch.float32 and (kernel := flash_kernel()) is not None:
        g = plan.gather
        window = None if window is None or g.most_keys <= window else window
        return kernel(query, key[g.keys], value[g.keys], g, scale, window, dropout)
    cuts, blocks = plan.blocks(window, query.dtype)
    if plan.divided and query.dtype in (torch.float32, torch.float64) and onednn_is_faster() and not dropout:
        result: Tensor = Blockwise.apply(query, key, value, cuts, blocks, scale, window)  # type: ignore[no-untyped-call]
        return result
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    # One split, because its backward is one concatenation; a slice's is a zero-filled copy of the whole row.
    keys, values = key.split(cuts), value.split(cuts)
    outputs = []
    for q, block in zip(query.split([block.queries for block in blocks]), blocks, strict=True):
        k, v = (torch.cat([side[i] for i in block.pieces]) for side in (keys, values))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        options: dict[str, Any] = {"scale": scale, "dropout_p": dropout}
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=block.mask, is_causal=block.mask is None, **options)
        outputs.append(o[0].transpose(0, 1))
    return torch.cat(outputs)


class Blockwise(torch.autograd.Function):
    """p v with p = softmax(scale q k^T + mask), for each block of queries and head of keys.

    The heads of queries that share a head of keys are rows of the same products. With g the gradient of the result and
    s = p (g v^T - sum of p g v^T over keys), the gradient of q is scale s k, that of k scale s^T q, that of v p^T g.
    The backward computes p again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cuts: list[int],
        blocks: list[Block],
        scale: float,
        window: int | None,
    ) -> Tensor:
        ctx.plan = cuts, blocks, scale, window
        result = torch.empty(*query.shape[:2], value.shape[-1], dtype=query.dtype)
        q, out = _by_head(query, key).contiguous(), _by_head(result, key)
        k, v = (key * scale).transpose(0, 1).contiguous(), value.transpose(0, 1).contiguous()
        ctx.save_for_backward(q, k, v)
        sizes = [block.queries for block in blocks]
        for q_head, o_head, *pieces in zip(q, out, *(_pieces(side, cuts) for side in (k, v)), strict=True):
            for block, rows, o in zip(blocks, q_head.split(sizes), o_head.split(sizes), strict=True):
                keys, values = (torch.cat([side[i] for i in block.pieces]) for side in pieces)
                o.copy_(product(_weights(rows, keys, block, window), values.T, REPEATED).view(o.shape))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cuts, blocks, scale, window = ctx.plan
        q, k, v = ctx.saved_tensors
        by_query = torch.empty(*grad.shape[:2], q.shape[-1], dtype=grad.dtype)
        by_key, by_value = torch.zeros_like(k), torch.zeros_like(v)
        rowwise = q, _by_head(grad, by_key.transpose(0, 1)).contiguous(), _by_head(by_query, by_key.transpose(0, 1))
        sizes = [block.queries for block in blocks]
        sides = (_pieces(side, cuts) for side in (k, v, by_key, by_value))
        for q_head, g_head, by_head, *pieces in zip(*rowwise, *sides, strict=True):
            split = (x.split(sizes) for x in (q_head, g_head, by_head))
            for block, rows, g, by_rows in zip(blocks, *split, strict=True):
                keys, values = (torch.cat([side[i] for i in block.pieces]) for side in pieces[:2])
                p, g = _weights(rows, keys, block, window), g.flatten(0, 1)
                s = torch._softmax_backward_data(product(g, values, REPEATED), p, -1, p.dtype)
                by_rows.copy_(product(s, keys.T, REPEATED).view(by_rows.shape))
                found = product_over_rows(s, rows.flatten(0, 1), REPEATED), product_over_rows(p, g, REPEATED)
                for side, by_block in zip(pieces[2:], found, strict=True):
                    for i, part in zip(block.pieces, by_block.split([cuts[i] for i in block.pieces]), strict=True):
                        side[i].add_(part)
        return by_query, by_key.mul_(scale).transpose(0, 1), by_value.transpose(0, 1), None, None, None, None


def _by_head(rows: Tensor, key: Tensor) -> Tensor:
    """A view of [R, H, E] as [K, R, H / K, E]; key [T, K, E]."""
    return rows.unflatten(1, (key.shape[1], -1)).transpose(0, 1)


def _pieces(side: Tensor, cuts: list[int]) -> list[tuple[Tensor, ...]]:
    """Of each head of keys or values [K, T, E] the pieces."""
    return [head.split(cuts) for head in side]


def _weights(rows: Tensor, keys: Tensor, block: Block, window: int | None) -> Tensor:
    """Of each key, for queries [n, H / K, E] -> [n * H / K, keys]."""
    scores = product(rows.flatten(0, 1), keys, REPEATED)
    assert block.mask is not None
    ends = block.queries if window is None else len(keys)  # how many of the last keys are hidden from anyone
    scores.view(*rows.shape[:2], len(keys))[..., -ends:].add_(block.mask[:, None, -ends:])
    return scores.softmax(-1)


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    plan: Plan | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """The same as transformers calls it: query [1, H, T, E], key [1, K, T, E], value [1, K, T, V] -> [1, T, H, V]."""
    if plan is None:
        raise ValueError("attention over segments needs the plan of the batch's segments")
    changed = [name for name in ("softcap", "s_aux") if others.get(name) is not None]
    if changed:
        raise ValueError(f"attention over segments does not do {', '.join(changed)}, which this model asks for")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # rotation has made fp32 of queries and keys, with which no fast kernel helps
        q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (q, k, v))
    return attend(q, k, v, plan, scale, sliding_window, dropout)[None], None


Kernel = Callable[[Tensor, Tensor, Tensor, Gather, float, int | None, float], Tensor]


@cache
def flash_kernel() -> Kernel | None:
    """The variable-length flash kernel of this installation; says which, and when there is none."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            _log.warning("No variable-length flash attention here (torch or flash-attn): one call for each sequence.")
            return None
        _log.info("Attention: torch's variable-length flash kernel.")
        return _torch_kernel(varlen_attn)
    _log.info("Attention: flash-attn's variable-length kernel.")

    def flash(
        query: Tensor, key: Tensor, value: Tensor, g: Gather, scale: float, window: int | None, dropout: float
    ) -> Tensor:
        back = -1 if window is None else window - 1
        where = g.query_starts, g.key_starts, g.most_queries, g.most_keys
        result: Tensor = flash_attn_varlen_func(
            query, key, value, *where, dropout, scale, causal=True, window_size=(back, 0 if window else -1)
        )
        return result

    return flash


def _torch_kernel(varlen_attn: Any) -> Kernel:
    """torch's kernel, whose signature differs from version to version."""
    accepted = inspect.signature(varlen_attn).parameters

    def kernel(
        query: Tensor, key: Tensor, value: Tensor, g: Gather, scale: float, window: int | None, dropout: float
    ) -> Tensor:
        options: dict[str, Any] = {}
        if "scale" in accepted:
            options["scale"] = scale
        else:
            query = query * (scale * query.shape[-1] ** 0.5)  # the kernel itself divides by the root
        if "window_size" in accepted:
            options["window_size"] = (-1 if window is None else window - 1, 0)
        elif window is None:
            options["is_causal"] = True
        else:
            raise RuntimeError("this torch has no sliding window in its variable-length attention; take 2.12 or later")
        if dropout:
            raise RuntimeError("torch's variable-length attention has no dropout; set attention_dropout to 0")
        groups = query.shape[1] // key.shape[1]
        if "enable_gqa" in accepted:
            options["enable_gqa"] = groups > 1
        elif groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        result: Tensor = varlen_attn(
            query, key, value, g.query_starts, g.key_starts, g.most_queries, g.most_keys, **options
        )
        return result

    return kernel


def _mask(queries: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0 where a query may look, else -inf: causal, aligned at the bottom right, at most `window` tokens back."""
    hidden = torch.ones(queries, keys, dtype=torch.bool, device=device).triu(keys - queries + 1)
    if window is not None and window < keys:
        hidden |= torch.ones_like(hidden).tril(keys - queries - window)
    return torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # or the host would wait for the device


AttentionInterface.register(SEGMENTS, segment_attention)
