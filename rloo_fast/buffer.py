"""Completions from their rollout to their last use, and which rows each optimizer step takes."""

from __future__ import annotations

from collections import deque
from dataclasses import fields
from typing import Any

import torch

from .rollout.engine import step_seed
from .types import Samples


class RolloutBuffer:
    """A queue of generation batches, consumed in micro-steps of `rows_per_micro_step` rows.

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
        self.queue: deque[tuple[int, Samples]] = deque()  # (batch number, its rows)
        self.cursor = 0  # micro-steps taken from the first entry

    def add(self, samples: Samples) -> None:
        assert samples.num_rows == self.rows_per_micro_step * self.micro_steps_per_pass
        self.queue.append((self.num_added, samples))
        self.num_added += 1

    def mark_off_policy(self) -> None:
        """The weights have changed: whatever is still to be used was sampled by older ones."""
        for _, samples in self.queue:
            samples.on_policy = False

    def pending_micro_steps(self) -> int:
        """Micro-steps that wait in front of a batch added now."""
        return len(self.queue) * self.micro_steps_per_pass * self.num_iterations - self.cursor

    def take(self, micro_steps: int) -> list[tuple[Samples, list[int]]]:
        """The rows of the next micro-steps: one (samples, rows) per generation batch and pass.

        Stops early where the queue ends (the last step of an epoch).
        """
        pieces: list[tuple[Samples, list[int]]] = []
        while micro_steps and self.queue:
            number, samples = self.queue[0]
            iteration, step = divmod(self.cursor, self.micro_steps_per_pass)
            count = min(micro_steps, self.micro_steps_per_pass - step)
            order = self._order(number, iteration, samples)
            size = self.rows_per_micro_step
            pieces.append((samples, order[step * size : (step + count) * size]))
            micro_steps -= count
            self.cursor += count
            if self.cursor == self.micro_steps_per_pass * self.num_iterations:
                self.queue.popleft()
                self.cursor = 0
        return pieces

    def _order(self, number: int, iteration: int, samples: Samples) -> list[int]:
        k = samples.num_generations if samples.num_rows % samples.num_generations == 0 else 1
        if self.micro_steps_per_pass == 1:
            return list(range(samples.num_rows))
        generator = torch.Generator().manual_seed(step_seed(self.seed, number, iteration))
        groups = torch.randperm(samples.num_rows // k, generator=generator).tolist()
        return [row for g in groups for row in range(g * k, (g + 1) * k)]

    def state_dict(self) -> dict[str, Any]:
        queue = [
            (number, {f.name: getattr(samples, f.name) for f in fields(samples)})
            for number, samples in self.queue
        ]
        sizes = [self.rows_per_micro_step, self.micro_steps_per_pass, self.num_iterations]
        return {
            "num_added": self.num_added, "cursor": self.cursor, "queue": queue, "sizes": sizes
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if batches were cut up differently when `state` was made."""
        sizes = [self.rows_per_micro_step, self.micro_steps_per_pass, self.num_iterations]
        if state["queue"] and state["sizes"] != sizes:
            raise ValueError(
                "the checkpoint holds completions still to be used, of a run with "
                "per_device_train_batch_size, steps_per_generation, num_iterations = "
                f"{state['sizes']}, but now they are {sizes}: resume with the same."
            )
        self.num_added, self.cursor = state["num_added"], state["cursor"]
        self.queue = deque((number, Samples(**kept)) for number, kept in state["queue"])
