"""TRL's trainers with our log-probs and entropies; written against TRL 1.16.0.

    import rloo_fast.integrations.trl as fast_trl

    fast_trl.patch()  # before or after trl is imported and trainers are built
    ...
    fast_trl.unpatch()

`RLOOTrainer`, `GRPOTrainer` and others score through `trl.trainer.utils.add_fused_lm_head`,
which calls one autograd function on hidden states and lm_head: that function is replaced by
`linear_logprob`. Trainers that score logits call the three functions of `trl.trainer.utils`: they
are replaced by `selective_log_softmax`. TRL's gathers (DeepSpeed, FSDP), masks, shifts and losses
are not touched. TRL's own code stays, with one logged line, for what ours do not make.

Log-probs and entropies are fp32 whatever the logits' dtype, as on TRL's GPU path. Under autocast
the gradient of an fp32 lm_head passes through autocast's dtype, as that of a linear layer does.
"""

from __future__ import annotations

from torch import Tensor

from ._ops import entropy, linear_logprobs, logprobs, logprobs_and_entropy
from ._patching import Patch

__all__ = ["patch", "patched", "unpatch"]

_OTHER_OUTPUTS = ("log_sum_sq_probs", "mean_logits", "is_top1")


class ChunkedLogProbFunction:
    """hidden (N, D), weight (V, D), bias (V,), targets (N,) -> TRL's five outputs, each (N,) or
    None: log-probs, entropies, log_sum_sq_probs, mean_logits, is_top1."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", *_OTHER_OUTPUTS),
    ) -> tuple[Tensor | None, ...]:
        reason = _not_ours(weight, outputs)
        if reason is not None:
            theirs = _PATCH.original("ChunkedLogProbFunction", reason)
            return theirs.apply(
                *(hidden, weight, bias, targets, temperature, chunk_size),
                *(final_logit_softcapping, logit_scale, outputs),
            )
        logps, entropies = linear_logprobs(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            return_entropy="entropy" in outputs,
        )
        return logps, entropies, None, None, None


def _not_ours(weight: Tensor, outputs: tuple[str, ...]) -> str | None:
    """Why a call stays with TRL, or None."""
    others = [name for name in _OTHER_OUTPUTS if name in outputs]
    if others:
        return f"it was asked for {', '.join(others)}"
    if hasattr(weight, "ds_id"):
        # gathered for the forward only: TRL's backward gathers it again
        return "the lm_head is partitioned by DeepSpeed ZeRO-3"
    return None


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """log softmax(logits / temperature) at index: logits (..., V), index (...) -> (...) in fp32.

    Rows where row_mask (...) is 0 give 0 and get no gradient. K ids per row, index (..., K), stay
    with TRL.
    """
    if index.ndim == logits.ndim:
        theirs = _PATCH.original("selective_log_softmax", "index has several ids per row")
        return theirs(logits, index, temperature, row_mask)
    return logprobs(logits, index, temperature=temperature, mask=row_mask)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy in nats of softmax(logits): (..., V) -> (...) in fp32. chunk_size has no effect."""
    return entropy(logits)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs at index and entropies of softmax(logits / temperature), each (...) in fp32.

    Shapes and row_mask as in selective_log_softmax; one pass over the logits.
    """
    logps, entropies = logprobs_and_entropy(logits, index, temperature=temperature, mask=row_mask)
    return logps, entropies if entropy_requires_grad else entropies.detach()


_PATCH = Patch(
    "trl",
    "1.16.0",
    {
        "trl.kernels.chunked_logprob": (ChunkedLogProbFunction,),
        "trl.trainer.utils": (
            selective_log_softmax,
            entropy_from_logits,
            selective_log_softmax_and_entropy,
        ),
    },
)
patch, unpatch, patched = _PATCH.patch, _PATCH.unpatch, _PATCH.patched
