"""The tree of rows against one of single tokens, and each row read back from its line."""

from __future__ import annotations

import random
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from rloo_fast.batching.layouts import LAYOUTS, UnitIds
from rloo_fast.batching.prefix_tree import EVERY, branches, first_row, key_of, shared

several = settings(max_examples=120, deadline=None, derandomize=True)
LAYOUT = LAYOUTS["shared_prefix"]
ids = st.lists(st.integers(0, 1), max_size=14)  # two tokens, so that rows meet often


@st.composite
def units(draw):
    """Units whose prompts and completions begin like others."""
    made: list[list[int]] = [[]]

    def grow(at_least: int = 0) -> list[int]:
        of = draw(st.sampled_from([x for x in made if len(x) >= at_least]))
        return of[: draw(st.integers(at_least, len(of)))] + draw(ids)

    found = []
    for _ in range(draw(st.integers(0, 5))):
        prompt = grow() or [0]
        made.append(prompt)
        completions = []
        for _ in range(draw(st.integers(1, 4))):
            row = prompt + draw(ids)
            if completions and draw(st.booleans()):
                other = draw(st.sampled_from(completions))
                row = prompt + other[: draw(st.integers(0, len(other)))] + draw(ids)
            completions.append(row[len(prompt) :])
            made.append(row)
        counted = [
            sorted(draw(st.sets(st.integers(0, len(c)), max_size=len(c) + 1)))
            if draw(st.booleans())
            else range(draw(st.integers(0, len(c) + 1)))
            for c in completions
        ]
        found.append(UnitIds(prompt, completions, counted, alone=draw(st.integers(0, 9)) == 0))
    return found


def lines(units):
    return LAYOUT.lines(units, pad_token_id=0, multiple_of=1, sizes=None)


def paths_of(found):
    """Per token of the line, the tokens it sees, itself the last, in order."""
    starts, before, paths = [0], [], []
    for length, parent in zip(found.segment_lengths, found.parents, strict=True):
        seen = [] if parent < 0 else [*before[parent], *range(starts[parent], starts[parent + 1])]
        before.append(seen)
        starts.append(starts[-1] + length)
        paths += [[*seen, *range(starts[-2], t + 1)] for t in range(starts[-2], starts[-1])]
    return paths


def rows_of(units):
    return [
        (unit.prompt, c, targets)
        for unit in units
        for c, targets in zip(unit.completions, unit.targets, strict=True)
    ]


def nodes(rows):
    """Nodes of a tree of single tokens."""
    return len({tuple(row[: i + 1]) for row in rows for i in range(len(row))})


@several
@given(units())
def test_what_predicts_a_token_has_seen_its_row(units):
    found = lines(units)
    paths, index = paths_of(found), iter(found.logit_index)
    for prompt, completion, targets in rows_of(units):
        for t in targets:
            seen = paths[next(index)]
            assert [found.input_ids[0][place] for place in seen] == prompt + completion[:t]
            assert [found.positions[place] for place in seen] == [*range(len(prompt) + t)]
    assert next(index, None) is None


@several
@given(units())
def test_each_row_is_in_the_line_and_weighs_one(units):
    found = lines(units)
    rows = [prompt + completion for prompt, completion, _ in rows_of(units)]
    whole = [tuple(found.input_ids[0][place] for place in path) for path in paths_of(found)]
    if not rows:
        assert found.weights == [[0]]
        return
    assert sum(found.weights[0]) == sum(map(len, rows))
    weight: dict[tuple[int, ...], int] = {}
    for ids, n in zip(whole, found.weights[0], strict=True):
        weight[ids] = weight.get(ids, 0) + n
    assert weight == {
        tuple(row[: i + 1]): sum(r[: i + 1] == row[: i + 1] for r in rows)
        for row in rows
        for i in range(len(row))
    }


@several
@given(units())
def test_no_token_is_run_twice_but_two_where_rows_part(units):
    units = [unit._replace(alone=False) for unit in units]
    rows = [prompt + completion for prompt, completion, _ in rows_of(units)]
    tokens = sum(lines(units).segment_lengths) if rows else 0
    assert nodes(rows) <= tokens <= nodes(rows) + (EVERY - 1) * max(0, len(rows) - 1)


