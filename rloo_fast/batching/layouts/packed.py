"""Layout `packed`: prompt and completion of each row after one another, without padding."""

from __future__ import annotations

from collections.abc import Sequence

from .base import UnitIds, register_layout
from .one_line import Line, OneLine


@register_layout
class Packed(OneLine):
    name, rank = "packed", 1
    help = "one line, each completion behind a prompt of its own: no padding"

    def tokens(self, prompt: int, completions: Sequence[int]) -> int:
        """sum (P + L)"""
        return prompt * len(completions) + sum(completions)

    def pairs(self, prompt: int, completions: Sequence[int]) -> float:
        """sum (P + L)^2 / 2"""
        return sum((prompt + length) ** 2 / 2 for length in completions)

    def put(self, line: Line, unit: UnitIds) -> None:
        for completion, targets in zip(unit.completions, unit.targets, strict=True):
            first = len(line.ids) + len(unit.prompt) - 1
            ids = unit.prompt + completion
            line.add(ids, position=0, weights=[1] * len(ids))
            line.logit_index += [first + place for place in targets]
