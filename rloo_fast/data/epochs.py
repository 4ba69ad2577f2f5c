"""A dataset read epoch by epoch, in the order of the Trainer's loader: see PromptStream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from .checks import check_fills_a_batch
from .curriculum import Curriculum
from .order import epoch_order
from .row_errors import ReadRows, UnreadableRow, read
from .row_functions import Row
from .skipping import Skipping

AnyRow = Row | UnreadableRow


class Epochs(Protocol):
    """A dataset, epoch by epoch. `place`: where a row is found again."""

    @property
    def curriculum(self) -> Curriculum | None: ...

    def take(self, epoch: int, start: int, num_rows: int) -> list[tuple[int, AnyRow]]:
        """(place, row) of the next rows from position `start` on; fewer: the epoch ends."""
        ...

    def at(self, epoch: int, places: Sequence[int]) -> list[AnyRow]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class MapEpochs:
    """Epochs of a map-style dataset; a place is the number of a row."""

    def __init__(
        self,
        dataset: Any,
        *,
        prompts_per_batch: int,
        shuffle: bool,
        seed: int,
        num_workers: int = 0,
        skipping: Skipping | None = None,
        curriculum: float | None = None,
    ):
        left_out: frozenset[int] = frozenset()
        if skipping is not None:
            left_out = skipping.left_out(dataset, "train_dataset")
            skipping.begin("train", left_out)
        check_fills_a_batch(len(dataset) - len(left_out), prompts_per_batch)
        self.rows, self.prompts_per_batch = ReadRows(dataset), prompts_per_batch
        self.shuffle, self.seed, self.num_workers = shuffle, seed, num_workers
        self.left_out = left_out
        self.curriculum = None
        if curriculum is not None:
            self.curriculum = Curriculum(len(dataset), curriculum, seed)
        self._resting: frozenset[int] = frozenset()  # by the curriculum, in the newest epoch
        self._epoch, self._order = -1, list[int]()
        self._workers: tuple[int, int, Iterator[Any]] | None = None  # (epoch, position, rows)

    def take(self, epoch: int, start: int, num_rows: int) -> list[tuple[int, AnyRow]]:
        self._begin(epoch)
        places = self._order[start : start + num_rows]
        if not places:
            return []
        if not self.num_workers:
            return list(zip(places, self.rows.__getitems__(places), strict=True))
        if self._workers is None or self._workers[:2] != (epoch, start):
            self._workers = (epoch, start, self._read_ahead(self._order[start:]))
        ahead = self._workers[2]
        rows = [next(ahead)[0] for _ in places]
        self._workers = (epoch, start + len(places), ahead)
        return list(zip(places, rows, strict=True))

    def at(self, epoch: int, places: Sequence[int]) -> list[AnyRow]:
        return self.rows.__getitems__(places)

    def _begin(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        if self.curriculum is not None:
            order = self._order_of(epoch, self.left_out)
            self._resting = self.curriculum.resting(epoch, order, self.prompts_per_batch)
        self._set_order(epoch)

    def _set_order(self, epoch: int) -> None:
        order = self._order_of(epoch, self.left_out | self._resting)
        self._epoch, self._order = epoch, order[: len(order) - len(order) % self.prompts_per_batch]

    def _order_of(self, epoch: int, left_out: frozenset[int]) -> list[int]:
        how = {"shuffle": self.shuffle, "seed": self.seed, "left_out": left_out}
        return epoch_order(len(self.rows), epoch, **how)

    def _read_ahead(self, places: list[int]) -> Iterator[Any]:
        source: Any = self.rows  # torch asks for __getitem__ by its types only
        loader = DataLoader(
            source,
            batch_sampler=[[place] for place in places],
            collate_fn=_same,
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(self.seed),  # not torch's global one
        )
        return iter(loader)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"sizes": self._sizes(), "begun": self._epoch}
        if self.curriculum is not None:
            state["curriculum"] = self.curriculum.state_dict()
            state["resting"] = torch.tensor(sorted(self._resting), dtype=torch.int64)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _check_sizes(state, self._sizes())
        self._workers = None
        if self.curriculum is not None:
            self.curriculum.load_state_dict(state["curriculum"])
            self._resting = frozenset(state["resting"].tolist())
        if state["begun"] >= 0:
            self._set_order(state["begun"])
        else:
            self._epoch = -1

    def _sizes(self) -> dict[str, Any]:
        return {
            "rows of train_dataset": len(self.rows) - len(self.left_out),
            "prompts of a generation batch": self.prompts_per_batch,
            "shuffle_dataset": self.shuffle,
            "seed": self.seed,
            "curriculum": None if self.curriculum is None else self.curriculum.chance,
        }


class StreamedEpochs:
    """Epochs of a streamed dataset, reshuffled whenever it ends; a place is a position."""

    curriculum = None

    def __init__(self, dataset: Any, *, shuffle: bool, seed: int, skipping: Skipping | None = None):
        self.dataset = dataset.shuffle(seed=seed) if shuffle else dataset
        self.skipping, self.sizes = skipping, {"shuffle_dataset": shuffle, "seed": seed}
        self.skipped_before = 0  # rows left out in the epochs before
        self._open: tuple[int, int, Iterator[AnyRow]] | None = None  # (epoch, position, rows)

    def take(self, epoch: int, start: int, num_rows: int) -> list[tuple[int, AnyRow]]:
        if self._open is None or self._open[:2] != (epoch, start):
            if self.skipping is not None and start:
                self.skipping.num_skipped["train"] = self.skipped_before
            elif self.skipping is not None:
                self.skipped_before = self.skipping.num_skipped["train"]
            rows = self._rows(epoch)
            for _ in islice(rows, start):
                pass
            self._open = (epoch, start, rows)
        rows = self._open[2]
        taken = list(enumerate(islice(rows, num_rows), start))
        self._open = (epoch, start + len(taken), rows)
        return taken

    def at(self, epoch: int, places: Sequence[int]) -> list[AnyRow]:
        """Reads the dataset from its start once more."""
        skipped = None if self.skipping is None else dict(self.skipping.num_skipped)
        wanted, found = set(places), dict[int, AnyRow]()
        for place, row in enumerate(islice(self._rows(epoch), max(places) + 1)):
            if place in wanted:
                found[place] = row
        if self.skipping is not None and skipped is not None:
            self.skipping.num_skipped.update(skipped)
        self._open = None  # the dataset is one object, which has one epoch at a time
        missing = UnreadableRow("the streamed dataset has fewer rows than when it was first read.")
        return [found.get(place, missing) for place in places]

    def _rows(self, epoch: int) -> Iterator[AnyRow]:
        self.dataset.set_epoch(epoch)
        rows = read(self.dataset)
        return rows if self.skipping is None else self.skipping.usable(rows, "train")

    def state_dict(self) -> dict[str, Any]:
        return {"sizes": self.sizes, "skipped_before": self.skipped_before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _check_sizes(state, self.sizes)
        self._open, self.skipped_before = None, state["skipped_before"]


def _check_sizes(state: dict[str, Any], now: dict[str, Any]) -> None:
    for name, value in now.items():
        before = state["sizes"].get(name)
        if before != value:
            raise ValueError(
                f"the checkpoint draws prompts with {name} = {before!r}, but now it is {value!r}: "
                "resume with the same."
            )


def _same(rows: Any) -> Any:
    return rows
