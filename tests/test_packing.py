import pytest
from hypothesis import given
from hypothesis import strategies as st

from zephyr.data.packing import best_fit, micro_batches


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
