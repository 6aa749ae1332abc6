"""Segment attention against a dense mask written down from its definition."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tests import tiny
from zephyr.data.batch import Pair, Segment, pack_pairs
from zephyr.models import attention
from zephyr.models.attention import SEGMENTS, Plan, _torch_kernel, attend, segment_attention

BATCH = pack_pairs([Pair([1] * 5, [2] * 4, [3] * 6), Pair([4] * 3, [5] * 7, [6] * 1)])
PLAN = Plan(BATCH.segments, len(BATCH.ids), torch.device("cpu"))


def dense(query, key, value, batch, window):
    """Row position i sees j where j is in i's segment or its prefix, not later, and fewer than `window` back."""
    length = len(batch.ids)
    mask = torch.zeros(length, length, dtype=torch.bool)
    for start, end, prefix_start, prefix_end in batch.segments:
        for i in range(start, end):
            for j in [*range(prefix_start, prefix_end), *range(start, i + 1)]:
                mask[i, j] = window is None or batch.positions[i] - batch.positions[j] < window
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("block", [1, 2, 4, 128])
@pytest.mark.parametrize("written_out", [True, False])
def test_equals_a_dense_mask_in_value_and_gradient(window, kv_heads, block, written_out, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(attention, "onednn_is_faster", lambda: written_out)
    monkeypatch.setattr(attention, "_block", block)
    plan = Plan(BATCH.segments, len(BATCH.ids), torch.device("cpu"))
    assert len(plan.blocks(window, torch.float64)[1]) == {1: 26, 2: 13, 4: 7, 128: 4}[block]
    length = len(BATCH.ids)
    shapes = [(1, 4, length, 8), (1, kv_heads, length, 8), (1, kv_heads, length, 8)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    upstream = torch.randn(1, length, 4, 8, dtype=torch.float64)
    ours, _ = segment_attention(None, *inputs, None, plan=plan, sliding_window=window)
    truth = dense(*inputs, BATCH, window)
    assert_close(ours, truth)
    for mine, theirs in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(truth, inputs, upstream), strict=True
    ):
        assert_close(mine, theirs)


@pytest.mark.parametrize("written_out", [True, False])
def test_values_may_be_narrower_than_keys_and_a_branch_empty(written_out, monkeypatch):
    """As with multi-head latent attention, whose keys also hold positions."""
    torch.manual_seed(0)
    monkeypatch.setattr(attention, "onednn_is_faster", lambda: written_out)
    batch = pack_pairs([Pair([1] * 5, [2] * 4, [])])
    plan = Plan(batch.segments, 9, torch.device("cpu"))
    inputs = [torch.randn(1, 4, 9, width, requires_grad=True) for width in (12, 12, 8)]
    upstream = torch.randn(1, 9, 4, 8)
    ours, _ = segment_attention(None, *inputs, None, plan=plan)
    truth = dense(*inputs, batch, None)
    assert_close(ours, truth)
    for mine, theirs in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(truth, inputs, upstream), strict=True
    ):
        assert_close(mine, theirs)


