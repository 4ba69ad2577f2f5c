"""Generation batches of prompts that a PromptStream gives: with groups that teach nothing replaced
by further prompts (dynamic sampling, arXiv:2503.14476), and with a curriculum."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainerState

from ..data.ledger import Fate
from ..data.row_functions import Row
from ..data.seeds import step_seed
from ..data.stream import PromptStream
from .acceptance import Acceptance
from .collect import Collected, Collector, Scored
from .group_filter import GroupFilter
from .groups import Group, aged, group_from_plain, group_to_plain, has_signal, joined, split
from .rounds import Round, Rounds, Wanted
from .source import check_kind, check_sizes, sizes_of

logger = logging.getLogger(__name__)


@dataclass
class _Rounds:
    """What was sampled for one generation batch."""

    scored: list[Scored] = field(default_factory=list[Scored])
    num_prompts: int = 0
    num_with_signal: int = 0
    num_again: int = 0  # completions that were over age
    rewards: list[float] = field(default_factory=list[float])  # of all that was sampled
    # groups that were turned down: without signal; by the filter
    equal: list[Group] = field(default_factory=list[Group])
    filtered: list[Group] = field(default_factory=list[Group])


class StreamSource:
    """A BatchSource: rounds of prompts are taken until there are as many groups with signal as the
    batch takes; `max_rounds=0`: one round, and every group is taken.

    A batch takes groups in the order of their prompts, first those that earlier rounds gave too
    many of. These were sampled by older weights, of the batch before: their tokens say so
    (`token_versions`), and carry the log-probs that they were sampled with. What is over age for
    `rounds` is sampled again. If `max_rounds` are not
    enough, the batch is filled up with groups that were turned down: first the newest without
    signal, then the newest that `keep` turned down, whose rewards compare with nothing then.
    """

    def __init__(
        self,
        collector: Collector,
        rounds: Rounds,
        stream: PromptStream,
        *,
        num_generations: int,
        prompts_per_batch: int,
        max_rounds: int,
        keep: GroupFilter | None = None,
    ):
        self.collector, self.rounds, self.stream, self.keep = collector, rounds, stream, keep
        self.num_generations, self.prompts_per_batch = num_generations, prompts_per_batch
        self.max_rounds = max_rounds
        self.ready: list[Group] = []  # that wait for a batch
        self.acceptance = Acceptance()

    def next(self, rows: list[Row], seed: int, state: TrainerState) -> Collected:
        rounds, needed = _Rounds(), self.prompts_per_batch
        self.acceptance.begin_batch()
        self._drop_over_age(rounds)
        for number in range(max(self.max_rounds, 1)):
            if len(self.ready) >= needed:
                break
            # the first round's draws are those of a run without dynamic sampling
            round_seed = step_seed(seed, -number) if number else seed
            self._round(rounds, needed - len(self.ready), round_seed, state)
        # a batch that stays short is trained like a whole one
        counts = self.rounds.end_batch(max(len(self.ready), needed), self.acceptance.rate)
        chosen, self.ready = self.ready[:needed], self.ready[needed:]
        num_short = needed - len(chosen)
        chosen += self._fill(rounds, num_short)
        self._mark(rounds, chosen)
        batch, texts = joined(chosen, self.collector.accelerator)
        collected = self.collector.finished(batch, texts, rounds.scored, "train")
        logged = self._logged(rounds, num_short)
        if counts:
            counts["sampled_again"] = rounds.num_again
            logged |= {f"async/{name}": float(value) for name, value in counts.items()}
        return collected._replace(logged=collected.logged | logged)

    # Rounds

    def _round(self, rounds: _Rounds, needed: int, seed: int, state: TrainerState) -> None:
        size = self.acceptance.num_prompts(needed, at_most=self.prompts_per_batch)
        done = self.prompts_per_batch * len(rounds.scored) / max(self.max_rounds, 1)
        wanted = Wanted(size, seed, max(len(self.ready), done), self.acceptance.rate)
        taken = self.rounds.take(wanted, state)
        batch = self.collector.without_scores(taken.scored, self.num_generations)
        texts = self.collector.texts(taken.scored)
        groups = split(batch, texts, taken.numbers, self.collector.accelerator)
        num_ready = len(self.ready)
        for group, keeps in zip(groups, self._kept(groups, taken), strict=True):
            teaches = keeps and has_signal(group.batch, self.collector.scores)
            self.stream.note_signal(group.number, has_signal=teaches)
            turned_down = rounds.equal if keeps else rounds.filtered
            (self.ready if teaches or not self.max_rounds else turned_down).append(group)
            rounds.num_with_signal += teaches
            rounds.rewards += group.batch.rows.reward.tolist()
        num_accepted = len(self.ready) - num_ready
        rounds.scored.append(taken.scored)
        rounds.num_prompts += len(groups)
        rounds.num_again += taken.num_again
        self.acceptance.note(accepted=num_accepted, sampled=len(groups))

    def _drop_over_age(self, rounds: _Rounds) -> None:
        old = [group for group in self.ready if self.rounds.over_age(group.batch)]
        if old:
            self.ready = [group for group in self.ready if group not in old]
            self.rounds.again([group.number for group in old])
            rounds.num_again += len(old) * self.num_generations

    def _kept(self, groups: list[Group], taken: Round) -> list[bool]:
        if self.keep is None:
            return [True] * len(groups)
        with self.collector.failing_together():
            said = self.keep.here(groups, taken.prompts())
        return self.keep.everywhere(said)

    def _fill(self, rounds: _Rounds, num_short: int) -> list[Group]:
        """Groups that were turned down, in the order of their prompts."""
        if not num_short:
            return []
        filtered = [group.unscorable() for group in rounds.filtered]
        worst_first = [*filtered, *rounds.equal]
        found = sorted(worst_first[-num_short:], key=lambda group: group.number)
        if self.collector.accelerator.is_main_process:
            logger.warning(
                "A generation batch is trained with %d of %d groups that have signal: "
                "max_sampling_rounds=%d rounds of sampling, %d prompts, gave no more.",
                self.prompts_per_batch - num_short, self.prompts_per_batch, self.max_rounds,
                rounds.num_prompts,
            )  # fmt: skip
        return found

    def _mark(self, rounds: _Rounds, chosen: list[Group]) -> None:
        """What has become of every prompt that is not finished."""
        numbers = {group.number for group in chosen}
        turned_down = {group.number for group in (*rounds.equal, *rounds.filtered)}
        self.stream.mark(sorted(numbers), Fate.TRAINED)
        self.stream.mark(sorted(turned_down - numbers), Fate.REPLACED)
        self.stream.mark([group.number for group in self.ready], Fate.QUEUED)

    def _logged(self, rounds: _Rounds, num_short: int) -> dict[str, float]:
        rewards = torch.tensor(rounds.rewards)
        return {
            "dynamic/acceptance": rounds.num_with_signal / max(rounds.num_prompts, 1),
            "dynamic/generated_per_used": rounds.num_prompts / self.prompts_per_batch,
            "dynamic/rounds": float(len(rounds.scored)),
            "dynamic/waiting": float(len(self.ready)),
            "dynamic/without_signal": float(num_short),
            "dynamic/reward": rewards.nanmean().item(),
            "dynamic/prompt_epoch": float(self.stream.epoch),
        }

    # State

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": self.rounds.kind,
            "sizes": self._sizes(),
            **self.rounds.state_dict(),
            "ready": [group_to_plain(group) for group in self.ready],
            "acceptance": self.acceptance.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_kind(state, self.rounds.kind)
        if state["ready"] or state.get("batches"):
            check_sizes(state["sizes"], self._sizes())
        shift = self.collector.rollouts.version() - state["version"]  # of the same weights
        self.rounds.load_state_dict(state)
        groups = [group_from_plain(plain) for plain in state["ready"]]
        self.ready = [
            Group(group.number, aged(group.batch, shift), group.texts) for group in groups
        ]
        self.acceptance.load_state_dict(state["acceptance"])

    def _sizes(self) -> dict[str, int]:
        return sizes_of(self.prompts_per_batch, self.num_generations)

    def close(self) -> None:
        self.rounds.close()
        self.collector.close()
