"""Layout `shared_prefix`: a prompt once, then all its completions, which attend to it."""

from __future__ import annotations

from collections.abc import Sequence

from .base import Demand, UnitIds, register_layout
from .one_line import Line, OneLine


@register_layout
class SharedPrefix(OneLine):
    name, rank = "shared_prefix", 0
    shares_prompts = True
    help = "one line, a prompt is run once for all its completions"

    def tokens(self, prompt: int, completions: Sequence[int]) -> int:
        """P + sum L"""
        return prompt + sum(completions)

    def pairs(self, prompt: int, completions: Sequence[int]) -> float:
        """P^2 / 2 + sum (L P + L^2 / 2)"""
        return prompt**2 / 2 + sum(length * prompt + length**2 / 2 for length in completions)

    def row_demands(self, prompt: int, completions: Sequence[int], budget: int) -> list[Demand]:
        # a part pays its prompt once: the rest of the budget is for completions
        return [Demand(length, length, budget - prompt) for length in completions]

    def put(self, line: Line, unit: UnitIds) -> None:
        start = len(line.ids)
        line.add(unit.prompt, position=0, weight=len(unit.completions))
        end = len(line.ids)
        for completion, n in zip(unit.completions, unit.num_targets, strict=True):
            own = len(line.ids)
            if n:  # the first target is predicted by the prompt's last token
                line.logit_index += [end - 1, *range(own, own + n - 1)]
            line.add(completion, position=len(unit.prompt), weight=1, prefix=(start, end))
