"""Rounds of prompts that are sampled while earlier ones are trained.

Prompts are drawn, tokenised and entered into the ledger on every process alike. The main one has
them sampled and scored, and gives the others their share. All take part in a weight update.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import TrainerState

from ..config.rloo_config import RLOOConfig
from ..data.ledger import Fate
from ..data.row_errors import UnreadableRow
from ..data.seeds import step_seed
from ..data.stream import Numbered, PromptStream
from ..records import GenerationBatch, Prompt
from ..rollout.ahead import Flight, Sampled, SharedCycle, make_workers
from ..rollout.ahead import flight as in_flight
from ..rollout.settings import MOST_SEQUENCES
from .collect import Collector, Scored
from .drawn import Drawn, Found, found_from_plain, found_to_plain
from .pending import Pending
from .rounds import Round, Wanted
from .shares import share_of


class AheadSettings(NamedTuple):
    """How far ahead, and how much at a time; completions are counted. `max_rounds`: most rounds of
    a batch."""

    max_staleness: int
    max_inflight: int
    queue_maxsize: int
    weight_sync_steps: int
    prompts_per_batch: int
    num_generations: int
    seed: int
    max_rounds: int = 1

    @classmethod
    def from_config(cls, args: RLOOConfig) -> AheadSettings:
        max_rounds = args.max_sampling_rounds if args.dynamic_sampling else 1
        rows = int(args.generation_batch_size or 0) * (args.max_staleness + 1) * max_rounds
        inflight = max(min(rows, MOST_SEQUENCES), args.num_generations)
        return cls(
            max_staleness=args.max_staleness,
            max_inflight=inflight if args.max_inflight_tasks == -1 else args.max_inflight_tasks,
            queue_maxsize=rows if args.queue_maxsize == -1 else args.queue_maxsize,
            weight_sync_steps=args.weight_sync_steps,
            prompts_per_batch=args.prompts_per_generation,
            num_generations=args.num_generations,
            seed=args.seed,
            max_rounds=max_rounds,
        )


class AheadRounds:
    """Rounds of `prompts_per_batch` prompts that are sampled before they are asked for.

    Round 0 is the next one. With `w` groups that wait for a batch, batches of B groups, and a share
    a of the prompts whose groups are trained, the groups of round j are all trained after

        steps_until(j) = floor((w + a B (j + 1) - min(1, a B)) / B)

    further optimizer steps. A round starts once the engine's weights are at most `max_staleness`
    older than those that will train it by then. Where more is accepted than expected, a group may
    have to wait longer: what is over age in its step is sampled again, never trained.
    """

    kind = "ahead stream"

    def __init__(self, collector: Collector, stream: PromptStream, settings: AheadSettings):
        cycle = collector.rollouts
        assert isinstance(cycle, SharedCycle)
        self.collector, self.stream, self.cycle = collector, stream, cycle
        self.settings = settings
        self.number = 0  # of the next round
        self._again: list[int] = []  # prompts that come first in the next round that is drawn
        self._drawn: dict[int, Drawn] = {}  # by number of the round, from the next one on
        # of the main process, while there is something to sample
        self._flight: Flight | None = None
        self._pending: dict[int, Pending] = {}
        self._workers = make_workers(cycle, collector.converse)
        self._is_main = collector.accelerator.is_main_process

    def take(self, wanted: Wanted, state: TrainerState) -> Round:
        number, collector = self.number, self.collector
        waiting = wanted.num_ready, max(wanted.acceptance, 1 / self.settings.max_rounds)
        with collector.failing_together():
            self._draw(number, state, *waiting)
        scored, num_again = None, 0
        with collector.failing_together(), collector.stage("rollout"):
            self._synchronize(*waiting)
            if self._is_main:
                self._submit(state, *waiting)
                scored, num_again = self._scored(number)
        drawn = self._drawn.pop(number)
        prompts = drawn.prompts
        assert isinstance(prompts, list), prompts
        rows = [prompt for prompt in prompts for _ in range(self.settings.num_generations)]
        share = share_of(scored, rows, collector.accelerator)
        self.number += 1
        return Round(drawn.numbers, share, lambda: prompts, num_again)

    def end_batch(self, num_ready: float, acceptance: float) -> dict[str, int]:
        self._advance(num_ready, max(acceptance, 1 / self.settings.max_rounds))
        return self.counts()

    def over_age(self, group: GenerationBatch) -> bool:
        versions = group.token_versions
        oldest = self.cycle.version() - self.settings.max_staleness
        return versions is not None and bool((versions < oldest).any())

    def again(self, numbers: Sequence[int]) -> None:
        self.stream.mark(numbers, Fate.IN_FLIGHT)
        self._again += numbers

    def counts(self) -> dict[str, int]:
        """Completions of the main process' queue, for the log."""
        return self._flight.counts() if self._flight is not None else {}

    def steps_until(self, ahead: int, num_ready: float, acceptance: float) -> int:
        size = self.settings.prompts_per_batch
        accepted = acceptance * size  # of a round
        last = num_ready + accepted * (ahead + 1) - min(1.0, accepted) + 1e-9
        return max(int(last // size), 0)

    # Prompts

    def _draw(self, number: int, state: TrainerState, num_ready: float, acceptance: float) -> None:
        """Prompts of every round that may be sampled now. Raises what one of the next round
        raised."""
        most = min(self.settings.max_staleness, max(state.max_steps - state.global_step, 1) - 1)
        for ahead in itertools.count():
            if ahead and self.steps_until(ahead, num_ready, acceptance) > most:
                break
            if number + ahead not in self._drawn:
                before = self.stream.state_dict()
                numbered = self._next_prompts()
                if ahead and isinstance(numbered[-1].row, UnreadableRow):
                    # a stream may have ended with it: it is read again, until its step has come
                    self.stream.load_state_dict(before)
                    break
                del self._again[: len(numbered)]
                drawn = Drawn([one.number for one in numbered])
                self._drawn[number + ahead] = drawn
                drawn.prompts = self._tokenized([one.row for one in numbered])
        for drawn in self._drawn.values():
            if drawn.prompts is None:
                drawn.prompts = self._tokenized([r.row for r in self.stream.again(drawn.numbers)])
        failure = self._drawn[number].prompts
        if isinstance(failure, Exception):
            raise failure

    def _next_prompts(self) -> list[Numbered]:
        size = self.settings.prompts_per_batch
        first = self.stream.again(self._again[:size])
        return first + (self.stream.take(size - len(first)) if len(first) < size else [])

    def _tokenized(self, rows: Sequence[Any]) -> list[Prompt] | Exception:
        try:
            return self.collector.tokenize(rows)
        except Exception as error:  # of a row that its own step is to say
            return error

    # Sampling

    def _synchronize(self, num_ready: float, acceptance: float) -> None:
        """The policy's weights into the engine, where that is due; every process calls."""
        version, held = self.cycle.version(), self.cycle.engine.version
        self._advance(num_ready, acceptance)
        # groups of the next round that wait for a later batch need newer weights than its own
        trained_by = version + self.steps_until(0, num_ready, acceptance)
        oldest = max(
            version + 1 - self.settings.weight_sync_steps, trained_by - self.settings.max_staleness
        )
        if held is None or held < oldest:
            self.cycle.synchronize()
            self._advance(num_ready, acceptance)

    def _advance(self, num_ready: float, acceptance: float) -> None:
        version, held = self.cycle.version(), self.cycle.engine.version
        if self._flight is not None and held is not None:
            self._flight.advance(
                self.number,
                version,
                held,
                lambda ahead: self.steps_until(ahead, num_ready, acceptance),
            )

    def _submit(self, state: TrainerState, num_ready: float, acceptance: float) -> None:
        settings = self.settings
        if self._flight is None:
            self._flight = Flight(
                max_staleness=settings.max_staleness,
                max_inflight=settings.max_inflight,
                queue_maxsize=settings.queue_maxsize,
            )
            self._advance(num_ready, acceptance)
            self._workers.start(self._flight, self.collector.sampling)
        for number, drawn in sorted(self._drawn.items()):
            if number in self._pending or not isinstance(drawn.prompts, list):
                continue
            seed = step_seed(settings.seed, number)
            k = settings.num_generations
            pending = Pending(self.collector, number, drawn.prompts, k, seed, state)
            self._pending[number] = pending
            self._flight.submit(pending.groups, pending.on_sampled, drawn.found)
            drawn.found = None

    def _scored(self, number: int) -> tuple[Scored, int]:
        """The batch with its rewards; how many of its completions were sampled again."""
        flight, pending, num_again = self._flight, self._pending[number], 0
        assert flight is not None
        while True:
            found = flight.wait(number)
            old = self._over_age(pending, found)
            if not old:
                break
            num_again += len(old)
            keep: Found = [
                [None if (g, i) in old else row for i, row in enumerate(rows)]
                for g, rows in enumerate(found)
            ]
            pending.score_again(keep)
            rows = [in_flight.Row(pending.groups[g], i) for g, i in sorted(old)]
            flight.sample_again(rows, pending.on_sampled)
        scored = pending.scored(found)
        flight.take(number)
        del self._pending[number]
        return scored, num_again

    def _over_age(self, pending: Pending, found: list[list[Sampled]]) -> set[tuple[int, int]]:
        """(group, sample) of the completions with a token that no step may train any more."""
        oldest = self.cycle.version() - self.settings.max_staleness
        return {
            (g, i)
            for g, rows in enumerate(found)
            for i, row in enumerate(rows)
            if row.versions and row.versions[0] < oldest
        }

    # State

    def state_dict(self) -> dict[str, Any]:
        """With the completions that are there: what is in flight is sampled again in a resumed
        run, from the same prompts and seeds."""
        found = self._found()
        for number, drawn in self._drawn.items():
            for prompt, rows in zip(drawn.numbers, found[number] or [], strict=bool(found[number])):
                self.stream.mark([prompt], Fate.IN_FLIGHT if None in rows else Fate.QUEUED)
        return {
            "number": self.number,
            "again": list(self._again),
            "version": self.cycle.version(),
            "stream": self.stream.state_dict(),
            "batches": [
                {"number": number, "prompts": drawn.numbers, "found": found_to_plain(found[number])}
                for number, drawn in sorted(self._drawn.items())
            ],
        }

    def _found(self) -> dict[int, Found | None]:
        """By batch: the completions that are there of each group, but those whose environment is
        held, which no checkpoint can keep; None: no group has begun."""
        found: dict[int, Found | None] = {n: drawn.found for n, drawn in self._drawn.items()}
        if self._flight is not None:
            for group, known in self._flight.known():
                rows = [row if row is None or row.held is None else None for row in known]
                begun = found.get(group.batch)
                found[group.batch] = [*(begun or []), rows]
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.close()
        self.stream.load_state_dict(state["stream"])
        self.number, self._again = state["number"], list(state["again"])
        shift = self.cycle.version() - state["version"]  # of the same weights
        self._drawn = {
            batch["number"]: Drawn(batch["prompts"], None, found_from_plain(batch["found"], shift))
            for batch in state["batches"]
        }
        for drawn in self._drawn.values():
            drawn.leave_out_unfit(self.collector.tools)

    def close(self) -> None:
        """End the threads; what is drawn stays drawn, and what is there is kept for a next call."""
        if self._flight is None:
            return
        for number, found in self._found().items():
            self._drawn[number].found = found
        self._flight.close()
        self._workers.stop()
        for pending in self._pending.values():
            pending.stop()
        self._flight, self._pending = None, {}
