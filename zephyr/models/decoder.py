"""A decoder layer on packed rows, written as its equations; for models built as Mistral is.

    x <- x + O attention(turn(Q n), turn(K n), V n)      n = norm(x)
    x <- x + down(silu(gate n) * up n)                   n = norm(x)

transformers' own layers compute the same, and stay what generates and what other architectures train with. Here the
elementwise parts have hand-written backwards, and the last layer computes only those rows whose result somebody reads:
nothing is predicted from inside a prompt, whose keys and values alone are needed there.

Two streams of hidden states may go through the layers side by side: the policy's and, where the reference is the same
weights without the adapter that trains, the reference's. Each projection then reads its weight once for both.
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
from zephyr.models.low_rank import project

Checkpointing = Literal["none", "selective", "full"]
Again = Callable[[Tensor, Callable[[], Tensor]], AbstractContextManager[Any]]
Half = Callable[..., Any]
Streams = list[Tensor]  # the policy's and, if it is carried along, the reference's
# norm, attention with rotary positions, norm, gated SiLU; biases and adapters are the projections' own affair
_BUILT_SO = {"MistralDecoderLayer", "LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}


class Beside:
    """The reference's hidden states [T, D], as one layer leaves them to the next; the first finds the embeddings."""

    hidden: Tensor | None = None


def _kept(tensor: Tensor, make: Callable[[], Tensor]) -> AbstractContextManager[Any]:
    return nullcontext()


@cache
def _compiled(half: Half) -> Half:
    # Every length is one graph, but there are several: with gradient and without, first layer, others, last.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    torch.fx.experimental._config.use_duck_shape = False  # a row as long as a head is wide is a coincidence
    return torch.compile(half, dynamic=True)


def written(core: Any) -> bool:
    """Whether the layers of a causal LM are of a kind that this module writes."""
    built_so = all(type(layer).__name__ in _BUILT_SO for layer in core.get_decoder().layers)
    return built_so and core.config.hidden_act == "silu"


def rewrite(core: Any, checkpointing: Checkpointing = "none", compiled: bool = False) -> bool:
    """Let the layers of a causal LM compute packed rows as written here; False if they are built otherwise.

    For the backward pass of training, "selective" computes again what is elementwise: the norms' and the gate's
    results, a third of what a layer keeps, at no product's cost. "full" computes again the whole layer. `compiled`
    hands what lies before and behind attention to torch.compile, which then decides itself what to keep.
    """
    if not written(core):
        return False
    layers = core.get_decoder().layers
    again = recomputed if checkpointing == "selective" and not compiled else _kept
    halves = (
        (_compiled(before), _compiled(behind))
        if compiled
        else (partial(before, again=again), partial(behind, again=again))
    )
    for layer in layers:
        layer.forward = partial(_forward, layer, layer is layers[-1], checkpointing == "full", *halves)
    return True


def rewritten(core: Any) -> bool:
    """Whether the layers are those of `rewrite`, uncompiled, which can carry the reference's stream."""
    forward = core.get_decoder().layers[0].forward
    return getattr(forward, "func", None) is _forward and isinstance(forward.args[3], partial)


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
    beside: Beside | None = options.get("beside")
    reference = [] if beside is None else [hidden[0].detach() if beside.hidden is None else beside.hidden]
    cosines, sines = (x[0, :, : x.shape[-1] // 2] for x in options["position_embeddings"])

    def compute(x: Tensor) -> Tensor:
        xs, *heads = first(layer, [x, *reference], cosines, sines, None if tail is None else tail.rows)
        reference.clear()  # computed again in the backward pass, the layer is the policy's alone
        own = layer.self_attn
        dropout = own.attention_dropout if layer.training else 0.0
        how = plan, own.scaling, _window(own), dropout
        attended = [attend(q, k, v, *how) for q, k, v in zip(*heads, strict=True)]
        result, *others = second(layer, xs, attended)
        if beside is not None and others:
            beside.hidden = others[0][0]
        return result

    if whole and layer.training and torch.is_grad_enabled():
        return checkpoint(compute, hidden[0], use_reentrant=False)
    return compute(hidden[0])


def before(
    layer: Any, xs: Streams, cosines: Tensor, sines: Tensor, rows: Tensor | None, again: Again = _kept
) -> tuple[Streams, Streams, Streams, Streams]:
    """Of a layer, what comes before attention: x [T, D] -> x itself, queries [T, H, E], keys and values [T, K, E].

    Each is a list of streams. With `rows` [R], x and the queries are those rows' alone. `again(tensor, make)` is
    entered where operations would keep a tensor of the policy that `make` can compute again.
    """
    own = layer.self_attn
    normed = [partial(_norm, layer.input_layernorm, x, _product_dtype(x)) for x in xs]
    ns = [norm() for norm in normed]
    with again(ns[0], normed[0]):
        keys, values = [rotate(k, cosines, sines) for k in _heads(own, "k", ns)], _heads(own, "v", ns)
        if rows is not None:
            xs, ns, cosines, sines = [x[rows] for x in xs], [n[rows] for n in ns], cosines[rows], sines[rows]
        return xs, [rotate(q, cosines, sines) for q in _heads(own, "q", ns)], keys, values


def behind(layer: Any, xs: Streams, attended: Streams, again: Again = _kept) -> Streams:
    """Of a layer, what comes behind attention: streams of x [R, D] and attended [R, H, E] -> streams of [1, R, D]."""
    mlp = layer.mlp
    xs = _sums(xs, project(layer.self_attn.o_proj, [a.flatten(1) for a in attended]))
    normed = [partial(_norm, layer.post_attention_layernorm, x, _product_dtype(x)) for x in xs]
    ns = [norm() for norm in normed]
    with again(ns[0], normed[0]):
        gates, ups = project(mlp.gate_proj, ns), project(mlp.up_proj, ns)
    hs = [swiglu(gate, up) for gate, up in zip(gates, ups, strict=True)]
    with again(hs[0], partial(swiglu, gates[0], ups[0])):
        downs = project(mlp.down_proj, hs)
        return _sums([x[None] for x in xs], [d[None] for d in downs])  # sums, unlike views, FSDP can put its hooks on


def _sums(xs: Streams, ys: Streams) -> Streams:
    return [x + y for x, y in zip(xs, ys, strict=True)]


def _heads(attention: Any, name: str, ns: Streams) -> Streams:
    """Queries, keys or values of n [T, D]: [T, heads, E], in each stream."""
    streams = [x.unflatten(-1, (-1, attention.head_dim)) for x in project(getattr(attention, f"{name}_proj"), ns)]
    inner = getattr(attention, f"{name}_norm", None)  # Qwen3 norms each head of queries and keys
    return streams if inner is None else [_norm(inner, heads, heads.dtype) for heads in streams]


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