@pytest.mark.parametrize("written_out", [True, False])
def test_autocast_rounds_what_comes_wider(written_out, monkeypatch):
    """Layers of transformers' own turn queries and keys by angles in fp32; values are of a product, in bf16."""
    torch.manual_seed(0)
    monkeypatch.setattr(attention, "onednn_is_faster", lambda: written_out)
    asked, real = [], attention.attend
    monkeypatch.setattr(attention, "attend", lambda *args: asked.extend(args[:3]) or real(*args))
    query, key, value = (torch.randn(1, 4, len(BATCH.ids), 8, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        ours, _ = segment_attention(None, query, key, value.bfloat16(), None, plan=PLAN)
    assert {x.dtype for x in (*asked, ours)} == {torch.bfloat16}
    truth = dense(query, key, value, BATCH, None)
    assert_close(ours.float(), truth, rtol=0.03, atol=0.03)
    upstream = torch.randn(ours.shape)
    mine = torch.autograd.grad(ours, (query, key, value), upstream.bfloat16())
    assert_close(mine, torch.autograd.grad(truth, (query, key, value), upstream), rtol=0.05, atol=0.05)


def test_what_a_cpu_does_is_done_on_no_gpu_and_in_no_simulation_of_one(monkeypatch):
    """Of the last layer's segments none is as long as its keys; a GPU may stand beside a CPU of AMD's."""
    monkeypatch.setattr(attention, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(attention, "Blockwise", None)
    tail, length = BATCH.tail, len(BATCH.ids)

    def asked(device):
        query, key = (torch.empty(rows, 4, 8, device=device) for rows in (len(tail.rows), length))
        return attend(query, key, key, Plan(tail.segments, length, query.device), 0.3)

    assert asked("meta").device.type == "meta"
    with attention.undivided():
        asked("cpu")


def test_no_key_is_asked_that_no_query_of_its_block_sees(monkeypatch):
    """A sequence of 8 tokens, 2 queries a block: keys 1-2, 1-4, ... 1-8; with a window of 3 from the first query on."""
    monkeypatch.setattr(attention, "_block", 2)
    plan = Plan([Segment(0, 8, 0, 0)], 8, torch.device("cpu"))
    cuts, blocks = plan.blocks(None, torch.float32)
    assert [sum(cuts[i] for i in block.pieces) for block in blocks] == [2, 4, 6, 8]
    cuts, blocks = plan.blocks(3, torch.float32)
    assert [sum(cuts[i] for i in block.pieces) for block in blocks] == [2, 4, 4, 4]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_leaks_between_examples_or_branches(checkpointing):
    """A model's output for one sequence does not move when any other sequence's tokens do."""
    model = tiny.model(0, attn_implementation=SEGMENTS)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def hidden(ids):
        out = model.model(input_ids=ids[None], position_ids=BATCH.positions[None], plan=PLAN, use_cache=False)
        return out.last_hidden_state[0]

    before = hidden(BATCH.ids)
    for segment in BATCH.segments:
        changed = BATCH.ids.clone()
        branch = range(segment.end - 1, segment.end)  # the last token: of a chosen or rejected branch
        changed[branch.start] = 200
        moved = (hidden(changed) - before).abs().amax(-1) > 0
        assert moved.nonzero().flatten().tolist() == [branch.start]


def test_the_plan_is_required():
    with pytest.raises(ValueError, match="plan"):
        segment_attention(None, *[torch.zeros(1, 1, 2, 2)] * 3, None)


def emulated(query, key, value, g, scale, window, dropout):
    """What a variable-length flash kernel computes: each sequence by itself, causal, aligned at the bottom right."""
    outputs = []
    for index in range(len(g.query_starts) - 1):
        q = query[g.query_starts[index] : g.query_starts[index + 1]]
        k, v = (x[g.key_starts[index] : g.key_starts[index + 1]] for x in (key, value))
        assert len(q) <= g.most_queries and len(k) <= g.most_keys
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        back = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        seen = (back >= 0) & (back < (window or len(k)))
        scores = torch.einsum("qhe,khe->hqk", q, k) * scale
        outputs.append(torch.einsum("hqk,khe->qhe", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("tail", [False, True])
def test_the_plan_for_a_variable_length_kernel_means_the_same(window, tail):
    torch.manual_seed(0)
    segments, rows = (BATCH.tail.segments, BATCH.tail.rows) if tail else (BATCH.segments, torch.arange(len(BATCH.ids)))
    plan = Plan(segments, len(BATCH.ids), torch.device("cpu"))
    query = torch.randn(len(rows), 4, 8, dtype=torch.float64)
    key, value = torch.randn(2, len(BATCH.ids), 2, 8, dtype=torch.float64)
    g = plan.gather
    ours = attend(query, key, value, plan, 0.3, window)
    assert_close(emulated(query, key[g.keys], value[g.keys], g, 0.3, window, 0.0), ours)


def oldest(query, key, value, cu_q, cu_k, max_q, max_k, is_causal=False): ...


def old(query, key, value, cu_q, cu_k, max_q, max_k, is_causal=False, scale=None): ...


def new(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False): ...


@pytest.mark.parametrize(
    ("signature", "window", "wanted"),
    [
        (oldest, None, {"is_causal": True}),
        (old, None, {"scale": 0.3, "is_causal": True}),
        (new, None, {"scale": 0.3, "window_size": (-1, 0), "enable_gqa": True}),
        (new, 3, {"scale": 0.3, "window_size": (2, 0), "enable_gqa": True}),
    ],
)
def test_torchs_kernel_is_asked_in_the_words_of_its_version(signature, window, wanted):
    @functools.wraps(signature)
    def recording(query, key, *others, **options):
        assert options == wanted
        assert key.shape[1] == (2 if "enable_gqa" in wanted else 4)  # else each query head gets a copy of its keys
        return query

    g = PLAN.gather
    query, key = torch.ones(len(BATCH.ids), 4, 16), torch.zeros(len(g.keys), 2, 16)
    asked = _torch_kernel(recording)(query, key, key, g, 0.3, window, 0.0)
    assert_close(asked, query if "scale" in wanted else torch.full_like(query, 0.3 * 4))
    if signature in (old, oldest):
        with pytest.raises(RuntimeError, match="no sliding window"):
            _torch_kernel(recording)(query, key, key, g, 0.3, 3, 0.0)
