"""The rollout buffer: which rows each optimizer step takes, for any ratio of its sizes."""

import dataclasses
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rloo_fast.records import BatchSizes, PolicyRows
from rloo_fast.step.buffer import RolloutBuffer
from tests.support.batches import prepared_batch

several = settings(max_examples=80, deadline=None, derandomize=True)


def make_batch(num_rows, num_generations, tag=0, **fields):
    """Rows that can be told apart: prompt i holds the number of its group."""
    return prepared_batch(
        prompt_ids=[[100 * tag + row // num_generations] for row in range(num_rows)],
        completion_ids=[[row] for row in range(num_rows)],
        scores=torch.arange(num_rows, dtype=torch.float),
        num_generations=num_generations,
        whole_groups=num_rows % num_generations == 0,
        **fields,
    )


@st.composite
def sizes(draw):
    """rows per micro-step, micro-steps per pass (S), passes (mu), micro-steps per update (GA), K"""
    k = draw(st.integers(1, 4))
    return {
        "rows": k * draw(st.integers(1, 3)),
        "per_pass": draw(st.integers(1, 4)),
        "passes": draw(st.integers(1, 3)),
        "per_update": draw(st.integers(1, 9)),
        "k": k,
        "batches": draw(st.integers(1, 3)),
    }


def filled(s, seed=7, batches=None):
    buffer = RolloutBuffer(s["rows"], s["per_pass"], s["passes"], seed)
    for tag in range(s["batches"] if batches is None else batches):
        buffer.add(make_batch(s["rows"] * s["per_pass"], s["k"], tag))
    return buffer


def take_all(buffer, s):
    """Pieces of every update until nothing is left, as (batch, rows)."""
    updates = []
    while pieces := buffer.take(s["per_update"]):
        updates.append(
            [(piece.batch.generation.prompt_ids[0][0] // 100, piece.rows) for piece in pieces]
        )
    return updates


@several
@given(sizes())
def test_every_row_once_per_pass(s):
    updates = take_all(filled(s), s)
    for tag in range(s["batches"]):
        used = [row for pieces in updates for batch, rows in pieces if batch == tag for row in rows]
        size = s["rows"] * s["per_pass"]
        assert len(used) == size * s["passes"]
        for start in range(0, len(used), size):  # one pass after another
            assert sorted(used[start : start + size]) == list(range(size))


@several
@given(sizes())
def test_every_update_but_the_last_is_full(s):
    updates = [sum(len(rows) for _, rows in pieces) for pieces in take_all(filled(s), s)]
    full = s["rows"] * s["per_update"]
    total = s["rows"] * s["per_pass"] * s["passes"] * s["batches"]
    assert updates == [full] * (total // full) + ([total % full] if total % full else [])


@several
@given(sizes())
def test_groups_stay_whole(s):
    for pieces in take_all(filled(s), s):
        for _, rows in pieces:
            groups = [rows[start : start + s["k"]] for start in range(0, len(rows), s["k"])]
            assert all(g == list(range(g[0], g[0] + s["k"])) for g in groups)
            assert all(g[0] % s["k"] == 0 for g in groups)


@several
@given(sizes())
def test_a_piece_is_of_one_batch_and_one_pass(s):
    """Batches in the order in which they came; within an update no row of a piece twice."""
    updates = take_all(filled(s), s)
    order = [batch for pieces in updates for batch, _ in pieces]
    assert order == sorted(order)
    assert all(len(set(rows)) == len(rows) for pieces in updates for _, rows in pieces)


@several
@given(sizes(), st.integers(0, 12))
def test_a_state_taken_midway_gives_the_same_pieces(s, steps):
    buffer = filled(s)
    for _ in range(steps):
        buffer.take(s["per_update"])
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    file.seek(0)
    resumed = filled(s, batches=0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.pending_micro_steps() == buffer.pending_micro_steps()
    assert take_all(resumed, s) == take_all(buffer, s)
    assert resumed.num_added == buffer.num_added


def test_a_state_keeps_what_the_sampler_said(tmp_path):
    said = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    buffer = RolloutBuffer(2, 2, 1, seed=0)
    buffer.add(make_batch(4, 2, sampler_logps=said))
    buffer.take(1)
    torch.save(buffer.state_dict(), tmp_path / "state.pt")
    resumed = RolloutBuffer(2, 2, 1, seed=0)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    [piece] = resumed.take(1)
    assert torch.equal(piece.batch.generation.sampler_logps, said)


@several
@given(sizes())
def test_pending_micro_steps_are_those_that_can_be_taken(s):
    buffer = filled(s)
    waiting = [buffer.pending_micro_steps()]
    while pieces := buffer.take(s["per_update"]):
        waiting.append(buffer.pending_micro_steps())
        taken = sum(len(piece.rows) for piece in pieces) // s["rows"]
        assert waiting[-2] - waiting[-1] == taken
    assert waiting[-1] == 0


def test_a_state_keeps_every_field(tmp_path):
    """Whatever fields the records have: none can be left out of a checkpoint."""
    batch = make_batch(
        4,
        2,
        sampler_logps=torch.randn(4),
        token_versions=torch.tensor([3, 1, 3, 2], dtype=torch.int32),
        inputs=[{"pixel_values": torch.randn(2, 3)}] * 4,
        strand_ids=[[[7], [8, 9]], [[5]], [[6]], [[4, 4]]],
        counted=[[[0], []], [[0]], [[0]], [[1]]],
        weights_version=3,
        sizes=BatchSizes(7, 9, 2.5),
        prepared={
            "on_policy": False,
            "ref_logps": torch.randn(4),
            "old_logps": torch.randn(4),
            "old_entropy": torch.rand(4),
            "token_entropy": torch.rand(4),
            "advantages": torch.randn(4),
            "policy_rows": PolicyRows(*(torch.randn(4) for _ in dataclasses.fields(PolicyRows))),
        },
    )
    buffer, resumed = RolloutBuffer(2, 2, 1, seed=0), RolloutBuffer(2, 2, 1, seed=0)
    buffer.add(batch)
    torch.save(buffer.state_dict(), tmp_path / "state.pt")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    (_, kept), = resumed.queue  # fmt: skip
    assert_same(kept, batch)


def assert_same(found, wanted):
    assert type(found) is type(wanted)
    if dataclasses.is_dataclass(wanted):
        for field in dataclasses.fields(wanted):
            assert getattr(wanted, field.name) is not None, field.name
            assert_same(getattr(found, field.name), getattr(wanted, field.name))
    elif isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted)
    elif isinstance(wanted, list):
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert_same(found[name], value)
    else:
        assert found == wanted


def orders(seed, num_batches=1, passes=1):
    buffer = RolloutBuffer(2, 16, passes, seed)
    for _ in range(num_batches):
        buffer.add(make_batch(32, 2))
    return [tuple(buffer.take(16)[0].rows) for _ in range(num_batches * passes)]


def test_passes_batches_and_seeds_have_orders_of_their_own():
    assert len({*orders(0, num_batches=2, passes=3), *orders(1)}) == 7


def test_the_same_seed_gives_the_same_order():
    assert orders(5, 2, 2) == orders(5, 2, 2)


def test_a_group_larger_than_a_micro_step_is_split():
    """K = 4 rows, 2 per micro-step: an update of one micro-step takes half a group."""
    buffer = RolloutBuffer(2, 4, 1, seed=0)
    buffer.add(make_batch(8, 4))
    halves = [buffer.take(1)[0].rows for _ in range(4)]
    assert sorted(row for rows in halves for row in rows) == list(range(8))


def test_only_what_is_still_to_be_used_becomes_off_policy():
    buffer = RolloutBuffer(2, 2, 1, seed=0)
    buffer.add(make_batch(4, 2))
    buffer.add(make_batch(4, 2))
    [used] = buffer.take(2)
    buffer.mark_off_policy()
    [(_, waiting)] = buffer.queue
    assert (used.batch.on_policy, waiting.on_policy) == (True, False)


def test_what_a_step_found_out_takes_the_place_of_its_batch():
    buffer = RolloutBuffer(2, 2, 1, seed=0)
    buffer.add(make_batch(4, 2))
    buffer.add(make_batch(4, 2, tag=1))
    [piece] = buffer.take(1)
    known = dataclasses.replace(piece.batch, old_logps=torch.arange(4.0))
    buffer.replace([piece._replace(batch=known)])
    assert [batch.old_logps is None for _, batch in buffer.queue] == [False, True]
    assert buffer.take(1)[0].batch is known


def test_a_state_of_other_sizes_is_refused():
    buffer = RolloutBuffer(2, 4, 1, seed=0)
    buffer.add(make_batch(8, 2))
    with pytest.raises(ValueError, match=r"\[2, 4, 1\], but now they are \[4, 2, 1\]"):
        RolloutBuffer(4, 2, 1, seed=0).load_state_dict(buffer.state_dict())
