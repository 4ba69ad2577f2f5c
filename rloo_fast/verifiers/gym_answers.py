"""What the verifier of a reasoning-gym task makes of an answer."""

# reasoning-gym has no stubs
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import reasoning_gym
import sympy.parsing.sympy_parser  # what the verifiers import when they are called  # noqa: F401

_WORDS = re.compile(r"[^\W\d_]+")
_NOT_NUMBERS = {"nan", "nani", "nanj"}


def verify(task: str, entry: dict[str, Any], answer: str | None) -> list[Any]:
    """[score_answer(answer, entry), ""] of the task's verifier.

    None: no answer, which is also the gold of tasks with many right ones. [0.0, why] for an answer
    that it cannot read, and for one that is not a number: where NaN is the distance from the gold,
    `min(1, exp(-distance))` is 1. Raises what the verifier raises of its
    own gold, and MemoryError and RecursionError, after which a process is not to be asked again.
    """
    if answer is not None and _is_nan(answer):
        return [0.0, "NaN is no answer"]
    verifier = _verifier(task, json.dumps(entry["config"], sort_keys=True))
    try:
        return [float(verifier.score_answer(answer, entry)), ""]
    except (MemoryError, RecursionError):  # what is left of it could cost the next answer its due
        raise
    except Exception as error:
        verifier.score_answer(entry["answer"], entry)
        return [0.0, f"{type(error).__name__}: {error}"[:200]]


def _is_nan(answer: str) -> bool:
    """Of its words one is NaN, and the others could only be of the same number."""
    words = set(_WORDS.findall(answer.lower()))
    return bool(words & _NOT_NUMBERS) and words <= _NOT_NUMBERS | {"i", "j", "inf", "infi", "infj"}


def warm_up() -> None:
    """Nothing: the modules that verifiers import when they are called are imported above."""


def missing(task: str, entry: dict[str, Any], answer: str) -> Callable[[], Any] | None:
    """What builds the verifier of this question, which may take seconds; None if it is there."""
    key = task, json.dumps(entry["config"], sort_keys=True)
    return None if key in _verifiers else lambda: _verifier(*key)


_verifiers: dict[tuple[str, str], Any] = {}


def _verifier(task: str, config: str) -> Any:
    if (task, config) not in _verifiers:
        made = reasoning_gym.create_dataset(task, size=1, seed=0, **json.loads(config))
        _verifiers[task, config] = made
    return _verifiers[task, config]
