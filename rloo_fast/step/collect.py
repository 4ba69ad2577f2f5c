"""Collect: dataset rows in, a scored generation batch out.

rows -> prompts -> completions (rollout) -> rewards -> scores -> groups balanced over processes
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerState

from ..batching.balance import balance_rows, with_sizes
from ..batching.planner import Planner
from ..data.images import shown_images, without_images
from ..data.seeds import step_seed
from ..data.tokenize import RowTokenizer, is_conversational
from ..distributed.collectives import gather_objects, gather_rows
from ..records import (
    CompletionTexts,
    Count,
    GenerationBatch,
    ImageInputs,
    Prompt,
    Rollout,
    RolloutRows,
    Sampling,
)
from ..rewards import Rewards, Scoring
from ..rewards.shaping import shape_scores
from ..rollout.cycle import RolloutCycle
from ..rollout.stops import KeptRows, Stops


@dataclass(frozen=True)
class ScoreSettings:
    """What becomes of the weighted reward before the loss sees it (see `shape_scores`)."""

    missing_eos_penalty: float | None = None
    normalize: bool = False
    clip_range: list[float] | None = None


class Collected(NamedTuple):
    """What a rollout and its rewards came to."""

    batch: GenerationBatch
    num_tokens: int  # of prompts and completions, all processes
    logged: dict[str, float]  # over all processes, of what reward functions gave to log_metric
    texts: CompletionTexts | None  # None: nobody looks at them


class PeerFailed(RuntimeError):
    """Another process could not sample or score its prompts; the message has its error."""


class Collector:
    """Samples completions for prompts and scores them. Same on every process, on its own rows.

    `stage(name)`: a context that times what runs in it. `hidden(seconds)`: is told what of the
    rewards' time ran beside the rollout. `tokens_per_pair`: see `Layout.cost`. `with_texts`: texts
    of all processes are gathered for whoever looks at them; `with_images`: images too,
    where a tracker `shows_images`.
    """

    def __init__(
        self,
        rollouts: RolloutCycle,
        tokenize: RowTokenizer,
        rewards: Rewards,
        sampling: Sampling,
        planner: Planner,
        accelerator: Accelerator,
        *,
        scores: ScoreSettings,
        mask_truncated: bool,
        overlap_rewards: bool,
        with_texts: bool,
        with_images: bool,
        shows_images: bool,
        tokens_per_pair: float,
        stage: Callable[[str], AbstractContextManager[None]],
        hidden: Callable[[float], None],
    ):
        self.rollouts, self.tokenize, self.rewards = rollouts, tokenize, rewards
        self.tokenizer, self.seen = tokenize.tokenizer, tokenize.seen
        self.sampling, self.planner, self.accelerator = sampling, planner, accelerator
        self.scores, self.mask_truncated = scores, mask_truncated
        self.overlap_rewards = overlap_rewards
        self.with_texts, self.with_images = with_texts, with_images
        self.shows_images = shows_images
        self.tokens_per_pair, self.stage, self.hidden = tokens_per_pair, stage, hidden
        self.stops = Stops(sampling, tokenize.tokenizer)
        self.failed = False  # the newest rollout or its rewards, on some process

    def __call__(
        self,
        dataset_rows: Sequence[Any],
        num_generations: int,
        seed: int,
        mode: str,
        state: TrainerState,
    ) -> Collected:
        """The K completions of each row's prompt, scored; this process' share of the rows.

        `dataset_rows` are those of all processes, `seed` is the same on all. Functions score a
        prompt as soon as this process has all its completions of it; without overlap_rewards, all
        prompts at the end. In mode "train", whole groups are exchanged so that all processes have
        about as much to compute.
        """
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        with self._failing_together():  # before anything that waits for the others
            prompts = self.tokenize(dataset_rows)
        rows = [prompt for prompt in prompts for _ in range(num_generations)]
        assert len(rows) % world == 0, (len(rows), world)
        size = len(rows) // world
        rows = rows[rank * size : (rank + 1) * size]
        # (prompt, sample), so that a draw does not depend on the number of processes
        places = [divmod(rank * size + i, num_generations) for i in range(size)]
        kept = KeptRows(self.stops, [[*row.ids] for row in rows])
        seeds = [step_seed(seed, *place) for place in places]
        given = _GivenByRewards()
        with self._failing_together():
            groups = [prompt for prompt, _ in places]
            scoring = self._begin_rewards(rows, groups, kept.texts, state)
            rollout, per_function = self._sample_and_score(
                kept, seeds, scoring, given, mode, _inputs(rows)
            )
        self.rollouts.sleep()
        texts = None
        if self.with_texts:
            completions = scoring.batch.completions(range(size))
            texts = self._texts(rows, completions, per_function, given.extra)
        batch = self._batch(rows, rollout, per_function, num_generations)
        if mode == "train":
            batch = balance_rows(
                batch,
                self.accelerator,
                layout=self.planner.layout,
                tokens_per_pair=self.tokens_per_pair,
            )
        return Collected(
            batch=with_sizes(batch, self.planner, self.accelerator),
            num_tokens=self._num_tokens(rows, rollout),
            logged=self._mean_logged(given.logged),
            texts=texts,
        )

    def _sample_and_score(
        self,
        kept: KeptRows,
        seeds: list[int],
        scoring: Scoring,
        given: _GivenByRewards,
        mode: str,
        inputs: list[ImageInputs] | None,
    ) -> tuple[Rollout, Tensor]:  # rewards (R, F), NaN: not applicable
        def finished(row: int, ids: list[int]) -> None:
            scoring.finished(row, ids[: kept.row(row, ids).num_tokens])

        with scoring:
            with self.stage("rollout"):
                sampled = self.rollouts.generate(
                    [[*ids] for ids in kept.prompt_ids],  # an engine may be anyone's
                    self.sampling,
                    seeds,
                    finished if self.overlap_rewards else None,
                    mode=mode,
                    inputs=inputs,
                )
                rollout = kept.rollout(sampled)
            if self.rewards.offloaded:
                self.rollouts.sleep(give_back=False)  # its memory is the reward models' first
            with self.stage("reward"):
                per_function = scoring.end(
                    rollout.completion_ids,
                    [reason == "stop" for reason in rollout.finish_reasons],
                    log_extra=lambda name, values: given.extra[name].extend(values),
                    log_metric=lambda name, value: given.logged[name].append(value),
                )
        self.hidden(scoring.hidden_s)
        return rollout, per_function

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        """What one process raises ends the others too, rather than letting them wait for it."""
        failure, self.failed = None, False
        try:
            yield
        except Exception as error:
            failure = error
        text = failure and f"{type(failure).__name__}: {failure}"
        everyone = gather_objects(self.accelerator, text)
        self.failed = any(other is not None for other in everyone)
        if failure is not None:
            raise failure
        for rank, other in enumerate(everyone):
            if other is not None:
                raise PeerFailed(f"process {rank} failed: {other}")

    def _begin_rewards(
        self, rows: list[Prompt], prompt_of: list[int], texts: dict[int, str], state: TrainerState
    ) -> Scoring:
        """`texts`: of rows whose text is not that of their tokens."""

        def decode(some: list[int], completion_ids: list[list[int]]) -> list[Any]:
            decoded = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
            found = [texts.get(row, text) for row, text in zip(some, decoded, strict=True)]
            chats = [is_conversational(rows[i].text) for i in some]
            return [
                [{"role": "assistant", "content": text}] if chat else text
                for chat, text in zip(chats, found, strict=True)
            ]

        groups = [list(group) for _, group in groupby(range(len(rows)), prompt_of.__getitem__)]
        if not self.overlap_rewards:
            groups = [list(chain(*groups))]
        names = dict.fromkeys(name for row in rows for name in row.columns)
        return self.rewards.begin(
            [row.text for row in rows],
            {name: [row.columns.get(name) for row in rows] for name in names},
            groups,
            decode=decode,
            trainer_state=state,
        )

    def _batch(
        self, rows: list[Prompt], rollout: Rollout, per_function: Tensor, num_generations: int
    ) -> GenerationBatch:
        truncated = torch.tensor([reason == "length" for reason in rollout.finish_reasons])
        lengths = torch.tensor([len(ids) for ids in rollout.completion_ids])
        counted = torch.where(truncated & self.mask_truncated, 0, lengths).tolist()
        reward = self.rewards.combine(per_function)
        together = gather_rows(self.accelerator, {"reward": reward, "truncated": truncated})
        scores = shape_scores(
            together["reward"].float(),
            together["truncated"],
            missing_eos_penalty=self.scores.missing_eos_penalty,
            normalize=self.scores.normalize,
            clip_range=self.scores.clip_range,
        )
        start = self.accelerator.process_index * len(rows)
        numbers = torch.arange(start, start + len(rows))
        return GenerationBatch(
            prompt_ids=[row.ids for row in rows],
            completion_ids=rollout.completion_ids,
            num_tokens=counted,
            groups=(numbers // num_generations).tolist(),
            scores=scores[start : start + len(rows)],
            rows=RolloutRows(
                row=numbers,
                length=lengths,
                truncated=truncated,
                rewards=per_function,
                reward=reward,
            ),
            num_generations=num_generations,
            whole_groups=len(rows) % num_generations == 0,
            sampler_logps=_packed(rollout.logps, counted),
            inputs=_inputs(rows),
            weights_version=rollout.weights_version,
        )

    def _num_tokens(self, rows: list[Prompt], rollout: Rollout) -> int:
        """Tokens of prompts and completions of all processes."""
        lengths = [len(row.ids) for row in rows] + [len(ids) for ids in rollout.completion_ids]
        mine = torch.tensor([sum(lengths)], device=self.accelerator.device)
        everyone = self.accelerator.gather(mine)
        assert isinstance(everyone, Tensor)
        return int(everyone.sum())

    def _mean_logged(self, mine: dict[str, list[float]]) -> dict[str, float]:
        everyone = gather_objects(self.accelerator, dict(mine))
        out = {}
        for name in sorted({name for one in everyone for name in one}):
            values = [value for one in everyone for value in one.get(name, [])]
            is_count = any(isinstance(value, Count) for value in values)
            out[name] = sum(values) / (1 if is_count else len(values))
        return out

    def _texts(
        self,
        rows: list[Prompt],
        completions: list[Any],
        rewards: Tensor,
        extra: dict[str, list[Any]],
    ) -> CompletionTexts:
        shows = self.with_images and self.shows_images and _inputs(rows) is not None
        mine = {
            "prompts": [without_images(row.text) for row in rows],
            "completions": completions,
            "images": [shown_images(row.text, row.columns) for row in rows] if shows else [],
            "rewards": rewards.tolist(),
            "extra": {name: values for name, values in extra.items() if len(values) == len(rows)},
        }
        everyone = gather_objects(self.accelerator, mine)
        per_row = [row for one in everyone for row in one["rewards"]]
        names = sorted({name for one in everyone for name in one["extra"]})
        return CompletionTexts(
            prompts=[x for one in everyone for x in one["prompts"]],
            completions=[x for one in everyone for x in one["completions"]],
            rewards={
                name: [row[i] for row in per_row] for i, name in enumerate(self.rewards.names)
            },
            extra={
                name: [
                    value
                    for one in everyone
                    for value in one["extra"].get(name, [None] * len(one["prompts"]))
                ]
                for name in names
            },
            images=[x for one in everyone for x in one["images"]] if shows else None,
        )


@dataclass
class _GivenByRewards:
    """What reward functions gave beside rewards, in one generation batch on this process."""

    extra: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    logged: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


def _inputs(rows: list[Prompt]) -> list[ImageInputs] | None:
    """What the rows' prompts bring beside their ids; None in a text run."""
    inputs = [row.inputs for row in rows if row.inputs is not None]
    return inputs if len(inputs) == len(rows) else None


def _packed(logps: list[list[float]] | None, counted: list[int]) -> Tensor | None:
    """The first counted[i] log-probs of every row i, one row after another: (N,)."""
    if logps is None:
        return None
    kept = [row[:count] for row, count in zip(logps, counted, strict=True)]
    return torch.tensor(list(chain(*kept)), dtype=torch.float32)
