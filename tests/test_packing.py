import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zephyr.data.packing import best_fit, deal, micro_batches


def test_best_fit_by_hand():
    # 7 opens a row (3 free), 5 another (5 free), 4 fits only there (1 free), 3 fills the first, 1 the second
    assert best_fit([3, 7, 4, 5, 1], capacity=10) == [[1, 0], [3, 2, 4]]


def test_an_item_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="11 tokens in rows of 10"):
        best_fit([11], capacity=10)


@given(st.lists(st.integers(1, 64), max_size=200))
def test_every_item_lies_in_one_row_that_holds_it(lengths):
    rows = best_fit(lengths, capacity=64)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in row) <= 64 for row in rows)
    # at most one row is less than half full, or two of them would have shared one
    assert sum(sum(lengths[item] for item in row) * 2 <= 64 for row in rows) <= 1


def test_micro_batches_keep_the_budget_and_a_long_item_is_alone():
    lengths = [30, 100, 20, 50, 10]
    batches = micro_batches(lengths, budget=60)
    assert batches[0] == [1]
    assert sorted(item for batch in batches for item in batch) == [0, 1, 2, 3, 4]
    assert [sum(lengths[i] for i in batch) for batch in batches[1:]] == [50, 60]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_step_is_dealt_out_whole_evenly_and_within_the_budget(ranks):
    lengths = [random.Random(number).randint(20, 400) for number in range(64)]
    hands = deal(lengths, 1000, ranks)
    assert sorted(item for hand in hands for members in hand for item in members) == list(range(64))
    tokens = [sum(lengths[i] for members in hand for i in members) for hand in hands]
    assert max(sum(lengths[i] for i in members) for hand in hands for members in hand) <= 1000
    assert len({len(hand) for hand in hands}) == 1
    assert max(tokens) <= 1.03 * min(tokens)


def test_no_rank_idles_while_items_are_enough():
    """A step that fits into one micro-batch is spread over the ranks all the same."""
    assert deal([10] * 8, 1000, 4) == [[[0, 4]], [[1, 5]], [[2, 6]], [[3, 7]]]
    assert deal([10, 900, 10], 500, 2) == [[[1]], [[0, 2]]]


def test_items_too_few_for_the_ranks_leave_some_a_micro_batch_short():
    """Five items that each fill a micro-batch, on two ranks: three and two."""
    hands = deal([500] * 5, 500, 2)
    assert sorted(map(len, hands)) == [2, 3]
