"""OpenRLHF's actor with our log-probs and entropies; written against OpenRLHF 0.11.2.

    import rloo_fast.integrations.openrlhf as fast_openrlhf

    fast_openrlhf.patch()

Replaced: `log_probs_from_logits` and `compute_entropy` of `openrlhf.models.utils`, which score the
logits of the actor and the reference model. Results are fp32 whatever the logits' dtype.

OpenRLHF trains in Ray workers: name the function as their setup hook (see docs/integrations.md).
"""

from __future__ import annotations

from torch import Tensor

from ._ops import IGNORED, entropy, logprobs
from ._patching import Patch

__all__ = ["patch", "patched", "unpatch"]


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at labels: logits (..., V), labels (...) -> (...) in fp32.

    A label of -100 gives 0 and no gradient. A temperature other than 1 divides the logits in
    place, as OpenRLHF's function does: what reads them next sees the tempered policy.
    """
    if temperature != 1.0:
        logits.div_(temperature)
    return logprobs(logits, labels, mask=labels != IGNORED)


def compute_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits): (..., V) -> (...) in fp32, differentiable."""
    return entropy(logits)


_PATCH = Patch(
    "openrlhf", "0.11.2", {"openrlhf.models.utils": (log_probs_from_logits, compute_entropy)}
)
patch, unpatch, patched = _PATCH.patch, _PATCH.unpatch, _PATCH.patched
