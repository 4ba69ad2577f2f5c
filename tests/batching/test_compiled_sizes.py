"""Token counts of a compiled model: few sizes, little waste."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rloo_fast.batching.compiled_sizes import rounded_tokens

several = settings(max_examples=80, deadline=None, derandomize=True)


@settings(several, max_examples=300)
@given(st.integers(1, 40_000), st.integers(0, 100_000))
def test_rounded_tokens(budget, tokens):
    got = rounded_tokens(tokens, budget)
    base = rounded_tokens(max(budget, 256), budget)
    assert got >= tokens
    assert got % 16 == 0
    assert rounded_tokens(got, budget) == got
    assert base < 1.25 * max(budget, 256)
    assert got - max(tokens, 1) < (base / 4 if tokens <= base else base / 2)


@pytest.mark.parametrize("budget", [1, 100, 256, 257, 1000, 1024, 3000, 8191, 8192, 8193, 10_000])
def test_at_most_four_sizes_up_to_the_budget(budget):
    sizes = {rounded_tokens(tokens, budget) for tokens in range(budget + 1)}
    assert len(sizes) <= 4
    beyond = {rounded_tokens(tokens, budget) for tokens in range(budget, 3 * budget + 1)}
    assert len(beyond) <= 6


def test_sizes_of_a_budget_on_and_off_the_grid():
    def sizes(budget):
        return sorted({rounded_tokens(tokens, budget) for tokens in range(2 * budget + 1)})

    assert sizes(8192) == [2048, 4096, 6144, 8192, 12288, 16384]
    assert sizes(4097) == [1280, 2560, 3840, 5120, 7680, 10240]  # base 5 * 1024
    on_grid = [256, 320, 384, 448, 512, 640]
    assert [rounded_tokens(budget, budget) for budget in on_grid] == on_grid
