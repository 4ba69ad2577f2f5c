"""What the rewards share whose verifiers run in processes of their own: limits, and who says so."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from ..records import Count
from ..verifiers import OverLimit

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])

_said: set[str] = set()


def in_own_processes(function: F) -> F:
    """It asks processes and waits: none of `reward_processes` is to start others for it."""
    marked: Any = function
    marked.has_own_processes = True
    return function


def check_limits(name: str, time_limit_s: float, over_limit_reward: float | None) -> None:
    """Raise ValueError for arguments that are none."""
    if not (_is_number(time_limit_s) and 0 < time_limit_s < math.inf):
        raise ValueError(f"{name!r}: time_limit_s must be > 0 seconds, got {time_limit_s!r}.")
    if over_limit_reward is not None and not _is_number(over_limit_reward):
        raise ValueError(
            f"{name!r}: over_limit_reward must be a finite number, or None (null) for a completion "
            f"that is not scored, got {over_limit_reward!r}."
        )


def within_limits(
    asked: Sequence[Future[Any]], log_metric: Callable[[str, float], None] | None
) -> list[Any]:
    """The answers of verifiers, an OverLimit for each that was ended. Logs `over_limit`, how many
    were. Raises what else a future raises; the others are cancelled then."""
    answers: list[Any] = []
    try:
        for future in asked:
            try:
                answers.append(future.result())
            except OverLimit as error:
                answers.append(error)
    finally:
        for future in asked[len(answers) :]:
            future.cancel()
    if log_metric is not None and answers:
        log_metric("over_limit", Count(sum(isinstance(a, OverLimit) for a in answers)))
    return answers


def say_once(who: str, reward: float | None, problem: str, answer: str) -> None:
    """Of the first completion that `who` has this kind of trouble with."""
    kind = f"{who} {problem.partition(':')[0]}"
    if kind not in _said:
        _said.add(kind)
        logger.warning(
            "reward %s where %s cannot read a completion, as here %r (%.80s); said once",
            reward,
            who,
            answer[:80],
            problem,
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
