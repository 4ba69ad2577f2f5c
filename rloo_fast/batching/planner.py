"""Which rows run together: plans of micro-batches, without a collective and without a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..records import GenerationBatch, MicroBatch, MicroBatchPlan, Prompt, Unit
from .budget import TokenBudget
from .compiled_sizes import CompiledSizes
from .layouts import LAYOUTS, Layout, RowTokens
from .micro_batches import make_micro_batch
from .packing import completions_of, largest_group_tokens, pack
from .strands import row_tokens, sharing_of


class Planner:
    """Rows -> micro-batches of at most a budget of tokens, in one layout.

    `every_token`: run also tokens from which nothing is predicted. `few_sizes`: micro-batches of a
    few sizes only, for a compiled model. `seen`: a prompt with an image for every micro-batch
    without one, where processes must run the same modules. `layout` and `images_once` are set once,
    before the first plan.
    """

    def __init__(
        self,
        budget: TokenBudget,
        *,
        device: torch.device,
        pad_token_id: int,
        multiple_of: int | None = None,
        every_token: bool = False,
        few_sizes: bool = False,
        seen: Prompt | None = None,
    ):
        self.budget, self.device, self.pad_token_id = budget, device, pad_token_id
        self.multiple_of, self.every_token = multiple_of or 1, every_token
        self.few_sizes, self.seen = few_sizes, seen
        self.layout_name, self.images_once = "", False

    @property
    def layout(self) -> Layout:
        assert self.layout_name, "no layout was chosen yet"
        return LAYOUTS[self.layout_name]

    def plan(
        self,
        batch: GenerationBatch,
        rows: Sequence[int],
        *,
        split: bool,
        max_rows: int | None = None,
        piece: int = 0,
    ) -> list[MicroBatchPlan]:
        """Micro-batches of `rows`, those of a prompt together; `split`: as far as they fit.

        `max_rows`: padded rows of the budget, in place of its own number of them.
        """
        budget = self.budget.of(batch, max_rows)
        groups = units_of(batch, rows)
        plans = pack(
            groups,
            *self.lengths(batch),
            layout=self.layout,
            budget=budget,
            split=split,
            sharing=sharing_of(batch, groups, self.layout, self.every_token),
        )
        return [MicroBatchPlan(units, budget, piece) for units in plans]

    def filler(self, batch: GenerationBatch, *, max_rows: int | None = None) -> MicroBatchPlan:
        """A micro-batch without rows."""
        return MicroBatchPlan([], self.budget.of(batch, max_rows))

    def micro_batch(self, batch: GenerationBatch, plan: MicroBatchPlan) -> MicroBatch:
        """The tensors of a planned micro-batch."""
        sizes = CompiledSizes(plan.budget, batch.sizes.longest_row) if self.few_sizes else None
        return make_micro_batch(
            batch,
            plan.units,
            self.layout,
            device=self.device,
            pad_token_id=self.pad_token_id,
            every_token=self.every_token,
            multiple_of=self.multiple_of,
            sizes=sizes,
            seen=self.seen,
            images_once=self.images_once,
        )

    def lengths(self, batch: GenerationBatch) -> tuple[list[int], list[RowTokens]]:
        """(prompt tokens, completion tokens that are run) of every row."""
        tokens = row_tokens(batch, self.layout, self.every_token)
        return [len(ids) for ids in batch.prompt_ids], tokens

    def sizes_here(self, batch: GenerationBatch) -> tuple[int, int]:
        """Tokens of (the longest row, the largest whole group) of this process' rows."""
        prompts, run = self.lengths(batch)
        pairs = zip(prompts, run, strict=True)
        longest = max(self.layout.tokens(p, completions_of(n)) for p, n in pairs)
        groups = units_of(batch, range(batch.num_rows)) if batch.whole_groups else []
        sharing = sharing_of(batch, groups, self.layout, self.every_token)
        return longest, largest_group_tokens(groups, prompts, run, self.layout, sharing)

    def why_groups_are_split(self, batch: GenerationBatch) -> str | None:
        """Why not every group of the generation batch is whole in one micro-batch, or None."""
        k, largest = batch.num_generations, batch.sizes.largest_group
        if not batch.whole_groups:
            return f"the num_generations={k} completions of a prompt are on several processes"
        if largest <= self.budget.of(batch):
            return None
        return (
            f"the num_generations={k} completions of a prompt take up to {largest} tokens, more "
            f"than a micro-batch holds ({self.budget.described(batch)})"
        )


def units_of(batch: GenerationBatch, rows: Sequence[int]) -> list[Unit]:
    """`rows` by the prompt they belong to."""
    groups: dict[int, Unit] = {}
    for row in rows:
        groups.setdefault(batch.groups[row], []).append(row)
    return list(groups.values())
