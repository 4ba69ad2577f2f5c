"""What crosses from one stage of a step to the next.

Letters: P prompts, K samples per prompt, B = P K completions (rows), N completion tokens of all
rows. Rows are prompt-major: rows i K .. (i + 1) K - 1 are the K samples of prompt i.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .attention import Segments

Message = dict[str, Any]
PromptText = str | list[Message]


@dataclass(frozen=True)
class Prompt:
    """One dataset row, ready to be sampled from."""

    text: PromptText  # as in the dataset's `prompt` column
    ids: list[int]
    columns: dict[str, Any]  # every other dataset column, for the reward functions


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; the same for every engine."""

    temperature: float
    top_p: float
    top_k: int  # 0: all tokens
    min_p: float | None
    repetition_penalty: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]  # each ends a completion and is part of it
    extra: dict[str, Any] = field(default_factory=dict)  # generation_kwargs, these win


@dataclass
class Rollout:
    """What an engine returns: one entry per prompt given, in order."""

    completion_ids: list[list[int]]  # up to and including the stop token, no padding
    finish_reasons: list[str]  # "stop": ended by a stop token; "length": cut at max_new_tokens
    # per token, of the distribution it was drawn from: after temperature, top-p, top-k and min-p;
    # None: the engine has none to give
    logps: list[list[float]] | None = None
    weights_version: int | None = None  # of the policy that sampled them


class Credit(NamedTuple):
    """What the loss credits the rows of a micro-batch with: exactly one of the first three.

    Per token in the order of the micro-batch's `targets`, on the CPU.
    """

    rewards: Tensor | None = None  # (R,) whole groups: KL and baseline come out of the forward
    advantages: Tensor | None = None  # (R,)
    token_advantages: Tensor | None = None  # (N,)
    old_logps: Tensor | None = None  # (N,) None: on-policy, the ratio is exactly 1
    ref_logps: Tensor | None = None  # (N,)


@dataclass
class MicroBatch:
    """Rows that go through the model together, and where their completions' log-probs are read.

    Layout `padded`: input_ids (R, T) is prompt | completion | padding, one line per row. Layouts
    `packed` and `shared_prefix`: input_ids (1, T), sequences one after another (see `layouts.py`).
    `logit_index` (N,) points into the flattened positions, at the one before each completion token.
    No rows: a filler, which runs one token and weighs nothing.
    """

    rows: list[int]  # row numbers in the Samples they came from
    input_ids: Tensor  # (R, T) or (1, T)
    logit_index: Tensor  # (N,) int64
    targets: Tensor  # (N,) int64
    cu_seqlens: Tensor  # (R + 1,) on the CPU; row r owns tokens cu_seqlens[r]:cu_seqlens[r + 1]
    token_weights: Tensor  # as input_ids: rows that a token stands for, 0 for padding
    position_ids: Tensor | None = None  # (1, T) None: from 0 in every line
    segments: Segments | None = None  # which tokens see which; None: all before them in the line


@dataclass
class Samples:
    """One generation batch as one rank holds it: its rows, and what is known of each.

    Filled stage by stage. The packed (N,) tensors hold the completion tokens that count in the
    loss, row after row: a masked row (truncated, under mask_truncated_completions) has none.
    """

    prompt_ids: list[list[int]]  # per row
    completion_ids: list[list[int]]  # per row
    cu_seqlens: Tensor  # (R + 1,)
    scores: Tensor  # (R,) weighted reward after penalty, normalisation and clip; NaN: unscorable
    num_generations: int
    groups: list[int]  # per row, the number of its prompt in the generation batch; ascending
    whole_groups: bool  # on every process, all K rows of each of its prompts
    longest: int = 0  # tokens put through the model for the longest row of all processes
    largest_group: int = 0  # likewise for the completions of one prompt, in the layout
    tokens_per_process: float = 0.0  # completion tokens that count, mean over processes
    on_policy: bool = True  # the weights have not changed since these were sampled
    ref_logps: Tensor | None = None  # (N,)
    old_logps: Tensor | None = None  # (N,) of the policy that sampled; None: not needed or not yet
    sampler_logps: Tensor | None = None  # (N,) the same as the rollout engine saw them; None: none
    advantages: Tensor | None = None  # (R,), or (N,) with a KL to go; None: not yet
    stats: dict[str, Tensor] = field(default_factory=dict)  # per row, for metrics

    @property
    def num_rows(self) -> int:
        return len(self.completion_ids)

    @property
    def num_tokens(self) -> list[int]:
        """Completion tokens of each row that count in the loss."""
        return self.cu_seqlens.diff().tolist()

    def token_index(self, rows: list[int]) -> Tensor:
        """Indices into the packed tensors of the tokens of `rows`, row after row."""
        bounds = self.cu_seqlens.tolist()
        parts = [torch.arange(bounds[r], bounds[r + 1]) for r in rows]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
