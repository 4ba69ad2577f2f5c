"""The reward of a mathematical answer, compared with a gold answer by math-verify."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from ..verifiers import OverLimit, Verifiers, shared_verifiers
from .builtin import Completion, completion_text
from .verified import check_limits, in_own_processes, say_once, within_limits


@in_own_processes
def accuracy(
    completions: list[Completion],
    solution: list[str | None] | None = None,
    answer: list[str | None] | None = None,
    log_extra: Callable[[str, list], None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    time_limit_s: float = 5.0,
    over_limit_reward: float | None = 0.0,
    **kwargs: Any,
) -> list[float | None]:
    r"""r_i = 1[completion_i's answer is the same as gold_i]; None if gold_i cannot be read.

    gold is the column `solution`, or `answer` if there is no `solution`: a bare answer (72, 2n-1,
    \frac12, 3:2, \text{(B)}), one in \boxed{} or $...$, or a text that ends with one. The same:
    letter for letter, or in value for math-verify; see `math_answers.py` for what is not read. The
    completion must give its answer in LaTeX (`\boxed{...}`, or "the final answer is $...$"), which
    is what TRL's `accuracy_reward` asks for too; anything else earns 0.

    Answers are read in processes of their own, where no text becomes code but arithmetic, with
    `time_limit_s` and 1 GiB for each completion: one that takes more earns `over_limit_reward`
    (None: it is not scored), and so does one of more than 3 MiB. Logs `over_limit`, how many were.
    Raises ImportError without math-verify, ValueError without a gold column.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError(
            "The reward function 'accuracy' needs math-verify: pip install math-verify"
        )
    check_limits("accuracy", time_limit_s, over_limit_reward)
    column = solution if solution is not None else answer
    if column is None:
        raise ValueError("'accuracy' needs a column `solution` or `answer` with the gold answers.")
    golds = ["" if gold is None else str(gold) for gold in column]
    texts = [completion_text(completion) for completion in completions]
    verifiers = shared_verifiers("accuracy", time_limit_s)
    asked = [verifiers.submit(*pair) for pair in zip(golds, texts, strict=True)]
    rewards: list[float | None] = []
    parsed: list[str] = []
    for gold, text, found in zip(golds, texts, within_limits(asked, log_metric), strict=True):
        if isinstance(found, OverLimit):
            found = [over_limit_reward if _is_read(verifiers, gold) else None, "", ""]
        reward, shown, problem = found
        if problem:
            say_once("math-verify", reward, problem, text)
        rewards.append(reward)
        parsed.append(shown)
    if log_extra is not None:
        log_extra("gold", golds)
        log_extra("parsed_answer", parsed)
    return rewards


def _is_read(verifiers: Verifiers, gold: str) -> bool:
    """Whether it was the completion that took too long, rather than the gold."""
    try:
        return verifiers.submit(gold, "").result()[0] is not None
    except OverLimit:
        return False
