"""Whether texts match a regular expression of the user's, which may backtrack without end."""

from __future__ import annotations

import functools
import re


def verify(pattern: str, texts: list[str]) -> list[bool]:
    """1[the pattern matches all of it], a dot line ends too."""
    compiled = _compiled(pattern)
    return [compiled.fullmatch(text) is not None for text in texts]


def warm_up() -> None:
    """Nothing."""


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.DOTALL)
