"""An update, taken again from its start in smaller micro-batches when memory runs out."""

from __future__ import annotations

from torch import nn

from ..models.adapters import base_causal_lm
from ..policy.attention.interface import restore
from ..records import Piece, StepResult
from .build import UpdateParts
from .update import ComputeLoss


def update_with_retries(
    pieces: list[Piece],
    wrapped: nn.Module,
    compute_loss: ComputeLoss,
    parts: UpdateParts,
) -> StepResult:
    """Run one optimizer step's forwards and backwards: gradients are left in the parameters.

    Without memory for it, the budget is halved, batches whose groups no longer fit a micro-batch
    are prepared again, and the step is planned anew. Raises RuntimeError where micro-batches cannot
    become smaller.
    """
    while True:
        plan = parts.updater.plan(pieces)
        result = parts.updater.attempt(plan, wrapped, compute_loss)
        if result is not None:
            return result
        wrapped.zero_grad(set_to_none=True)
        # a backward that failed leaves the attention switched
        restore(base_causal_lm(parts.preparer.policy.model))
        parts.runner.shrink(parts.planner.budget, pieces[0].batch.generation, plan.micro_batches)
        batches = {piece.number: piece.batch for piece in pieces}
        again = {n: parts.preparer.again_without_memory(b, wrapped) for n, b in batches.items()}
        pieces = [piece._replace(batch=again[piece.number]) for piece in pieces]
