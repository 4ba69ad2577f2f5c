"""verl's workers with our log-probs and entropies; written against verl 0.9.1.

    import rloo_fast.integrations.verl as fast_verl

    fast_verl.patch()  # before the engine is built: it keeps the entropy function it finds

Replaced: on logits `logprobs_from_logits`, `entropy_from_logits` and
`entropy_from_logits_with_chunking` of `verl.utils.torch_functional`; on hidden states, with
`use_fused_kernels=True`, what the "torch" backend (`FusedLinearForPPOFunction`) and the "triton"
backend (`linear_cross_entropy`) call, the latter with a vocabulary split over processes (Megatron)
too. The "liger" backend, and what verl makes of a split vocabulary's logits (`vocab_parallel_*`),
stay verl's. Results are fp32 whatever the dtype of the inputs.

verl trains in Ray workers: name the function as their setup hook (see docs/integrations.md).
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from ._ops import IGNORED, entropy, linear_logprobs, logprobs
from ._patching import Patch

__all__ = ["patch", "patched", "unpatch"]


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """log softmax(logits) at labels: logits (..., V), labels (...) -> (...) in fp32.

    A label of -100 gives 0 and no gradient. `inplace_backward` overwrites the logits with their
    gradient, as verl does where it scores with flash-attn.
    """
    return logprobs(logits, labels, mask=labels != IGNORED, inplace_backward=inplace_backward)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits): (..., V) -> (...) in fp32, differentiable."""
    return entropy(logits)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """entropy_from_logits; chunk_size has no effect."""
    return entropy(logits)


class FusedLinearForPPOFunction:
    """hidden_states (..., D), vocab_weights (V, D), input_ids (...) -> log-probs and entropies
    (...) of softmax(h W^T / temperature)."""

    @staticmethod
    def apply(
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float = 1.0,
        chunk_size: int = 512,
    ) -> tuple[Tensor, Tensor]:
        logps, entropies = _score(hidden_states, vocab_weights, input_ids, temperature)
        return logps.view(input_ids.shape), entropies.view(input_ids.shape)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """hidden (..., D), weight (V, D), labels (...) -> log-probs and entropies of
    softmax(h W^T / temperature), each flat: (N,).

    With a group, weight (V / R, D) is this rank's part, as Megatron cuts it. The gradient of hidden
    is then, as verl's, this rank's part of a sum, which the backward of Megatron's gathering of
    sequence-parallel hidden states makes.
    """
    if reduction.lower() != "none":
        theirs = _PATCH.original("linear_cross_entropy", f"reduction is {reduction!r}")
        return theirs(hidden, weight, labels, temperature, reduction, dist_process_group)
    split = {}
    if dist_process_group is not None:
        split = {
            "group": dist_process_group,
            "vocab_offset": dist.get_rank(dist_process_group) * weight.shape[0],
            "sum_hidden_grad": False,
        }
    return _score(hidden, weight, labels, temperature, **split)


def _score(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, **split: Any
) -> tuple[Tensor, Tensor]:
    rows, ids = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    logps, entropies = linear_logprobs(rows, weight, ids, temperature=temperature, **split)
    assert entropies is not None
    return logps, entropies


_PATCH = Patch(
    "verl",
    "0.9.1",
    {
        "verl.utils.torch_functional": (
            logprobs_from_logits,
            entropy_from_logits,
            entropy_from_logits_with_chunking,
        ),
        "verl.utils.experimental.torch_functional": (FusedLinearForPPOFunction,),
        "verl.utils.kernel.linear_cross_entropy": (linear_cross_entropy,),
    },
)
patch, unpatch, patched = _PATCH.patch, _PATCH.unpatch, _PATCH.patched
