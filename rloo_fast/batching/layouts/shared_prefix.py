"""Layout `shared_prefix`: what rows begin with alike is run once, and what follows attends to it.

Rows of a group share their prompt; groups of a micro-batch what their prompts begin with, a system
prompt or examples; completions what they begin with. The line is that tree, depth first: a segment,
then each one that continues it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

from ..prefix_tree import key_of, shared
from ..tree_segments import NONE, TreeRow, tree_segments
from .base import Demand, Sharing, UnitIds, register_layout
from .one_line import Line, OneLine


@register_layout
class SharedPrefix(OneLine):
    name, rank = "shared_prefix", 0
    shares_prompts = True
    help = "one line, tokens that rows begin with alike are run once for all of them"

    def tokens(self, prompt: int, completions: Sequence[int]) -> int:
        """P + sum L, where completions share nothing"""
        return prompt + sum(completions)

    def pairs(self, prompt: int, completions: Sequence[int]) -> float:
        """P^2 / 2 + sum (L P + L^2 / 2)"""
        return prompt**2 / 2 + sum(length * prompt + length**2 / 2 for length in completions)

    def row_demands(self, prompt: int, rows: Sequence[Sequence[int]], budget: int) -> list[Demand]:
        # a part pays its prompt once: the rest of the budget is for completions
        return [Demand(sum(lengths), sum(lengths), budget - prompt) for lengths in rows]

    def row_tokens(self, strands: Sequence[list[int]]) -> int:
        """Tokens of the tree of its strands: what they share is run once."""
        cuts = shared([key_of(ids) for ids in strands]).cuts if len(strands) > 1 else []
        return sum(map(len, strands)) - sum(cuts)

    def sharing(
        self, prompts: Sequence[list[int]], completions: Sequence[Sequence[list[int]]]
    ) -> Sharing:
        groups = shared([key_of(ids) for ids in prompts], ends=False)
        rows = [
            shared([key_of(ids) for ids in rows], behind=len(prompt))
            for prompt, rows in zip(prompts, completions, strict=True)
        ]
        joins = [0] * len(prompts)
        for (a, b), cut in zip(pairwise(groups.order), groups.cuts, strict=True):
            joins[a], joins[b] = max(joins[a], cut), cut
        return Sharing(groups, rows, joins)

    def put(self, line: Line, unit: UnitIds) -> None:
        self.fill(line, [unit])

    def fill(self, line: Line, units: Sequence[UnitIds]) -> None:
        rows = [
            (TreeRow(unit.prompt + ids, len(unit.prompt), number, unit.alone), targets)
            for number, unit in enumerate(units)
            for ids, targets in zip(unit.completions, unit.targets, strict=True)
        ]
        before = len(line.parents)
        segments, paths = tree_segments([row for row, _ in rows])
        shifts: list[int] = []  # from positions of a segment's rows to places in the line
        for segment in segments:
            shifts.append(len(line.ids) - segment.start)
            line.add(
                rows[segment.row][0].ids[segment.start : segment.stop],
                position=segment.start,
                weights=segment.weights(),
                parent=NONE if segment.parent == NONE else before + segment.parent,
            )
        for (row, targets), path in zip(rows, paths, strict=True):
            first = row.prompt - 1  # a completion's first token is predicted by the prompt's last
            done = 0
            for s in path:
                end = bisect_left(targets, segments[s].stop - first, lo=done)
                shift = shifts[s] + first
                line.logit_index += [shift + place for place in targets[done:end]]
                done = end
