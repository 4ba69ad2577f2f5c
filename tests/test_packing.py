"""Micro-batches: every row once, groups whole, the same number on every rank."""

from hypothesis import given, settings
from hypothesis import strategies as st

from rloo_fast.packing import plan_micro_batches

several = settings(max_examples=80, deadline=None, derandomize=True)


@st.composite
def cases(draw):
    """(tokens per row, K, rows per micro-batch)"""
    k, num_groups = draw(st.integers(1, 5)), draw(st.integers(0, 8))
    lengths = draw(st.lists(st.integers(1, 50), min_size=k * num_groups, max_size=k * num_groups))
    return lengths, k, draw(st.integers(k, 4 * k + 3))


@several
@given(cases())
def test_every_row_once(case):
    rows = [row for batch in plan_micro_batches(*case) for row in batch]
    assert sorted(rows) == list(range(len(case[0])))


@several
@given(cases())
def test_groups_stay_whole_and_in_order(case):
    k = case[1]
    for batch in plan_micro_batches(*case):
        for start in range(0, len(batch), k):
            first = batch[start]
            assert first % k == 0
            assert batch[start : start + k] == list(range(first, first + k))


@several
@given(cases())
def test_no_micro_batch_is_too_large_or_empty(case):
    assert all(0 < len(batch) <= case[2] for batch in plan_micro_batches(*case))


@several
@given(cases())
def test_the_number_of_micro_batches_follows_from_the_number_of_groups(case):
    """Ranks with other lengths must run as many, or collectives hang."""
    lengths, k, max_rows = case
    want = -(-(len(lengths) // k) // (max_rows // k))
    assert len(plan_micro_batches(lengths, k, max_rows)) == want


@several
@given(cases())
def test_longer_groups_come_first(case):
    lengths, k, _ = case
    order = [row for batch in plan_micro_batches(*case) for row in batch[::k]]
    longest = [max(lengths[row : row + k]) for row in order]
    assert longest == sorted(longest, reverse=True)


def test_rows_of_a_like_length_go_together():
    assert plan_micro_batches([9, 1, 8, 2, 7, 3], 1, 2) == [[0, 2], [4, 5], [3, 1]]


def test_groups_of_equal_length_keep_their_order():
    assert plan_micro_batches([5] * 6, 2, 2) == [[0, 1], [2, 3], [4, 5]]
