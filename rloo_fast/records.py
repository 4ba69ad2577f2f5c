"""What crosses from one stage of a step to the next: a frozen record, made by one stage.

    stage      makes             out of
    data       Prompt            a dataset row
    rollout    Rollout           prompts
    collect    GenerationBatch   rollouts and their rewards
    prepare    PreparedBatch     a GenerationBatch, after the passes without gradients
    plan       StepPlan          the rows of PreparedBatches that an optimizer step takes
    update     StepResult        a StepPlan

A later stage returns a new record (`dataclasses.replace`); nobody writes into an earlier one.

Letters: P prompts, K samples per prompt, R completions (rows) of one process, N counted completion
tokens of these rows, F reward functions. Rows are prompt-major: the K samples of a prompt are
neighbours. A field says along what it runs: `per_row` has an entry for every row, `per_token` for
every counted token, row after row; the others hold for the whole batch. What moves and saves
records (`record_rows.py`) follows the fields, so that a new one cannot be lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from rloo_kernels import Objective
from rloo_kernels.loss.packed import segment_sum
from torch import Tensor

from .record_rows import newest, per_row, per_token
from .record_trajectories import Message, Strand, Trajectory

PromptText = str | list[Message]
Unit = list[int]  # rows of one group that run together, ascending
Bucket = list[tuple[str, Tensor]]  # (name as in a checkpoint, full tensor), at least one
# what an engine is sent: the weights with their adapters, or apart from them, or these alone
SentParts = Literal["merged", "base+adapter", "adapter"]
# what a model's forward takes of a prompt beside its ids, by the names there: pixel_values, grids,
# sizes; per token of the prompt (L,) PER_TOKEN_INPUTS and (3, L) position_ids, where it counts
# them in three directions. Rows of one prompt share one object, which nobody writes into
ImageInputs = dict[str, Tensor]
# prompts with images of a micro-batch that has each image once, and in how many lines they are
ImageCopies = list[tuple[list[int], int]]
PER_TOKEN_INPUTS = ("token_type_ids", "mm_token_type_ids")
NAN = float("nan")


class RawPrompt(NamedTuple):
    """A prompt with images before a processor had it, for an engine that has one itself."""

    ids: list[int]  # of its text, in which an image is what the template writes for it
    images: list[Any]  # PIL images


class Count(float):
    """A metric that is summed over the calls and processes of a step; others are averaged."""


# Prompts and completions


@dataclass(frozen=True)
class Prompt:
    """One dataset row, ready to be sampled from.

    Prompt("2 + 2 =", [17, 10, 17, 28], {"answer": "4"})
    """

    text: PromptText  # as in the dataset's `prompt` column
    ids: list[int]
    columns: dict[str, Any]  # every other dataset column, for the reward functions
    inputs: ImageInputs | None = None  # None: a text run
    raw: RawPrompt | None = None  # of a run with images whose engine reads them itself


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
    extra: dict[str, Any] = field(default_factory=dict[str, Any])  # generation_kwargs, these win
    stop_strings: tuple[str, ...] = ()  # text that ends a completion, see `rollout.stops`
    include_stop_strings: bool = True  # whether they are part of it, and trained on
    # of prompt and completion together: max_new_tokens may be more than a prompt leaves room for
    max_length: int | None = None

    def num_new(self, num_prompt: int) -> int:
        """Most tokens behind a prompt of so many."""
        if self.max_length is None:
            return self.max_new_tokens
        return min(self.max_new_tokens, self.max_length - num_prompt)

    def behind(self, num_prompt: int) -> Sampling:
        """The same with max_new_tokens alone, for one prompt of so many tokens."""
        if self.max_length is None:
            return self
        return replace(self, max_new_tokens=self.num_new(num_prompt), max_length=None)


@dataclass(frozen=True)
class Rollout:
    """What an engine returns: one entry per prompt given, in order.

    Rollout([[4, 1]], ["stop"], [[-0.3, -0.1]], weights_version=7)

    Of trajectories, made of several answers of an engine, completion_ids are those of the last
    strand, and what is per token is of every sampled one, strand after strand.
    """

    completion_ids: list[list[int]]  # up to and including what ended it, no padding
    # "stop": ended by a stop token or a stop string; "length": cut before. Penalty, masks and
    # metrics go by this, and by nothing else
    finish_reasons: list[str]
    # per token, of the distribution it was drawn from: after temperature, top-p, top-k and min-p;
    # None: the engine has none to give
    logps: list[list[float]] | None = None
    weights_version: int | None = None  # of the newest policy that sampled of them
    # per token, of the policy that drew it; None: all by weights_version
    token_versions: list[list[int]] | None = None
    trajectories: list[Trajectory] | None = None  # None: completions, all of whose tokens count

    @property
    def num_sampled(self) -> list[int]:
        """Tokens of each that the policy drew."""
        if self.trajectories is not None:
            return [one.num_sampled for one in self.trajectories]
        return [len(ids) for ids in self.completion_ids]


class CompletionTexts(NamedTuple):
    """What the completions table shows of a generation batch: of all processes, as sampled."""

    prompts: list[Any]
    completions: list[Any]
    rewards: dict[str, list[float]]  # by reward function
    extra: dict[str, list[Any]]  # what reward functions gave to log_extra
    images: list[list[Any]] | None = None  # of each prompt; None: nobody looks at them


@dataclass(frozen=True)
class SampledGroup:
    """The completions of one prompt, as a rollout_filter sees them: K of each list."""

    prompt: PromptText
    columns: dict[str, Any]  # every other dataset column of the prompt's row
    completions: list[Any]  # texts, or messages, as reward functions get them
    completion_ids: list[list[int]]
    rewards: dict[str, list[float]]  # by reward function; NaN: not applicable
    reward: list[float]  # their weighted sum; NaN: unscorable
    lengths: list[int]  # in tokens
    truncated: list[bool]  # cut before it ended


# A generation batch: sampled, scored, prepared


@dataclass(frozen=True, eq=False)
class RolloutRows:
    """What a rollout and its rewards say of each row, for metrics."""

    row: Tensor = per_row()  # (R,) its number in the generation batch as sampled
    length: Tensor = per_row()  # (R,) tokens that were sampled, counted in the loss or not
    truncated: Tensor = per_row()  # (R,) bool: cut before it ended, by Rollout.finish_reasons
    rewards: Tensor = per_row()  # (R, F) of each function; NaN: not applicable
    reward: Tensor = per_row()  # (R,) their weighted sum; NaN: unscorable


class BatchSizes(NamedTuple):
    """Sizes of a generation batch over all processes, the same on each: budgets depend on them."""

    longest_row: int = 0  # tokens put through the model for the longest row
    largest_group: int = 0  # likewise for all completions of one prompt, in the layout
    tokens_per_process: float = 0.0  # completion tokens that count, mean over processes


@dataclass(frozen=True, eq=False)
class GenerationBatch:
    """Completions that were sampled together, with their scores: this process' rows.

    A masked row (truncated, under mask_truncated_completions) has no counted token. Rows may have
    been sampled by several policies, a row by more than one: `token_versions` says by which.

    A row is one trajectory, whose counted tokens are those that were sampled, strand after strand:
    what is per row (score, advantage, a ratio of sequences) is of the whole of it.
    """

    prompt_ids: list[list[int]] = per_row()
    completion_ids: list[list[int]] = per_row()  # of a trajectory, the ids of its last strand
    num_tokens: list[int] = per_row()  # completion tokens that count in the loss
    groups: list[int] = per_row()  # number of the row's prompt in the generation batch; ascending
    scores: Tensor = per_row()  # (R,) reward after penalty, normalisation, clip; NaN: unscorable
    rows: RolloutRows = per_row()
    num_generations: int = 0  # K
    whole_groups: bool = True  # on every process, all K rows of each of its prompts
    sampler_logps: Tensor | None = per_token(default=None)  # (N,) as the engine sampled them
    # (N,) int32, of the policy that drew each; None: all by weights_version
    token_versions: Tensor | None = per_token(default=None)
    inputs: list[ImageInputs] | None = per_row(default=None)  # of its prompt; None: a text run
    # of each strand of a trajectory, see `strands`; None: the first num_tokens of completion_ids
    strand_ids: list[list[list[int]]] | None = per_row(default=None)
    counted: list[list[list[int]]] | None = per_row(default=None)
    # of the policy when the batch was collected: its first update starts from these weights
    weights_version: int | None = newest(default=None)
    sizes: BatchSizes = BatchSizes()

    @property
    def num_rows(self) -> int:
        return len(self.completion_ids)

    def strands(self, row: int) -> list[Strand]:
        """What the row is made of: its completion, or the strands of its trajectory."""
        if self.strand_ids is None or self.counted is None:
            return [Strand(self.completion_ids[row], range(self.num_tokens[row]))]
        pairs = zip(self.strand_ids[row], self.counted[row], strict=True)
        return [Strand(ids, counted) for ids, counted in pairs]

    @cached_property
    def staleness(self) -> Tensor:
        """(N,) int64: versions that the policy was ahead of the one that drew the token."""
        if self.token_versions is None or self.weights_version is None:
            return torch.zeros(sum(self.num_tokens), dtype=torch.long)
        return self.weights_version - self.token_versions.long()

    @cached_property
    def stale_rows(self) -> Tensor:
        """(R,) bool: an older policy drew a token of it. Then even its newest tokens may rest on
        keys and values that this policy had computed of the row."""
        return segment_sum((self.staleness != 0).long(), self.cu_seqlens) > 0

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """(R + 1,) int64: row r owns the counted tokens cu_seqlens[r]:cu_seqlens[r + 1]."""
        return torch.tensor([0, *accumulate(self.num_tokens)])

    def token_index(self, rows: Sequence[int]) -> Tensor:
        """Indices into the (N,) tensors of the tokens of `rows`, row after row."""
        bounds = [0, *accumulate(self.num_tokens)]
        parts = [torch.arange(bounds[r], bounds[r + 1]) for r in rows]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)


@dataclass(frozen=True, eq=False)
class PolicyRows:
    """What the policy's log-probs say of each row, for metrics; NaN: nothing ran that row."""

    kl: Tensor = per_row()  # (R,) sum_t (logp_t - ref_t), 0 without a reference
    shaped_reward: Tensor = per_row()  # (R,) score - beta KL; the score where the KL is elsewhere
    surprisal: Tensor = per_row()  # (R,) -sum_t logp_t


