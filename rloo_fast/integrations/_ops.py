"""Our ops as the adapters call them."""

from __future__ import annotations

from typing import Any

import torch
from rloo_kernels import linear_logprob, selective_log_softmax
from torch import Tensor

IGNORED = -100  # the label that flash-attn's cross entropy, others' GPU path, gives 0


def logprobs(logits: Tensor, token_ids: Tensor, **options: Any) -> Tensor:
    """log softmax(logits) at token_ids: (..., V), (...) -> (...) in fp32; options of the op."""
    found: Any = selective_log_softmax(logits, token_ids, **options)
    return found


def logprobs_and_entropy(
    logits: Tensor, token_ids: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """logprobs, and the entropies (...) in nats from the same pass."""
    found: Any = selective_log_softmax(logits, token_ids, return_entropy=True, **options)
    return found


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits): (..., V) -> (...) in fp32, differentiable."""
    token_ids = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return logprobs_and_entropy(logits, token_ids)[1]


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    return_entropy: bool = True,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropies (or None) of a head's rows: (N, D), (V, D), (N,) -> (N,) in fp32.

    Computed in the dtype that a linear layer would compute in at this place: autocast's where it
    is on, else that of hidden. Gradients pass through the casts to the dtypes that came in.
    """
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    found: Any = linear_logprob(
        hidden.to(dtype),
        weight.to(dtype),
        token_ids,
        bias=None if bias is None else bias.to(dtype),
        return_entropy=return_entropy,
        **options,
    )
    return found if return_entropy else (found, None)
