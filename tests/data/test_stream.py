"""Prompts one by one: the loader's order, the ledger, and states that resume exactly."""

import tracemalloc

import datasets
import pytest
import torch

from rloo_fast.data.ledger import Fate, Ledger
from rloo_fast.data.loader import train_loader
from rloo_fast.data.row_errors import UnreadableRow
from rloo_fast.data.stream import prompt_stream

ROWS = [{"prompt": f"w{i}", "n": i} for i in range(17)]


def map_style():
    return datasets.Dataset.from_list(ROWS)


def streamed():
    return map_style().to_iterable_dataset(num_shards=3)


def stream_of(dataset, **options):
    options = {"prompts_per_batch": 3, "shuffle": True, "seed": 5} | options
    return prompt_stream(dataset, **options)


def numbers_and_rows(taken):
    return [(number, row["n"]) for number, row in taken]


@pytest.mark.parametrize("make", [map_style, streamed])
@pytest.mark.parametrize("shuffle", [True, False])
def test_the_order_is_the_loaders_over_epochs(make, shuffle):
    sizes = {"prompts_per_batch": 3, "micro_steps_per_batch": 1, "micro_steps_per_update": 1}
    loader = train_loader(make(), **sizes, shuffle=shuffle, seed=5)
    expected, epoch = [], 0
    while len(expected) < 40:
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        for item in loader:
            expected += [row["n"] for row in item]
            if len(expected) >= 40:
                break
        epoch += 1
    stream = stream_of(make(), shuffle=shuffle)
    taken = [pair for size in (1, 7, 2, 20, 10) for pair in stream.take(size)]
    assert numbers_and_rows(taken) == list(enumerate(expected[:40]))


@pytest.mark.parametrize("make", [map_style, streamed])
@pytest.mark.parametrize("num_taken", [0, 1, 14, 15, 16, 40])
def test_a_loaded_state_goes_on_with_the_same_prompts(make, num_taken):
    stream = stream_of(make())
    stream.take(num_taken)
    state = stream.state_dict()
    after = numbers_and_rows(stream.take(21))
    resumed = stream_of(make())
    resumed.load_state_dict(state)
    assert numbers_and_rows(resumed.take(21)) == after
    stream.load_state_dict(state)  # as after a step that failed
    assert numbers_and_rows(stream.take(21)) == after


@pytest.mark.parametrize("make", [map_style, streamed])
def test_prompts_that_are_not_finished_are_found_again(make):
    stream = stream_of(make())
    taken = dict(numbers_and_rows(stream.take(40)))
    stream.mark(range(20), Fate.TRAINED)
    stream.mark([20, 22], Fate.QUEUED)
    resumed = stream_of(make())
    resumed.load_state_dict(stream.state_dict())
    unfinished = resumed.ledger.unfinished()
    assert unfinished == list(range(20, 40))
    again = numbers_and_rows(resumed.again([39, 20, 33]))
    assert again == [(n, taken[n]) for n in (20, 33, 39)]
    assert numbers_and_rows(resumed.take(9)) == numbers_and_rows(stream.take(9))


def test_worker_processes_read_the_same_and_leave_the_random_state_alone():
    alone, state = stream_of(map_style()), torch.get_rng_state()
    others = stream_of(map_style(), num_workers=2)
    for size in (4, 9, 20):
        assert numbers_and_rows(others.take(size)) == numbers_and_rows(alone.take(size))
    others.load_state_dict(alone.state_dict())
    assert numbers_and_rows(others.take(5)) == numbers_and_rows(alone.take(5))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_prompt_that_is_finished_stays_so():
    ledger = Ledger()
    assert [ledger.draw(), ledger.draw()] == [0, 1]
    ledger.mark([0], Fate.QUEUED)
    ledger.mark([0], Fate.TRAINED)
    ledger.mark([1], Fate.REPLACED)
    assert ledger.counts() == {
        Fate.IN_FLIGHT: 0, Fate.QUEUED: 0, Fate.TRAINED: 1, Fate.REPLACED: 1,
    }  # fmt: skip
    with pytest.raises(AssertionError, match="prompt 1 is REPLACED, now TRAINED"):
        ledger.mark([1], Fate.TRAINED)


