"""Segment attention against a dense mask written down from its definition."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tests import tiny
from zephyr.data.batch import Pair, pack_pairs
from zephyr.models.attention import SEGMENTS, Plan, segment_attention

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
def test_equals_a_dense_mask_in_value_and_gradient(window, kv_heads):
    torch.manual_seed(0)
    length = len(BATCH.ids)
    shapes = [(1, 4, length, 8), (1, kv_heads, length, 8), (1, kv_heads, length, 8)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    upstream = torch.randn(1, length, 4, 8, dtype=torch.float64)
    ours, _ = segment_attention(None, *inputs, None, plan=PLAN, sliding_window=window)
    truth = dense(*inputs, BATCH, window)
    assert_close(ours, truth)
    for mine, theirs in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(truth, inputs, upstream), strict=True
    ):
        assert_close(mine, theirs)


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
