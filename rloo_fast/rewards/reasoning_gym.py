"""The reward of a reasoning-gym problem: its task's own verifier."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rloo_fast.rewards.builtin import Completion, completion_text
from rloo_fast.tasks import make_task

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

logger = logging.getLogger(__name__)


def reasoning_gym_reward(
    completions: list[Completion],
    task: list[str],
    entry: list[str],
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float]:
    """r_i = score_answer(strip(completion_i), entry_i) of the task's verifier, mostly in [0, 1].

    `task` and `entry` are the columns that `load_reasoning_gym` makes. Some verifiers raise on text
    that they cannot read (prime_factorization on a word): such a completion earns 0, which is said
    once per task. Logs `accuracy`, the share of completions with r_i >= 1 (some verifiers give part
    of the reward for part of the answer). Raises ValueError for an entry that is no entry of its
    task.
    """
    rewards = [
        _score(completion_text(completion).strip(), name, text)
        for completion, name, text in zip(completions, task, entry, strict=True)
    ]
    if log_metric is not None and rewards:
        log_metric("accuracy", sum(reward >= 1 for reward in rewards) / len(rewards))
    return rewards


def _score(answer: str, task: str, text: str) -> float:
    try:
        entry = json.loads(text)
        config = entry["config"]
        oracle = entry["answer"]
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            "'reasoning_gym' needs a column `entry` as load_reasoning_gym writes it, JSON with "
            f"question, answer, metadata and config, got {text!r:.80} ({error!r})."
        ) from error
    verifier = _verifier(task, json.dumps(config, sort_keys=True))
    try:
        return float(verifier.score_answer(answer, entry))
    except Exception as error:
        try:
            verifier.score_answer(oracle, entry)
        except Exception:
            raise ValueError(
                f"The verifier of {task!r} cannot score this entry, {text!r:.200}: {error!r}"
            ) from error
        _say_once(task, f"{type(error).__name__}: {error}", answer)
        return 0.0


@functools.cache
def _verifier(task: str, config: str) -> ProceduralDataset:
    return make_task(task, 1, 0, json.loads(config))


_said: set[str] = set()


def _say_once(task: str, error: str, answer: str) -> None:
    if task not in _said:
        _said.add(task)
        logger.warning(
            "reward 0 where the verifier of %r cannot read a completion, as here %r (%s)",
            task,
            answer[:80],
            error[:80],
        )
