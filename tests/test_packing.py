import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zephyr.data.packing import best_fit, deal, look_ahead, micro_batches, pack


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


def test_looking_ahead_by_hand():
    # 6 opens a row and 2 + 2 fill it, where best fit takes 3; then 3 + 3 + 3 are left for one row instead of two
    lengths = [6, 3, 3, 3, 2, 2]
    assert look_ahead(lengths, 10, waste=0) == [[0, 4, 5], [1, 2, 3]]
    assert best_fit(lengths, 10) == [[0, 1], [2, 3, 4, 5]]
    # 5 and 2 are the two that fill the row up
    assert look_ahead([9, 5, 4, 2], 16, waste=0) == [[0, 1, 3], [2]]
    assert look_ahead([9, 4, 2], 16, waste=1) == [[0, 1, 2]]  # 4 and 2 leave one free


@given(st.lists(st.integers(1, 64), max_size=200), st.integers(0, 8))
def test_looking_ahead_loses_no_item(lengths, waste):
    for rows in (look_ahead(lengths, 64, waste), pack(lengths, 64)):
        assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
        assert all(sum(lengths[item] for item in row) <= 64 for row in rows)


def lower_bound(lengths, capacity):
    """Rows that any packing needs, Martello and Toth's L2 (1990): items that leave less than k take none as long."""
    best = 0
    for k in range(capacity // 2 + 1):
        alone = sum(length > capacity - k for length in lengths)
        long = [length for length in lengths if capacity // 2 < length <= capacity - k]
        rest = sum(length for length in lengths if k <= length <= capacity // 2)
        best = max(best, alone + len(long) + max(0, -(-(rest - (len(long) * capacity - sum(long))) // capacity)))
    return best


@pytest.mark.parametrize(("mean", "spread"), [(110, 0.5), (90, 0.6), (125, 0.3), (60, 0.8)])
def test_rows_are_99_percent_full_where_whole_items_allow_it(mean, spread):
    """Lengths like a chat corpus's in rows of 205: within 1 % of what no packing can beat, and never behind best fit."""
    draw = random.Random(0)
    lengths = [min(205, max(2, int(draw.lognormvariate(math.log(mean) - spread**2 / 2, spread)))) for _ in range(5000)]
    rows = pack(lengths, 205)
    assert len(rows) <= min(1.01 * lower_bound(lengths, 205), len(best_fit(lengths, 205)))


def test_short_items_fill_their_rows():
    """Best fit takes the longest and leaves room for none; two of the right lengths at the end of a row fill it."""
    draw = random.Random(0)
    lengths = [draw.randint(30, 90) for _ in range(4000)]
    fill = {way: sum(lengths) / (512 * len(way(lengths, 512))) for way in (best_fit, pack)}
    assert fill[best_fit] < 0.99 and fill[pack] > 0.995


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
