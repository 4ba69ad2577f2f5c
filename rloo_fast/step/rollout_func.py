"""A rollout_func of the user's own: prompts and the trainer in, whole completions out, as in TRL.

    rollout_func(prompts, trainer) -> {"prompt_ids", "completion_ids", "logprobs", ...}

`prompts` has the prompt of every completion that this process is to sample, in order: each prompt
num_generations times. `logprobs` may be None. `env_mask` has a 1 for every completion token that
the policy sampled, and a 0 for one that came from elsewhere; without it all were sampled. Other
keys are columns for the reward functions: a list with a value per completion, or one value.
"""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ..data.tokenize import is_conversational
from ..records import Prompt, Rollout, Strand, Trajectory
from ..rewards.functions import FIXED_KEYWORDS

REQUIRED = ("prompt_ids", "completion_ids", "logprobs")
MASK = "env_mask"


class Made(NamedTuple):
    """What a rollout_func made."""

    rows: list[Prompt]  # with the prompts' ids, and its columns
    rollout: Rollout


def call_rollout_func(
    function: Callable[[list[Any]], Any],
    rows: Sequence[Prompt],
    *,
    decode: Callable[[list[int]], str],
    ends: set[int],
    num_ids: int | None,
) -> Made:
    """`function(prompts)`, checked. `ends`: token ids of which one at the end of a completion says
    that it ended; `num_ids`: that the model takes, None if it does not say. Raises ValueError for
    what is missing or does not fit."""
    output = function([copy.deepcopy(row.text) for row in rows])
    if not isinstance(output, Mapping):
        raise ValueError(
            f"rollout_func must return a dict with {', '.join(REQUIRED)}, got "
            f"{type(output).__name__}."
        )
    if missing := [key for key in REQUIRED if key not in output]:
        raise ValueError(f"rollout_func must return {', '.join(missing)} in its dict, too.")
    if taken := sorted({*output} & {*FIXED_KEYWORDS} - {*REQUIRED}):
        raise ValueError(
            f"rollout_func returned {', '.join(taken)}, which reward functions get from the "
            "trainer: give it another name."
        )
    count = len(rows)
    prompts = _ids(output["prompt_ids"], "prompt_ids", count, num_ids)
    completions = _ids(output["completion_ids"], "completion_ids", count, num_ids)
    if empty := [i for i, ids in enumerate(prompts) if not ids]:
        raise ValueError(f"rollout_func: prompt_ids[{empty[0]}] is empty.")
    logps, mask = output["logprobs"], output.get(MASK)
    if logps is not None:
        logps = _per_token(logps, "logprobs", completions, float)
    if mask is not None:
        mask = _per_token(mask, MASK, completions, bool)
    columns = _columns(output, count)
    made = [
        replace(row, ids=ids, columns={**row.columns, **{k: v[i] for k, v in columns.items()}})
        for i, (row, ids) in enumerate(zip(rows, prompts, strict=True))
    ]
    reasons = ["stop" if ids and ids[-1] in ends else "length" for ids in completions]
    if mask is None:
        return Made(made, Rollout(completions, reasons, logps))
    places = [[i for i, sampled in enumerate(row) if sampled] for row in mask]
    trajectories = [
        Trajectory(
            [Strand([*row.ids, *ids], [len(row.ids) + place for place in counted])],
            _messages(row, decode(ids)),
        )
        for row, ids, counted in zip(made, completions, places, strict=True)
    ]
    if logps is not None:
        logps = [[row[i] for i in counted] for row, counted in zip(logps, places, strict=True)]
    return Made(made, Rollout(completions, reasons, logps, trajectories=trajectories))


def _messages(row: Prompt, text: str) -> Any:
    return [{"role": "assistant", "content": text}] if is_conversational(row.text) else text


def _ids(value: Any, name: str, count: int, num_ids: int | None) -> list[list[int]]:
    rows = _list(value, name)
    if len(rows) != count:
        raise ValueError(
            f"rollout_func was given {count} prompts, one for each completion, and returned "
            f"{len(rows)} {name}."
        )
    ids = [_list(row, f"{name}[{i}]") for i, row in enumerate(rows)]
    for i, row in enumerate(ids):
        if not all(isinstance(token, numbers.Integral) for token in row):
            raise ValueError(f"rollout_func: {name}[{i}] must be token ids, got {row!r:.80}.")
        end = math.inf if num_ids is None else num_ids
        if wrong := [token for token in row if not 0 <= token < end]:
            raise ValueError(
                f"rollout_func: {name}[{i}] has {wrong[0]}, which is no token of the model: ids "
                f"are from 0 to {end - 1}."
            )
    return [[int(token) for token in row] for row in ids]


def _per_token(
    value: Any, name: str, completions: list[list[int]], kind: Callable[[Any], Any]
) -> list[list[Any]]:
    rows = [_list(row, f"{name}[{i}]") for i, row in enumerate(_list(value, name))]
    if [len(row) for row in rows] != [len(ids) for ids in completions]:
        raise ValueError(
            f"rollout_func: {name} must have one value for every token of completion_ids, got "
            f"{[len(row) for row in rows][:8]} for {[len(ids) for ids in completions][:8]} tokens."
        )
    for i, row in enumerate(rows):
        if not all(isinstance(x, numbers.Real) for x in row):
            raise ValueError(f"rollout_func: {name}[{i}] must be numbers, got {row!r:.80}.")
    return [[kind(x) for x in row] for row in rows]


def _list(value: Any, name: str) -> list[Any]:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise ValueError(f"rollout_func: {name} must be a list, got {type(value).__name__}.")
    return list(value)


def _columns(output: Mapping[str, Any], count: int) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    for name, value in output.items():
        if name in (*REQUIRED, MASK):
            continue
        if not isinstance(value, list):
            columns[name] = [value] * count
        elif len(value) == count:
            columns[name] = value
        else:
            raise ValueError(
                f"rollout_func returned {len(value)} values of {name!r}, which reward functions "
                f"get as a column: {count} were expected, one per completion."
            )
    return columns
