"""Stage 4: rows -> micro-batches. Pure Python, deterministic."""

from __future__ import annotations

from collections.abc import Sequence


def plan_micro_batches(
    lengths: Sequence[int], num_generations: int, max_rows: int
) -> list[list[int]]:
    """Row numbers of each micro-batch: whole groups, at most `max_rows` rows.

    `lengths`: tokens of every row; each `num_generations` rows in turn are a group (1: rows stand
    alone). Groups are sorted by their longest row, so that rows of a like length are padded
    together; ranks with equally many groups get equally many micro-batches.
    """
    assert len(lengths) % num_generations == 0, (len(lengths), num_generations)
    assert num_generations <= max_rows, (num_generations, max_rows)
    k, per_batch = num_generations, max_rows // num_generations
    starts = sorted(range(0, len(lengths), k), key=lambda s: (-max(lengths[s : s + k]), s))
    return [
        [row for start in starts[i : i + per_batch] for row in range(start, start + k)]
        for i in range(0, len(starts), per_batch)
    ]
