"""What crosses from one stage of a step to the next.

Letters: P prompts, K samples per prompt, B = P K completions (rows), N completion tokens of all
rows. Rows are prompt-major: rows i K .. (i + 1) K - 1 are the K samples of prompt i.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

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


@dataclass
class MicroBatch:
    """Rows that go through the model together, and where their completions' log-probs are read.

    Layout `padded`: input_ids (R, T) is prompt | completion | padding. `logit_index` (N,) points
    into the flattened (R T) positions, at the one before each completion token.
    """

    rows: list[int]  # row numbers in the Samples they came from
    input_ids: Tensor  # (R, T)
    attention_mask: Tensor  # (R, T) 1 for real tokens; only auxiliary losses need it
    logit_index: Tensor  # (N,) int64
    targets: Tensor  # (N,) int64
    cu_seqlens: Tensor  # (R + 1,) row r owns packed tokens cu_seqlens[r]:cu_seqlens[r + 1]

    def to(self, device: torch.device) -> MicroBatch:
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return MicroBatch(rows=self.rows, **moved)


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
    on_policy: bool = True  # the weights have not changed since these were sampled
    ref_logps: Tensor | None = None  # (N,)
    old_logps: Tensor | None = None  # (N,) of the policy that sampled; None: not needed or not yet
    advantages: Tensor | None = None  # (R,), or (N,) with token-level KL; None: not yet
    stats: dict[str, Tensor] = field(default_factory=dict)  # per row, for metrics

    @property
    def num_rows(self) -> int:
        return len(self.completion_ids)

    def token_index(self, rows: list[int]) -> Tensor:
        """Indices into the packed tensors of the tokens of `rows`, row after row."""
        bounds = self.cu_seqlens.tolist()
        parts = [torch.arange(bounds[r], bounds[r + 1]) for r in rows]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