@several
@given(units())
def test_segments_are_long_but_at_a_prompts_end(units):
    """Rows part at every EVERY-th place, from the start or a prompt's end."""
    found = lines(units)
    ends = {0, *(len(unit.prompt) for unit in units)}
    if not units:
        return
    for s, parent in enumerate(found.parents):
        first = sum(found.segment_lengths[:s])
        if parent >= 0:
            assert any((found.positions[first] - end) % EVERY == 0 for end in ends)


def test_rows_that_are_alone_share_their_prompt_only():
    """Where ids are not all there is: images have the same ones."""
    two = [UnitIds([5, 5, 5, 5], [[1, 2, 3, 4], [1, 2, 3, 4]], [[0], [0]], alone=True)] * 2
    found = lines(two)
    assert found.segment_lengths == [4, 4, 4] * 2
    assert found.parents == [-1, 0, 0, -1, 3, 3]
    assert found.input_ids[0] == [5, 5, 5, 5, 1, 2, 3, 4, 1, 2, 3, 4] * 2


def test_a_system_prompt_a_shot_and_a_prompt_by_hand():
    system, shot = [*range(100, 109)], [*range(200, 206)]
    units = [
        UnitIds(
            [*system, *shot, 1, 2],
            [[3, 4, 5, 6], [3, 4, 5, 7], [8]],
            [range(5), range(5), range(2)],
        ),
        UnitIds([*system, *shot, 9], [[10], []], [range(2), range(1)]),
        UnitIds([*system, 11], [[12]], [range(1)]),
    ]
    found = lines(units)
    assert found.segment_lengths == [9, 6, 2, 3, 1, 1, 1, 1, 1, 1, 1]
    assert found.parents == [-1, 0, 1, 2, 3, 3, 2, 1, 7, 0, 9]
    assert found.positions[17:23] == [17, 18, 19, 20, 20, 17]
    assert found.input_ids[0][17:23] == [3, 4, 5, 6, 7, 8]
    assert found.weights[0] == [6] * 9 + [5] * 6 + [3, 3] + [2] * 3 + [1] * 3 + [2, 1] + [1, 1]
    assert found.logit_index == [
        *[16, 17, 18, 19, 20], *[16, 17, 18, 19, 21], *[16, 22], *[23, 24], 23, 25,
    ]  # fmt: skip
    # two tokens are too few for a branch
    found = lines([UnitIds([1], [[3, 4, 6], [3, 4, 7]], [range(4)] * 2)])
    assert found.segment_lengths == [1, 3, 3]


@several
@given(st.lists(ids, min_size=1, max_size=8), st.booleans())
def test_shares_are_those_of_every_pair(rows, ends):
    found = shared([key_of(row) for row in rows], ends=ends)
    assert sorted(found.order) == [*range(len(rows))]
    for (a, b), cut in zip(pairwise(found.order), found.cuts, strict=True):
        both = zip(rows[a], rows[b], strict=False)
        common = next(
            (i for i, (x, y) in enumerate(both) if x != y), min(map(len, (rows[a], rows[b])))
        )
        assert cut == (len(rows[a]) if ends and common == len(rows[a]) else common - common % EVERY)


@several
@given(st.lists(ids, min_size=1, max_size=8))
def test_branches_hold_each_row_once_behind_what_it_shares(rows):
    found = branches(shared([key_of(row) for row in rows], ends=False))
    leaves = [child for branch in found for child in branch.children if isinstance(child, int)]
    assert sorted(leaves) == [*range(len(rows))]
    assert found[-1].depth == 0
    seen: dict[int, set[int]] = {}
    for branch in found:
        below = [seen[id(c)] if not isinstance(c, int) else {c} for c in branch.children]
        seen[id(branch)] = set().union(*below)
        assert len({tuple(rows[row][: branch.depth]) for row in seen[id(branch)]}) == 1
        assert branch.first == min(seen[id(branch)]) == min(map(first_row, branch.children))
        assert branch is found[-1] or len(branch.children) > 1


def test_long_rows_in_little_time():
    """512 rows of 2,000 tokens behind a system prompt of 1,000: some 30 ms; a tree of single tokens
    takes a second."""
    import time

    rng = random.Random(0)
    draw = lambda n: [rng.randrange(150_000) for _ in range(n)]  # noqa: E731
    system, units = draw(1000), []
    for _ in range(64):
        units.append(UnitIds(system + draw(500), [draw(500) for _ in range(8)], [range(501)] * 8))
    start = time.process_time()
    LAYOUT.sharing([unit.prompt for unit in units], [unit.completions for unit in units])
    assert time.process_time() - start < 2
