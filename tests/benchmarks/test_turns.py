"""The conversations of `benchmarks.step.turns`, and how many of their tokens are run."""

from __future__ import annotations

import pytest

from benchmarks.step.turns import Shape, run, trajectories, trl_tree_tokens
from rloo_fast.batching.layouts import LAYOUTS, UnitIds

SHAPE = Shape(turns=3, tools=40, question=12, reasoning=9, call=5, said=6)


@pytest.mark.parametrize(("case", "strands"), [("kept", 1), ("dropped", 3)])
def test_each_sampled_token_counts_once(case, strands):
    for prompt, found in trajectories(SHAPE, case, 1000):
        assert len(found) == strands
        assert sum(len(strand.counted) for strand in found) == 3 * (9 + 5)
        assert all(strand.ids[: len(prompt)] == prompt for strand in found)
        assert len(found[-1].ids) == 52 + 3 * 5 + 2 * 6 + (27 if case == "kept" else 9)


@pytest.mark.parametrize("case", ["kept", "dropped"])
def test_never_more_tokens_than_trls_tree(case):
    pytest.importorskip("trl.experimental.async_grpo.packing")
    units = []
    for prompt, strands in trajectories(SHAPE, case, 50_000):
        n = len(prompt)
        places = [[place - n for place in strand.counted] for strand in strands]
        run = [strand.ids[n : strand.counted[-1]] for strand in strands]
        units.append(UnitIds(prompt, run, places))
    made = LAYOUTS["shared_prefix"].lines(units, pad_token_id=0, multiple_of=1, sizes=None)
    assert len(made.input_ids[0]) <= trl_tree_tokens(SHAPE, case)


@pytest.mark.parametrize("case", ["kept", "dropped"])
def test_all_trainers_make_the_update_and_ours_of_the_fewest_tokens(case):
    """Their losses and norms of the gradient have passed the gate then."""
    rows = {row.provider: row for row in run(case, SHAPE, "tiny", 1)}
    ours = ("ours_padded", "ours_packed", "ours")
    assert all(rows[name].seconds_median for name in ("trl", *ours))
    assert "needs a GPU" in rows["trl_tree"].skipped
    counts = [int(rows[name].note.split()[0].lstrip("(")) for name in ours]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < counts[0]
