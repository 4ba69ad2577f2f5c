"""The reward of a reasoning-gym problem: its task's own verifier."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from ..verifiers import NoProcess, OverLimit, VerifierError, shared_verifiers
from .builtin import Completion, completion_text
from .verified import check_limits, in_own_processes, say_once, within_limits


@in_own_processes
def reasoning_gym_reward(
    completions: list[Completion],
    task: list[str],
    entry: list[str],
    log_metric: Callable[[str, float], None] | None = None,
    time_limit_s: float = 5.0,
    over_limit_reward: float | None = 0.0,
    **kwargs: Any,
) -> list[float | None]:
    """r_i = score_answer(strip(completion_i), entry_i) of the task's verifier, mostly in [0, 1].

    `task` and `entry` are the columns that `load_reasoning_gym` makes. The verifiers run in
    processes of their own, where no text becomes code but arithmetic (nine tasks call `eval` on an
    answer), with `time_limit_s` and 1 GiB for each answer: one that takes more earns
    `over_limit_reward` (None: it is not scored). Some verifiers raise on text that they cannot read
    (prime_factorization on a word): such a completion earns 0, which is said once per task. Logs
    `accuracy`, the share of completions with r_i >= 1 (some verifiers give part of the reward for
    part of the answer), and `over_limit`, how many were ended. Raises ValueError for an entry that
    is no entry of its task.
    """
    check_limits("reasoning_gym", time_limit_s, over_limit_reward)
    verifiers = shared_verifiers("reasoning_gym", time_limit_s)
    texts = [completion_text(completion).strip() for completion in completions]
    asked = [
        verifiers.submit(name, _entry(row), text)
        for text, name, row in zip(texts, task, entry, strict=True)
    ]
    try:
        found = within_limits(asked, log_metric)
    except NoProcess:
        raise
    except VerifierError as error:
        number = next(i for i, future in enumerate(asked) if _failed(future))
        raise ValueError(
            f"The verifier of {task[number]!r} cannot score this entry, {entry[number]!r:.200}: "
            f"{error}"
        ) from error
    rewards: list[float | None] = []
    for name, text, answer in zip(task, texts, found, strict=True):
        score, problem = (over_limit_reward, "") if isinstance(answer, OverLimit) else answer
        if problem:
            say_once(f"the verifier of {name!r}", score, problem, text)
        rewards.append(score)
    if log_metric is not None and rewards:
        log_metric("accuracy", sum((r or 0.0) >= 1 for r in rewards) / len(rewards))
    return rewards


def _failed(future: Future[Any]) -> bool:
    return (
        future.done() and not future.cancelled() and isinstance(future.exception(), VerifierError)
    )


def _entry(text: str) -> dict[str, Any]:
    try:
        entry = json.loads(text)
        return {name: entry[name] for name in ("question", "answer", "metadata", "config")}
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            "'reasoning_gym' needs a column `entry` as load_reasoning_gym writes it, JSON with "
            f"question, answer, metadata and config, got {text!r:.80} ({error!r})."
        ) from error