@dataclass(frozen=True, eq=False)
class PreparedBatch:
    """A generation batch with all that is known before rows of it are trained on."""

    generation: GenerationBatch
    on_policy: bool = True  # the weights have not changed since it was collected
    ref_logps: Tensor | None = None  # (N,)
    # (N,) of the policy when it was collected, whoever sampled; None: not needed or not yet
    old_logps: Tensor | None = None
    old_entropy: Tensor | None = None  # (R,) sum_t H_t, where a pass before the update found it
    token_entropy: Tensor | None = None  # (N,) H_t, of the pass or update that made old_logps
    # (R,), or (N,) with a KL to go; None: they come out of the update's own forward
    advantages: Tensor | None = None
    policy_rows: PolicyRows | None = None


# An optimizer step


class Piece(NamedTuple):
    """Rows of a generation batch that one optimizer step takes."""

    batch: PreparedBatch
    rows: list[int]
    number: int  # of the batch in the run


@dataclass(frozen=True)
class MicroBatchPlan:
    """Units that run together, none for a filler. `piece`: number of their piece in the step."""

    units: list[Unit]
    budget: int  # tokens that it may hold
    piece: int = 0

    @property
    def num_rows(self) -> int:
        return sum(len(unit) for unit in self.units)


@dataclass(frozen=True, eq=False)
class StepPlan:
    """What an optimizer step will run on this process; as many micro-batches on every one.

    Rows whose gradient is known to be 0 are in no micro-batch.
    """

    pieces: list[Piece]
    micro_batches: list[MicroBatchPlan]
    denominators: list[float]  # of the sum over each piece's rows

    @property
    def num_rows(self) -> int:
        return sum(len(piece.rows) for piece in self.pieces)


