import math

import torch
import torch.nn.functional as F
from torch.testing import assert_close

from zephyr.data.batch import Conversation, pack_conversations
from zephyr.models.logps import ChunkedLogProbs, sequence_sums


def reference(hidden, weight, targets):
    return F.log_softmax((hidden @ weight.T).double(), -1).gather(1, targets[:, None]).squeeze(1)


def test_values_and_gradients_equal_autograd_over_full_logits():
    torch.manual_seed(0)
    hidden, weight = torch.randn(37, 16), torch.randn(50, 16)
    targets, upstream = torch.randint(50, (37,)), torch.randn(37)
    results = []
    for function in (lambda h, w: ChunkedLogProbs.apply(h, w, targets, 8)[0], lambda h, w: reference(h, w, targets)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logps = function(h, w)
        (logps * upstream).sum().backward()
        results.append((logps.double(), h.grad, w.grad))
    for ours, truth in zip(*results, strict=True):
        assert_close(ours, truth, rtol=1e-5, atol=1e-5)


def test_bf16_hidden_states_keep_fp32_probabilities():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(5, 64).bfloat16(), torch.randn(100, 64), torch.randint(100, (5,))
    logps, _ = ChunkedLogProbs.apply(hidden, weight, targets, 2)
    logits = (hidden @ weight.bfloat16().T).float()  # only the matrix product is in bf16
    assert logps.dtype == torch.float32
    assert_close(logps, F.log_softmax(logits, -1).gather(1, targets[:, None]).squeeze(1))


def test_a_uniform_model_gives_minus_log_v_a_token():
    logps, _ = ChunkedLogProbs.apply(torch.zeros(3, 4), torch.zeros(7, 4), torch.tensor([0, 3, 6]), 2)
    assert_close(logps, torch.full((3,), -math.log(7)))


def test_collisions_are_the_log_of_the_sum_of_squared_probabilities():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(5, 8), torch.randn(11, 8), torch.randint(11, (5,))
    _, collisions = ChunkedLogProbs.apply(hidden, weight, targets, 2, True)
    assert_close(collisions, (hidden @ weight.T).softmax(1).square().sum(1).log())


def test_sums_by_sequence_by_hand():
    batch = pack_conversations([Conversation([1, 2, 3], [True] * 3), Conversation([4, 5], [True] * 2)])
    sums = sequence_sums(torch.tensor([-1.0, -2.0, -4.0]), batch, 2)
    assert sums.tolist() == [-3.0, -4.0] and sums.dtype == torch.float64
