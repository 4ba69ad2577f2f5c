"""Which rows run together: the token budget of a micro-batch, and equally many on every process."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from .layouts import Sizes, make_batch, run_lengths
from .packing import Unit, largest_group_tokens, pack
from .types import MicroBatch, Samples

logger = logging.getLogger(__name__)


@dataclass
class Step:
    """A micro-batch to be: units of `samples`, none for a filler; `piece` numbers its origin."""

    samples: Samples
    units: list[Unit]
    piece: int = 0


class Planner:
    """Rows -> micro-batches of at most a budget of tokens.

    The budget: `max_tokens`, or the tokens of `rows` padded rows as long as the longest of the
    generation batch; halved by every lack of memory. `layout` is to be set before the first plan.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        rows: int,
        max_tokens: int | None,
        pad_token_id: int,
        multiple_of: int | None = None,
        every_token: bool = False,
        few_sizes: bool = False,
        can_retry: bool = True,
    ):
        self.accelerator, self.rows, self.max_tokens = accelerator, rows, max_tokens
        self.every_token, self.few_sizes = every_token, few_sizes
        self.pad_token_id, self.multiple_of = pad_token_id, multiple_of or 1
        self.can_retry = can_retry
        self.layout = ""
        self.num_halvings = 0

    def survey(self, samples: Samples) -> None:
        """Fill in what the budget depends on, and a denominator, of the rows of all processes."""
        prompts, run = self._lengths(samples)
        longest = max(p + n for p, n in zip(prompts, run, strict=True))
        groups = [self._units_of(samples, list(range(samples.num_rows)))] * samples.whole_groups
        largest = max(
            (largest_group_tokens(units, prompts, run, self.layout) for units in groups), default=0
        )
        mine = [longest, largest, int(samples.cu_seqlens[-1])]
        sizes = torch.tensor([mine], device=self.accelerator.device)
        sizes = self.accelerator.gather(sizes)
        samples.longest, samples.largest_group, _ = sizes.max(0).values.tolist()  # pyright: ignore
        samples.tokens_per_process = sizes[:, 2].double().mean().item()  # pyright: ignore

    def budget(self, samples: Samples, rows: int | None = None) -> int:
        """Tokens of a micro-batch; `rows` in place of the number this planner was given."""
        whole = self.max_tokens or (rows or self.rows) * samples.longest
        return max(whole >> self.num_halvings, 1)

    def why_groups_are_split(self, samples: Samples) -> str | None:
        """Why not every group of the generation batch is whole in one micro-batch, or None."""
        k, budget = samples.num_generations, self.budget(samples)
        if not samples.whole_groups:
            return f"the num_generations={k} completions of a prompt are on several processes"
        if samples.largest_group <= budget:
            return None
        given = f"max_tokens_per_micro_batch={self.max_tokens}" if self.max_tokens else (
            f"per_device_train_batch_size={self.rows} rows of {samples.longest}"
        )  # fmt: skip
        halved = f", halved {self.num_halvings} times" if self.num_halvings else ""
        return (
            f"the num_generations={k} completions of a prompt take up to {samples.largest_group} "
            f"tokens, more than a micro-batch holds ({budget}: {given}{halved})"
        )

    def plan(
        self, samples: Samples, rows: list[int], *, split: bool, max_rows: int | None = None
    ) -> list[list[Unit]]:
        """Micro-batches of `rows`, those of a prompt together; `split`: as far as they fit."""
        prompts, run = self._lengths(samples)
        return pack(
            self._units_of(samples, rows),
            prompts,
            run,
            layout=self.layout,
            budget=self.budget(samples, max_rows),
            split=split,
        )

    def even(self, steps: list[Step], samples: Samples) -> list[Step]:
        """As many as on the process with most, at least one: collectives need it. The fillers come
        first, so that gradients are reduced while a real micro-batch is running."""
        count = torch.tensor([max(len(steps), 1)], device=self.accelerator.device)
        most = int(self.accelerator.gather(count).max())  # pyright: ignore
        return [Step(samples, []) for _ in range(most - len(steps))] + steps

    def batch(self, step: Step, max_rows: int | None = None) -> MicroBatch:
        samples = step.samples
        sizes = Sizes(self.budget(samples, max_rows), samples.longest) if self.few_sizes else None
        return make_batch(
            samples,
            step.units,
            self.layout,
            device=self.accelerator.device,
            pad_token_id=self.pad_token_id,
            every_token=self.every_token,
            multiple_of=self.multiple_of,
            sizes=sizes,
        )

    def _lengths(self, samples: Samples) -> tuple[list[int], list[int]]:
        return [len(ids) for ids in samples.prompt_ids], run_lengths(samples, self.every_token)

    def _units_of(self, samples: Samples, rows: list[int]) -> list[Unit]:
        groups: dict[int, Unit] = {}
        for row in rows:
            groups.setdefault(samples.groups[row], []).append(row)
        return list(groups.values())

    # Lack of memory

    def run(
        self, steps: list[Step], run_one: Callable[[Step, bool], None], *, last_synchronises: bool
    ) -> bool:
        """run_one(step, is last) for every step; False if a process ran out of memory.

        Then nothing is left of it but what run_one has changed. A process that ran out goes on with
        fillers, so that the others, who learn of it at the end, do not wait for it. Gradients are
        reduced in the last step with `last_synchronises`: what fails in it, with several
        processes, cannot be taken back; nothing can be without `can_retry`.
        """
        several = self.accelerator.num_processes > 1
        failed = False
        for i, step in enumerate(steps):
            last = i == len(steps) - 1
            bound = several and last and last_synchronises
            if bound and self.can_retry and self._any_process(failed):
                return False
            try:
                run_one(Step(step.samples, []) if failed else step, last)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if bound or (several and not self.can_retry):
                    error.add_note(self._advice(steps))
                    raise
                failed = True
            if failed and not several:
                break
        if several and self.can_retry and not last_synchronises:
            failed = self._any_process(failed)
        return not failed

    def _advice(self, steps: list[Step]) -> str:
        half = max(self.budget(steps[0].samples) // 2, 1)
        return (
            "Other processes are waiting for this one, so the step cannot be taken again in "
            f"smaller micro-batches: set max_tokens_per_micro_batch={half}, and resume from the "
            "newest checkpoint."
        )

    def shrink(self, steps: list[Step]) -> None:
        """Halve the budget; raises RuntimeError where each micro-batch is one completion."""
        clear_device_cache(garbage_collection=True)
        if self._all_processes(all(sum(len(u) for u in step.units) <= 1 for step in steps)):
            raise RuntimeError(
                "out of memory with a single completion in a micro-batch: set "
                "gradient_checkpointing=True, lower max_completion_length, or use a smaller model."
            )
        before = self.budget(steps[0].samples)
        self.num_halvings += 1
        after = self.budget(steps[0].samples)
        logger.warning(
            "Out of memory: a micro-batch now holds %d tokens at most in place of %d, and the step "
            "is tried again from its start. max_tokens_per_micro_batch=%d would start there.",
            *(after, before, after),
        )

    def _any_process(self, value: bool) -> bool:
        flag = torch.tensor([value], device=self.accelerator.device)
        return bool(self.accelerator.gather(flag).any())  # pyright: ignore

    def _all_processes(self, value: bool) -> bool:
        return not self._any_process(not value)

    def state_dict(self) -> dict[str, Any]:
        return {"num_halvings": self.num_halvings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_halvings = state["num_halvings"]


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or should_reduce_batch_size(
        error  # pyright: ignore[reportArgumentType]
    )
