"""skip_unusable_rows: rows that cannot be sampled from are left out and counted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .first_rows import is_transformed, only_columns
from .row_errors import ReadRows, UnreadableRow, UnusableRow
from .row_functions import Row
from .tokenize import OPTION, RowTokenizer, is_conversational

logger = logging.getLogger(__name__)

Reason = Callable[[Any], str | None]  # a row -> why it cannot be used


class Skipping:
    """Which rows a run leaves out. It follows from the rows alone, so a resumed run repeats it.

    `num_skipped`: by "train" and "eval", rows left out of the dataset that is read, or, of a
    stream, so far.
    """

    def __init__(self, tokenize: RowTokenizer):
        self.tokenize = tokenize
        self.num_skipped = {"train": 0, "eval": 0}
        self._left_out: dict[int, tuple[Any, frozenset[int]]] = {}  # by id, with what has that id
        self._said = False

    def left_out(self, dataset: Any, name: str) -> frozenset[int]:
        """Numbers of the rows of a map-style dataset that cannot be used; each is read once.

        Raises ValueError if none can.
        """
        if id(dataset) not in self._left_out:
            reasons = self._find(dataset)
            if reasons:
                number, why = next(iter(reasons.items()))
                found = f"{len(reasons)} of {len(dataset)} rows cannot be used"
                first = f"The first is row {number} (counted from 0): {why}"
                if len(reasons) == len(dataset):
                    raise ValueError(f"{name}: {found}. {first}")
                logger.warning("%s: %s and are left out. %s", name, found, first)
            self._left_out[id(dataset)] = dataset, frozenset(reasons)
        return self._left_out[id(dataset)][1]

    def begin(self, mode: str, left_out: frozenset[int] = frozenset()) -> None:
        """A pass over a dataset begins, of which these rows are left out; none of a stream's."""
        self.num_skipped[mode] = len(left_out)

    def usable(self, rows: Iterable[Row | UnreadableRow], mode: str) -> Iterator[Any]:
        """The rows of a stream that can be used; one that says the stream broke is passed on."""
        reason = self._reasons()
        for row in rows:
            why = None if isinstance(row, UnreadableRow) else reason(row)
            if why is None:
                yield row
                continue
            self.num_skipped[mode] += 1
            if not self._said:
                self._said = True
                logger.warning("A row is left out, as are others like it from now on: %s", why)

    def _find(self, dataset: Any) -> dict[int, str]:
        """Row number -> why it cannot be used."""
        only_prompts = not is_transformed(dataset)
        rows, size = ReadRows(only_columns(dataset, self.tokenize.columns)), self.tokenize.at_a_time
        reason, found = self._reasons(only_prompts=only_prompts), {}
        for start in range(0, len(rows), size):
            numbers = range(start, min(start + size, len(rows)))
            for number, row in zip(numbers, rows.__getitems__(numbers), strict=True):
                if (why := reason(row)) is not None:
                    found[number] = why
        return found

    def _reasons(self, *, only_prompts: bool = False) -> Reason:
        """For one pass: prompts must be of the kind (text, conversation) of the first usable one.

        `only_prompts`: the other columns are not there to be checked.
        """
        kinds: set[bool] = set()

        def reason(row: Row | UnreadableRow) -> str | None:
            try:
                if only_prompts and not isinstance(row, UnreadableRow):
                    (prompt,) = self.tokenize.prompts([row])
                else:
                    (prompt,) = self.tokenize([row])
            except UnusableRow as error:
                return str(error).removesuffix(OPTION)
            kind = is_conversational(prompt.text)
            if not kinds:
                kinds.add(kind)
            if kind in kinds:
                return None
            return f"its prompt is {'' if kind else 'not '}a conversation, unlike those before it."

        return reason
