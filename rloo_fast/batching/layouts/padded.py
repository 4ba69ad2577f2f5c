"""Layout `padded`: a line per row, padded on the right, which a causal model never sees."""

from __future__ import annotations

from collections.abc import Sequence

from ..compiled_sizes import CompiledSizes
from .base import Demand, Layout, Lines, UnitIds, UnitLengths, register_layout


@register_layout
class Padded(Layout):
    name, rank = "padded", 2
    help = "a line per row, all of one length: any causal model"

    def tokens(self, prompt: int, completions: Sequence[int]) -> int:
        """rows * max (P + L)"""
        return len(completions) * (prompt + max(completions))

    def pairs(self, prompt: int, completions: Sequence[int]) -> float:
        """sum (P + L)^2 / 2"""
        return sum((prompt + length) ** 2 / 2 for length in completions)

    def batch_tokens(self, units: Sequence[UnitLengths]) -> int:
        num_rows = sum(len(completions) for _, completions in units)
        return num_rows * max((prompt + max(ls) for prompt, ls in units), default=0)

    def demand(self, prompt: int, completions: Sequence[int], budget: int) -> Demand:
        # the first unit has the longest row, which fixes the width: room is rows
        width = prompt + max(completions)
        return Demand(width, len(completions), budget // width)

    def lines(
        self,
        units: Sequence[UnitIds],
        *,
        pad_token_id: int,
        multiple_of: int,
        sizes: CompiledSizes | None,
    ) -> Lines:
        rows = [
            (unit.prompt, completion, targets)
            for unit in units
            for completion, targets in zip(unit.completions, unit.targets, strict=True)
        ]
        width = max((len(prompt) + len(ids) for prompt, ids, _ in rows), default=1)
        height, width = max(len(rows), 1), -(-width // multiple_of) * multiple_of
        if sizes is not None:
            height, width = sizes.padded(height, width)
        input_ids: list[list[int]] = []
        weights: list[list[int]] = []
        index: list[int] = []
        for line, (prompt, ids, targets) in enumerate(rows):
            length = len(prompt) + len(ids)
            input_ids.append(prompt + ids + [pad_token_id] * (width - length))
            weights.append([1] * length + [0] * (width - length))
            first = line * width + len(prompt) - 1
            index += [first + place for place in targets]
        for _ in range(height - len(rows)):
            input_ids.append([pad_token_id] * width)
            weights.append([0] * width)
        return Lines(input_ids, weights, index)
