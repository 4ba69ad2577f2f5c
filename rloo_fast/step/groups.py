"""Whole groups apart from the batch that they were sampled in: which have signal, and how some of
them become a generation batch. Every process holds the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from ..distributed.collectives import gather_objects
from ..record_rows import as_plain, concatenate, from_plain, take_rows
from ..records import CompletionTexts, GenerationBatch
from ..rewards.shaping import ScoreSettings
from .texts import joined_texts, texts_of

PLAIN = (str, int, float, bool, type(None))


@dataclass(frozen=True, eq=False)
class Group:
    """The completions of one prompt."""

    number: int  # of the prompt in the run
    batch: GenerationBatch  # K rows, without scores
    texts: CompletionTexts | None = None  # None: nobody looks at them

    def unscorable(self) -> Group:
        """The same with rewards that compare with nothing: it is trained with advantages of 0."""
        nothing = torch.full_like(self.batch.rows.reward, float("nan"))
        return replace(
            self, batch=replace(self.batch, rows=replace(self.batch.rows, reward=nothing))
        )


def split(
    batch: GenerationBatch,
    texts: CompletionTexts | None,
    numbers: Sequence[int],
    accelerator: Accelerator,
) -> list[Group]:
    """The groups of a rollout, of which every process has a share of the rows; the first ones, as
    many as `numbers`."""
    parts = gather_objects(accelerator, batch)
    everyone = parts[0] if len(parts) == 1 else concatenate(parts)
    k = batch.num_generations
    found: list[Group] = []
    for i, number in enumerate(numbers):
        rows = slice(i * k, (i + 1) * k)
        some = None if texts is None else texts_of(texts, rows)
        found.append(Group(number, take_rows(everyone, range(rows.start, rows.stop)), some))
    return found


def has_signal(group: GenerationBatch, settings: ScoreSettings) -> bool:
    """Whether the scores of the group's completions differ, so that advantages are not all 0, and
    one that is compared has tokens that count.

    Scores are what the loss compares: rewards after the penalties of length and the clip, without
    the unscorable (NaN). Normalising over the generation batch keeps what is equal equal, so where
    it is asked for it is left out here, and with it the clip that follows it. A KL in the reward
    does not count: it differs between any two completions, so that every group would have signal,
    and it pulls towards the reference, which is no reason to prefer one prompt to another.
    """
    alone = replace(settings, normalize=False, clip_range=None) if settings.normalize else settings
    rows = group.rows
    scores = alone.scores(rows.reward.double(), rows.truncated.double(), rows.length.double())
    scorable = ~scores.isnan()
    kept: Tensor = scores[scorable]
    counts = torch.tensor(group.num_tokens)[scorable] > 0
    return kept.numel() > 1 and bool(kept.min() < kept.max()) and bool(counts.any())


def joined(
    groups: Sequence[Group], accelerator: Accelerator
) -> tuple[GenerationBatch, CompletionTexts | None]:
    """A generation batch of these groups, in this order: this process' share of its rows, and the
    texts of all."""
    k = groups[0].batch.num_generations
    whole = concatenate([group.batch for group in groups])
    numbers = torch.arange(whole.num_rows)
    whole = replace(whole, groups=(numbers // k).tolist(), rows=replace(whole.rows, row=numbers))
    size = whole.num_rows // accelerator.num_processes
    start = accelerator.process_index * size
    mine = take_rows(whole, range(start, start + size))
    texts = [group.texts for group in groups if group.texts is not None]
    return (
        replace(mine, whole_groups=size % k == 0),
        joined_texts(texts) if len(texts) == len(groups) else None,
    )


def aged(batch: GenerationBatch, shift: int) -> GenerationBatch:
    """The batch with `shift` added to the versions of its weights: a resumed run counts anew."""
    versions, newest = batch.token_versions, batch.weights_version
    return replace(
        batch,
        token_versions=None if versions is None else versions + shift,
        weights_version=None if newest is None else newest + shift,
    )


def group_to_plain(group: Group) -> dict[str, Any]:
    """For a checkpoint, without the images that trackers show; what a reward function gave to
    log_extra becomes text where it has to."""
    texts = group.texts
    if texts is not None:
        extra = {
            name: [x if isinstance(x, PLAIN) else str(x) for x in values]
            for name, values in texts.extra.items()
        }
        texts = texts._replace(extra=extra, images=None)
    return {
        "number": group.number,
        "batch": as_plain(group.batch),
        "texts": None if texts is None else texts._asdict(),
    }


def group_from_plain(plain: dict[str, Any]) -> Group:
    texts = plain["texts"]
    return Group(
        plain["number"],
        cast(GenerationBatch, from_plain(GenerationBatch, plain["batch"])),
        None if texts is None else CompletionTexts(**texts),
    )
