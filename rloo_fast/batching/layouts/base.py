"""What a layout is: its tokens, its cost, its lines, and which models it cannot serve.

P prompt tokens, L completion tokens of a row that are run. A unit is some rows of one group. Where
a row is a trajectory of several strands, each counts as a completion, but as `row_tokens` says.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from ..compiled_sizes import CompiledSizes
from ..prefix_tree import Shares

UnitLengths = tuple[int, Sequence[int]]  # (P, [L of each row]) of a unit
RowTokens = int | tuple[int, ...]  # L of a row, or of each completion that it counts as


class Demand(NamedTuple):
    """What first-fit knows of a unit; the largest is put in first."""

    order: int  # tokens of a row when padded, of the unit otherwise
    size: int  # room it takes in a micro-batch
    room: int  # room of a micro-batch that it is the first in


class UnitIds(NamedTuple):
    """The token ids of a unit. `alone`: these do not say all (there are images), so that its rows
    have their prompt in common, and nothing else with any."""

    prompt: list[int]
    completions: list[list[int]]  # as far as they are run
    targets: list[Sequence[int]]  # places in each of the tokens that log-probs are read for
    alone: bool = False


class Sharing(NamedTuple):
    """Tokens that a layout runs once for several rows: not only a prompt for its group."""

    groups: Shares  # of groups, what their prompts begin with
    rows: list[Shares]  # of the rows of each group, in tokens from their prompt's start
    joins: list[int]  # tokens that each group's prompt has in common with another's, at most

    def group_tokens(self, group: int, prompt: int, completions: Sequence[int]) -> int:
        """P + sum L less what completions share; but at least sum L beside what prompts share, so
        that a micro-batch predicts no more tokens than it may hold."""
        saved = sum(cut - prompt for cut in self.rows[group].cuts)
        return max(prompt + sum(completions) - saved, self.joins[group] + sum(completions))


class Lines(NamedTuple):
    """A micro-batch in Python numbers."""

    input_ids: list[list[int]]  # as many lines as the layout has, all of one length T
    weights: list[list[int]]  # rows that each token stands for, 0 for padding
    logit_index: list[int]  # flattened positions that predict the counted tokens, row after row
    positions: list[int] | None = None  # (T,) of one line; None: from 0 in every line
    segment_lengths: list[int] | None = None  # one line: None where each token sees all before it
    parents: list[int] | None = None  # number of the segment that each continues, -1: none
    padded_segments: dict[str, int] | None = None  # of make_segments, for compiled models


class Layout(ABC):
    """How rows lie in a micro-batch. Subclasses are registered by `register_layout`."""

    name: ClassVar[str]
    help: ClassVar[str]
    rank: ClassVar[int]  # layout="auto" tries the lowest first
    shares_prompts: ClassVar[bool] = False  # a unit's prompt is there once, not for each completion

    @abstractmethod
    def tokens(self, prompt: int, completions: Sequence[int]) -> int:
        """Tokens that the model runs for a unit."""

    @abstractmethod
    def pairs(self, prompt: int, completions: Sequence[int]) -> float:
        """(query, key) pairs of attention in a unit."""

    @abstractmethod
    def lines(
        self,
        units: Sequence[UnitIds],
        *,
        pad_token_id: int,
        multiple_of: int,
        sizes: CompiledSizes | None,
    ) -> Lines:
        """The micro-batch of `units`; without units a filler, which runs one token and weighs
        nothing. Lines are lengthened to a multiple of `multiple_of` tokens, or to one of `sizes`.
        """

    def batch_tokens(self, units: Sequence[UnitLengths]) -> int:
        """Tokens that the model runs for a micro-batch; 0 for a filler."""
        return sum(self.tokens(*unit) for unit in units)

    def cost(self, prompt: int, completions: Sequence[int], *, tokens_per_pair: float) -> float:
        """Estimated cost of a unit, in tokens: tokens run + pairs / tokens_per_pair.

        A decoder layer with the usual 12 D^2 weights does 24 D^2 FLOPs of matrix products per
        token, and attention 4 D per pair (2 D for q.k, 2 D for p v): tokens_per_pair = 6 D.
        """
        return self.tokens(prompt, completions) + self.pairs(prompt, completions) / tokens_per_pair

    def demand(self, prompt: int, completions: Sequence[int], budget: int) -> Demand:
        """What a unit takes of a micro-batch of `budget` tokens."""
        tokens = self.tokens(prompt, completions)
        return Demand(tokens, tokens, budget)

    def row_demands(self, prompt: int, rows: Sequence[Sequence[int]], budget: int) -> list[Demand]:
        """Likewise of each row of a group that is cut, given the completions that it counts as:
        rows that fit together form a unit."""
        return [self.demand(prompt, completions, budget) for completions in rows]

    def row_tokens(self, strands: Sequence[list[int]]) -> RowTokens:
        """L of a trajectory, from its strands as far as they are run: one for each, or for all."""
        return tuple(map(len, strands))

    def sharing(
        self, prompts: Sequence[list[int]], completions: Sequence[Sequence[list[int]]]
    ) -> Sharing | None:
        """What groups share, from the token ids of their prompts and completions as far as they are
        run; None for a layout that counts each group by its lengths."""
        return None

    def refusal(self, model: Any) -> str | None:
        """Why a causal language model of transformers cannot run in this layout, or None: as far
        as its configuration and its modules tell."""
        return None


LAYOUTS: dict[str, Layout] = {}  # the lowest rank first


def register_layout(layout: type[Layout]) -> type[Layout]:
    """Class decorator: `layout=NAME` of a configuration means this class from now on.

    Raises ValueError for a name that is taken by another class.
    """
    for attribute in ("name", "help", "rank"):
        if not hasattr(layout, attribute):
            raise ValueError(f"the layout {layout.__qualname__} has no {attribute}: set it.")
    known = LAYOUTS.get(layout.name)
    if layout.name == "auto" or (known and _source(type(known)) != _source(layout)):
        raise ValueError(f"the layout name {layout.name!r} is taken: choose another one.")
    LAYOUTS[layout.name] = layout()
    for name in sorted(LAYOUTS, key=lambda name: LAYOUTS[name].rank):
        LAYOUTS[name] = LAYOUTS.pop(name)  # the best one first, wherever they are listed
    return layout


def _source(layout: type[Layout]) -> tuple[str, str | None]:
    """The same for a class whose file is run twice, under other module names."""
    return layout.__qualname__, getattr(sys.modules.get(layout.__module__), "__file__", None)


def best_first() -> list[Layout]:
    """Every layout, in the order in which layout="auto" tries them."""
    return list(LAYOUTS.values())


def layouts_help() -> str:
    """name (its line) | name (its line) ..., for the help of an option."""
    return " | ".join(f"{layout.name} ({layout.help})" for layout in best_first())
