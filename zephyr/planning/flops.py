"""The floating-point operations that a model needs by its mathematics, whoever computes them, however."""

from typing import Any, NamedTuple

from torch import Tensor

from zephyr.data.batch import Batch


class ModelSize(NamedTuple):
    """What the arithmetic of a decoder depends on. The input embedding is a look-up and costs none."""

    body: int  # parameters used once a token: all but the embedding and the head
    body_trained: int  # those of them that receive gradients
    head: int  # parameters of the output layer, used once a scored token
    head_trained: int
    layers: int
    width: int  # heads x head size


def model_size(policy: Any) -> ModelSize:
    """Count a causal language model (adapters and 4-bit weights too). A tied head is a head, no embedding."""
    config: Any = policy.config
    head = list(policy.get_output_embeddings().parameters())
    outside = {id(p) for p in (*head, *policy.get_input_embeddings().parameters())}
    body = [p for p in policy.parameters() if id(p) not in outside]
    heads = config.num_attention_heads
    return ModelSize(
        body=sum(map(_numel, body)),
        body_trained=sum(_numel(p) for p in body if p.requires_grad),
        head=sum(map(_numel, head)),
        head_trained=sum(_numel(p) for p in head if p.requires_grad),
        layers=config.num_hidden_layers,
        width=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
    )


class Load(NamedTuple):
    """What of a micro-batch its arithmetic depends on."""

    tokens: int
    scored: int
    context: float  # sum over tokens of how many positions each attends to


def load(batch: Batch) -> Load:
    """Attention is causal: q tokens behind a prefix of p attend to q (q + 1) / 2 + q p positions."""
    context = 0.0
    for start, end, prefix_start, prefix_end in batch.segments:
        queries = end - start
        context += queries * (queries + 1) / 2 + queries * (prefix_end - prefix_start)
    return Load(len(batch.ids), len(batch.targets), context)


def forward_flops(size: ModelSize, of: Load) -> tuple[float, float, float]:
    """Floating-point operations of one forward pass in the body's linear layers, the head, and attention."""
    # attention: two products, queries with keys and weights with values
    return 2.0 * size.body * of.tokens, 2.0 * size.head * of.scored, 4.0 * size.layers * size.width * of.context


def step_flops(size: ModelSize, batches: list[Batch], reference: bool) -> float:
    """Floating-point operations that an optimizer step needs by its mathematics, without recomputation.

    The backward pass takes the linear part of a forward pass once for the gradients of the inputs and once, where
    weights are trained, for those of the weights; and the attention part twice. A live reference is one more forward
    pass. With n packed and m scored tokens, and c their context, training all weights is thus the usual
    6 (body n + head m) + 12 layers width c.
    """
    return sum(needed_flops(size, load(batch), reference) for batch in batches)


def needed_flops(size: ModelSize, of: Load, reference: bool) -> float:
    """The same of one micro-batch."""
    body, head, attention = forward_flops(size, of)
    weights = 2.0 * (size.body_trained * of.tokens + size.head_trained * of.scored)
    return (2 + reference) * (body + head) + weights + (3 + reference) * attention


def _numel(parameter: Tensor) -> int:
    # bitsandbytes packs two weights into a byte and keeps the true shape aside.
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel() if state is not None else parameter.numel())
