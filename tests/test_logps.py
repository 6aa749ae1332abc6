import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zephyr.data.batch import Conversation, pack_conversations
from zephyr.models.logps import ChunkedLogProbs, sequence_sums


def reference(hidden, weight, targets):
    return F.log_softmax((hidden @ weight.T).double(), -1).gather(1, targets[:, None]).squeeze(1)


@pytest.mark.parametrize("rows", [1, 8, 36, 37, 100])  # in the buffer at once; with 36 the chunks are 19 and 18
def test_values_and_gradients_equal_autograd_over_full_logits(rows):
    torch.manual_seed(0)
    hidden, weight = torch.randn(37, 16), torch.randn(50, 16)
    targets, upstream = torch.randint(50, (37,)), torch.randn(37)
    results = []
    ours = lambda h, w: ChunkedLogProbs.apply(h, w, targets, 50 * rows)[0]  # noqa: E731
    for function in (ours, lambda h, w: reference(h, w, targets)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logps = function(h, w)
        (logps * upstream).sum().backward()
        results.append((logps.double(), h.grad, w.grad))
    for ours, truth in zip(*results, strict=True):
        assert_close(ours, truth, rtol=1e-5, atol=1e-5)


def test_no_more_logits_than_the_buffer_holds_whatever_the_vocabulary():
    shapes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            shapes.extend(r.numel() for r in tree_leaves(result) if isinstance(r, torch.Tensor) and not r._is_view())
            return result

    for vocabulary in (320, 2560):
        hidden, weight = torch.randn(300, 2, requires_grad=True), torch.randn(vocabulary, 2)
        targets = torch.randint(vocabulary, (300,))
        with Watch():
            ChunkedLogProbs.apply(hidden, weight, targets, 9600)[0].sum().backward()
        assert max(shapes) <= 9600


def test_a_second_backward_is_refused():
    """The first one used the buffer up."""
    hidden = torch.randn(3, 4, requires_grad=True)
    loss = ChunkedLogProbs.apply(hidden, torch.randn(7, 4), torch.tensor([0, 3, 6]), 100)[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bf16_hidden_states_keep_fp32_probabilities():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(5, 64).bfloat16(), torch.randn(100, 64), torch.randint(100, (5,))
    logps, _ = ChunkedLogProbs.apply(hidden, weight, targets, 200)
    logits = (hidden @ weight.bfloat16().T).float()  # only the matrix product is in bf16
    assert logps.dtype == torch.float32
    assert_close(logps, F.log_softmax(logits, -1).gather(1, targets[:, None]).squeeze(1))


def test_a_uniform_model_gives_minus_log_v_a_token():
    logps, _ = ChunkedLogProbs.apply(torch.zeros(3, 4), torch.zeros(7, 4), torch.tensor([0, 3, 6]), 14)
    assert_close(logps, torch.full((3,), -math.log(7)))


def test_collisions_are_the_log_of_the_sum_of_squared_probabilities():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(5, 8), torch.randn(11, 8), torch.randint(11, (5,))
    _, collisions = ChunkedLogProbs.apply(hidden, weight, targets, 22, True)
    assert_close(collisions, (hidden @ weight.T).softmax(1).square().sum(1).log())


def test_sums_by_sequence_by_hand():
    batch = pack_conversations([Conversation([1, 2, 3], [True] * 3), Conversation([4, 5], [True] * 2)])
    sums = sequence_sums(torch.tensor([-1.0, -2.0, -4.0]), batch, 2)
    assert sums.tolist() == [-3.0, -4.0] and sums.dtype == torch.float64
