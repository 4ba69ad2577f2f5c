"""A call of a reward function that was ended: which completion did it, and what becomes of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .batch import Batch
from .builtin import completion_text, content_text
from .calls import CallEnded, Log, LoopBlocked, RewardTimeout

MAX_NAMED = 3  # samples in a message
MAX_CHARS = 160  # of a prompt or completion in it: its two ends
ID_COLUMNS = ("id", "task_id", "uid", "idx", "index")  # by which datasets name their rows
END_THE_RUN = "error"

logger = logging.getLogger(__name__)

Call = Callable[[list[int]], tuple[Tensor, Log]]  # rows -> their rewards, what was logged
Alone = Callable[[list[int]], Iterator[tuple[int, Exception | None]]]  # each row in a call alone


class OverLimit:
    """What becomes of completions that a call does not come back from.

    `reward`: "error" (the run ends), their reward, or None or "none": they are not scored.
    """

    def __init__(self, reward: float | str | None = END_THE_RUN) -> None:
        self.ends_the_run = reward == END_THE_RUN
        self.reward = math.nan if reward is None or isinstance(reward, str) else float(reward)
        self._warned: set[str] = set()

    def score(
        self, batch: Batch, function: int, name: str, rows: list[int], call: Call, alone: Alone
    ) -> None:
        """Put the rewards of `rows` into the batch.

        If the call is ended, those that end one alone as well are over the limit, and the others
        are scored together, without them. If none does alone, all are. A process that died may
        have been killed by someone else: if no row kills another, the call is made once more.
        """
        try:
            batch.put(function, rows, *call(rows))
            return
        except LoopBlocked as error:
            raise error.on(describe(batch, rows)) from error
        except CallEnded as error:
            ended = error
        if len(rows) == 1 and isinstance(ended, RewardTimeout):
            guilty = {rows[0]: ended}
        else:
            guilty = self._guilty(alone(rows))
        if not guilty and isinstance(ended, RewardTimeout):
            guilty = dict.fromkeys(rows, ended)
        if guilty and self.ends_the_run:
            raise next(iter(guilty.values())).on(describe(batch, [*guilty])) from ended
        rest = [row for row in rows if row not in guilty]
        if rest:
            try:
                batch.put(function, rest, *call(rest))
            except CallEnded as error:
                if self.ends_the_run:
                    raise error.on(describe(batch, rest)) from error
                guilty |= dict.fromkeys(rest, error)
        if guilty:
            over = list(guilty)
            batch.put_over_limit(
                function, over, torch.full((len(over),), self.reward, dtype=torch.float32)
            )
            self._warn_once(name, guilty[over[0]].on(describe(batch, over)))

    def _guilty(self, tried: Iterator[tuple[int, Exception | None]]) -> dict[int, CallEnded]:
        guilty = {}
        for row, error in tried:
            if isinstance(error, CallEnded):
                guilty[row] = error
                if self.ends_the_run:
                    break
        return guilty

    def _warn_once(self, name: str, error: CallEnded) -> None:
        if name not in self._warned:
            self._warned.add(name)
            what = "not scored" if math.isnan(self.reward) else f"scored {self.reward:g}"
            logger.warning(
                "%s They are %s (reward_over_limit), as all others will be; the metric over_limit "
                "counts them, and this is said once.",
                error,
                what,
            )


def describe(batch: Batch, rows: list[int]) -> str:
    """ " on sample 3 (id 'x', prompt '...', completion '...')", or on the first of several."""
    named = [_describe(batch, row) for row in rows[:MAX_NAMED]]
    more = f"; and {len(rows) - MAX_NAMED} more" if len(rows) > MAX_NAMED else ""
    count = f"{len(rows)} samples: " if len(rows) > 1 else ""
    return f" on {count}{'; '.join(named)}{more}"


def _describe(batch: Batch, row: int) -> str:
    prompt = batch.prompts[row]
    if isinstance(prompt, list):  # the last message is what tells one conversation from another
        prompt = content_text(prompt[-1].get("content"))
    ids = [f"{n} {batch.columns[n][row]!r:.80}, " for n in ID_COLUMNS if n in batch.columns]
    completion = completion_text(batch.completions([row])[0])
    return f"sample {row} ({''.join(ids)}prompt {_ends(prompt)}, completion {_ends(completion)})"


def _ends(text: Any) -> str:
    shown = str(text)
    if len(shown) > MAX_CHARS:
        half = MAX_CHARS // 2
        return f"{shown[:half]!r} ... {len(shown) - MAX_CHARS} more ... {shown[-half:]!r}"
    return repr(shown)
