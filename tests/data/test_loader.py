"""Which prompts each optimizer step starts with."""

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rloo_fast.data.loader import EvalSampler, StepSampler, StreamedSteps, train_loader
from rloo_fast.data.row_errors import UnreadableRow
from rloo_fast.step.buffer import RolloutBuffer
from tests.support.batches import prepared_batch

several = settings(max_examples=80, deadline=None, derandomize=True)


@st.composite
def plans(draw):
    """rows of the dataset, prompts per batch (P), micro-steps per batch and per update"""
    return {
        "num_rows": draw(st.integers(0, 40)),
        "prompts_per_batch": draw(st.integers(1, 6)),
        "micro_steps_per_batch": draw(st.integers(1, 8)),
        "micro_steps_per_update": draw(st.integers(1, 8)),
    }


def sampler_of(plan, shuffle=True, seed=3):
    return StepSampler(**plan, shuffle=shuffle, seed=seed)


@several
@given(plans())
def test_length_is_the_number_of_items(plan):
    sampler = sampler_of(plan)
    assert len(list(sampler)) == len(sampler)


@several
@given(plans())
def test_every_prompt_of_a_full_batch_appears_once_in_an_epoch(plan):
    seen = [row for item in sampler_of(plan, shuffle=False) for row in item]
    size = plan["prompts_per_batch"]
    assert seen == list(range(plan["num_rows"] // size * size))


@several
@given(plans())
def test_items_are_whole_generation_batches(plan):
    size = plan["prompts_per_batch"]
    assert all(len(item) % size == 0 for item in sampler_of(plan))


@several
@given(plans(), st.integers(1, 4))
def test_items_give_the_buffer_what_every_update_takes(plan, num_epochs):
    """No update runs short but the last of an epoch, and none finds more than it can use."""
    rows_per_micro_step, size = 2, plan["prompts_per_batch"]
    per_batch, per_update = plan["micro_steps_per_batch"], plan["micro_steps_per_update"]
    buffer = RolloutBuffer(rows_per_micro_step, per_batch, 1, seed=0)
    num_rows = rows_per_micro_step * per_batch
    for _ in range(num_epochs):
        sampler = sampler_of(plan)
        left = plan["num_rows"] // size * per_batch
        for item in sampler:
            for _ in range(len(item) // size):
                # a batch comes no earlier than the update that begins with it
                assert buffer.pending_micro_steps() < per_update
                buffer.add(blank_batch(num_rows))
            taken = sum(len(piece.rows) for piece in buffer.take(per_update)) // rows_per_micro_step
            assert taken == min(per_update, left)
            left -= taken
        assert left == 0
        assert buffer.pending_micro_steps() == 0


def blank_batch(num_rows):
    return prepared_batch([[0]] * num_rows, [[0]] * num_rows)


def order_of(epoch, num_rows=24, seed=3):
    sampler = StepSampler(num_rows, 4, 2, 2, shuffle=True, seed=seed)
    sampler.set_epoch(epoch)
    return [row for item in sampler for row in item]


def test_order_of_epoch_0_is_torch_s_random_permutation_of_the_seed():
    want = torch.randperm(24, generator=torch.Generator().manual_seed(3)).tolist()
    assert order_of(0) == want


def test_every_epoch_has_an_order_of_its_own():
    orders = [tuple(order_of(epoch)) for epoch in range(5)]
    assert len(set(orders)) == 5
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(24))}


def test_an_epoch_s_order_does_not_depend_on_those_before_it():
    sampler = StepSampler(24, 4, 2, 2, shuffle=True, seed=3)
    list(sampler)
    sampler.set_epoch(2)
    assert [row for item in sampler for row in item] == order_of(2)


def test_prompts_that_fill_no_batch_change_from_epoch_to_epoch():
    left_out = [frozenset(range(26)) - set(order_of(epoch, num_rows=26)) for epoch in range(4)]
    assert [len(rows) for rows in left_out] == [2] * 4
    assert len(set(left_out)) > 1


def rows_of(num_rows):
    return datasets.Dataset.from_dict({"prompt": [f"w{i}" for i in range(num_rows)]})


@several
@given(plans())
def test_a_stream_gives_the_same_items_as_a_dataset_in_order(plan):
    """For one epoch without an update that falls short: a stream goes on into the next one."""
    num_rows, size = plan.pop("num_rows"), plan["prompts_per_batch"]
    num_rows = max(num_rows, size)
    sampler = StepSampler(num_rows, **plan, shuffle=False, seed=0)
    micro_steps = num_rows // size * plan["micro_steps_per_batch"]
    items = iter(StreamedSteps(FakeStream(num_rows), **plan))
    for item in list(sampler)[: micro_steps // plan["micro_steps_per_update"]]:
        assert [row["number"] for row in next(items)] == item


class FakeStream:
    """Rows numbered on from epoch to epoch."""

    def __init__(self, num_rows):
        self.num_rows, self.epochs = num_rows, []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __iter__(self):
        start = self.epochs[-1] * self.num_rows
        return ({"number": n} for n in range(start, start + self.num_rows))


def test_a_stream_loses_no_row_between_its_epochs():
    stream = FakeStream(5)
    items = iter(StreamedSteps(stream, 2, 1, 1))
    assert [row["number"] for _ in range(6) for row in next(items)] == list(range(12))
    assert stream.epochs == [0, 1, 2]


def test_an_empty_stream_is_an_error_not_an_endless_loop():
    ((row,),) = StreamedSteps(FakeStream(0), 2, 1, 1)
    assert isinstance(row, UnreadableRow)
    assert "the stream ended without a single row" in str(row)


def test_loader_yields_dataset_rows_in_the_sampler_s_order():
    dataset = rows_of(12)
    sizes = {"prompts_per_batch": 4, "micro_steps_per_batch": 2, "micro_steps_per_update": 1}
    loader = train_loader(dataset, **sizes, shuffle=True, seed=3)
    loader.set_epoch(1)
    sampler = StepSampler(12, **sizes, shuffle=True, seed=3)
    sampler.set_epoch(1)
    want = [[dataset[i]["prompt"] for i in item] for item in sampler]
    assert [[row["prompt"] for row in item] for item in loader] == want
    assert [len(item) for item in want] == [4, 0, 4, 0, 4, 0]


def test_loader_of_a_stream():
    loader = train_loader(
        rows_of(8).to_iterable_dataset(), prompts_per_batch=4, micro_steps_per_batch=1,
        micro_steps_per_update=1, shuffle=False, seed=0,
    )  # fmt: skip
    items = iter(loader)
    got = [[row["prompt"] for row in next(items)] for _ in range(3)]
    assert got == [["w0", "w1", "w2", "w3"], ["w4", "w5", "w6", "w7"], ["w0", "w1", "w2", "w3"]]


def test_too_few_prompts_for_one_batch():
    with pytest.raises(ValueError, match="has 3 prompts, but a generation batch takes 4"):
        train_loader(
            rows_of(3), prompts_per_batch=4, micro_steps_per_batch=1, micro_steps_per_update=1,
            shuffle=True, seed=0,
        )  # fmt: skip


@several
@given(st.integers(0, 30), st.integers(1, 7))
def test_evaluation_reads_every_prompt_once_in_order(num_rows, prompts_per_batch):
    sampler = EvalSampler(num_rows, prompts_per_batch)
    items = list(sampler)
    assert len(items) == len(sampler)
    assert [row for item in items for row in item] == list(range(num_rows))
    assert all(len(item) == prompts_per_batch for item in items[:-1])
