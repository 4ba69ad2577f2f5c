"""Sums over packed rows against plain loops, and the packing itself."""

from random import Random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rloo_kernels.loss.packed import (
    pack_rows,
    segment_exclusive_cumsum,
    segment_ids,
    segment_sum,
)

from tests.support.kernel_helpers import bounds

several = settings(max_examples=60, deadline=None, derandomize=True)


def close(got, want):
    want = torch.as_tensor(want, dtype=torch.double)
    torch.testing.assert_close(got.double(), want, rtol=1e-9, atol=1e-9)


@several
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 10**6))
def test_segment_operations_equal_loops(row_lengths, seed):
    random = Random(seed)
    rows = [[random.uniform(-1, 1) for _ in range(n)] for n in row_lengths]
    values = torch.tensor([v for row in rows for v in row], dtype=torch.double)
    cu = bounds(row_lengths)
    close(segment_sum(values, cu), [sum(row) for row in rows])
    before = [sum(row[:t]) for row in rows for t in range(len(row))]
    close(segment_exclusive_cumsum(values, cu), torch.tensor(before, dtype=torch.double))
    owners = [i for i, row in enumerate(rows) for _ in row]
    assert segment_ids(cu, len(values)).tolist() == owners


def test_segments_without_any_row():
    nothing = torch.empty(0)
    assert segment_sum(nothing, torch.tensor([0])).shape == (0,)
    assert segment_exclusive_cumsum(nothing, torch.tensor([0])).shape == (0,)


def test_segment_sum_hands_every_token_its_row_s_gradient():
    values = torch.zeros(5, requires_grad=True)
    segment_sum(values, bounds([2, 0, 3])).backward(torch.tensor([1.0, 5.0, 7.0]))
    assert values.grad.tolist() == [1, 1, 7, 7, 7]


def test_padded_rows_are_packed_rows_of_one_length():
    num_rows, cu_seqlens = pack_rows(torch.zeros(3, 4), None)
    assert num_rows == 3
    assert cu_seqlens.tolist() == [0, 4, 8, 12]
