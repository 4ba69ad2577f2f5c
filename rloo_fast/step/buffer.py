"""Completions from their rollout to their last use, and which rows each optimizer step takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from ..data.seeds import step_seed
from ..record_rows import as_plain, from_plain
from ..records import GenerationBatch, Piece, PreparedBatch


class RolloutBuffer:
    """A queue of prepared batches, consumed in micro-steps of `rows_per_micro_step` rows.

    A generation batch lasts num_iterations passes of `micro_steps_per_pass` micro-steps. Each pass
    takes the groups in a fresh order that follows from (seed, batch number, pass), groups whole.
    """

    def __init__(
        self, rows_per_micro_step: int, micro_steps_per_pass: int, num_iterations: int, seed: int
    ):
        self.rows_per_micro_step = rows_per_micro_step
        self.micro_steps_per_pass = micro_steps_per_pass
        self.num_iterations, self.seed = num_iterations, seed
        self.num_added = 0
        self.queue: deque[tuple[int, PreparedBatch]] = deque()  # (batch number, what is known)
        self.cursor = 0  # micro-steps taken from the first entry

    def add(self, batch: PreparedBatch) -> None:
        rows = self.rows_per_micro_step * self.micro_steps_per_pass
        assert batch.generation.num_rows == rows, (batch.generation.num_rows, rows)
        self.queue.append((self.num_added, batch))
        self.num_added += 1

    def replace(self, pieces: Iterable[Piece]) -> None:
        """Put the batches that a step returns, with what it computed, in place of those queued."""
        newest = {piece.number: piece.batch for piece in pieces}
        self.queue = deque((number, newest.get(number, batch)) for number, batch in self.queue)

    def mark_off_policy(self) -> None:
        """The weights have changed: whatever is still to be used was sampled by older ones."""
        self.queue = deque(
            (number, replace(batch, on_policy=False)) for number, batch in self.queue
        )

    def pending_micro_steps(self) -> int:
        """Micro-steps that wait in front of a batch added now."""
        return len(self.queue) * self.micro_steps_per_pass * self.num_iterations - self.cursor

    def ends_within(self, micro_steps: int) -> bool:
        """Whether the next `micro_steps` reach the end of a pass over a batch added now."""
        return self.pending_micro_steps() + self.micro_steps_per_pass <= micro_steps

    def take(self, micro_steps: int) -> list[Piece]:
        """The rows of the next micro-steps: a piece per generation batch and pass.

        Stops early where the queue ends (the last step of an epoch).
        """
        pieces: list[Piece] = []
        while micro_steps and self.queue:
            number, batch = self.queue[0]
            iteration, step = divmod(self.cursor, self.micro_steps_per_pass)
            count = min(micro_steps, self.micro_steps_per_pass - step)
            order = self._order(number, iteration, batch.generation)
            size = self.rows_per_micro_step
            pieces.append(Piece(batch, order[step * size : (step + count) * size], number))
            micro_steps -= count
            self.cursor += count
            if self.cursor == self.micro_steps_per_pass * self.num_iterations:
                self.queue.popleft()
                self.cursor = 0
        return pieces

    def _order(self, number: int, iteration: int, batch: GenerationBatch) -> list[int]:
        k = batch.num_generations if batch.num_rows % batch.num_generations == 0 else 1
        if self.micro_steps_per_pass == 1:
            return list(range(batch.num_rows))
        generator = torch.Generator().manual_seed(step_seed(self.seed, number, iteration))
        groups = torch.randperm(batch.num_rows // k, generator=generator).tolist()
        return [row for g in groups for row in range(g * k, (g + 1) * k)]

    def state_dict(self) -> dict[str, Any]:
        return {
            "num_added": self.num_added,
            "cursor": self.cursor,
            "queue": [(number, as_plain(batch)) for number, batch in self.queue],
            "sizes": self._sizes(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if batches were cut up differently when `state` was made."""
        sizes = self._sizes()
        if state["queue"] and state["sizes"] != sizes:
            raise ValueError(
                "the checkpoint holds completions still to be used, of a run with "
                "per_device_train_batch_size, steps_per_generation, num_iterations = "
                f"{state['sizes']}, but now they are {sizes}: resume with the same."
            )
        self.num_added, self.cursor = state["num_added"], state["cursor"]
        self.queue = deque(
            (number, from_plain(PreparedBatch, kept)) for number, kept in state["queue"]
        )

    def _sizes(self) -> list[int]:
        return [self.rows_per_micro_step, self.micro_steps_per_pass, self.num_iterations]
