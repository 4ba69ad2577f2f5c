"""Collect: dataset rows in, a scored generation batch out.

rows -> prompts -> completions (rollout) -> rewards -> scores -> groups balanced over processes
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, groupby
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerState

from ..batching.balance import balance_rows, with_sizes
from ..batching.planner import Planner
from ..data.images import shown_images
from ..data.seeds import step_seed
from ..data.tokenize import RowTokenizer, is_conversational
from ..distributed.collectives import gather_objects, gather_rows, total
from ..records import (
    CompletionTexts,
    GenerationBatch,
    Message,
    Prompt,
    Rollout,
    RolloutRows,
    Sampling,
)
from ..rewards import Rewards, Scoring
from ..rewards.functions import ENVIRONMENTS
from ..rewards.shaping import ScoreSettings
from ..rollout.ahead import Converse
from ..rollout.cycle import RolloutCycle
from ..rollout.stops import Stops
from ..rollout.trajectories import trajectory_rows
from ..tools import RunTools
from .sessions import EngineSession, Open, Session, inputs_of
from .texts import gather_texts, mean_logged
from .tool_metrics import tool_metrics


class Collected(NamedTuple):
    """What a rollout and its rewards came to."""

    batch: GenerationBatch
    num_tokens: int  # of prompts and completions, all processes
    logged: dict[str, float]  # over all processes, of what reward functions gave to log_metric
    texts: CompletionTexts | None  # None: nobody looks at them


@dataclass
class GivenByRewards:
    """What reward functions gave beside rewards, in one generation batch on this process."""

    extra: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    logged: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


class Scored(NamedTuple):
    """Completions of one process and what rewards made of them, all of its rows."""

    rows: list[Prompt]
    rollout: Rollout
    rewards: Tensor  # (R, F), NaN: not applicable
    completions: list[Any]  # as reward functions got them; none: nobody looks at them
    given: GivenByRewards

    @property
    def num_tokens(self) -> int:
        """Of prompts, and as many as were sampled."""
        return sum(len(row.ids) for row in self.rows) + sum(self.rollout.num_sampled)


class PeerFailed(RuntimeError):
    """Another process could not sample or score its prompts; the message has its error."""


class Collector:
    """Samples completions for prompts and scores them. Same on every process, on its own rows.

    `stage(name)`: a context that times what runs in it. `hidden(seconds)`: is told what of the
    rewards' time ran beside the rollout. `tokens_per_pair`: see `Layout.cost`. `with_texts`: texts
    of all processes are gathered for whoever looks at them; `with_images`: images too, where a
    tracker `shows_images`. `progress(completions)`: a context that is told the tokens of each that
    is finished. `open_session`: how completions are made; None: by the engine alone. `converse`:
    how they are made ahead of their step. `tools`: of a run with some, whose calls are counted.
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
        open_session: Open | None = None,
        converse: Converse | None = None,
        tools: RunTools | None = None,
        stage: Callable[[str], AbstractContextManager[None]],
        hidden: Callable[[float], None],
        progress: Callable[[int], AbstractContextManager[Callable[[int], None]]],
    ):
        self.rollouts, self.tokenize, self.rewards = rollouts, tokenize, rewards
        self.tokenizer, self.seen = tokenize.tokenizer, tokenize.seen
        self.sampling, self.planner, self.accelerator = sampling, planner, accelerator
        self.scores, self.mask_truncated = scores, mask_truncated
        self.overlap_rewards = overlap_rewards
        self.with_texts, self.with_images = with_texts, with_images
        self.shows_images = shows_images
        self.tokens_per_pair, self.stage, self.hidden = tokens_per_pair, stage, hidden
        self.progress, self.tools, self.converse = progress, tools, converse
        self.stops = Stops(sampling, tokenize.tokenizer)
        self.open_session = open_session or partial(
            EngineSession.open, rollouts=rollouts, stops=self.stops
        )
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
        scored = self.sample(dataset_rows, num_generations, seed, mode, state)
        return self.collected(scored, num_generations, mode)

    def sample(
        self,
        dataset_rows: Sequence[Any],
        num_generations: int,
        seed: int,
        mode: str,
        state: TrainerState,
    ) -> Scored:
        """Completions and what the reward functions say of them."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        with self.failing_together():  # before anything that waits for the others
            prompts = self.tokenize(dataset_rows)
        rows = [prompt for prompt in prompts for _ in range(num_generations)]
        assert len(rows) % world == 0, (len(rows), world)
        size = len(rows) // world
        rows = rows[rank * size : (rank + 1) * size]
        # (prompt, sample), so that a draw does not depend on the number of processes
        places = [divmod(rank * size + i, num_generations) for i in range(size)]
        seeds = [step_seed(seed, *place) for place in places]
        given = GivenByRewards()
        groups = [prompt for prompt, _ in places]
        with ExitStack() as sessions:
            with self.failing_together():  # a session's processes wait for each other
                session = sessions.enter_context(self.open_session(rows, self.sampling))
            with self.failing_together():
                scoring = self.begin_rewards(
                    session.rows, groups, session.texts, state, session.environments
                )
                rollout, per_function = self._sample_and_score(session, seeds, scoring, given, mode)
        with self.failing_together():  # of its own: it may wait for all processes
            self.rollouts.sleep()
        completions = scoring.batch.completions(range(size)) if self.with_texts else []
        return Scored(session.rows, rollout, per_function, completions, given)

    def close(self) -> None:
        """End the threads of the tools. A later rollout starts new ones."""
        if self.tools is not None:
            self.tools.end()

    def collected(self, scored: Scored, num_generations: int, mode: str) -> Collected:
        """Of completions that this process is the one to train, scored."""
        batch = self.without_scores(scored, num_generations)
        return self.finished(batch, self.texts(scored), [scored], mode)

    def finished(
        self,
        batch: GenerationBatch,
        texts: CompletionTexts | None,
        scored: Sequence[Scored],
        mode: str,
    ) -> Collected:
        """`batch` with scores, its groups balanced over processes, and what there is to log of all
        that was sampled for it."""
        batch = self._with_scores(batch)
        if mode == "train":
            batch = balance_rows(
                batch,
                self.accelerator,
                layout=self.planner.layout,
                tokens_per_pair=self.tokens_per_pair,
            )
        logged = mean_logged(self.accelerator, [one.given.logged for one in scored])
        if self.tools is not None:
            every = chain.from_iterable(one.rollout.trajectories or () for one in scored)
            logged |= tool_metrics(self.accelerator, [*every], self.tools.num_left_behind)
        return Collected(
            batch=with_sizes(batch, self.planner, self.accelerator),
            num_tokens=total(self.accelerator, sum(one.num_tokens for one in scored)),
            logged=logged,
            texts=texts,
        )

    def texts(self, scored: Scored) -> CompletionTexts | None:
        """Of all processes' completions, if somebody looks at them."""
        if not self.with_texts:
            return None
        images = None
        if self.with_images and self.shows_images and inputs_of(scored.rows) is not None:
            images = [shown_images(row.text, row.columns) for row in scored.rows]
        return gather_texts(
            self.accelerator,
            self.rewards.names,
            scored.rows,
            scored.completions,
            scored.rewards,
            scored.given.extra,
            images,
        )

    def _sample_and_score(
        self,
        session: Session,
        seeds: list[int],
        scoring: Scoring,
        given: GivenByRewards,
        mode: str,
    ) -> tuple[Rollout, Tensor]:  # rewards (R, F), NaN: not applicable
        def finished(row: int, ids: list[int], num_sampled: int) -> None:
            show(num_sampled)
            if self.overlap_rewards:
                scoring.finished(row, ids)

        with scoring:
            with self.stage("rollout"), self.progress(len(seeds)) as show:
                rollout = session.sample(seeds, mode, finished)
            if self.rewards.offloaded:
                self.rollouts.sleep(give_back=False)  # its memory is the reward models' first
            with self.stage("reward"):
                per_function = end_of(scoring, rollout, given)
        self.hidden(scoring.hidden_s)
        return rollout, per_function

    @contextmanager
    def failing_together(self) -> Iterator[None]:
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

    def begin_rewards(
        self,
        rows: list[Prompt],
        prompt_of: list[int],
        texts: Mapping[int, str | list[Message]],
        state: TrainerState,
        environments: list[Any] | None = None,
    ) -> Scoring:
        """`texts`: of rows whose text is not that of their tokens, or their messages."""

        def decode(some: list[int], completion_ids: list[list[int]]) -> list[Any]:
            decoded = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
            found = [texts.get(row, text) for row, text in zip(some, decoded, strict=True)]
            chats = [is_conversational(rows[i].text) for i in some]
            return [
                [{"role": "assistant", "content": text}] if chat and isinstance(text, str) else text
                for chat, text in zip(chats, found, strict=True)
            ]

        groups = [list(group) for _, group in groupby(range(len(rows)), prompt_of.__getitem__)]
        if not self.overlap_rewards:
            groups = [list(chain(*groups))]
        names = dict.fromkeys(name for row in rows for name in row.columns)
        columns = {name: [row.columns.get(name) for row in rows] for name in names}
        return self.rewards.begin(
            [row.text for row in rows],
            columns if environments is None else {**columns, ENVIRONMENTS: environments},
            groups,
            decode=decode,
            trainer_state=state,
        )

    def without_scores(self, scored: Scored, num_generations: int) -> GenerationBatch:
        """This process' rows; `scores` are the rewards as they are."""
        rows, rollout = scored.rows, scored.rollout
        truncated = torch.tensor([reason == "length" for reason in rollout.finish_reasons])
        lengths = torch.tensor(rollout.num_sampled)
        counted = torch.where(truncated & self.mask_truncated, 0, lengths).tolist()
        reward = self.rewards.combine(scored.rewards)
        start = self.accelerator.process_index * len(rows)
        numbers = torch.arange(start, start + len(rows))
        groups = (numbers // num_generations).tolist()
        parts = None
        if rollout.trajectories is not None:
            with self.failing_together():  # of groups that one process has alone
                parts = trajectory_rows(
                    rollout.trajectories,
                    groups,
                    [row.ids for row in rows],
                    [count == 0 for count in counted],
                    partial(gather_objects, self.accelerator),
                )
        return GenerationBatch(
            prompt_ids=parts.prompt_ids if parts else [row.ids for row in rows],
            completion_ids=rollout.completion_ids,
            num_tokens=counted,
            groups=groups,
            scores=reward,
            rows=RolloutRows(
                row=numbers,
                length=lengths,
                truncated=truncated,
                rewards=scored.rewards,
                reward=reward,
            ),
            num_generations=num_generations,
            whole_groups=len(rows) % num_generations == 0,
            sampler_logps=_packed(rollout.logps, counted, torch.float32),
            token_versions=_packed(_versions(rollout), counted, torch.int32),
            inputs=inputs_of(rows),
            strand_ids=parts.strand_ids if parts else None,
            counted=parts.counted if parts else None,
            weights_version=self.rollouts.version(),
        )

    def _with_scores(self, batch: GenerationBatch) -> GenerationBatch:
        columns = {name: getattr(batch.rows, name) for name in ("reward", "truncated", "length")}
        scores = self.scores.scores(**gather_rows(self.accelerator, columns))
        start = self.accelerator.process_index * batch.num_rows
        return replace(batch, scores=scores[start : start + batch.num_rows])


def end_of(scoring: Scoring, rollout: Rollout, given: GivenByRewards) -> Tensor:
    """The rewards of a rollout, (R, F), once all are there; what functions gave beside them goes
    into `given`."""
    return scoring.end(
        rollout.completion_ids,
        [reason == "stop" for reason in rollout.finish_reasons],
        log_extra=lambda name, values: given.extra[name].extend(values),
        log_metric=lambda name, value: given.logged[name].append(value),
    )


def _versions(rollout: Rollout) -> list[list[int]] | None:
    """Per token; None: the engine does not say."""
    if rollout.token_versions is not None or rollout.weights_version is None:
        return rollout.token_versions
    return [[rollout.weights_version] * count for count in rollout.num_sampled]


def _packed(
    per_token: Sequence[Sequence[float]] | None, counted: list[int], dtype: torch.dtype
) -> Tensor | None:
    """The first counted[i] values of every row i, one row after another: (N,)."""
    if per_token is None:
        return None
    kept = [row[:count] for row, count in zip(per_token, counted, strict=True)]
    return torch.tensor(list(chain(*kept)), dtype=dtype)
