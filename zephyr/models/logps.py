"""Log-probabilities of scored tokens, in nats. Logits exist for a chunk of scored tokens at a time, never for a row.

Letters: T tokens of the row, N scored tokens, S scored sequences, D hidden size, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zephyr.data.batch import Batch

CHUNK = 1024  # scored tokens whose logits exist at once: 131 MB in fp32 at 32,000 entries


class Scores(NamedTuple):
    """What a model says of the scored tokens, [N], fp32."""

    logps: Tensor  # log p(target | what precedes it)
    collisions: Tensor | None  # log sum_v p(v)^2, without gradient: how sure the model is, whatever the target


def token_logps(model: Any, batch: Batch) -> Tensor:
    """log p(target | what precedes it) of every scored token, [N], fp32, from a causal LM or an adapter around one."""
    return token_scores(model, batch).logps


def token_scores(model: Any, batch: Batch, collisions: bool = False) -> Scores:
    """Log-probabilities of the scored tokens and, where asked for, the collision log-probabilities."""
    core = model.get_base_model() if hasattr(model, "peft_config") else model
    sharded = getattr(core, "score", None)  # a method, so that the parameters it uses are gathered around it
    return sharded(batch, collisions) if sharded else score(core, batch, collisions)


def score(core: Any, batch: Batch, collisions: bool = False) -> Scores:
    """The same for a transformers causal LM whose parameters are at hand."""
    decoder, head = core.get_decoder(), core.get_output_embeddings()
    hidden = decoder(
        input_ids=batch.ids[None],
        position_ids=batch.positions[None],
        use_cache=False,
        segments=batch.segments,
    ).last_hidden_state[0]
    hidden = hidden[batch.sources]
    if torch.is_autocast_enabled(hidden.device.type):  # a custom function's backward runs outside autocast
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return Scores(*ChunkedLogProbs.apply(hidden, head.weight, batch.targets, CHUNK, collisions))  # type: ignore[no-untyped-call]


def sequence_sums(token_values: Tensor, batch: Batch, sequences: int) -> Tensor:
    """Sum of the per-token values [N] of each scored sequence, [S], in float64.

    A DPO loss depends on small differences of sums of hundreds of terms near -8: adding them up in fp32 would cost
    1e-4 of it.
    """
    zeros = torch.zeros(sequences, dtype=torch.float64, device=token_values.device)
    return zeros.index_add(0, batch.sequences, token_values.double())


class ChunkedLogProbs(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[target], a chunk of rows at a time; the backward computes each chunk again.

    hidden [N, D], weight [V, D], targets [N] -> [N], fp32, and with `collisions` the log of the sum of all squared
    probabilities, [N], without gradient. With p the softmax and g the gradient of the result, the
    logits' gradient is g (onehot(target) - p). Matrix products run in hidden's dtype, everything else in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, collisions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        weight_in_use = weight.to(hidden.dtype)
        logps = hidden.new_empty(len(hidden), dtype=torch.float32)
        normalisers = torch.empty_like(logps)
        squares = torch.empty_like(logps) if collisions else None
        for rows in _chunks(len(hidden), chunk):
            logits = (hidden[rows] @ weight_in_use.T).float()
            normalisers[rows] = logits.logsumexp(1)
            logps[rows] = logits.gather(1, targets[rows, None]).squeeze(1) - normalisers[rows]
            if squares is not None:
                squares[rows] = logits.mul_(2).logsumexp(1) - 2 * normalisers[rows]
        ctx.chunk = chunk
        ctx.save_for_backward(hidden, weight, targets, normalisers)
        if squares is not None:
            ctx.mark_non_differentiable(squares)
        return logps, squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, targets, normalisers = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        weight_in_use = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Chunks add up in fp32 whatever the weights' dtype: rounding each partial sum would lose small gradients.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        for rows in _chunks(len(hidden), ctx.chunk):
            logits = (hidden[rows] @ weight_in_use.T).float()
            grad_logits = logits.sub_(normalisers[rows, None]).exp_().mul_(-grad[rows, None])
            grad_logits.scatter_add_(1, targets[rows, None], grad[rows, None])
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight_in_use, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += (grad_logits.T @ hidden[rows]).float()
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _chunks(rows: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, rows)) for start in range(0, rows, chunk)]
