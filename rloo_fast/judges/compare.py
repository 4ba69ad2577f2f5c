"""Pairs of texts -> verdicts, with the order of every pair drawn outside the judge.

A judge is any callable

    judge(prompts, pairs) -> per pair: 0 or 1, the index of the better text, or None; or a Verdict

called with all pairs at once. It never learns which text is whose: the model's text stands first in
half of the pairs, drawn by a seed. A judge that prefers a position thus ends near 50 %, and
`first_won` shows it.
"""

from __future__ import annotations

import math
import operator
import random
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..masking import masked, shown
from ..records import PromptText
from ..rewards.copies import fresh

Pair = tuple[str, str]
TIE = "tie"


class JudgeError(RuntimeError):
    """A judge cannot judge: it is not there, refuses its key, or answered against the contract."""


class Verdict(NamedTuple):
    """The index of the better text, or None and the reason; `answer` is what the judge said."""

    index: int | None
    why: str = ""  # without an index: TIE, or a word for what was wrong with the answer
    answer: str | None = None


Judge = Callable[[list[PromptText], list[Pair]], Sequence[Any]]


@dataclass(frozen=True)
class Judgement:
    """The verdict on one pair, in which the model's text stood at `place` (0 or 1)."""

    place: int
    verdict: Verdict

    @property
    def won(self) -> float | None:
        """1: the model's text is the better one, 0: it is not, None: no verdict."""
        index = self.verdict.index
        return None if index is None else float(index == self.place)


def compare(
    judge: Judge,
    prompts: Sequence[PromptText],
    texts: Sequence[str],
    others: Sequence[str],
    *,
    seed: int = 0,
    both_orders: bool = False,
) -> list[list[Judgement]]:  # per prompt, one judgement or, with both_orders, two
    """Ask for every (text, other), in an order drawn with `seed`, or in both orders.

    Exactly half of the texts stand first (rounded down). Raises JudgeError for a judge that breaks
    its contract or raises, with its name.
    """
    places = [row % 2 for row in range(len(texts))]
    random.Random(seed).shuffle(places)
    rounds = [_ask(judge, prompts, texts, others, places)]
    if both_orders:
        rounds.append(_ask(judge, prompts, texts, others, [1 - place for place in places]))
    return [list(judgements) for judgements in zip(*rounds, strict=True)]


def _ask(
    judge: Judge,
    prompts: Sequence[PromptText],
    texts: Sequence[str],
    others: Sequence[str],
    places: Sequence[int],
) -> list[Judgement]:
    pairs = [
        (other, text) if place else (text, other)
        for text, other, place in zip(texts, others, places, strict=True)
    ]
    try:
        given = judge(fresh([*prompts]), [*pairs])  # lists of its own, whatever it does to them
    except JudgeError:
        raise
    except Exception as error:  # the user's code
        name = getattr(judge, "__name__", type(judge).__name__)
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise JudgeError(
            f"the judge {name} raised {type(error).__name__}: {masked(str(error))} "
            f"({Path(at.filename).name}, line {at.lineno})"
        ) from error
    verdicts = read_verdicts(given, len(pairs))
    return [Judgement(*both) for both in zip(places, verdicts, strict=True)]


def read_verdicts(given: Any, count: int) -> list[Verdict]:
    """What a judge returned, as verdicts. JudgeError unless it is `count` times 0, 1 or None."""
    try:
        values = list(given)
    except TypeError as error:
        raise JudgeError(
            f"a judge returns a list of 0, 1 or None, got {type(given).__name__}."
        ) from error
    if len(values) != count:
        raise JudgeError(f"a judge gives one verdict per pair: got {len(values)} for {count}.")
    return [_verdict(value) for value in values]


def higher_wins(first: float, second: float) -> Verdict:
    """The text with the higher number wins; equal ones are a tie; NaN is no verdict."""
    answer = f"{first:.6g} {second:.6g}"
    if math.isnan(first) or math.isnan(second):
        return Verdict(None, "not a number", answer)
    return (
        Verdict(None, TIE, answer) if first == second else Verdict(int(second > first), "", answer)
    )


def _verdict(value: Any) -> Verdict:
    verdict = value if isinstance(value, Verdict) else Verdict(value)
    said = None if verdict.answer is None else str(verdict.answer)  # files take texts alone
    verdict = verdict._replace(why=str(verdict.why), answer=said)
    if verdict.index is None:
        return verdict if verdict.why else verdict._replace(why="none given")
    try:
        index = operator.index(verdict.index)  # NumPy's and torch's integers too
    except TypeError:
        index = -1
    if index not in (0, 1):
        raise JudgeError(f"a verdict is 0, 1 or None, got {shown(verdict.index)}.")
    return verdict._replace(index=index)
