"""A decoder layer on packed rows, written as its equations; for models built as Mistral is.

    x <- x + O attention(turn(Q n), turn(K n), V n)      n = norm(x)
    x <- x + down(silu(gate n) * up n)                   n = norm(x)

transformers' own layers compute the same, and stay what generates and what other architectures train with. Here the
elementwise parts have hand-written backwards, and the last layer computes only those rows whose result somebody reads:
nothing is predicted from inside a prompt, whose keys and values alone are needed there.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zephyr.data.batch import Tail
from zephyr.models.attention import Plan, attend
from zephyr.models.functions import recomputed, rms_norm, rotate, swiglu

Checkpointing = Literal["none", "selective", "full"]
Again = Callable[[Tensor, Callable[[], Tensor]], AbstractContextManager[Any]]
Half = Callable[..., Any]
# norm, attention with rotary positions, norm, gated SiLU; biases and adapters are the projections' own affair
_BUILT_SO = {"MistralDecoderLayer", "LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}


def _kept(tensor: Tensor, make: Callable[[], Tensor]) -> AbstractContextManager[Any]:
    return nullcontext()


@cache
def _compiled(half: Half) -> Half:
    # Every length is one graph, but there are several: with gradient and without, first layer, others, last.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    torch.fx.experimental._config.use_duck_shape = False  # a row as long as a head is wide is a coincidence
    return torch.compile(half, dynamic=True)


def rewrite(core: Any, checkpointing: Checkpointing = "none", compiled: bool = False) -> bool:
    """Let the layers of a causal LM compute packed rows as written here; False if they are built otherwise.

    For the backward pass of training, "selective" computes again what is elementwise: the norms' and the gate's
    results, a third of what a layer keeps, at no product's cost. "full" computes again the whole layer. `compiled`
    hands what lies before and behind attention to torch.compile, which then decides itself what to keep.
    """
    layers = core.get_decoder().layers
    if any(type(layer).__name__ not in _BUILT_SO for layer in layers) or core.config.hidden_act != "silu":
        return False
    again = recomputed if checkpointing == "selective" and not compiled else _kept
    halves = (
        (_compiled(before), _compiled(behind))
        if compiled
        else (partial(before, again=again), partial(behind, again=again))
    )
    for layer in layers:
        layer.forward = partial(_forward, layer, layer is layers[-1], checkpointing == "full", *halves)
    return True


def _forward(
    layer: Any, last: bool, whole: bool, first: Half, second: Half, hidden: Tensor, *args: Any, **options: Any
) -> Tensor:
    plan: Plan | None = options.get("plan")
    if plan is None:  # it generates
        result: Tensor = type(layer).forward(layer, hidden, *args, **options)
        return result
    tail: Tail | None = options["tail"] if last else None
    if tail is not None:
        plan = Plan(tail.segments, hidden.shape[1], hidden.device)
    cosines, sines = (x[0, :, : x.shape[-1] // 2] for x in options["position_embeddings"])

    def compute(x: Tensor) -> Tensor:
        x, q, k, v = first(layer, x, cosines, sines, None if tail is None else tail.rows)
        own = layer.self_attn
        dropout = own.attention_dropout if layer.training else 0.0
        return second(layer, x, attend(q, k, v, plan, own.scaling, _window(own), dropout))

    if whole and layer.training and torch.is_grad_enabled():
        return checkpoint(compute, hidden[0], use_reentrant=False)
    return compute(hidden[0])


def before(
    layer: Any, x: Tensor, cosines: Tensor, sines: Tensor, rows: Tensor | None, again: Again = _kept
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a layer, what comes before attention: x [T, D] -> x itself, queries [T, H, E], keys and values [T, K, E].

    With `rows` [R], x and the queries are those rows' alone. `again(tensor, make)` is entered where operations would
    keep a tensor that `make` can compute again.
    """
    own = layer.self_attn
    normed = partial(_norm, layer.input_layernorm, x, _product_dtype(x))
    n = normed()
    with again(n, normed):
        keys, values = rotate(_heads(own, "k", n), cosines, sines), _heads(own, "v", n)
        if rows is None:
            return x, rotate(_heads(own, "q", n), cosines, sines), keys, values
        return x[rows], rotate(_heads(own, "q", n[rows]), cosines[rows], sines[rows]), keys, values


def behind(layer: Any, x: Tensor, attended: Tensor, again: Again = _kept) -> Tensor:
    """Of a layer, what comes behind attention: x [R, D] and attended [R, H, E] -> [1, R, D]."""
    mlp = layer.mlp
    x = x + layer.self_attn.o_proj(attended.flatten(1))
    normed = partial(_norm, layer.post_attention_layernorm, x, _product_dtype(x))
    n = normed()
    with again(n, normed):
        gate, up = mlp.gate_proj(n), mlp.up_proj(n)
    h = swiglu(gate, up)
    with again(h, partial(swiglu, gate, up)):
        return x[None] + mlp.down_proj(h)[None]  # the sum, unlike its view, is what FSDP's hooks can be put on


def _heads(attention: Any, name: str, n: Tensor) -> Tensor:
    """Queries, keys or values of n [T, D]: [T, heads, E]."""
    heads = getattr(attention, f"{name}_proj")(n).unflatten(-1, (-1, attention.head_dim))
    inner = getattr(attention, f"{name}_norm", None)  # Qwen3 norms each head of queries and keys
    return heads if inner is None else _norm(inner, heads, heads.dtype)


def _norm(module: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    return rms_norm(x, module.weight, module.variance_epsilon).to(dtype)


def _product_dtype(x: Tensor) -> torch.dtype:
    """In which products take x. Autocast would cast it for each of them, and each would keep its own copy."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _window(attention: Any) -> int | None:
    """Tokens that attention may look back on; where layers differ in that, each says so itself."""
    holder = attention if hasattr(attention, "sliding_window") else attention.config
    return getattr(holder, "sliding_window", None)
