"""Generation batches whose completions are sampled while earlier ones are trained.

Step s trains batch s: the same prompts, with the same seeds, as without. When it begins, the
weights go to the engine, the prompts of batch s + max_staleness are asked for, and the trainer
waits for what is still missing of batch s; then it trains, and the engine goes on.

Prompts are drawn, tokenised and entered into the ledger on every process alike. The main one has
them sampled and scored, and gives the others their share. All take part in a weight update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import TrainerState

from ..config.rloo_config import RLOOConfig
from ..data.ledger import Fate
from ..data.row_errors import UnreadableRow
from ..data.row_functions import Row
from ..data.seeds import step_seed
from ..data.stream import PromptStream
from ..distributed.collectives import gather_objects
from ..records import Prompt, Rollout
from ..rollout.ahead import Flight, Sampled, SharedCycle, make_workers
from ..rollout.ahead import flight as in_flight
from ..rollout.settings import MOST_SEQUENCES
from .collect import Collected, Collector, GivenByRewards, Scored
from .pending import Pending
from .source import check_kind, check_sizes, sizes_of

Found = list[list[Sampled | None]]  # completions of each group, None: not there


class AheadSettings(NamedTuple):
    """How far ahead, and how much at a time; completions are counted."""

    max_staleness: int
    max_inflight: int
    queue_maxsize: int
    weight_sync_steps: int
    prompts_per_batch: int
    num_generations: int
    seed: int

    @classmethod
    def from_config(cls, args: RLOOConfig) -> AheadSettings:
        rows = int(args.generation_batch_size or 0) * (args.max_staleness + 1)
        inflight = max(min(rows, MOST_SEQUENCES), args.num_generations)
        return cls(
            max_staleness=args.max_staleness,
            max_inflight=inflight if args.max_inflight_tasks == -1 else args.max_inflight_tasks,
            queue_maxsize=rows if args.queue_maxsize == -1 else args.queue_maxsize,
            weight_sync_steps=args.weight_sync_steps,
            prompts_per_batch=args.prompts_per_generation,
            num_generations=args.num_generations,
            seed=args.seed,
        )


@dataclass
class _Drawn:
    """The prompts of a batch, by their numbers in the stream. `prompts`: None after a resume, or
    what a prompt raised, which is raised once its step has come. `found`: of a checkpoint."""

    numbers: list[int]
    prompts: list[Prompt] | Exception | None = None
    found: Found | None = None


class AheadSource:
    """A BatchSource that samples up to `max_staleness` batches ahead. With 0 it gives what
    LoaderSource gives, bit for bit."""

    kind = "ahead"

    def __init__(self, collector: Collector, stream: PromptStream, settings: AheadSettings):
        cycle = collector.rollouts
        assert isinstance(cycle, SharedCycle)
        self.collector, self.stream, self.cycle = collector, stream, cycle
        self.settings = settings
        self.number = 0  # of the next batch
        self._drawn: dict[int, _Drawn] = {}  # by number of the batch, from the next one on
        # of the main process, while there is something to sample
        self._flight: Flight | None = None
        self._pending: dict[int, Pending] = {}
        self._workers = make_workers(cycle)
        self._is_main = collector.accelerator.is_main_process

    def next(self, rows: list[Row], seed: int, state: TrainerState) -> Collected:
        number, collector = self.number, self.collector
        assert seed == step_seed(self.settings.seed, number), number
        with collector.failing_together():
            self._draw(number, state)
        scored, num_again = None, 0
        with collector.failing_together(), collector.stage("rollout"):
            self._synchronize()
            if self._is_main:
                self._submit(state)
                scored, num_again = self._scored(number)
        collected = collector.collected(self._share(scored), self.settings.num_generations, "train")
        self.stream.mark(self._drawn.pop(number).numbers, Fate.TRAINED)
        self.number += 1
        counts = self._counts() | {"sampled_again": num_again}
        logged = {f"async/{name}": float(value) for name, value in counts.items()}
        return collected._replace(logged=collected.logged | logged)

    # Prompts

    def _draw(self, number: int, state: TrainerState) -> None:
        """Prompts of every batch that may be sampled now. Raises what one of this batch raised."""
        steps_left = max(state.max_steps - state.global_step, 1)
        for ahead in range(min(self.settings.max_staleness + 1, steps_left)):
            if number + ahead not in self._drawn:
                before = self.stream.state_dict()
                numbered = self.stream.take(self.settings.prompts_per_batch)
                if ahead and isinstance(numbered[-1].row, UnreadableRow):
                    # a stream may have ended with it: it is read again, until its step has come
                    self.stream.load_state_dict(before)
                    break
                drawn = _Drawn([one.number for one in numbered])
                self._drawn[number + ahead] = drawn
                drawn.prompts = self._tokenized([one.row for one in numbered])
        for drawn in self._drawn.values():
            if drawn.prompts is None:
                drawn.prompts = self._tokenized([r.row for r in self.stream.again(drawn.numbers)])
        failure = self._drawn[number].prompts
        if isinstance(failure, Exception):
            raise failure

    def _tokenized(self, rows: Sequence[Any]) -> list[Prompt] | Exception:
        try:
            return self.collector.tokenize(rows)
        except Exception as error:  # of a row that its own step is to say
            return error

    # Sampling

    def _synchronize(self) -> None:
        """The policy's weights into the engine, where that is due; every process calls."""
        version, engine = self.cycle.version(), self.cycle.engine
        self._advance()
        if engine.version is None or version - engine.version >= self.settings.weight_sync_steps:
            self.cycle.synchronize()
            self._advance()

    def _advance(self) -> None:
        version, held = self.cycle.version(), self.cycle.engine.version
        if self._flight is not None and held is not None:
            self._flight.advance(self.number, version, held)

    def _submit(self, state: TrainerState) -> None:
        settings = self.settings
        if self._flight is None:
            self._flight = Flight(
                max_staleness=settings.max_staleness,
                max_inflight=settings.max_inflight,
                queue_maxsize=settings.queue_maxsize,
            )
            self._advance()
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

    def _counts(self) -> dict[str, int]:
        return self._flight.counts() if self._flight is not None else {}

    # Sharing

    def _share(self, scored: Scored | None) -> Scored:
        """This process' part of what the main one has."""
        accelerator = self.collector.accelerator
        if accelerator.num_processes == 1:
            assert scored is not None
            return scored
        whole = gather_objects(accelerator, scored)[0]
        assert whole is not None
        size = len(whole.rows) // accelerator.num_processes
        start = accelerator.process_index * size
        mine = slice(start, start + size)
        extra = {n: v[mine] for n, v in whole.given.extra.items() if len(v) == len(whole.rows)}
        return Scored(
            whole.rows[mine],
            _rows_of(whole.rollout, mine),
            whole.rewards[mine],
            whole.completions[mine],
            GivenByRewards(extra, whole.given.logged if self._is_main else {}),
        )

    # State

    def state_dict(self) -> dict[str, Any]:
        """With the completions that are there: what is in flight is sampled again in a resumed
        run, from the same prompts and seeds."""
        found = self._found()
        for number, drawn in self._drawn.items():
            for prompt, rows in zip(drawn.numbers, found[number] or [], strict=bool(found[number])):
                self.stream.mark([prompt], Fate.IN_FLIGHT if None in rows else Fate.QUEUED)
        return {
            "kind": self.kind,
            "sizes": self._sizes(),
            "number": self.number,
            "version": self.cycle.version(),
            "stream": self.stream.state_dict(),
            "batches": [
                {"number": number, "prompts": drawn.numbers, "found": _plain(found[number])}
                for number, drawn in sorted(self._drawn.items())
            ],
        }

    def _found(self) -> dict[int, Found | None]:
        """By batch: the completions that are there of each group; None: no group has begun."""
        found: dict[int, Found | None] = {n: drawn.found for n, drawn in self._drawn.items()}
        if self._flight is not None:
            for group, rows in self._flight.known():
                begun = found.get(group.batch)
                found[group.batch] = [*(begun or []), rows]
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_kind(state, self.kind)
        if state["batches"]:
            check_sizes(state["sizes"], self._sizes())
        self.close()
        self.stream.load_state_dict(state["stream"])
        self.number = state["number"]
        shift = self.cycle.version() - state["version"]  # of the same weights
        self._drawn = {
            batch["number"]: _Drawn(batch["prompts"], None, _from_plain(batch["found"], shift))
            for batch in state["batches"]
        }

    def _sizes(self) -> dict[str, int]:
        settings = self.settings
        return sizes_of(settings.prompts_per_batch, settings.num_generations)

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


def _rows_of(rollout: Rollout, rows: slice) -> Rollout:
    return Rollout(
        rollout.completion_ids[rows],
        rollout.finish_reasons[rows],
        rollout.logps and rollout.logps[rows],
        weights_version=rollout.weights_version,
        token_versions=rollout.token_versions and rollout.token_versions[rows],
    )


def _plain(found: Found | None) -> list[list[Any]] | None:
    """As lists and numbers, which torch.load(weights_only=True) reads."""
    if found is None:
        return None
    return [[None if row is None else list(row) for row in rows] for rows in found]


def _from_plain(found: Any, shift: int) -> Found | None:
    """The inverse; `shift` is added to the versions of weights."""
    if found is None:
        return None
    return [
        [
            None if row is None else Sampled(*row[:3], versions=[v + shift for v in row[3]])
            for row in rows
        ]
        for rows in found
    ]