def test_a_state_takes_as_many_bytes_as_prompts_were_drawn_also_while_it_is_made():
    ledger, count = Ledger(), 200_000
    for _ in range(count):
        ledger.draw()
    ledger.mark([7], Fate.TRAINED)
    tracemalloc.start()
    state = ledger.state_dict()  # of every step
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < count
    assert state["fates"].nbytes == count
    ledger.mark([8], Fate.TRAINED)
    resumed = Ledger()
    resumed.load_state_dict(state)
    assert [resumed.fate(n).name for n in (7, 8)] == ["TRAINED", "IN_FLIGHT"]
    assert len(resumed) == count
    resumed.load_state_dict(Ledger().state_dict())
    assert len(resumed) == 0


def test_another_dataset_is_refused():
    stream = stream_of(map_style())
    other = stream_of(map_style().select(range(9)))
    with pytest.raises(ValueError, match="rows of train_dataset = 17, but now it is 9: resume"):
        other.load_state_dict(stream.state_dict())


def test_a_stream_that_breaks_or_is_empty_says_so_in_a_row():
    def rows():
        yield from ROWS[:4]
        raise OSError("gone")

    stream = stream_of(datasets.IterableDataset.from_generator(rows), shuffle=False)
    *good, last = stream.take(9)
    assert numbers_and_rows(good) == [(n, n) for n in range(4)]
    assert isinstance(last.row, UnreadableRow)
    assert "OSError: gone" in str(last.row)

    nothing = datasets.IterableDataset.from_generator(lambda: iter(()))
    (only,) = stream_of(nothing, shuffle=False).take(2)
    assert "train_dataset is empty" in str(only.row)


def test_rows_left_out_of_a_stream_are_counted_once_over_a_resume():
    from tests.data.test_skipping import skipping

    rows = [{"prompt": "" if i % 4 == 1 else f"w{i}", "n": i} for i in range(10)]
    data = datasets.Dataset.from_list(rows).to_iterable_dataset()

    def fresh():
        skip = skipping()
        return skip, stream_of(data, shuffle=False, skipping=skip)

    skip, stream = fresh()
    stream.take(12)
    state = stream.state_dict()
    skip_resumed, resumed = fresh()
    resumed.load_state_dict(state)
    assert numbers_and_rows(resumed.take(5)) == numbers_and_rows(stream.take(5))
    assert skip_resumed.num_skipped == skip.num_skipped


def test_prompts_without_signal_rest_and_come_back():
    stream = stream_of(map_style(), curriculum=0.25, prompts_per_batch=1)
    easy, times = {0, 3, 8, 11}, dict.fromkeys(range(17), 0)
    while stream.epoch < 400:
        ((number, row),) = stream.take(1)
        times[row["n"]] += 1
        stream.note_signal(number, has_signal=row["n"] not in easy)
        stream.mark([number], Fate.TRAINED)
    for n, count in times.items():
        assert 70 <= count <= 130 if n in easy else count in (400, 401), (n, count)


def test_a_resumed_curriculum_goes_on_in_the_middle_of_an_epoch():
    def step(stream):
        ((number, row),) = stream.take(1)
        stream.note_signal(number, has_signal=row["n"] % 3 != 0)
        stream.mark([number], Fate.REPLACED)
        return row["n"]

    stream = stream_of(map_style(), curriculum=0.5, prompts_per_batch=2)
    for _ in range(45):
        step(stream)
    resumed = stream_of(map_style(), curriculum=0.5, prompts_per_batch=2)
    resumed.load_state_dict(stream.state_dict())
    assert [step(resumed) for _ in range(60)] == [step(stream) for _ in range(60)]