class SharedRuns(NamedTuple):
    """Sequences b of queries cu_q[b]:cu_q[b + 1] that see the keys cu_k[b]:cu_k[b + 1], all of
    them: neighbouring segments and the one that all of them continue, and empty ones between."""

    cu_q: Tensor  # int32, on the device
    cu_k: Tensor
    max_q: int  # bounds on their lengths, rounded up as those of Segments
    max_k: int


class Segments(NamedTuple):
    """S attention segments of one line of T tokens, a tree: a segment continues its parent, and
    sees it and all that it sees. They come depth first. Made by `batching.segments.make_segments`;
    torch.compile traces through it."""

    bounds: Tensor  # (S + 1,) int32, CPU
    parents: Tensor  # (S,) int32, CPU: number of the segment that it continues, -1: none
    key_index: Tensor | None  # (M,) tokens that are keys, per segment its path, then own; None: all
    cu_q: Tensor  # (S + 1,) int32: bounds, on the device
    cu_k: Tensor  # (S + 1,) int32: where the segments' keys begin in key_index
    max_q: int  # no segment has more tokens, and none more keys; rounded up to powers of two,
    max_k: int  # so that a compiled graph seldom sees a new one
    shared: tuple[SharedRuns, ...] = ()  # by depth: segments without parent, those after them, ...


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Rows that go through the model together, and where their completions' log-probs are read.

    Layout `padded`: input_ids (R, T) is prompt | completion | padding, one line per row. Layouts
    `packed` and `shared_prefix`: input_ids (1, T), sequences one after another.
    `logit_index` (N,) points into the flattened positions, at the one before each completion token.
    No rows: a filler, which runs one token and weighs nothing.
    """

    rows: list[int]  # row numbers in the generation batch
    input_ids: Tensor  # (R, T) or (1, T)
    logit_index: Tensor  # (N,) int64
    targets: Tensor  # (N,) int64
    cu_seqlens: Tensor  # (R + 1,) on the CPU; row r owns tokens cu_seqlens[r]:cu_seqlens[r + 1]
    token_weights: Tensor  # as input_ids: rows that a token stands for, 0 for padding
    # (1, T), or (3, R, T) of a model that counts in three directions; None: from 0 in every line
    position_ids: Tensor | None = None
    segments: Segments | None = None  # which tokens see which; None: all before them in the line
    inputs: ImageInputs | None = None  # of its images, in their tokens' order, for forward
    copies: ImageCopies | None = None  # of images that several lines have; None: of none


class LossInputs(NamedTuple):
    """What the loss of a micro-batch is made of, beside its log-probs: one of the first three.

    Per token in the order of the micro-batch's `targets`, on the CPU.
    """

    rewards: Tensor | None = None  # (R,) whole groups: KL and baseline come out of the forward
    advantages: Tensor | None = None  # (R,)
    token_advantages: Tensor | None = None  # (N,)
    # (N,) None: on-policy, the ratio is exactly 1; NaN: of this token
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None  # (N,)


@dataclass(frozen=True, eq=False)
class MicroBatchInputs:
    """What `RLOOTrainer.compute_loss` is given."""

    micro_batch: MicroBatch
    loss_inputs: LossInputs
    num_generations: int  # K where the advantages come out of the forward, 0 where they are given
    denominator: float  # of the sum over the rows of its piece
    num_rows: int  # of the step on this process; every process has the same
    loss_scale: float = 1.0  # what fp16 gradients are multiplied by


@dataclass(frozen=True, eq=False)
class MicroBatchResult:
    """What `RLOOTrainer.compute_loss` returns beside the loss."""

    objective: Objective
    aux_loss: Tensor | None = None  # () load-balancing loss of a mixture-of-experts model


def _of_update(*, not_run: float) -> Any:
    """A column (R,) of UpdateRows; `not_run`: its value for a row that is in no micro-batch."""
    return field(metadata={"along": "rows", "not_run": not_run})


@dataclass(frozen=True, eq=False)
class UpdateRows:
    """Statistics of each row that an optimizer step takes, (R,) each."""

    ran: Tensor = _of_update(not_run=0.0)  # 1; 0: its gradient was known to be 0
    tokens: Tensor = _of_update(not_run=0.0)  # that count in the loss
    entropy: Tensor = _of_update(not_run=NAN)  # sum_t H_t
    clipped_low: Tensor = _of_update(not_run=0.0)  # share of the row's ratios, see Objective
    clipped_high: Tensor = _of_update(not_run=0.0)
    log_ratio: Tensor = _of_update(not_run=0.0)  # sum_t (logp_t - old_t)
    token_ratio: Tensor = _of_update(not_run=0.0)  # sum_t exp(logp_t - old_t)
    loss: Tensor = _of_update(not_run=0.0)  # scaled: the mean over rows is the step's loss
    micro_batch: Tensor = _of_update(not_run=-1.0)  # number of the micro-batch it went through
    aux_loss: Tensor = _of_update(not_run=NAN)  # NaN also without a load-balancing loss

    @classmethod
    def not_run(cls, num_rows: int) -> UpdateRows:
        """The columns of rows of which none was run."""
        return cls(
            **{
                f.name: torch.full((num_rows,), f.metadata["not_run"], dtype=torch.float32)
                for f in fields(cls)
            }
        )


@dataclass(frozen=True, eq=False)
class StepResult:
    """What an optimizer step came to on this process."""

    loss: Tensor  # () sum over this process' rows, as divided by the denominators
    rows: UpdateRows
    pieces: list[Piece]  # their batches with what is known since: old log-probs, advantages
    num_micro_batches: int  # fillers included
    num_tokens_run: int  # positions put through the model
    num_groups: int
    num_groups_not_run: int

    @property
    def first_used(self) -> list[PreparedBatch]:
        """The batches of which no earlier step took rows."""
        batches = {piece.number: piece.batch for piece in self.pieces}
        return [batch for batch in batches.values() if batch.on_policy]
