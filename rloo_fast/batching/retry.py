"""Micro-batches run one after another, equally many on every process; what to do without memory."""

# accelerate has no stubs
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from ..distributed.collectives import any_process, gather_tensor
from ..records import GenerationBatch, MicroBatchPlan
from .budget import TokenBudget

logger = logging.getLogger(__name__)


def equal_numbers(
    plans: list[MicroBatchPlan], filler: MicroBatchPlan, accelerator: Accelerator
) -> list[MicroBatchPlan]:
    """As many as on the process with most, at least one: collectives need it. The fillers come
    first, so that gradients are reduced while a real micro-batch is running."""
    most = gather_tensor(accelerator, torch.tensor([max(len(plans), 1)]))
    return [filler] * (int(most.max()) - len(plans)) + plans


class MicroBatchRunner:
    """Runs micro-batches so that all processes end together, also where one runs out of memory.

    `can_retry`: what failed on one process can be taken again by all (see TrainingEngine).
    """

    def __init__(self, accelerator: Accelerator, *, can_retry: bool):
        self.accelerator, self.can_retry = accelerator, can_retry

    def run(
        self,
        plans: Sequence[MicroBatchPlan],
        run_one: Callable[[MicroBatchPlan, bool], None],
        *,
        last_synchronises: bool,
    ) -> bool:
        """run_one(plan, is last) for every plan; False if a process ran out of memory.

        Then nothing is left of it but what run_one has changed. A process that ran out goes on with
        fillers, so that the others, who learn of it at the end, do not wait for it. Gradients are
        reduced in the last one with `last_synchronises`: what fails in it, with several
        processes, cannot be taken back; nothing can be without `can_retry`.
        """
        several = self.accelerator.num_processes > 1
        failed = False
        for i, plan in enumerate(plans):
            last = i == len(plans) - 1
            bound = several and last and last_synchronises
            if bound and self.can_retry and any_process(self.accelerator, failed):
                return False
            try:
                run_one(replace(plan, units=[]) if failed else plan, last)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if bound or (several and not self.can_retry):
                    error.add_note(_advice(plan.budget))
                    raise
                failed = True
            if failed and not several:
                break
        if several and self.can_retry and not last_synchronises:
            failed = any_process(self.accelerator, failed)
        return not failed

    def shrink(
        self, budget: TokenBudget, batch: GenerationBatch, plans: Sequence[MicroBatchPlan]
    ) -> None:
        """Halve the budget; raises RuntimeError where each micro-batch is one completion."""
        clear_device_cache(garbage_collection=True)
        if not any_process(self.accelerator, any(plan.num_rows > 1 for plan in plans)):
            raise RuntimeError(
                "out of memory with a single completion in a micro-batch: set "
                "gradient_checkpointing=True, lower max_completion_length, or use a smaller model."
            )
        before = budget.of(batch)
        budget.halve()
        after = budget.of(batch)
        logger.warning(
            "Out of memory: a micro-batch now holds %d tokens at most in place of %d, and the step "
            "is tried again from its start. max_tokens_per_micro_batch=%d would start there.",
            *(after, before, after),
        )


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, Exception) and should_reduce_batch_size(error)
    )


def _advice(budget: int) -> str:
    return (
        "Other processes are waiting for this one, so the step cannot be taken again in smaller "
        f"micro-batches: set max_tokens_per_micro_batch={max(budget // 2, 1)}, and resume from the "
        "newest checkpoint."
    )
