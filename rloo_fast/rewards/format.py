"""The reward of a completion that has the form of a regular expression."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ..records import Count
from ..verifiers import OverLimit, shared_verifiers
from .builtin import Completion, completion_text
from .verified import check_limits, say_once, within_limits

AT_ONCE = 64  # completions that a process matches before it answers


class Format:
    """r_i = 1[the regular expression `pattern` matches all of strip(completion_i)].

    A dot matches line ends too. Matching runs in processes of its own, with `time_limit_s` for each
    completion: one that takes more (a pattern may backtrack without end) earns `over_limit_reward`
    (None: it is not scored). Logs `over_limit`, how many did. Raises ValueError for a pattern that
    is none.
    """

    __name__ = "format"  # of the metric
    has_own_processes = True

    def __init__(
        self, pattern: str, time_limit_s: float = 5.0, over_limit_reward: float | None = 0.0
    ) -> None:
        check_limits("format", time_limit_s, over_limit_reward)
        try:
            self.pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}.") from error
        self.time_limit_s, self.over_limit_reward = time_limit_s, over_limit_reward

    def __call__(
        self,
        completions: list[Completion],
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        texts = [completion_text(completion).strip() for completion in completions]
        parts = [texts[i : i + AT_ONCE] for i in range(0, len(texts), AT_ONCE)]
        found: list[Any] = []
        for part, matches in zip(parts, self._match(parts), strict=True):
            if isinstance(matches, OverLimit):
                matches = self._match([[text] for text in part])
                found += [m if isinstance(m, OverLimit) else m[0] for m in matches]
            else:
                found += matches
        over = [text for text, m in zip(texts, found, strict=True) if isinstance(m, OverLimit)]
        if over:
            say_once("the pattern", self.over_limit_reward, "it is over the limit", over[0])
        if log_metric is not None:
            log_metric("over_limit", Count(len(over)))
        return [self.over_limit_reward if isinstance(m, OverLimit) else float(m) for m in found]

    def _match(self, parts: list[list[str]]) -> list[Any]:
        verifiers = shared_verifiers("format", self.time_limit_s)
        return within_limits([verifiers.submit(self.pattern.pattern, part) for part in parts], None)
