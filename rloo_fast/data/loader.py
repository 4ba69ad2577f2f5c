"""Dataset -> rows of each optimizer step, in an order that a resumed run repeats.

The loader yields one item per optimizer step: the generation batches that start in that step, each
a list of dataset rows (none in a step that only reuses earlier completions). Every process reads
the same items and takes its own completions from them. Where prompts come from a PromptStream, the
loader still says how many generation batches begin in a step, and its rows are empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, repeat
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, Sampler

from .checks import check_fills_a_batch
from .order import epoch_order
from .row_errors import ReadRows, UnreadableRow, read
from .row_functions import Row
from .skipping import Skipping


class StepSampler(Sampler[list[int]]):
    """Dataset rows of every optimizer step of an epoch; the order follows from (seed, epoch).

    A generation batch of P prompts lasts `micro_steps_per_batch` micro-steps, an optimizer step
    takes `micro_steps_per_update`. Prompts that do not fill a generation batch wait for the next
    epoch, as in TRL. The rows `left_out` are taken out of the order of all.
    """

    def __init__(
        self,
        num_rows: int,
        prompts_per_batch: int,
        micro_steps_per_batch: int,
        micro_steps_per_update: int,
        *,
        shuffle: bool,
        seed: int,
        left_out: frozenset[int] = frozenset(),
    ):
        self.num_rows, self.prompts_per_batch = num_rows, prompts_per_batch
        self.left_out = left_out
        self.micro_steps_per_batch = micro_steps_per_batch
        self.micro_steps_per_update = micro_steps_per_update
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def num_batches(self) -> int:
        return (self.num_rows - len(self.left_out)) // self.prompts_per_batch

    def __len__(self) -> int:
        micro_steps = self.num_batches * self.micro_steps_per_batch
        return -(-micro_steps // self.micro_steps_per_update)

    def __iter__(self) -> Iterator[list[int]]:
        how = {"shuffle": self.shuffle, "seed": self.seed, "left_out": self.left_out}
        order = epoch_order(self.num_rows, self.epoch, **how)
        for update in range(len(self)):
            first = update * self.micro_steps_per_update
            last = min(
                first + self.micro_steps_per_update, self.num_batches * self.micro_steps_per_batch
            )
            begin = -(-first // self.micro_steps_per_batch)
            end = -(-last // self.micro_steps_per_batch)
            yield order[begin * self.prompts_per_batch : end * self.prompts_per_batch]


class NoRows:
    """As many empty rows as a dataset has, or without an end, where nobody reads them."""

    def __init__(self, num_rows: int | None = None):
        self.num_rows = num_rows

    def __len__(self) -> int:
        assert self.num_rows is not None
        return self.num_rows

    def __getitems__(self, numbers: Sequence[int]) -> list[Row]:
        return [{} for _ in numbers]

    def __iter__(self) -> Iterator[Row]:
        return repeat({})

    def set_epoch(self, epoch: int) -> None:
        pass


class StepLoader(DataLoader):
    """DataLoader over a StepSampler that passes the epoch on."""

    def __init__(self, dataset: Any, sampler: StepSampler, num_workers: int):
        super().__init__(dataset, batch_sampler=sampler, collate_fn=_same, num_workers=num_workers)
        self.step_sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        self.step_sampler.set_epoch(epoch)


class StreamedSteps(IterableDataset):
    """The same for a streamed dataset: one endless pass, reshuffled whenever the stream ends.

    If the stream breaks, the last item ends with an UnreadableRow.
    """

    def __init__(
        self,
        dataset: Any,
        prompts_per_batch: int,
        micro_steps_per_batch: int,
        micro_steps_per_update: int,
        skipping: Skipping | None = None,
    ):
        self.dataset, self.prompts_per_batch = dataset, prompts_per_batch
        self.micro_steps_per_batch = micro_steps_per_batch
        self.micro_steps_per_update = micro_steps_per_update
        self.skipping = skipping

    def _rows(self) -> Iterator[Row | UnreadableRow]:
        epoch = 0
        while True:
            self.dataset.set_epoch(epoch)
            row, rows = None, read(self.dataset)
            for row in rows if self.skipping is None else self.skipping.usable(rows, "train"):
                yield row
            if isinstance(row, UnreadableRow):
                return
            if row is None:
                which = "" if self.skipping is None else " that can be used"
                yield UnreadableRow(
                    f"train_dataset is empty: the stream ended without a single row{which}."
                )
                return
            epoch += 1

    def __iter__(self) -> Iterator[list[Row | UnreadableRow]]:
        if self.skipping is not None:
            self.skipping.begin("train")
        rows, micro_step = self._rows(), 0
        while True:
            step: list[Row | UnreadableRow] = []
            for _ in range(self.micro_steps_per_update):
                if micro_step % self.micro_steps_per_batch == 0:
                    step += islice(rows, self.prompts_per_batch)
                micro_step += 1
            yield step
            if step and isinstance(step[-1], UnreadableRow):
                return


def train_loader(
    dataset: Any, *, prompts_per_batch: int, micro_steps_per_batch: int,
    micro_steps_per_update: int, shuffle: bool, seed: int, num_workers: int = 0,
    skipping: Skipping | None = None, with_rows: bool = True,
) -> DataLoader:  # fmt: skip
    """One item per optimizer step, without the rows that `skipping` leaves out.

    `with_rows=False`: as many items, of as many rows, all of them empty; nothing is read.
    Raises ValueError if no generation batch can be filled. What the dataset raises while it is
    read is in an item, as an UnreadableRow.
    """
    import datasets

    sizes = (prompts_per_batch, micro_steps_per_batch, micro_steps_per_update)
    if isinstance(dataset, datasets.IterableDataset):
        if not with_rows:
            return DataLoader(StreamedSteps(NoRows(), *sizes), batch_size=None, collate_fn=_same)
        if shuffle:
            dataset = dataset.shuffle(seed=seed)
        steps = StreamedSteps(dataset, *sizes, skipping)
        return DataLoader(steps, batch_size=None, collate_fn=_same)
    left_out: frozenset[int] = frozenset()
    if skipping is not None:
        left_out = skipping.left_out(dataset, "train_dataset")
        skipping.begin("train", left_out)
    check_fills_a_batch(len(dataset) - len(left_out), prompts_per_batch)
    sampler = StepSampler(len(dataset), *sizes, shuffle=shuffle, seed=seed, left_out=left_out)
    if not with_rows:
        return StepLoader(NoRows(len(dataset)), sampler, 0)
    return StepLoader(ReadRows(dataset), sampler, num_workers)


def generation_batches(rows: list[Row], prompts_per_batch: int) -> Iterator[list[Row]]:
    """The rows of an optimizer step -> those of each generation batch that begins in it."""
    for start in range(0, len(rows), prompts_per_batch):
        yield rows[start : start + prompts_per_batch]


def _same(rows: Any) -> Any:
    return rows


class EvalSampler(Sampler[list[int]]):
    """Consecutive prompts, `prompts_per_batch` at a time, the last batch shorter; without the rows
    `left_out`."""

    def __init__(
        self, num_rows: int, prompts_per_batch: int, left_out: frozenset[int] = frozenset()
    ):
        self.rows = [row for row in range(num_rows) if row not in left_out]
        self.prompts_per_batch = prompts_per_batch

    def __len__(self) -> int:
        return -(-len(self.rows) // self.prompts_per_batch)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.rows), self.prompts_per_batch):
            yield self.rows[start : start + self.prompts_per_batch]


class EvalStream(IterableDataset):
    """The rows of a streamed evaluation set, as StreamedSteps reads those to train on; once."""

    def __init__(self, dataset: Any, skipping: Skipping | None):
        self.dataset, self.skipping = dataset, skipping

    def __iter__(self) -> Iterator[Row | UnreadableRow]:
        rows = read(self.dataset)
        if self.skipping is None:
            return rows
        self.skipping.begin("eval")
        return self.skipping.usable(rows, "eval")


def eval_loader(
    dataset: Any,
    *,
    prompts_per_batch: int,
    num_workers: int = 0,
    skipping: Skipping | None = None,
) -> DataLoader:
    """Every prompt of an evaluation set once, in order, but those that `skipping` leaves out."""
    import datasets

    if isinstance(dataset, datasets.IterableDataset):
        stream: Any = EvalStream(dataset, skipping)
        return DataLoader(stream, batch_size=prompts_per_batch, collate_fn=_same)
    left_out: frozenset[int] = frozenset()
    if skipping is not None:
        left_out = skipping.left_out(dataset, "eval_dataset")
        skipping.begin("eval", left_out)
    sampler = EvalSampler(len(dataset), prompts_per_batch, left_out)
    source: Any = ReadRows(dataset)  # torch asks for __getitem__ by its types only
    return DataLoader(source, batch_sampler=sampler, collate_fn=_same, num_workers=num_workers)
