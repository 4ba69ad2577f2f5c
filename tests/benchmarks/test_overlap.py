"""The benchmark of sampling ahead: its script lasts as long as it says, and a step ahead less."""

from __future__ import annotations

from statistics import fmean

import pytest

from benchmarks.overlap.run import table
from benchmarks.overlap.scripted import seconds_of_rows, step_seconds


def test_the_longest_completion_takes_what_is_stated_and_most_take_far_less():
    seconds = sorted(seconds_of_rows(4.0, 64))
    assert seconds[-1] == 4.0
    assert seconds[32] < 1.5


@pytest.mark.slow
def test_a_step_ahead_takes_the_longer_part_in_place_of_the_sum(tmp_path):
    together = fmean(step_seconds(tmp_path, 0, 0.8, 0.8, steps=3))
    ahead = fmean(step_seconds(tmp_path, 1, 0.8, 0.8, steps=3))
    assert together > 1.6
    assert ahead < 0.8 * together


def test_the_table_has_a_line_per_run():
    row = dict.fromkeys(("max_staleness", "generate_s", "train_s", "step_s", "of_sum", "of_max"), 1)
    assert table([{"engine": "scripted", **row}]).splitlines()[2] == (
        "| scripted | 1 | 1 | 1 | 1 | 1 | 1 |"
    )
