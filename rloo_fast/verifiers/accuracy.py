"""What becomes of a mathematical answer beside its gold answer: the reward `accuracy`."""

from __future__ import annotations

import functools
from typing import Any

from .math_answers import Answer, Reader

MAX_SHOWN = 200  # characters of an answer in the table of samples
MAX_GOLDS = 512  # that are remembered: the completions of a group share theirs
WARM_UP = [
    (r"\frac{1}{3}", r"so \boxed{\frac{2}{6}}"),
    ("1, 2", r"the final answer is $x = 1$ or $x = \sqrt{4}$"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\boxed{\begin{pmatrix} 1 \\ 3 \end{pmatrix}}"),
    (r"x^2 + 2x + 1 \le 3", r"\boxed{(x+1)^2}"),
    ("So there are 3 + 4 apples, which all in all makes 7", r"\boxed{[1, \infty)}"),
]


def verify(gold: str, completion: str) -> list[Any]:
    """[1.0 or 0.0, None: the gold cannot be read; what was read of the completion; a problem].

    A completion that math-verify, or what stands before it, fails on earns 0, and has a problem.
    """
    target = _gold(gold)
    wrong = None if target is None else 0.0
    shown = ""
    try:
        given = _reader().read_completion(completion)
        if given is None:
            return [wrong, "", ""]
        shown = _shown(given)
        right = target is not None and _reader().same(target, given)
        return [1.0 if right else wrong, shown, ""]
    except (MemoryError, RecursionError):
        raise
    except Exception as error:
        return [wrong, shown, f"{type(error).__name__}: {error}"[:200]]


def warm_up() -> None:
    """Import and build, before workers are forked, what the first questions would make."""
    for gold, completion in WARM_UP:
        verify(gold, completion)


@functools.cache
def _reader() -> Reader:
    return Reader()


@functools.lru_cache(MAX_GOLDS)
def _gold(text: str) -> Answer | None:
    try:
        return _reader().read(text)
    except Exception:
        return None


def _shown(answer: Answer) -> str:
    return (answer.text if answer.value is None else str(answer.value[0]))[:MAX_SHOWN]
