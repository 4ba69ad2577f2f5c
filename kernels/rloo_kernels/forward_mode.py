"""Forward-mode differentiation: an op of torch.library would drop a tangent without a word."""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

from torch import Tensor
from torch.autograd import forward_ad


def refuse_tangents(op: str, *tensors: Tensor | None) -> None:
    """Raise NotImplementedError if a tensor carries a tangent (torch.func.jvp, jacfwd, dual)."""
    for x in tensors:
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"{op} has no forward-mode derivative (torch.func.jvp, jacfwd): use reverse mode "
                "(backward, torch.autograd.grad), or torch's own log_softmax on the logits."
            )
