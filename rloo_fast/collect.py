"""Prompts -> scored completions: rollout, rewards, and the one number per row that the loss
needs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerState

from .config import RLOOConfig
from .prompts import is_conversational
from .reports.metrics import Metrics, gather_rows
from .rewards import Rewards, Scoring
from .rollout.cycle import RolloutCycle
from .rollout.engine import step_seed
from .types import Prompt, Rollout, Samples, Sampling


def shape_scores(
    rewards: Tensor,
    missing_eos: Tensor,
    *,
    missing_eos_penalty: float | None = None,
    normalize: bool = False,
    clip_range: list[float] | None = None,
) -> Tensor:
    """(B,) weighted rewards of the generation batch -> scores; NaN (unscorable) stays NaN.

    In this order: minus the penalty where `missing_eos`; (r - mean) / (std + 1e-8), unbiased std
    over the scorable rows; clip to clip_range = (min, max).
    """
    if missing_eos_penalty is not None:
        rewards = rewards - missing_eos_penalty * missing_eos.to(rewards.dtype)
    if normalize:
        kept = rewards[~rewards.isnan()]
        std = kept.std() if kept.numel() > 1 else kept.new_zeros(())
        rewards = (rewards - kept.mean()) / (std + 1e-8)
    if clip_range is not None:
        rewards = rewards.clamp(*clip_range)
    return rewards


@dataclass
class TableRows:
    """What the completions table shows, of the newest generation batch of all processes."""

    prompts: list[Any] = field(default_factory=list)
    completions: list[Any] = field(default_factory=list)
    rewards: dict[str, list[float]] = field(default_factory=dict)
    advantages: list[float] = field(default_factory=list)
    extra: dict[str, list[Any]] = field(default_factory=dict)


class PeerFailed(RuntimeError):
    """Another process could not sample or score its prompts; the message has its error."""


class Collector:
    """Samples completions for prompts and scores them. Same on every process, on its own rows."""

    def __init__(
        self,
        rollouts: RolloutCycle,
        tokenizer: PreTrainedTokenizerBase,
        rewards: Rewards,
        sampling: Sampling,
        args: RLOOConfig,
        accelerator: Accelerator,
        metrics: Metrics,
    ):
        self.rollouts, self.tokenizer, self.rewards = rollouts, tokenizer, rewards
        self.sampling, self.args = sampling, args
        self.accelerator, self.metrics = accelerator, metrics
        self.table = TableRows()
        self.failed = False  # the newest rollout or its rewards, on some process
        self._extra: dict[str, list[Any]] = defaultdict(list)
        self._logged: dict[str, list[float]] = defaultdict(list)

    def __call__(
        self, prompts: list[Prompt], num_generations: int, seed: int, mode: str, state: TrainerState
    ) -> Samples:
        """The K completions of each prompt, scored; this process' share of the rows.

        `prompts` are those of all processes, `seed` is the same on all. Functions score a prompt
        as soon as this process has all its completions of it; without overlap_rewards, all prompts
        at the end. Metrics of the rollout and the rewards wait in `samples.stats`, per row, until
        the KL is known.
        """
        rows = [prompt for prompt in prompts for _ in range(num_generations)]
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        assert len(rows) % world == 0, (len(rows), world)
        size = len(rows) // world
        rows = rows[rank * size : (rank + 1) * size]
        # (prompt, sample), so that a draw does not depend on the number of processes
        places = [divmod(rank * size + i, num_generations) for i in range(size)]
        scoring = self._begin_rewards(rows, [prompt for prompt, _ in places], state)
        seeds = [step_seed(seed, *place) for place in places]
        with self._failing_together():
            rollout, per_function = self._sample_and_score(rows, seeds, scoring, mode)
        for name, total, count in self._gather_logged():
            self.metrics.add(mode, {name: total / count})
        completions = scoring.batch.completions(range(size))
        return self._samples(rows, rollout, per_function, num_generations, completions)

    def _sample_and_score(
        self, rows: list[Prompt], seeds: list[int], scoring: Scoring, mode: str
    ) -> tuple[Rollout, Tensor]:  # rewards (R, F), NaN: not applicable
        device = self.accelerator.device
        self._extra.clear()
        self._logged.clear()
        with scoring:
            with self.metrics.stage("rollout", device):
                rollout = self.rollouts.generate(
                    [row.ids for row in rows],
                    self.sampling,
                    seeds,
                    scoring.finished if self.args.overlap_rewards else None,
                    mode=mode,
                )
            if self.rewards.offloaded:
                self.rollouts.sleep(give_back=False)  # its memory is the reward models' first
            with self.metrics.stage("reward", device):
                per_function = scoring.end(
                    rollout.completion_ids,
                    log_extra=lambda name, values: self._extra[name].extend(values),
                    log_metric=lambda name, value: self._logged[name].append(value),
                )
        self.metrics.stages["reward_hidden"] += scoring.hidden_s
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
        everyone = _gather_objects(self.accelerator, text)
        self.failed = any(other is not None for other in everyone)
        if failure is not None:
            raise failure
        for rank, other in enumerate(everyone):
            if other is not None:
                raise PeerFailed(f"process {rank} failed: {other}")

    def _begin_rewards(
        self, rows: list[Prompt], prompt_of: list[int], state: TrainerState
    ) -> Scoring:
        def decode(some: list[int], completion_ids: list[list[int]]) -> list[Any]:
            texts = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
            chats = [is_conversational(rows[i].text) for i in some]
            return [
                [{"role": "assistant", "content": text}] if chat else text
                for chat, text in zip(chats, texts, strict=True)
            ]

        groups = [list(group) for _, group in groupby(range(len(rows)), prompt_of.__getitem__)]
        if not self.args.overlap_rewards:
            groups = [list(chain(*groups))]
        return self.rewards.begin(
            [row.text for row in rows],
            {name: [row.columns.get(name) for row in rows] for name in rows[0].columns},
            groups,
            decode=decode,
            trainer_state=state,
        )

    def _gather_logged(self) -> list[tuple[str, float, int]]:
        """(name, sum, count) over all processes of what reward functions gave to log_metric."""
        logged = {name: (sum(v), len(v)) for name, v in self._logged.items()}
        out = []
        everyone = _gather_objects(self.accelerator, logged)
        for name in sorted({name for one in everyone for name in one}):
            pairs = [one.get(name, (0.0, 0)) for one in everyone]
            out.append((name, sum(p[0] for p in pairs), sum(p[1] for p in pairs)))
        return out

    def _samples(
        self,
        rows: list[Prompt],
        rollout: Rollout,
        per_function: Tensor,
        num_generations: int,
        completions: list[Any],
    ) -> Samples:
        args = self.args
        truncated = torch.tensor([reason == "length" for reason in rollout.finish_reasons])
        lengths = torch.tensor([len(ids) for ids in rollout.completion_ids])
        counted = torch.where(truncated & args.mask_truncated_completions, 0, lengths)
        eos: Any = self.tokenizer.eos_token_id
        num_eos = torch.tensor([ids.count(eos) for ids in rollout.completion_ids])
        reward = self.rewards.combine(per_function)
        together = gather_rows(self.accelerator, {"reward": reward, "num_eos": num_eos})
        scores = shape_scores(
            together["reward"].float(),
            together["num_eos"] == 0,
            missing_eos_penalty=args.missing_eos_penalty,
            normalize=args.normalize_rewards,
            clip_range=args.reward_clip_range,
        )
        start = self.accelerator.process_index * len(rows)
        numbers = torch.arange(start, start + len(rows))
        samples = Samples(
            prompt_ids=[row.ids for row in rows],
            completion_ids=rollout.completion_ids,
            cu_seqlens=torch.cat([counted.new_zeros(1), counted.cumsum(0)]),
            scores=scores[start : start + len(rows)],
            num_generations=num_generations,
            groups=(numbers // num_generations).tolist(),
            whole_groups=len(rows) % num_generations == 0,
            sampler_logps=_packed(rollout.logps, counted),
        )
        samples.stats = {
            "row": numbers,
            "length": lengths,
            "tokens": counted,
            "truncated": truncated,
            "num_eos": num_eos,
            "reward": reward,
            "score": samples.scores,
            **{f"reward_{i}": per_function[:, i] for i in range(per_function.shape[1])},
        }
        if args.log_completions or args.log_completions_csv or args.num_sample_generations:
            self._fill_table(rows, completions, per_function)  # every process' texts travel
        return samples

    def _fill_table(self, rows: list[Prompt], completions: list[Any], rewards: Tensor) -> None:
        mine = {
            "prompts": [row.text for row in rows],
            "completions": completions,
            "rewards": rewards.tolist(),
            "extra": {k: v for k, v in self._extra.items() if len(v) == len(rows)},
        }
        everyone = _gather_objects(self.accelerator, mine)
        per_row = [row for one in everyone for row in one["rewards"]]
        names = sorted({name for one in everyone for name in one["extra"]})
        self.table = TableRows(
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
        )


def _packed(logps: list[list[float]] | None, counted: Tensor) -> Tensor | None:
    """The first counted[i] log-probs of every row i, one row after another: (N,)."""
    if logps is None:
        return None
    kept = [row[:count] for row, count in zip(logps, counted.tolist(), strict=True)]
    assert [len(row) for row in kept] == counted.tolist(), "log-probs are missing"
    return torch.tensor(list(chain(*kept)), dtype=torch.float32)


def _gather_objects(accelerator: Accelerator, mine: Any) -> list[Any]:
    """One Python object per process, in rank order."""
    if accelerator.num_processes == 1:
        return [mine]
    from accelerate.utils import gather_object

    return gather_object([mine])
