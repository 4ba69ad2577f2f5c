"""Attention over segments that share prefixes, in two FlashAttention varlen calls and no copies.

    own      every segment against itself, causally: T queries, T keys
    shared   every run of neighbours with one prefix against that prefix, all of it: no mask

The softmax of a query over both sets of keys is made of the softmaxes (o1, lse1) and (o2, lse2)
over each:

    lse = log(e^lse1 + e^lse2)      out = e^(lse1 - lse) o1 + e^(lse2 - lse) o2

Backward, with S the scores, P = e^(S - lse) the probabilities over all keys:

    D_i = sum_j P_ij dP_ij = dO_i . O_i      dP = dO V^T      dS = P (dP - D)
    dQ = scale dS K      dK = scale dS^T Q      dV = P^T dO

P_ij and dS_ij of a key j need lse_i and D_i of *all* keys and nothing else of the other ones. A
FlashAttention backward makes P from the lse and D from the output that it is given: given the
merged ones, its dK and dV of a part are exact, and dQ is the sum of both parts'.

cu_seqlens can only cut consecutive rows, so `shared` has two empty sequences before each run: the
queries before it, without keys, and the keys between the prefixes, without queries. FlashAttention
gives queries without keys an output of 0 with lse = inf, and gradients of 0 on both sides.

Letters: T tokens, H query heads, Hkv key heads, d head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...records import Segments


class _Call(NamedTuple):
    """One varlen call: where its sequences begin, and a bound on their lengths."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, call: _Call, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(out (T, H, d), lse (H, T) in fp32) of torch's FlashAttention."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *call, 0.0, causal, False, scale=scale
    )
    return out, lse


def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    call: _Call,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), in the inputs' dtype."""
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, *call, 0.0, causal, state, q.new_empty(0), scale=scale
    )


def shared_prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float
) -> Tensor:
    """q (T, H, d), k and v (T, Hkv, d) -> (T, H, d); `segments.shared` is given."""
    shared = segments.shared
    assert shared is not None
    out = SharedPrefix.apply(
        q, k, v, segments.cu_q, segments.max_q, shared.cu_q, shared.cu_k, shared.max_q,
        shared.max_k, scale,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


class SharedPrefix(torch.autograd.Function):
    """The two calls and their merge."""

    @staticmethod
    def forward(ctx, q, k, v, own, max_own, cu_q, cu_k, max_q, max_k, scale):
        ctx.options = max_own, max_q, max_k, scale
        parts = _calls(own, cu_q, cu_k, max_own, max_q, max_k)
        (out, lse), (shared_out, shared_lse) = (
            flash_forward(q, k, v, call, causal, scale) for call, causal in parts
        )
        shared_lse = torch.where(shared_lse == torch.inf, -torch.inf, shared_lse)  # no keys
        share = torch.sigmoid(shared_lse - lse).T.unsqueeze(-1)  # e^(lse2 - lse), fp32
        # in place: products and sums are made in fp32, and no fp32 copy of an output is held
        out.mul_(1 - share).addcmul_(shared_out, share)
        lse = torch.logaddexp(lse, shared_lse)
        ctx.save_for_backward(q, k, v, out, lse, own, cu_q, cu_k)
        return out

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse, own, cu_q, cu_k = ctx.saved_tensors
        max_own, max_q, max_k, scale = ctx.options
        grad = grad.contiguous()
        first, second = (
            flash_backward(grad, q, k, v, out, lse, call, causal, scale)
            for call, causal in _calls(own, cu_q, cu_k, max_own, max_q, max_k)
        )
        return (*(a.add_(b) for a, b in zip(first, second, strict=True)), *(None,) * 7)


def _calls(
    own: Tensor, cu_q: Tensor, cu_k: Tensor, max_own: int, max_q: int, max_k: int
) -> tuple[tuple[_Call, bool], tuple[_Call, bool]]:
    """Both calls, and whether they are causal."""
    return (_Call(own, own, max_own, max_own), True), (_Call(cu_q, cu_k, max_q, max_k), False)
