"""Log-probabilities of scored tokens, in nats. Logits exist for a chunk of scored tokens at a time, never for a row.

Letters: T tokens of the row, N scored tokens, S scored sequences, D hidden size, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zephyr.data.batch import Batch
from zephyr.models.attention import Plan
from zephyr.models.decoder import Beside
from zephyr.models.products import onednn_is_faster, product, product_over_rows

LOGITS = 2**26  # that exist at once: 256 MiB in fp32, 2,097 scored tokens at 32,000 entries
_BESIDE = 2**23  # that exist beside the buffer, where products cannot be written into it


class Scores(NamedTuple):
    """What a model says of the scored tokens, [N], fp32."""

    logps: Tensor  # log p(target | what precedes it)
    collisions: Tensor | None  # log sum_v p(v)^2, without gradient: how sure the model is, whatever the target
    reference: Tensor | None = None  # logps of the model without the adapter that trains, had in the same pass


def token_logps(model: Any, batch: Batch) -> Tensor:
    """log p(target | what precedes it) of every scored token, [N], fp32, from a causal LM or an adapter around one."""
    return token_scores(model, batch).logps


def token_scores(model: Any, batch: Batch, collisions: bool = False, reference: bool = False) -> Scores:
    """Log-probabilities of the scored tokens and, where asked for, collision and reference log-probabilities."""
    core = model.get_base_model() if hasattr(model, "peft_config") else model
    sharded = getattr(core, "score", None)  # a method, so that the parameters it uses are gathered around it
    return sharded(batch, collisions, reference) if sharded else score(core, batch, collisions, reference)


def score(core: Any, batch: Batch, collisions: bool = False, reference: bool = False) -> Scores:
    """The same for a transformers causal LM whose parameters are at hand."""
    decoder, beside = core.get_decoder(), Beside() if reference else None
    hidden = decoder(
        input_ids=batch.ids[None],
        position_ids=batch.positions[None],
        use_cache=False,
        plan=Plan(batch.segments, len(batch.ids), batch.ids.device),
        tail=batch.tail,
        beside=beside,
    ).last_hidden_state[0]
    other = None if beside is None else _of_rows(core, decoder.norm(beside.hidden), batch, False)[0]
    return Scores(*_of_rows(core, hidden, batch, collisions), other)


def _of_rows(core: Any, hidden: Tensor, batch: Batch, collisions: bool) -> tuple[Tensor, Tensor | None]:
    hidden = hidden[batch.sources if len(hidden) == len(batch.ids) else batch.tail.sources]
    if torch.is_autocast_enabled(hidden.device.type):  # a custom function's backward runs outside autocast
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    weight = core.get_output_embeddings().weight
    found: tuple[Tensor, Tensor | None] = ChunkedLogProbs.apply(hidden, weight, batch.targets, LOGITS, collisions)  # type: ignore[no-untyped-call]
    return found


def sequence_sums(token_values: Tensor, batch: Batch, sequences: int) -> Tensor:
    """Sum of the per-token values [N] of each scored sequence, [S], in float64.

    A DPO loss depends on small differences of sums of hundreds of terms near -8: adding them up in fp32 would cost
    1e-4 of it.
    """
    zeros = torch.zeros(sequences, dtype=torch.float64, device=token_values.device)
    return zeros.index_add(0, batch.sequences, token_values.double())


class ChunkedLogProbs(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[target], a chunk of rows at a time.

    hidden [N, D], weight [V, D], targets [N] -> [N], fp32, and with `collisions` the log of the sum of all squared
    probabilities, [N], without gradient. With p the softmax and g the gradient of the result, the
    logits' gradient is g (onehot(target) - p). Matrix products run in hidden's dtype, everything else in fp32.

    There is one buffer, of `logits` entries at most. It is left holding exp(logits) of the last chunk, with which the
    backward begins; it computes the other chunks again. So few rows cost three products of their size, and many
    rows no more memory than few.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, logits: int, collisions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        weight_in_use = weight.to(hidden.dtype)
        chunks = _chunks(len(hidden), max(1, logits // len(weight)))
        rows_at_once = chunks[0].stop if chunks else 0
        buffer = hidden.new_empty(rows_at_once, len(weight), dtype=torch.float32)
        logps, shifts, sums = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))
        squares = torch.empty_like(logps) if collisions else None
        for rows in chunks:
            scores = _products(hidden[rows], weight_in_use, buffer)
            shifts[rows] = scores.amax(1)
            logps[rows] = scores.gather(1, targets[rows, None]).squeeze(1) - shifts[rows]
            sums[rows] = scores.sub_(shifts[rows, None]).exp_().sum(1)
            if squares is not None:
                squares[rows] = 2 * (torch.linalg.vector_norm(scores, dim=1) / sums[rows]).log()
        logps -= sums.log()
        ctx.chunks = chunks
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(hidden, weight, targets, shifts, sums, buffer)
        if squares is not None:
            ctx.mark_non_differentiable(squares)
        return logps, squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, targets, shifts, sums, buffer = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        weight_in_use = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Chunks add up in fp32 whatever the weights' dtype: rounding each partial sum would lose small gradients.
        grad_weight: Tensor | None = None
        for rows in reversed(ctx.chunks):
            powers = buffer[: rows.stop - rows.start]
            if rows is not ctx.chunks[-1]:
                _products(hidden[rows], weight_in_use, buffer).sub_(shifts[rows, None]).exp_()
            powers.mul_((-grad[rows] / sums[rows])[:, None]).scatter_add_(1, targets[rows, None], grad[rows, None])
            grad_logits = powers.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = product(grad_logits, weight_in_use.T)
            if wants_weight:
                by_chunk = product_over_rows(grad_logits, hidden[rows]).float()
                grad_weight = by_chunk if grad_weight is None else grad_weight.add_(by_chunk)
        if wants_weight:
            grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None


def _products(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """hidden @ weight.T in fp32, in the buffer's first rows."""
    rows = buffer[: len(hidden)]
    if hidden.dtype != rows.dtype:
        return rows.copy_(hidden @ weight.T)
    if hidden.device.type != "cpu" or not onednn_is_faster():
        return torch.mm(hidden, weight.T, out=rows)
    few = max(1, _BESIDE // len(weight))
    for some, of in zip(rows.split(few), hidden.split(few), strict=True):
        some.copy_(product(of, weight))
    return rows


def _chunks(rows: int, most: int) -> list[slice]:
    """All rows in as few chunks as can be, of nearly the same length, the first the longest."""
    length = -(-rows // max(1, -(-rows // most)))
    return [slice(start, min(start + length, rows)) for start in range(0, rows, max(1, length))]
