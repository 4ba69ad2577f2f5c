"""The loss of completions from their logits: `selective_log_softmax`, then `rloo_objective`."""

# pyright: strict

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..logprob.selective_log_softmax import selective_log_softmax
from .rloo_objective import rloo_objective
from .types import Objective


def rloo_loss(
    logits: Tensor,
    token_ids: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    inplace_backward: bool = False,
    return_entropy: bool = False,
    **loss: Any,
) -> Objective:
    """The RLOO loss from logits: three passes over them (read; read and write in backward).

    Shapes: logits (N, V) and token_ids (N,) with cu_seqlens (R + 1,), or padded (R, T, V) and
    (R, T) with mask (R, T). `loss`: the inputs and options of `rloo_objective`. Where the logits
    need not exist, `fused_linear_rloo_loss` is the op to take.

    Raises ValueError where `selective_log_softmax` and `rloo_objective` do.
    """
    found = selective_log_softmax(
        logits,
        token_ids,
        temperature=temperature,
        mask=mask,
        return_entropy=return_entropy,
        inplace_backward=inplace_backward,
    )
    logps, entropy = found if isinstance(found, tuple) else (found, None)
    objective = rloo_objective(logps, cu_seqlens, mask=mask, entropy=entropy, **loss)
    entropy = None if entropy is None else entropy.detach()
    return objective._replace(logps=logps.detach(), entropy=entropy)
