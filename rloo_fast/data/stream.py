"""The prompts of a run one by one, for sources of generation batches that need more of them than
the Trainer's loader gives to a step, or earlier."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from .epochs import AnyRow, Epochs, MapEpochs, StreamedEpochs
from .ledger import FINAL, Fate, Ledger
from .row_errors import UnreadableRow
from .skipping import Skipping


class Numbered(NamedTuple):
    """A dataset row that has been drawn."""

    number: int  # of the draw in the run, from 0
    row: AnyRow  # UnreadableRow: the dataset raised; RowTokenizer raises it in the step


class PromptStream:
    """Prompts in the order of the epochs, without an end; the same on every process.

        stream.take(n)            the next n prompts, in flight
        stream.ledger.mark(...)   what becomes of them
        stream.again(numbers)     the rows of prompts that are not finished, as after a resume

    The order is that of the Trainer's loader: it follows from (seed, epoch), and prompts that do
    not fill a generation batch wait for the next epoch. With a curriculum some rest in an epoch.
    If a streamed dataset breaks, or is empty, `take` ends with an UnreadableRow, and may give
    fewer than n.

    state_dict() is exact: a stream that loads it goes on with the same prompts. It does not hold
    rows: those of unfinished prompts are read again. A streamed dataset is read again up to where
    it was, as by the Trainer's loader.
    """

    def __init__(self, epochs: Epochs):
        self.epochs, self.ledger = epochs, Ledger()
        self.epoch, self.position = 0, 0  # of the next prompt
        self._places: dict[int, tuple[int, int]] = {}  # number: (epoch, place), of the unfinished

    def take(self, num_prompts: int) -> list[Numbered]:
        taken: list[Numbered] = []
        while len(taken) < num_prompts:
            found = self.epochs.take(self.epoch, self.position, num_prompts - len(taken))
            if not found and not self.position:
                message = "train_dataset is empty: the stream ended without a row that can be used."
                found = [(0, UnreadableRow(message))]
            for place, row in found:
                number = self.ledger.draw()
                self._places[number] = self.epoch, place
                taken.append(Numbered(number, row))
            self.position += len(found)
            if taken and isinstance(taken[-1].row, UnreadableRow):
                break
            if not found:
                self.epoch, self.position = self.epoch + 1, 0
        return taken

    def again(self, numbers: Iterable[int]) -> list[Numbered]:
        """Prompts that were taken before and are not finished, with their rows."""
        by_epoch: dict[int, list[int]] = {}
        for number in numbers:
            by_epoch.setdefault(self._places[number][0], []).append(number)
        rows: list[Numbered] = []
        for epoch, some in by_epoch.items():
            found = self.epochs.at(epoch, [self._places[number][1] for number in some])
            rows += [Numbered(*pair) for pair in zip(some, found, strict=True)]
        return sorted(rows)

    def mark(self, numbers: Iterable[int], fate: Fate) -> None:
        """The ledger's, which forgets the places of prompts that are finished."""
        numbers = list(numbers)
        self.ledger.mark(numbers, fate)
        if fate in FINAL:
            for number in numbers:
                del self._places[number]

    def note_signal(self, number: int, *, has_signal: bool) -> None:
        """For the curriculum, before the prompt is marked as finished."""
        if self.epochs.curriculum is not None:
            self.epochs.curriculum.note(self._places[number][1], has_signal=has_signal)

    def state_dict(self) -> dict[str, Any]:
        places = [(number, *place) for number, place in self._places.items()]
        return {
            "epoch": self.epoch,
            "position": self.position,
            "places": places,
            "ledger": self.ledger.state_dict(),
            "epochs": self.epochs.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the dataset, or how it is drawn from, is another one."""
        self.epochs.load_state_dict(state["epochs"])
        self.epoch, self.position = state["epoch"], state["position"]
        self._places = {number: (epoch, place) for number, epoch, place in state["places"]}
        self.ledger.load_state_dict(state["ledger"])


def prompt_stream(
    dataset: Any,
    *,
    prompts_per_batch: int,
    shuffle: bool,
    seed: int,
    num_workers: int = 0,
    skipping: Skipping | None = None,
    curriculum: float | None = None,
) -> PromptStream:
    """The stream of a map-style or streamed dataset. Arguments as those of `train_loader`;
    `curriculum`: see Curriculum, of map-style data.

    Raises ValueError if the rows of an epoch do not fill a generation batch.
    """
    import datasets

    if isinstance(dataset, datasets.IterableDataset):
        assert curriculum is None, curriculum
        return PromptStream(StreamedEpochs(dataset, shuffle=shuffle, seed=seed, skipping=skipping))
    return PromptStream(
        MapEpochs(
            dataset,
            prompts_per_batch=prompts_per_batch,
            shuffle=shuffle,
            seed=seed,
            num_workers=num_workers,
            skipping=skipping,
            curriculum=curriculum,
        )
    )
