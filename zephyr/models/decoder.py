"""A decoder layer on packed rows, written as its equations; for models built as Mistral is.

    x <- x + O attention(turn(Q n), turn(K n), V n)      n = norm(x)
    x <- x + down(silu(gate n) * up n)                   n = norm(x)

transformers' own layers compute the same, and stay what generates and what other architectures train with. Here the
elementwise parts have hand-written backwards, and the last layer computes only those rows whose result somebody reads:
nothing is predicted from inside a prompt, whose keys and values alone are needed there.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zephyr.data.batch import Tail
from zephyr.models.attention import Plan, attend
from zephyr.models.functions import recomputed, rms_norm, rotate, swiglu

Checkpointing = Literal["none", "selective", "full"]
# norm, attention with rotary positions, norm, gated SiLU; biases and adapters are the projections' own affair
_BUILT_SO = {"MistralDecoderLayer", "LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}


def rewrite(core: Any, checkpointing: Checkpointing = "none") -> bool:
    """Let the layers of a causal LM compute packed rows as written here; False if they are built otherwise.

    For the backward pass of training, "selective" computes again what is elementwise: the norms' and the gate's
    results, a third of what a layer keeps, at no product's cost. "full" computes again the whole layer.
    """
    layers = core.get_decoder().layers
    if any(type(layer).__name__ not in _BUILT_SO for layer in layers) or core.config.hidden_act != "silu":
        return False
    for layer in layers:
        layer.forward = partial(_forward, layer, layer is layers[-1], checkpointing)
    return True


def _forward(
    layer: Any, last: bool, checkpointing: Checkpointing, hidden: Tensor, *args: Any, **options: Any
) -> Tensor:
    plan: Plan | None = options.get("plan")
    if plan is None:  # it generates
        result: Tensor = type(layer).forward(layer, hidden, *args, **options)
        return result
    tail: Tail | None = options["tail"] if last else None
    if tail is not None:
        plan = Plan(tail.segments, hidden.shape[1], hidden.device)
    cosines, sines = (x[0, :, : x.shape[-1] // 2] for x in options["position_embeddings"])
    inputs = layer, hidden[0], cosines, sines, plan, tail
    if not (layer.training and torch.is_grad_enabled()) or checkpointing == "none":
        return decoder_layer(*inputs)[None]
    if checkpointing == "selective":
        return decoder_layer(*inputs, recomputed)[None]
    whole: Tensor = checkpoint(decoder_layer, *inputs, use_reentrant=False)
    return whole[None]


def decoder_layer(
    layer: Any,
    x: Tensor,
    cosines: Tensor,
    sines: Tensor,
    plan: Plan,
    tail: Tail | None = None,
    again: Callable[[Tensor, Callable[[], Tensor]], AbstractContextManager[Any]] = lambda *_: nullcontext(),
) -> Tensor:
    """One layer: x [T, D] -> [T, D], or with a `tail` the rows [R, D] that it names; the plan is then the tail's.

    `again(tensor, make)` is entered where operations would keep that tensor, which `make` can compute again.
    """
    own, mlp = layer.self_attn, layer.mlp
    n = _norm(layer.input_layernorm, x)
    with again(n, partial(_norm, layer.input_layernorm, x)):
        k, v = _heads(own, "k", n), _heads(own, "v", n)
        q = _heads(own, "q", n if tail is None else n[tail.rows])
    k = rotate(k, cosines, sines)
    if tail is not None:
        x, cosines, sines = x[tail.rows], cosines[tail.rows], sines[tail.rows]
    q = rotate(q, cosines, sines)
    dropout = own.attention_dropout if layer.training else 0.0
    x = x + own.o_proj(attend(q, k, v, plan, own.scaling, _window(own), dropout).flatten(1))

    n = _norm(layer.post_attention_layernorm, x)
    with again(n, partial(_norm, layer.post_attention_layernorm, x)):
        gate, up = mlp.gate_proj(n), mlp.up_proj(n)
    h = swiglu(gate, up)
    with again(h, partial(swiglu, gate, up)):
        return x + mlp.down_proj(h)


def _heads(attention: Any, name: str, n: Tensor) -> Tensor:
    """Queries, keys or values of n [T, D]: [T, heads, E]."""
    heads = getattr(attention, f"{name}_proj")(n).unflatten(-1, (-1, attention.head_dim))
    inner = getattr(attention, f"{name}_norm", None)  # Qwen3 norms each head of queries and keys
    return heads if inner is None else _norm(inner, heads)


def _norm(module: nn.Module, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight, module.variance_epsilon)  # type: ignore[arg-type]


def _window(attention: Any) -> int | None:
    """Tokens that attention may look back on; where layers differ in that, each says so itself."""
    holder = attention if hasattr(attention, "sliding_window") else attention.config
    return getattr(holder, "sliding_window", None)
