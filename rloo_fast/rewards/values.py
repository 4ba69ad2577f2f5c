"""What a reward function returned -> one float32 per completion, or an error with the sample."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .builtin import describe_sample


def read_values(
    values: Any,
    name: str,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    rows: Sequence[int] | None = None,
) -> Tensor:
    """B values, each None or a finite number -> (B,) float32 on the CPU, None as NaN.

    Of a trajectory it may be a list of these, one per message of the model's: their sum counts.
    `values` is an iterable, an array or a 1-D tensor; a tensor is one transfer, and so are the
    tensors in a list. Raises ValueError with the function's name, and the sample at fault, whose
    number is rows[i] for the i-th.
    """
    who, count = f"Reward function {name!r}", len(prompts)

    def sample(index: int) -> str:
        return describe_sample(index, prompts, completions, rows)

    if not isinstance(values, Tensor) and hasattr(values, "__array__"):
        array = np.asarray(values)
        # An array of another kind (objects, strings) holds Python values, None among them.
        is_number = array.dtype.kind in "fiub"
        values = torch.from_numpy(array.astype(np.float32)) if is_number else array.tolist()
    if isinstance(values, Tensor):
        if values.ndim != 1 or values.is_complex():
            raise ValueError(
                f"{who} must return real numbers of shape ({count},), got a {values.dtype} tensor "
                f"of shape {tuple(values.shape)}."
            )
        _check_count(len(values), who, count)
        column = values.detach().to("cpu", torch.float32)
        is_none = torch.zeros(count, dtype=torch.bool)
    else:
        listed = _as_list(values, who, count)
        _check_count(len(listed), who, count)
        turns = [_num_turns(completion) for completion in completions]
        listed = [_sum_of_turns(v, turns[i], who, partial(sample, i)) for i, v in enumerate(listed)]
        floats = [_as_float(v, i, who, sample) for i, v in enumerate(listed)]
        column = torch.tensor([math.nan if v is None else v for v in floats], dtype=torch.float32)
        is_none = torch.tensor([v is None for v in floats], dtype=torch.bool)
    if bad := (~is_none & ~column.isfinite()).nonzero().flatten().tolist():
        raise ValueError(
            f"{who} returned {column[bad[0]].item()} for {sample(bad[0])}. Rewards must be finite "
            "in float32; to say that the function does not apply to a completion, return None in "
            "its place."
        )
    return column


def _check_count(got: int, who: str, count: int) -> None:
    if got != count:
        raise ValueError(
            f"{who} returned {got} rewards, but {count} were expected: one per completion, None "
            "where it does not apply."
        )


def _as_list(values: Any, who: str, count: int) -> list[Any]:
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes, Mapping, Set)):
        hint = ""
        if values is None:
            hint = " Is a `return` missing?"
        elif inspect.iscoroutine(values):
            values.close()  # it will not be awaited
            hint = " Write the function with `async def`, so that it is seen to be asynchronous."
        raise ValueError(
            f"{who} must return a sequence of {count} values, one number or None per completion, "
            f"got {type(values).__name__}.{hint}"
        )
    listed = list(values)
    at = [i for i, v in enumerate(listed) if isinstance(v, Tensor) and v.numel() == 1]
    if at:  # one transfer for all of them
        together = torch.stack([listed[i].detach().reshape(()) for i in at]).tolist()
        for i, value in zip(at, together, strict=True):
            listed[i] = value
    return listed


def _num_turns(completion: Any) -> int:
    """Messages of a trajectory that the model wrote; 0 of a completion that is none."""
    if not isinstance(completion, list):
        return 0
    return sum(message.get("role") == "assistant" for message in completion)


def _sum_of_turns(value: Any, num_turns: int, who: str, sample: Callable[[], str]) -> Any:
    """sum over turns t of r_t, where a function gives a list of them; None where all are."""
    if not isinstance(value, list | tuple) or not num_turns:
        return value
    if len(value) != num_turns:
        raise ValueError(
            f"{who} returned a list of {len(value)} rewards, one for each turn, but the model "
            f"wrote {num_turns} messages in {sample()}. Give as many, None where a turn has no "
            "reward; or one number for the whole trajectory."
        )
    given = [_as_float(turn, 0, who, lambda _: sample()) for turn in value]
    known = [turn for turn in given if turn is not None]
    return sum(known) if known else None


def _as_float(value: Any, index: int, who: str, sample: Callable[[int], str]) -> float | None:
    if value is None:
        return None
    if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise ValueError(
            f"{who} returned {value!r:.80} ({type(value).__name__}), not a number or None, for "
            f"{sample(index)}."
        )
    try:
        return float(value)
    except OverflowError:  # an int beyond float64
        return math.inf
