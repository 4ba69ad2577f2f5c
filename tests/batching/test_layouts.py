"""The table of layouts, and the lines of each for a micro-batch written out by hand."""

from __future__ import annotations

import pytest

from rloo_fast.batching.layouts import (
    LAYOUTS,
    Lines,
    UnitIds,
    base,
    best_first,
    layouts_help,
    register_layout,
)
from rloo_fast.batching.layouts.base import Demand
from rloo_fast.batching.layouts.one_line import FILLER
from rloo_fast.batching.layouts.packed import Packed
from rloo_fast.batching.layouts.padded import Padded

# completions without their last token, from which nothing is predicted
UNITS = [
    UnitIds(prompt=[10, 11], completions=[[20, 21], [30]], targets=[range(3), range(2)]),
    UnitIds(prompt=[12], completions=[[]], targets=[range(1)]),
]
BY_HAND = {
    "shared_prefix": Lines(
        input_ids=[[10, 11, 20, 21, 30, 12]],
        weights=[[2, 2, 1, 1, 1, 1]],
        logit_index=[1, 2, 3, 1, 4, 5],
        positions=[0, 1, 2, 3, 2, 0],
        segment_lengths=[2, 2, 1, 1],
        parents=[-1, 0, 0, -1],
        padded_segments={},
    ),
    "packed": Lines(
        input_ids=[[10, 11, 20, 21, 10, 11, 30, 12]],
        weights=[[1, 1, 1, 1, 1, 1, 1, 1]],
        logit_index=[1, 2, 3, 5, 6, 7],
        positions=[0, 1, 2, 3, 0, 1, 2, 0],
        segment_lengths=[4, 3, 1],
        parents=[-1] * 3,
        padded_segments={},
    ),
    "padded": Lines(
        input_ids=[[10, 11, 20, 21], [10, 11, 30, 0], [12, 0, 0, 0]],
        weights=[[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]],
        logit_index=[1, 2, 3, 5, 6, 8],
    ),
}
layouts = pytest.mark.parametrize("name", BY_HAND)


@pytest.fixture(autouse=True)
def own_table(monkeypatch):
    monkeypatch.setattr(base, "LAYOUTS", dict(LAYOUTS))


def lines(name, units=UNITS, multiple_of=1):
    return LAYOUTS[name].lines(units, pad_token_id=0, multiple_of=multiple_of, sizes=None)


def test_every_layout_is_written_out_here():
    assert {*LAYOUTS} == {*BY_HAND}


@layouts
def test_lines_are_those_written_by_hand(name):
    assert lines(name) == BY_HAND[name]
    run = sum(map(sum, BY_HAND[name].weights))
    assert run == 4 + 3 + 1  # tokens of the rows, shared or not; padding weighs nothing


@layouts
def test_the_tokens_it_counts_are_those_of_its_lines(name):
    lengths = [(len(u.prompt), [len(ids) for ids in u.completions]) for u in UNITS]
    assert LAYOUTS[name].batch_tokens(lengths) == sum(map(len, lines(name).input_ids))


@layouts
def test_lines_are_lengthened_by_tokens_that_weigh_nothing(name):
    found, plain = lines(name, multiple_of=5), BY_HAND[name]
    width = {"shared_prefix": 10, "packed": 10, "padded": 5}[name]
    for ids, weights, short in zip(found.input_ids, found.weights, plain.input_ids, strict=True):
        assert ids == short + [0] * (width - len(short))
        assert weights[len(short) :] == [0] * (width - len(short))
    if plain.segment_lengths is not None:  # a segment of their own, seen by nobody
        assert found.segment_lengths == [*plain.segment_lengths, width - len(plain.input_ids[0])]
        assert found.parents == [*plain.parents, -1]
        assert found.logit_index == plain.logit_index


def test_long_padding_of_a_line_is_cut_into_segments():
    found = lines("packed", multiple_of=200)
    assert found.segment_lengths == [4, 3, 1, FILLER, FILLER, FILLER]
    assert sum(found.segment_lengths) == 200


@layouts
def test_a_filler_runs_one_token_of_no_weight(name):
    found = lines(name, units=[])
    assert (found.input_ids, found.weights, found.logit_index) == ([[0]], [[0]], [])


@layouts
def test_of_a_masked_row_no_log_prob_is_read(name):
    found = lines(name, [UnitIds([10], [[20], [30]], [(), (0, 1)])])
    assert found.logit_index == {"shared_prefix": [0, 2], "packed": [2, 3], "padded": [2, 3]}[name]


@pytest.mark.parametrize(
    ("name", "whole", "cut"),
    [  # a prompt of 3, completions of 2 and 4, a budget of 20
        ("shared_prefix", Demand(9, 9, 20), [Demand(2, 2, 17), Demand(4, 4, 17)]),
        ("packed", Demand(12, 12, 20), [Demand(5, 5, 20), Demand(7, 7, 20)]),
        ("padded", Demand(7, 2, 2), [Demand(5, 1, 4), Demand(7, 1, 2)]),
    ],
)
def test_what_a_unit_takes_of_the_budget(name, whole, cut):
    assert LAYOUTS[name].demand(3, [2, 4], 20) == whole
    assert LAYOUTS[name].row_demands(3, [[2], [4]], 20) == cut


def test_auto_tries_the_fewest_tokens_first():
    names = [layout.name for layout in best_first()]
    assert names == ["shared_prefix", "packed", "padded"]
    tokens = [LAYOUTS[name].tokens(400, [20, 53]) for name in names]
    assert tokens == sorted(tokens)
    assert [part.split(" (")[0] for part in layouts_help().split(" | ")] == names


def test_a_layout_of_ones_own_takes_its_place_by_rank():
    class Mine(Packed):
        name, rank = "mine", 1.5

    assert register_layout(Mine) is Mine
    assert register_layout(Mine) is Mine  # its file, run again
    assert [layout.name for layout in best_first()][2] == "mine"


@pytest.mark.parametrize("name", ["auto", "packed"])
def test_a_name_that_is_taken_is_refused(name):
    mine = type("Mine", (Padded,), {"name": name})
    with pytest.raises(ValueError, match=f"the layout name '{name}' is taken"):
        register_layout(mine)
    assert base.LAYOUTS == LAYOUTS
