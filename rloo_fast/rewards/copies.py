"""Objects of one's own for user code: what a reward function changes is its own copy.

The K completions of a prompt come from one dataset row, and what was sampled is trained on and
logged after the functions have seen it. So every call of every function gets new containers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

UNCHANGING = frozenset(
    (str, int, float, bool, type(None), bytes, complex, datetime, date, time, timedelta, Decimal)
)
FROM_TRAINER = ("trainer_state", "log_extra", "log_metric", "environments")


def fresh(value: Any) -> Any:
    """`value` with every list, dict, array, tensor or other object in it copied.

    Text, numbers and dates cannot change and are passed as they are. What cannot be copied (a lock,
    an open file) stays the one object that the dataset gave.
    """
    kind = type(value)
    if kind in UNCHANGING:
        return value
    if kind is list:
        return value.copy() if UNCHANGING.issuperset(map(type, value)) else [*map(fresh, value)]
    if kind is dict:
        if UNCHANGING.issuperset(map(type, value.values())):
            return value.copy()
        return {key: fresh(item) for key, item in value.items()}
    try:
        return copy.deepcopy(value)
    except Exception:  # of the object's own code, which raises what it likes
        return value


def call_with_copies(function: Callable[..., Any], keywords: Mapping[str, Any]) -> Any:
    """What the function returns on copies of its prompts, completions, ids and columns.

    trainer_state, the log functions and environments are the trainer's own.
    """
    return function(
        **{name: v if name in FROM_TRAINER else fresh(v) for name, v in keywords.items()}
    )
