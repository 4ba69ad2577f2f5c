"""reasoning-gym's procedural tasks as datasets of prompts that their own verifier can score."""

from __future__ import annotations

import json
from collections.abc import Container
from typing import TYPE_CHECKING, Any

from ..config.reasoning_gym import make_task

if TYPE_CHECKING:
    from datasets import Dataset

DRAWS_PER_PROMPT = 20  # a task that repeats itself more than this is said to be exhausted
MIN_DRAWS = 1000


def load_reasoning_gym(
    task: str,
    size: int,
    seed: int,
    *,
    exclude_prompts: Container[str] = (),
    **task_config: Any,
) -> Dataset:
    """`size` problems with distinct prompts, none of them in `exclude_prompts`.

    Problem number i is made from seed + i; a prompt that came before is passed over, so i may go
    beyond size. Columns: `prompt` (the question), `answer` (None where a task has no single one),
    `task`, and `entry` (JSON: reasoning-gym's whole entry and the task's `config`, which is what
    `reasoning_gym_reward` needs). `task_config`: fields of the task's configuration.

    Raises ValueError for an unknown task or configuration, and if the task does not give `size`
    such prompts in max(1000, 20 size) draws.
    """
    from datasets import Dataset

    if size < 1:
        raise ValueError(f"size must be >= 1, got {size}: it is the number of problems to make.")
    num_draws = max(MIN_DRAWS, DRAWS_PER_PROMPT * size)
    problems = make_task(task, num_draws, seed, task_config)
    rows: dict[str, dict[str, Any]] = {}
    for number in range(num_draws):
        entry = problems[number]
        prompt = entry["question"]
        if prompt in rows or prompt in exclude_prompts:
            continue
        text = _as_json(task, {**entry, "config": task_config})
        if not rows:
            _check_verifier(task, problems, entry, json.loads(text))
        rows[prompt] = {"prompt": prompt, "answer": entry["answer"], "task": task, "entry": text}
        if len(rows) == size:
            return Dataset.from_list(list(rows.values()))
    raise ValueError(
        f"task {task!r} with {task_config or 'its default configuration'} gave {len(rows)} prompts "
        f"that are distinct and not excluded in {num_draws} draws, {size} were asked for: lower "
        "the size, or widen the task's configuration."
    )


def _as_json(task: str, entry: dict[str, Any]) -> str:
    try:
        return json.dumps(entry)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"task {task!r}: its entries cannot be written as JSON: {error}"
        ) from error


def _check_verifier(task: str, problems: Any, entry: dict[str, Any], reread: dict[str, Any]):
    """The verifier must judge an entry read back from JSON (tuples are lists then) as the original.

    In reasoning-gym 0.1.25 all but arc_agi and rearc do.
    """
    scores = [problems.score_answer(entry["answer"], each) for each in (entry, reread)]
    if scores[0] != scores[1]:
        raise ValueError(
            f"task {task!r}: its verifier cannot score an entry that was stored as JSON (it gives "
            f"the right answer {scores[1]:.2g} in place of {scores[0]:.2g}), so it cannot be used."
        )
